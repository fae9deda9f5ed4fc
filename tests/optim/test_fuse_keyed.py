"""`fuse` of torchrec's optimizers: what they wrap and combine becomes native, in one call."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchrec")

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recap_fast import FusedCombinedOptimizer, fuse, reference, unfuse
from recap_fast.keyed import CombinedOptimizer, walk
from recap_fast.optim import FusedAdam, FusedOptimizer
from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import TORCH, parameters, set_grads


def wrapper(params: dict[str, nn.Parameter], algorithm: str, **options: Any) -> Any:
    return keyed.KeyedOptimizerWrapper(params, lambda p: TORCH[algorithm](p, **options))


def members(params: list[nn.Parameter]) -> list[tuple[str, Any]]:
    return [
        ("a", wrapper({"0": params[0]}, "adam", lr=0.1)),
        ("b", wrapper({"1": params[1]}, "adagrad", lr=0.1)),
        ("c", wrapper({"2": params[2], "3": params[3]}, "sgd", lr=0.1, momentum=0.9)),
    ]


def clipping(optimizer: Any) -> Any:
    return GradientClippingOptimizer(optimizer, GradientClipping.NORM, max_gradient=0.5)


def warmup(optimizer: Any) -> Any:
    return WarmupOptimizer(optimizer, [WarmupStage(WarmupPolicy.LINEAR, 4, 0.1)], lr=0.1)


def nested(params: list[nn.Parameter]) -> Any:
    inner = keyed.CombinedOptimizer(members(params)[:2])
    return keyed.CombinedOptimizer([("x", clipping(inner)), ("y", warmup(members(params)[2][1]))])


KINDS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "wrapper": lambda params: wrapper({str(i): p for i, p in enumerate(params)}, "adam", lr=0.1),
    "combined": lambda params: keyed.CombinedOptimizer(members(params)),
    "ours in torch": lambda params: CombinedOptimizer(members(params)),
    "fused over torch's": lambda params: FusedCombinedOptimizer(members(params)),
    "clipping": lambda params: clipping(keyed.CombinedOptimizer(members(params))),
    "warm-up": lambda params: warmup(keyed.CombinedOptimizer(members(params))),
    "nested": nested,
}


class Pair:
    """Two equal optimizers over equal parameters, of which the first may be fused."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Any]) -> None:
        self.params = [parameters(4) for _ in range(2)]
        self.optimizers = [make(params) for params in self.params]

    @property
    def ours(self) -> Any:
        return self.optimizers[0]

    def step(self, start: int, steps: int = 1) -> None:
        for step in range(start, start + steps):
            for params, optimizer in zip(self.params, self.optimizers, strict=True):
                set_grads(params, step)
                optimizer.step()

    def check(self) -> None:
        for inner in walk(self.ours):
            stepper = getattr(inner, "_stepper", None)
            assert stepper is None or not stepper._left, "torch took the step"
        self.check_values()

    def check_values(self) -> None:
        for ours, theirs in zip(*self.params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        ours, theirs = (optimizer.state_dict()["state"] for optimizer in self.optimizers)
        assert (
            theirs.keys() <= ours.keys()
        )  # torchrec's nested wrappers show what they were made with
        for name, state in theirs.items():
            assert ours[name].keys() == state.keys()
            for key, value in state.items():
                torch.testing.assert_close(ours[name][key], value, rtol=1e-5, atol=1e-6)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of optimizers in each native call."""
    calls: list[int] = []
    step = Stepper.step

    def counted(self: Stepper, *args: Any) -> None:
        calls.append(len(self._references))
        step(self, *args)

    monkeypatch.setattr(Stepper, "step", counted)
    return calls


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_before(kind: str, begin: int) -> None:
    pair = Pair(KINDS[kind])
    optimizer = pair.ours
    pair.step(0, begin)
    assert fuse(optimizer) is optimizer
    leaves = [inner for inner in walk(optimizer) if isinstance(inner, torch.optim.Adam)]
    assert leaves and all(isinstance(leaf, FusedAdam) for leaf in leaves)
    pair.step(begin, 3)
    pair.check()
    assert unfuse(optimizer) is optimizer
    assert not any(isinstance(inner, FusedOptimizer) for inner in walk(optimizer))
    assert not any(isinstance(inner, FusedCombinedOptimizer) for inner in walk(optimizer))
    pair.step(begin + 3, 2)
    pair.check()


def test_all_members_of_a_combined_optimizer_step_in_one_call(native_calls: list[int]) -> None:
    pair = Pair(KINDS["combined"])
    fuse(pair.ours)
    assert type(pair.ours) is FusedCombinedOptimizer
    pair.step(0, 2)
    assert native_calls == [3, 3]


def test_a_class_of_its_own_keeps_its_step_and_its_members_become_native(
    native_calls: list[int],
) -> None:
    class Own(keyed.CombinedOptimizer):
        pass

    pair = Pair(lambda params: Own(members(params)))
    fuse(pair.ours)
    assert type(pair.ours) is Own
    pair.step(0, 2)
    assert native_calls == [1] * 6
    pair.check()


@pytest.mark.parametrize("kind", ["combined", "ours in torch"])
def test_it_becomes_what_it_was(kind: str) -> None:
    pair = Pair(KINDS[kind])
    before = type(pair.ours)
    assert type(unfuse(fuse(pair.ours))) is before


def test_what_was_made_fused_becomes_the_reference() -> None:
    module = pytest.importorskip("tests.support.optimizers")
    params = [parameters(4), parameters(4)]
    ours, theirs = (module.combined(own) for own in params)
    unfuse(ours)
    assert type(ours) is CombinedOptimizer
    for step in range(3):
        for own, optimizer in zip(params, (ours, theirs), strict=True):
            set_grads(own, step)
            optimizer.step()
    for mine, other in zip(*params, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moment", [0, 2])
def test_hooks_and_schedulers_go_on(moment: int) -> None:
    pair = Pair(KINDS["combined"])
    calls: list[str] = []
    handle = pair.ours.register_step_post_hook(lambda *_: calls.append("post"))
    member = pair.ours.optimizers[0][1]._optimizer
    member.register_step_pre_hook(lambda *_: calls.append("pre of a member"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [LambdaLR(optimizer, lambda step: 0.8**step) for optimizer in pair.optimizers]
        for step in range(6):
            if step == moment:
                fuse(pair.ours)
            if step == moment + 2:
                unfuse(pair.ours)
            pair.step(step)
            for scheduler in schedulers:
                scheduler.step()
            assert calls == ["pre of a member", "post"]
            calls.clear()
    pair.check()
    handle.remove()
    pair.step(6)
    assert calls == ["pre of a member"]


def test_schedulers_of_members_go_on() -> None:
    """Which the one call steps, and not their own `step`."""
    pair = Pair(KINDS["combined"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [
            LambdaLR(part._optimizer, lambda step: 0.8**step)
            for optimizer in pair.optimizers
            for _, part in optimizer.optimizers
        ]
        fuse(pair.ours)
        for step in range(4):
            pair.step(step)
            for scheduler in schedulers:
                scheduler.step()
    pair.check()


def test_a_member_whose_step_was_replaced_on_the_object_steps_by_itself(
    native_calls: list[int],
) -> None:
    pair = Pair(KINDS["combined"])
    member = pair.ours.optimizers[0][1]._optimizer
    step, calls = member.step, []
    member.step = lambda *args, **kwargs: (calls.append(1), step(*args, **kwargs))
    fuse(pair.ours)
    pair.step(0, 2)
    assert native_calls == [2, 2] and calls == [1, 1]
    pair.check()


def test_a_grad_scaler_goes_on() -> None:
    """Also where members had torch's fused step, whose flag torchrec does not look at."""
    options = {"lr": 0.1, "fused": True}
    pair = Pair(
        lambda params: keyed.CombinedOptimizer(
            [
                ("a", wrapper({"0": params[0]}, "adam", **options)),
                ("b", wrapper({str(i): params[i] for i in (1, 2, 3)}, "sgd", **options)),
            ]
        )
    )
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        if step == 2:
            fuse(pair.ours)
        if step == 5:
            unfuse(pair.ours)
        for params, optimizer, scaler in zip(pair.params, pair.optimizers, scalers, strict=True):
            scaler.scale(torch.ones(()))
            set_grads(params, step)
            for param in params:
                param.grad *= scaler.get_scale()
            if step == 3:
                params[0].grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        for ours, theirs in zip(*pair.params, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    pair.check()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_train_on(duplicate: Any) -> None:
    pair = Pair(lambda params: keyed.CombinedOptimizer([("", nn_wrapper(params))]))
    fuse(pair.ours)
    pair.step(0, 2)
    twin = duplicate(pair.ours)
    pair.params[0] = list(twin.params.values())
    pair.optimizers[0] = twin
    pair.step(2, 2)
    pair.check()
    unfuse(twin)
    pair.step(4)
    pair.check()


def nn_wrapper(params: list[nn.Parameter]) -> Any:
    """Without a lambda, so that it can be pickled."""
    named = {str(index): param for index, param in enumerate(params)}
    return keyed.KeyedOptimizerWrapper(named, torch.optim.Adagrad)


def test_checkpoints_load_both_ways() -> None:
    pair = Pair(KINDS["combined"])
    fuse(pair.ours)
    pair.step(0, 2)
    for source, target in (pair.optimizers, pair.optimizers[::-1]):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        pair.step(2)
        pair.check()


def test_param_groups_are_saved_if_they_were() -> None:
    pair = Pair(lambda params: keyed.CombinedOptimizer([("", warmup(nn_wrapper(params)))]))
    for optimizer in pair.optimizers:
        optimizer.save_param_groups(True)
        optimizer.step()
    fuse(pair.ours)
    ours, theirs = (optimizer.state_dict() for optimizer in pair.optimizers)
    assert ours["param_groups"] == theirs["param_groups"]


def test_clipping_of_the_reference_becomes_native(native_calls: list[int]) -> None:
    pair = Pair(lambda params: CombinedOptimizer(members(params), clip_grad_norm=0.5))
    fuse(pair.ours)
    pair.step(0, 3)
    pair.check()
    assert native_calls == [3] * 3
    assert pair.ours.grad_norm == pytest.approx(pair.optimizers[1].grad_norm)
    unfuse(pair.ours)
    pair.step(3)
    pair.check()


def test_clipping_stays_with_the_reference_where_a_group_is_not_native() -> None:
    def make(params: list[nn.Parameter]) -> Any:
        rms = keyed.KeyedOptimizerWrapper(
            {"3": params[3]}, lambda p: torch.optim.Adadelta(p, lr=0.1)
        )
        return CombinedOptimizer([*members(params)[:2], ("d", rms)], clip_grad_norm=0.5)

    pair = Pair(make)
    fuse(pair.ours)
    assert type(pair.ours) is CombinedOptimizer
    pair.step(0, 3)
    for ours, theirs in zip(*pair.params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_member_with_sparse_gradients_is_left_to_torch(
    native_calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def make(params: list[nn.Parameter]) -> Any:
        return keyed.CombinedOptimizer(members(params))

    pair = Pair(make)
    fuse(pair.ours)
    with caplog.at_level(logging.INFO, "recap_fast"):
        for step in range(4):
            for params, optimizer in zip(pair.params, pair.optimizers, strict=True):
                set_grads(params, step)
                params[1].grad = params[1].grad.to_sparse()
                optimizer.step()
    assert native_calls == [3] * 4
    pair.check_values()
    assert [record.getMessage() for record in caplog.records] == [
        "param group 0 of optimizer 1 steps in torch's own way from now on: sparse gradients of 2 "
        "dimensions"
    ]


def test_a_scheduler_of_ours_drives_the_reference_fused_in_mid_training() -> None:
    config = pytest.importorskip("recap_fast.config").RecapOptimizerConfig.model_validate(
        {
            "adam": {"beta_1": 0.95, "beta_2": 0.999, "epsilon": 1e-7},
            "single_task_learning_rate": {
                "linear_ramp_to_constant": {"learning_rate": 0.1, "num_ramp_steps": 4}
            },
        }
    )
    models, built = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
        built.append(reference.build_optimizer(models[-1], config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            if step == 2:
                fuse(built[0][0])
            for model, (optimizer, scheduler) in zip(models, built, strict=True):
                optimizer.zero_grad()
                model(torch.full((2, 3), 1.0 + step)).square().sum().backward()
                optimizer.step()
                scheduler.step()
    assert type(built[0][0]) is FusedCombinedOptimizer
    assert built[0][0].param_groups[0]["lr"] == built[1][0].param_groups[0]["lr"] == 0.1
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Dlrm(nn.Module):
    """Tables that torchrec fuses with their optimizer, and dense layers, as in its DLRM."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [
            EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=9, feature_names=["f"])
        ]
        self.ebc = FusedEmbeddingBagCollection(
            tables, torch.optim.SGD, {"lr": 0.1}, device=torch.device("cpu")
        )
        self.over = nn.Linear(4, 1)

    @property
    def fused_optimizer(self) -> Any:
        return self.ebc.fused_optimizer()

    def forward(self, seed: int) -> torch.Tensor:
        rows = torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(seed))
        features = KeyedJaggedTensor(["f"], rows, lengths=torch.tensor([2, 1, 3]))
        return self.over(self.ebc(features)["f"]).square().mean()


def test_the_five_lines_of_dlrm(native_calls: list[int], caplog: pytest.LogCaptureFixture) -> None:
    models, losses = [Dlrm(), Dlrm()], []
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        dense_optimizer = keyed.KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(model.over.named_parameters())),
            lambda params: torch.optim.Adagrad(params, lr=0.1),
        )
        optimizer = keyed.CombinedOptimizer([model.fused_optimizer, dense_optimizer])
        if model is models[0]:
            with caplog.at_level(logging.INFO, "recap_fast"):
                fuse(optimizer)
        losses.append([])
        for step in range(5):
            optimizer.zero_grad()
            loss = model(step)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert native_calls == [1] * 5
    assert "1 of 2 param groups are native; group 0: tables, updated in the backward" in caplog.text
