"""The scheduler over torchrec's combined optimizer, with torch.optim and FBGEMM inside."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClippingOptimizer
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer

from recap_fast.config import (
    LearningRate,
    LinearRampToConstant,
    LinearRampToCosine,
    PiecewiseConstant,
)
from recap_fast.keyed import CombinedOptimizer
from recap_fast.scheduler import RecapLRShim

UNSET = 24601.0

RAMP = LearningRate(
    linear_ramp_to_constant=LinearRampToConstant(learning_rate=0.8, num_ramp_steps=4)
)
COSINE = LearningRate(
    linear_ramp_to_cosine=LinearRampToCosine(
        learning_rate=1.0, final_learning_rate=0.5, num_ramp_steps=2, final_num_steps=4
    )
)
PIECEWISE = LearningRate(
    piecewise_constant=PiecewiseConstant(
        learning_rate_boundaries=[3], learning_rate_values=[0.25, 0.125]
    )
)
CONSTANT = LearningRate(constant=0.0625)

# Worked out by hand, for steps 0 to 5.
RAMP_RATES = [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]
COSINE_RATES = [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
PIECEWISE_RATES = [0.25, 0.25, 0.25, 0.125, 0.125, 0.125]
NUM_STEPS = 6

Adam = partial(torch.optim.Adam, lr=UNSET)
SGD = partial(torch.optim.SGD, lr=UNSET)


class FakeFused(FusedOptimizer):
    """Like the optimizer of fused embeddings, with `num_groups` param groups."""

    def __init__(self, num_groups: int) -> None:
        tables = [nn.Parameter(torch.ones(2)) for _ in range(num_groups)]
        params = {f"embedding_bags.t{i}.weight": table for i, table in enumerate(tables)}
        super().__init__(params, {}, [{"params": [table], "lr": UNSET} for table in tables])

    def step(self, closure: Any = None) -> None: ...

    def zero_grad(self, set_to_none: bool = False) -> None: ...


class SyncingOptimizer(keyed.CombinedOptimizer):
    """Records the rates at every call of `sync_fused_learning_rates`."""

    def __init__(self, optims: list[keyed.KeyedOptimizer]) -> None:
        super().__init__(optims)
        self.synced: list[list[float]] = []

    def sync_fused_learning_rates(self) -> None:
        self.synced.append(rates(self))


def dense(
    name: str, factory: Callable[..., torch.optim.Optimizer] = Adam
) -> keyed.KeyedOptimizerWrapper:
    return keyed.KeyedOptimizerWrapper({f"{name}.weight": nn.Parameter(torch.ones(3))}, factory)


def combine(*parts: keyed.KeyedOptimizer) -> keyed.CombinedOptimizer:
    return keyed.CombinedOptimizer(list(parts))


def two_towers_and_tables() -> keyed.CombinedOptimizer:
    return combine(dense("liked"), dense("backbone", SGD), FakeFused(num_groups=2))


def shim_for(optimizer: keyed.CombinedOptimizer, **changes: Any) -> RecapLRShim:
    arguments = {
        "lr_dict": {"liked": RAMP, "backbone": COSINE},
        "emb_learning_rate": PIECEWISE,
        **changes,
    }
    return RecapLRShim(optimizer, **arguments)


def expected_rates(step: int) -> list[float]:
    """The rates of `two_towers_and_tables` under `shim_for`."""
    rate = [RAMP_RATES[step], COSINE_RATES[step], PIECEWISE_RATES[step], PIECEWISE_RATES[step]]
    return pytest.approx(rate, rel=1e-14)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def train_step(optimizer: keyed.CombinedOptimizer, shim: RecapLRShim) -> None:
    optimizer.step()
    shim.step()


def saved_at(step: int, **changes: Any) -> dict[str, Any]:
    """A state saved by an uninterrupted run after `step` steps, through a file."""
    optimizer = two_towers_and_tables()
    shim = shim_for(optimizer, **changes)
    for _ in range(step):
        train_step(optimizer, shim)
    file = io.BytesIO()
    torch.save(shim.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Rates


def test_every_param_group_follows_its_schedule() -> None:
    optimizer = two_towers_and_tables()
    shim = shim_for(optimizer)
    for step in range(NUM_STEPS):
        assert rates(optimizer) == expected_rates(step)
        assert shim.get_last_lr() == rates(optimizer) == shim.get_lr()
        assert shim.last_epoch == step
        train_step(optimizer, shim)


@pytest.mark.parametrize("last_epoch", [-1, 2])
def test_another_scheduler_goes_on_from_the_first_rate_of_each_group(last_epoch: int) -> None:
    """torch's begin at `initial_lr`, which must not be what groups were made with."""
    optimizer = two_towers_and_tables()
    shim_for(optimizer, last_epoch=last_epoch)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert rates(optimizer) == expected_rates(0)


def test_several_param_groups_in_a_dense_part_and_a_fused_part_between() -> None:
    weights = {"a.weight": nn.Parameter(torch.ones(1)), "b.weight": nn.Parameter(torch.ones(1))}
    two_groups = keyed.KeyedOptimizerWrapper(
        weights, lambda params: SGD([{"params": [param]} for param in params])
    )
    optimizer = combine(two_groups, FakeFused(num_groups=1), dense("c"))
    RecapLRShim(optimizer, {"a": CONSTANT, "b": PIECEWISE, "c": RAMP}, LearningRate(constant=9.0))
    assert rates(optimizer) == [0.0625, 0.25, 9.0, 0.0]


@pytest.mark.parametrize("make", [keyed.CombinedOptimizer, CombinedOptimizer])
def test_wrapped_and_nested_optimizers_are_what_they_hold(
    make: type[keyed.CombinedOptimizer],
) -> None:
    mixed = make([dense("a"), GradientClippingOptimizer(FakeFused(num_groups=1))])
    optimizer = make([("x", mixed), ("y", GradientClippingOptimizer(combine(dense("b"))))])
    RecapLRShim(optimizer, {"a": CONSTANT, "b": PIECEWISE}, LearningRate(constant=9.0))
    assert rates(optimizer) == [0.0625, 9.0, 0.25]


# Tables with their own schedules


class GroupedFused(FusedOptimizer):
    """Like the optimizer of fused embeddings, with a param group for each group of tables."""

    def __init__(self, *groups: str, prefix: str = "embedding_bags.") -> None:
        tables = [{name: nn.Parameter(torch.ones(2)) for name in group} for group in groups]
        params = {f"{prefix}{name}.weight": t for group in tables for name, t in group.items()}
        super().__init__(
            params, {}, [{"params": list(group.values()), "lr": UNSET} for group in tables]
        )

    def step(self, closure: Any = None) -> None: ...

    def zero_grad(self, set_to_none: bool = False) -> None: ...


@pytest.mark.parametrize("prefix", ["embedding_bags.", "", "x.y.embedding_bags."])
def test_tables_follow_their_own_schedules(prefix: str) -> None:
    fused = GroupedFused("ab", "c", "de", prefix=prefix)
    optimizer = combine(dense("liked"), GradientClippingOptimizer(fused))
    own = {"c": PIECEWISE, "d": RAMP, "e": RAMP, "of another process": COSINE}
    shim = RecapLRShim(optimizer, {"liked": COSINE}, CONSTANT, table_learning_rates=own)
    for step in range(NUM_STEPS):
        expected = [COSINE_RATES[step], 0.0625, PIECEWISE_RATES[step], RAMP_RATES[step]]
        assert rates(optimizer) == pytest.approx(expected, rel=1e-14)
        assert shim.get_last_lr() == rates(optimizer)
        train_step(optimizer, shim)


def test_no_common_schedule_is_needed_if_all_tables_have_their_own() -> None:
    optimizer = combine(dense("liked"), GroupedFused("ab", "c"))
    own = {"a": RAMP, "b": RAMP, "c": PIECEWISE}
    RecapLRShim(optimizer, {"liked": CONSTANT}, table_learning_rates=own)
    assert rates(optimizer) == [0.0625, 0.0, 0.25]


def test_a_schedule_may_be_given_twice() -> None:
    """A table's own, if it is that of the others, does not part them."""
    optimizer = combine(dense("liked"), GroupedFused("ab"))
    own = {"a": LearningRate.model_validate(RAMP.model_dump())}
    RecapLRShim(optimizer, {"liked": CONSTANT}, RAMP, table_learning_rates=own)
    assert rates(optimizer) == [0.0625, 0.0]


def test_the_rate_that_is_set_is_the_rate_that_trains() -> None:
    optimizer = combine(dense("liked", SGD))
    shim = RecapLRShim(optimizer, {"liked": RAMP})
    (weight,) = optimizer.params.values()
    for _ in range(NUM_STEPS):
        weight.grad = torch.ones_like(weight)
        train_step(optimizer, shim)
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1.0 - sum(RAMP_RATES)))


def test_a_tensor_rate_is_filled_in_place() -> None:
    optimizer = combine(dense("liked", partial(torch.optim.Adam, lr=torch.tensor(UNSET))))
    rate = optimizer.param_groups[0]["lr"]
    shim = RecapLRShim(optimizer, {"liked": RAMP})
    last = None
    for step in range(NUM_STEPS):
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(RAMP_RATES[step], rel=1e-7)
        (last,) = shim.get_last_lr()
        train_step(optimizer, shim)
    assert last.item() == pytest.approx(RAMP_RATES[-1], rel=1e-7)
    last.fill_(7.0)
    assert rate.item() != 7.0
    shim.load_state_dict({**shim.state_dict(), "last_epoch": 2})
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(RAMP_RATES[2], rel=1e-7)


def test_fbgemm_tables_get_the_rate() -> None:
    tables = [
        EmbeddingBagConfig(
            name=name, embedding_dim=4, num_embeddings=5, feature_names=[name], pooling=pooling
        )
        for name, pooling in (("user", PoolingType.SUM), ("genre", PoolingType.MEAN))
    ]
    collection = FusedEmbeddingBagCollection(
        tables, optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": UNSET}
    )
    optimizer = combine(dense("liked"), collection.fused_optimizer())
    shim = RecapLRShim(optimizer, {"liked": RAMP}, PIECEWISE)
    for step in range(NUM_STEPS):
        assert rates(optimizer) == pytest.approx(
            [RAMP_RATES[step], PIECEWISE_RATES[step], PIECEWISE_RATES[step]]
        )
        optimizer.step()  # hands the rate to FBGEMM
        for module in collection._emb_modules:
            assert module._emb_module.get_learning_rate() == PIECEWISE_RATES[step]
        shim.step()


def test_fused_rates_are_synced_after_every_change() -> None:
    optimizer = SyncingOptimizer([dense("liked"), FakeFused(num_groups=1)])
    shim = RecapLRShim(optimizer, {"liked": CONSTANT}, PIECEWISE)
    assert optimizer.synced == [[0.0625, 0.25]]
    train_step(optimizer, shim)
    assert optimizer.synced == [[0.0625, 0.25]] * 2
    shim.load_state_dict({**shim.state_dict(), "last_epoch": 5})
    assert optimizer.synced == [*[[0.0625, 0.25]] * 2, [0.0625, 0.125]]


# Resuming


def test_a_step_does_not_search_for_the_optimizers_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would take longer than all else for an optimizer of many groups."""
    params = {str(i): nn.Parameter(torch.ones(2)) for i in range(3)}
    parts = [
        (name, keyed.KeyedOptimizerWrapper({name: param}, partial(torch.optim.SGD, lr=1.0)))
        for name, param in params.items()
    ]
    optimizer = CombinedOptimizer(parts)
    rate = LearningRate(
        piecewise_constant=PiecewiseConstant(
            learning_rate_boundaries=[1], learning_rate_values=[0.5, 0.25]
        )
    )
    scheduler = RecapLRShim(optimizer, dict.fromkeys(params, rate))
    monkeypatch.setattr("recap_fast.keyed.walk", None)
    optimizer.zero_grad()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3


@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_resume_continues_the_schedules(step: int) -> None:
    optimizer = two_towers_and_tables()
    shim = shim_for(optimizer)
    shim.load_state_dict(saved_at(step))
    for later in range(step, NUM_STEPS):
        assert rates(optimizer) == expected_rates(later)
        assert shim.get_last_lr() == rates(optimizer)
        assert shim.last_epoch == later
        train_step(optimizer, shim)


@pytest.mark.parametrize("last_epoch", range(NUM_STEPS - 1))
def test_last_epoch_is_the_last_finished_step(last_epoch: int) -> None:
    optimizer = two_towers_and_tables()
    shim = shim_for(optimizer, last_epoch=last_epoch)
    for later in range(last_epoch + 1, NUM_STEPS):
        assert rates(optimizer) == expected_rates(later)
        assert shim.get_last_lr() == rates(optimizer)
        train_step(optimizer, shim)


def test_a_resumed_run_follows_its_own_schedules() -> None:
    state = saved_at(4)
    optimizer = two_towers_and_tables()
    shim = shim_for(optimizer, lr_dict={"liked": CONSTANT, "backbone": RAMP})
    shim.load_state_dict(state)
    assert rates(optimizer) == [0.0625, 0.8, 0.125, 0.125]


def test_the_order_of_the_groups_may_change() -> None:
    optimizer = combine(dense("backbone", SGD), dense("liked"), FakeFused(num_groups=1))
    shim = shim_for(optimizer, lr_dict={"backbone": COSINE, "liked": RAMP})
    shim.load_state_dict(saved_at(3))
    assert rates(optimizer) == pytest.approx([0.75, 0.6, 0.125])


def test_the_state_is_a_copy_and_pickles() -> None:
    shim = shim_for(two_towers_and_tables())
    state = shim.state_dict()
    assert pickle.loads(pickle.dumps(state)) == state
    state["group_names"].clear()
    assert shim.state_dict()["group_names"] == ["liked", "backbone"]


GOOD_STATE = {"last_epoch": 3, "group_names": ["liked", "backbone"], "has_embedding_rate": True}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "not the state of a learning-rate scheduler: .* no last_epoch in it, only nothing"),
        (Adam([nn.Parameter(torch.ones(1))]).state_dict(), "only state, param_groups"),
        ({**GOOD_STATE, "last_epoch": -1}, "last_epoch in the state must be .*; found -1"),
        ({**GOOD_STATE, "last_epoch": True}, "last_epoch in the state must be .*; found True"),
        ({**GOOD_STATE, "last_epoch": 3.0}, r"last_epoch in the state must be .*; found 3\.0"),
        (
            {**GOOD_STATE, "group_names": ["liked"]},
            r"1 dense group\(s\): liked; this scheduler has 2: liked, backbone",
        ),
        ({**GOOD_STATE, "group_names": ["loved", "backbone"]}, "loved, backbone; .* liked, back"),
        (
            {**GOOD_STATE, "has_embedding_rate": False},
            "has_embedding_rate is False in the state, but True here",
        ),
    ],
)
def test_a_wrong_state_changes_nothing(state: Mapping[str, Any], message: str) -> None:
    optimizer = two_towers_and_tables()
    shim = shim_for(optimizer)
    train_step(optimizer, shim)
    with pytest.raises(ValueError, match=message):
        shim.load_state_dict(state)
    assert shim.last_epoch == 1
    assert rates(optimizer) == shim.get_last_lr() == expected_rates(1)


def test_a_good_state_is_good() -> None:
    optimizer = two_towers_and_tables()
    shim_for(optimizer).load_state_dict(GOOD_STATE)
    assert rates(optimizer) == expected_rates(3)


# What construction refuses


@pytest.mark.parametrize(
    ("parts", "arguments", "error", "message"),
    [
        (
            [dense("liked"), dense("loved")],
            {"lr_dict": {"liked": RAMP}},
            ValueError,
            r"2 dense param group\(s\), but lr_dict has 1 learning rate\(s\): liked\.",
        ),
        (
            [dense("liked"), FakeFused(num_groups=1)],
            {"lr_dict": {"liked": RAMP, "loved": RAMP}, "emb_learning_rate": RAMP},
            ValueError,
            r"1 dense param group\(s\), but lr_dict has 2 learning rate\(s\): liked, loved\.",
        ),
        (
            [dense("liked")],
            {"lr_dict": {}},
            ValueError,
            r"1 dense param group\(s\), but lr_dict has 0 learning rate\(s\): none\.",
        ),
        (
            [dense("liked"), FakeFused(num_groups=2)],
            {"lr_dict": {"liked": RAMP}},
            ValueError,
            r"2 fused embedding param group\(s\) besides the 1 dense: liked\. .* emb_learning_rate",
        ),
        (
            [GradientClippingOptimizer(dense("liked"))],
            {"lr_dict": {}, "emb_learning_rate": RAMP},
            ValueError,
            r"1 dense param group\(s\), but lr_dict has 0 learning rate\(s\): none\.",
        ),
        (
            [dense("liked")],
            {"lr_dict": {"liked": RAMP}, "emb_learning_rate": RAMP},
            ValueError,
            r"emb_learning_rate is set, but all 1 param group\(s\) are dense: liked\.",
        ),
        (
            [dense("liked")],
            {"lr_dict": {"liked": 0.1}},
            TypeError,
            r"lr_dict\['liked'\] must be a recap_fast\.config\.LearningRate, .* found float",
        ),
        (
            [FakeFused(num_groups=1)],
            {"lr_dict": {}, "emb_learning_rate": 0.1},
            TypeError,
            r"emb_learning_rate must be a recap_fast\.config\.LearningRate, .* found float",
        ),
        (
            [dense("liked"), GroupedFused("ab", "cd")],
            {
                "lr_dict": {"liked": RAMP},
                "emb_learning_rate": RAMP,
                "table_learning_rates": {"a": RAMP, "d": CONSTANT},
            },
            ValueError,
            "the tables c and d share a param group of the fused optimizer, but have different",
        ),
        (
            [dense("liked"), GroupedFused("a", "bc")],
            {"lr_dict": {"liked": RAMP}, "table_learning_rates": {"a": RAMP}},
            ValueError,
            "2 fused embedding param group.* emb_learning_rate; there is no other for b, c",
        ),
        (
            [dense("liked")],
            {"lr_dict": {"liked": RAMP}, "table_learning_rates": {"a": RAMP}},
            ValueError,
            r"table_learning_rates\['a'\] is set, but all 1 param group\(s\) are dense",
        ),
        (
            [dense("liked"), GroupedFused("a")],
            {"lr_dict": {"liked": RAMP}, "table_learning_rates": {"a": 0.1}},
            TypeError,
            r"table_learning_rates\['a'\] must be a recap_fast\.config\.Learning.* found float",
        ),
        (
            [dense("liked")],
            {"lr_dict": {"liked": RAMP}, "last_epoch": -2},
            ValueError,
            "last_epoch must be -1 or greater, found -2",
        ),
    ],
)
def test_mismatches_are_refused_by_name(
    parts: list[keyed.KeyedOptimizer],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    optimizer = combine(*parts)
    with pytest.raises(error, match=message):
        RecapLRShim(optimizer, **arguments)
    for group in optimizer.param_groups:
        assert group["lr"] == UNSET
        assert "initial_lr" not in group


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torchrec.* found Adam"):
        RecapLRShim(Adam([nn.Parameter(torch.ones(1))]), {"all": RAMP})


@pytest.mark.parametrize("emb_learning_rate", [None, RAMP])
@pytest.mark.parametrize("fused", [EmptyFusedOptimizer(), combine()], ids=["empty", "of none"])
def test_a_fused_optimizer_without_tables_needs_no_rate_and_takes_one(
    fused: keyed.KeyedOptimizer, emb_learning_rate: LearningRate | None
) -> None:
    optimizer = combine(dense("liked"), fused)
    own = {"a": CONSTANT} if emb_learning_rate is not None else None
    shim = RecapLRShim(optimizer, {"liked": CONSTANT}, emb_learning_rate, table_learning_rates=own)
    assert shim.get_last_lr() == [0.0625]


# As a scheduler of torch


@pytest.mark.parametrize("last_epoch", [-1, 2])
def test_the_right_order_of_steps_is_silent(last_epoch: int) -> None:
    optimizer = two_towers_and_tables()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shim = shim_for(optimizer, last_epoch=last_epoch)
        shim.load_state_dict(GOOD_STATE)
        train_step(optimizer, shim)
        shim.load_state_dict(GOOD_STATE)
        train_step(optimizer, shim)


def test_the_wrong_order_of_steps_warns_and_works() -> None:
    optimizer = two_towers_and_tables()
    shim = shim_for(optimizer)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step\(\)"):
        shim.step()
    assert rates(optimizer) == expected_rates(1)


def test_step_with_an_epoch_moves_there() -> None:
    optimizer = two_towers_and_tables()
    shim = shim_for(optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        shim.step(4)
    assert rates(optimizer) == expected_rates(4)
    assert shim.last_epoch == 4
