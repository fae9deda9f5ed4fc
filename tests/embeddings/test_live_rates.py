"""Rates that are set by others than `RecapLRShim`, and evaluation in `inference_mode`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import keyed

from recap_fast import build_optimizer, fuse, reference
from tests.support.live_tables import (
    ALGORITHMS,
    Towers,
    assert_same,
    batch,
    fused,
    state_of,
    weights,
)
from tests.support.table_reference import table
from tests.support.tables import config_of

SGD = config_of(sgd={})
DENSE = {"sgd": {"lr": 0.1}}


def by_hand(optimizer: Any) -> Callable[[int], None]:
    def set_rates(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / (step + 1)

    return set_rates


def by_tensor(optimizer: Any) -> Callable[[int], None]:
    """A tensor that is filled in place, as torch's schedulers fill one."""
    for group in optimizer.param_groups[1:]:
        group["lr"] = torch.tensor(0.5)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    return lambda step: scheduler.step() if step else None


def by(make: Callable[[Any], Any]) -> Callable[[Any], Callable[[int], None]]:
    def begin(optimizer: Any) -> Callable[[int], None]:
        scheduler = make(optimizer)
        return lambda step: scheduler.step() if step else None

    return begin


SETTERS = {
    "by hand": by_hand,
    "tensor": by_tensor,
    "StepLR": by(lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.1)),
    "OneCycleLR": by(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, 0.5, total_steps=5, cycle_momentum=False
        )
    ),
    "LambdaLR": by(lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))),
}


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> torch.Tensor:
    """By how much the rows that a batch of ones looks up once have moved."""
    return torch.stack(
        [before[name][1, 0] - weight[1, 0] for name, weight in weights(model).items()]
    )


ONE_LOOKUP = batch(0).__class__(
    keys=["x", "y", "z", "w"],
    values=torch.tensor([1, 2, 1, 1]),
    lengths=torch.ones(4, dtype=torch.int64),
)


@pytest.mark.parametrize("begin", SETTERS.values(), ids=SETTERS)
@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
def test_tables_train_at_the_rate_that_their_group_shows(
    begin: Callable[[Any], Callable[[int], None]], build: Callable[..., Any]
) -> None:
    model = fused(SGD)
    optimizer, _ = build(model, DENSE, SGD)
    set_rates = begin(optimizer)
    shown = []
    for step in range(4):
        set_rates(step)
        before = weights(model)
        rate = float(optimizer.param_groups[-1]["lr"])
        shown.append(rate)
        model(ONE_LOOKUP).sum().backward()
        torch.testing.assert_close(moved(before, model), torch.full((3,), rate))
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(shown)) == 4


class WithTorchrecs(nn.Module):
    """One of torchrec's own fused collections, beside a dense parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = FusedEmbeddingBagCollection(
            [table("a", "x", "y"), table("b", "z"), table("c", "w")],
            torch.optim.Adagrad,
            {"lr": 0.5},
        )
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Any) -> torch.Tensor:
        return self.ebc(features).values() + self.bias


def of_build_optimizer(model: nn.Module) -> Any:
    return build_optimizer(model, DENSE, {"learning_rate": {"constant": 0.5}})[0]


def of_fuse(model: nn.Module) -> Any:
    dense = keyed.KeyedOptimizerWrapper(
        {"bias": model.bias}, lambda params: torch.optim.SGD(params, lr=0.1)
    )
    optimizer = keyed.CombinedOptimizer([("ebc", model.ebc.fused_optimizer()), ("", dense)])
    fuse(optimizer)
    return optimizer


@pytest.mark.parametrize("make", [of_build_optimizer, of_fuse])
def test_torchrecs_own_collection_follows_too(make: Callable[[nn.Module], Any]) -> None:
    model = WithTorchrecs()
    optimizer = make(model)
    group = next(g for g in optimizer.param_groups if len(g["params"]) == 3)
    before = weights(model)
    group["lr"] = 0.25
    model(ONE_LOOKUP).sum().backward()
    # The first step of Adagrad is one of the rate.
    torch.testing.assert_close(moved(before, model), torch.full((3,), 0.25))
    with torch.inference_mode():
        assert torch.isfinite(model(ONE_LOOKUP)).all()


def test_torchrecs_own_collection_shows_what_trains() -> None:
    model = WithTorchrecs()
    of_build_optimizer(model)
    new = {name: torch.full_like(value, 2.0) for name, value in model.ebc.state_dict().items()}
    model.ebc.load_state_dict(new, assign=True)
    assert model(ONE_LOOKUP).eq(2.0).all()
    model.ebc.embedding_bags["b"].requires_grad_(False)
    model(ONE_LOOKUP).sum().backward()
    after = weights(model)
    assert after["b"].eq(2.0).all()
    assert after["a"][1].lt(2.0).all() and after["c"][1].lt(2.0).all()
    copied = model.ebc._emb_modules[0]._emb_module.split_embedding_weights()
    assert copied[0].data_ptr() == model.ebc.embedding_bags["a"].weight.data_ptr()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_evaluation_in_inference_mode(algorithm: str, is_weighted: bool) -> None:
    """Lightning's default. It trains nothing, and leaves a model that trains on."""
    config = config_of(**ALGORITHMS[algorithm])
    plain, model = Towers(is_weighted=is_weighted), fused(config, is_weighted=is_weighted)
    optimizer, _ = build_optimizer(model, DENSE, config)
    for each in (plain, model):
        each.eval()
    before, state = weights(model), state_of(model)
    outside = batch(0, is_weighted=is_weighted)
    with torch.inference_mode():
        inside = batch(0, is_weighted=is_weighted)
        assert inside.values().is_inference()
        expected = plain(inside)
        for features in (inside, outside):
            found = model(features)
            assert not found.requires_grad
            torch.testing.assert_close(found, expected)
    assert_same(weights(model), before)
    assert_same(state_of(model), state)
    model.train()
    model(batch(0, is_weighted=is_weighted)).sum().backward()
    optimizer.step()
    assert not weights(model)["a"].equal(before["a"])


def test_compiled_models_follow_too() -> None:
    model = fused(SGD)
    optimizer, _ = build_optimizer(model, DENSE, SGD)
    compiled = torch.compile(model, backend="eager")
    for rate in (0.5, 0.25, 0.125):
        optimizer.param_groups[-1]["lr"] = optimizer.param_groups[-2]["lr"] = rate
        before = weights(model)
        compiled(ONE_LOOKUP).sum().backward()
        torch.testing.assert_close(moved(before, model), torch.full((3,), rate))
    model.ebc.requires_grad_(False)
    before = weights(model)
    compiled(ONE_LOOKUP).sum().backward()
    assert_same(weights(model), before)
