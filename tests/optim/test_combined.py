"""FusedCombinedOptimizer: one native step for all the dense optimizers inside."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("torchrec")

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupStage

from recap_fast.embeddings import fuse_embeddings
from recap_fast.keyed.fused import CombinedOptimizer, FusedCombinedOptimizer
from tests.support.models import EMBEDDING_RATE, EmbeddingRanker, features
from tests.support.optimizers import (
    FUSED,
    combined,
    for_loop,
    parameters,
    same_bits,
    set_grads,
    wrapped,
)


class CountingOptimizer(FusedOptimizer):
    """Stands for a fused embedding optimizer: a step passes rates on and updates nothing."""

    def __init__(self) -> None:
        super().__init__({}, {}, [{"params": [], "lr": 0.1}])
        self.steps = 0
        self.cleared: list[bool] = []

    def step(self, closure: Any = None) -> None:
        assert closure is None
        self.steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared.append(set_to_none)


def test_all_groups_take_the_step_of_their_optimizer(device: torch.device) -> None:
    ours, theirs = parameters(5, device=device), parameters(5, device=device)
    optimizer = combined(ours)
    separate = [
        for_loop("adam", theirs[:1], lr=0.1),
        for_loop("adagrad", theirs[1:2], lr=0.1),
        for_loop("sgd", theirs[2:], lr=0.1, momentum=0.9),
    ]
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        ours[step].grad = theirs[step].grad = None
        optimizer.step()
        for other in separate:
            other.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_it_is_what_torchrec_and_torch_expect(device: torch.device) -> None:
    optimizer = combined(parameters(3, device=device))
    assert isinstance(optimizer, keyed.CombinedOptimizer)
    assert [key for key, _ in optimizer.optimizers] == ["a", "b", "c"]
    assert all(isinstance(part, keyed.KeyedOptimizerWrapper) for _, part in optimizer.optimizers)
    assert list(optimizer.params) == ["a.0", "b.1", "c.2"]
    assert len(optimizer.param_groups) == 3


def test_it_may_hold_nothing() -> None:
    optimizer = FusedCombinedOptimizer([])
    assert optimizer.step(lambda: 3.0) == 3.0
    optimizer.zero_grad()
    optimizer.init_state()
    assert optimizer.state_dict() == {"state": {}}


def test_it_may_hold_fused_embedding_optimizers_only() -> None:
    part = CountingOptimizer()
    optimizer = FusedCombinedOptimizer([part])
    optimizer.step()
    optimizer.sync_fused_learning_rates()
    assert part.steps == 2


def test_fused_embedding_optimizers_are_stepped_and_cleared(device: torch.device) -> None:
    part, params = CountingOptimizer(), parameters(1, device=device)
    optimizer = FusedCombinedOptimizer([("t", part), ("d", wrapped({"0": params[0]}, "adam"))])
    before = params[0].detach().clone()
    optimizer.sync_fused_learning_rates()
    assert part.steps == 1 and torch.equal(params[0], before)
    optimizer.step()
    assert part.steps == 2 and not torch.equal(params[0], before)
    optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    assert part.cleared == [False, True]


def test_other_dense_optimizers_take_steps_of_their_own(device: torch.device) -> None:
    ours, theirs = parameters(2, device=device), parameters(2, device=device)
    optimizer = FusedCombinedOptimizer(
        [
            ("a", wrapped({"0": ours[0]}, "sgd", lr=0.1)),
            ("b", keyed.KeyedOptimizerWrapper({"1": ours[1]}, lambda p: torch.optim.Adadelta(p))),
        ]
    )
    separate = [for_loop("sgd", theirs[:1], lr=0.1), torch.optim.Adadelta(theirs[1:])]
    for step in range(2):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        for other in separate:
            other.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


class UnknownOptimizer(keyed.KeyedOptimizer):
    """A keyed optimizer that is none of torchrec's: plain SGD."""

    def __init__(self, param: nn.Parameter) -> None:
        super().__init__({"x": param}, {}, [{"params": [param], "lr": 1.0}])

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data -= group["lr"] * param.grad


# Ways to put a dense optimizer under something other than a KeyedOptimizerWrapper.
WRAPPED: dict[str, Any] = {
    "clipping": lambda part: GradientClippingOptimizer(part),
    "warm-up": lambda part: WarmupOptimizer(part, [], lr=1.0),
    "twice": lambda part: GradientClippingOptimizer(WarmupOptimizer(part, [], lr=1.0)),
    "nested": lambda part: CombinedOptimizer([part]),
    "torchrec's nested": lambda part: keyed.CombinedOptimizer([part]),
    "with tables": lambda part: keyed.CombinedOptimizer([CountingOptimizer(), part]),
    "clipping of nested": lambda part: GradientClippingOptimizer(keyed.CombinedOptimizer([part])),
    "unknown": lambda part: UnknownOptimizer(part.params["x"]),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("make", [CombinedOptimizer, FusedCombinedOptimizer])
def test_setting_the_rates_of_tables_never_steps_a_dense_parameter(
    kind: str, make: type[CombinedOptimizer]
) -> None:
    """The scheduler sets them after every step of the optimizer, which does step it."""
    params = parameters(1)
    optimizer = make([("a", WRAPPED[kind](wrapped({"x": params[0]}, "sgd", lr=1.0)))])
    before, expected = params[0].detach().clone(), params[0].detach() - params[0].grad
    optimizer.sync_fused_learning_rates()
    assert torch.equal(params[0], before)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), expected)
    optimizer.sync_fused_learning_rates()
    torch.testing.assert_close(params[0].detach(), expected)


def test_setting_the_rates_of_tables_reaches_those_that_are_wrapped_or_nested() -> None:
    nested, warmed = CountingOptimizer(), CountingOptimizer()
    dense = wrapped({"x": parameters(1)[0]}, "sgd")
    warmup = WarmupOptimizer(warmed, [WarmupStage(max_iters=10)], lr=1.0)
    optimizer = FusedCombinedOptimizer([("a", CombinedOptimizer([nested, dense])), ("b", warmup)])
    optimizer.sync_fused_learning_rates()
    assert (nested.steps, warmed.steps) == (1, 1)
    assert not warmup.state  # no iteration of the warm-up was counted
    optimizer.step()
    assert (nested.steps, warmed.steps) == (2, 2)


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", [CombinedOptimizer, FusedCombinedOptimizer])
def test_gradients_of_wrapped_and_nested_optimizers_are_cleared(
    make: type[CombinedOptimizer], set_to_none: bool, kind: str
) -> None:
    params = parameters(1)
    optimizer = make([("a", WRAPPED[kind](wrapped({"x": params[0]}, "sgd", lr=1.0)))])
    optimizer.zero_grad(set_to_none=set_to_none)
    assert params[0].grad is None if set_to_none else not params[0].grad.any()


def test_a_step_of_a_derived_class_is_taken() -> None:
    calls = []

    class Wrapper(keyed.KeyedOptimizerWrapper):
        def step(self, closure: Any = None) -> None:
            calls.append("wrapper")
            super().step(closure)

    class Optimizer(FUSED["sgd"]):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            calls.append("optimizer")
            super().step(closure)

    ours = parameters(3)
    expected = [param.detach() - param.grad for param in ours]
    FusedCombinedOptimizer(
        [
            ("a", Wrapper({"x": ours[0]}, lambda p: FUSED["sgd"](p, lr=1.0))),
            ("b", keyed.KeyedOptimizerWrapper({"x": ours[1]}, lambda p: Optimizer(p, lr=1.0))),
            ("c", wrapped({"x": ours[2]}, "sgd", lr=1.0)),
        ]
    ).step()
    assert calls == ["wrapper", "optimizer"]
    for param, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(param.detach(), value)


def test_a_clipping_wrapper_clips(device: torch.device) -> None:
    params = parameters(1, device=device)
    expected = params[0].detach() - params[0].grad.clamp(-0.25, 0.25)
    part = GradientClippingOptimizer(
        wrapped({"x": params[0]}, "sgd", lr=1.0), GradientClipping.VALUE, max_gradient=0.25
    )
    FusedCombinedOptimizer([("a", part)]).step()
    torch.testing.assert_close(params[0].detach(), expected)


# --- closures, zero_grad, hooks, schedulers ------------------------------------------------------


def test_a_closure_is_called_once_for_all_groups(device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = combined(params)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((param * 2).sum() for param in params)
        loss.backward()
        return loss

    before = [param.detach().clone() for param in params]
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == pytest.approx(sum(2 * value.sum().item() for value in before), rel=1e-5)
    torch.testing.assert_close(params[2].detach(), before[2] - 0.1 * 2)
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool, device: torch.device) -> None:
    params = parameters(3, device=device)
    combined(params).zero_grad(set_to_none=set_to_none)
    for param in params:
        assert param.grad is None if set_to_none else not param.grad.any()


def test_hooks_run_on_every_level(device: torch.device) -> None:
    """The optimizer's own, those of the optimizers inside, and global ones, as without fusing."""

    def run(make: type[CombinedOptimizer]) -> list[tuple[str, str]]:
        params = parameters(2, device=device)
        optimizer = make(
            [
                ("a", wrapped({"0": params[0]}, "adam")),
                ("b", wrapped({"1": params[1]}, "sgd")),
            ]
        )
        names = {id(optimizer): "combined"} | {
            id(part._optimizer): key for key, part in optimizer.optimizers
        }
        seen: list[tuple[str, str]] = []

        def hook(when: str) -> Any:
            def record(opt: torch.optim.Optimizer, *_: Any) -> None:
                # Once a KeyedOptimizerWrapper was unpickled, torch runs global hooks for them too.
                if not isinstance(opt, keyed.KeyedOptimizerWrapper):
                    seen.append((when, names[id(opt)]))

            return record

        inner = optimizer.optimizers[0][1]._optimizer
        handles = [
            optimizer.register_step_pre_hook(hook("own pre")),
            optimizer.register_step_post_hook(hook("own post")),
            inner.register_step_pre_hook(hook("inner pre")),
            inner.register_step_post_hook(hook("inner post")),
        ]
        optimizer.step()
        handles[0].remove()
        handles[1].remove()
        handles += [
            register_optimizer_step_pre_hook(hook("global pre")),
            register_optimizer_step_post_hook(hook("global post")),
        ]
        try:
            optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        count = len(seen)
        optimizer.step()
        assert len(seen) == count
        return seen

    fused, separate = run(FusedCombinedOptimizer), run(CombinedOptimizer)
    assert sorted(fused) == sorted(separate)
    assert fused[0] == ("own pre", "combined")
    assert fused[:4] == separate[:4]  # own pre, inner pre, inner post, own post


def test_a_pre_hook_inside_may_change_gradients(device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = combined(params)

    def clip(*_: Any) -> None:
        params[2].grad = torch.zeros_like(params[2])

    optimizer.optimizers[2][1]._optimizer.register_step_pre_hook(clip)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert torch.equal(params[2], before[2]) and not torch.equal(params[0], before[0])


def test_a_pre_hook_inside_that_returns_arguments_is_refused(device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = combined(params)
    optimizer.optimizers[0][1]._optimizer.register_step_pre_hook(lambda opt, a, k: (a, k))
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="must return None"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_torch_scheduler_drives_all_groups(device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = combined(params)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        before = params[2].detach().clone()
        buffer = optimizer.state.get(params[2], {}).get("momentum_buffer")
        expected = params[2].grad + (0.9 * buffer if buffer is not None else 0)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(params[2].detach(), before - 0.1 * 0.5**step * expected)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * 0.5**3] * 3


def test_a_group_added_to_an_optimizer_inside_is_stepped(device: torch.device) -> None:
    params = parameters(4, device=device)
    optimizer = combined(params[:3])
    optimizer.step()
    optimizer.optimizers[2][1]._optimizer.add_param_group({"params": [params[3]]})
    before = params[3].detach().clone()
    optimizer.step()
    assert not torch.equal(params[3], before)


def test_the_optimizers_inside_can_be_stepped_alone(device: torch.device) -> None:
    """In turns with the whole; the step counts stay right."""
    params = parameters(3, device=device)
    optimizer = combined(params)
    inner = optimizer.optimizers[0][1]
    for _ in range(2):
        optimizer.step()
        inner.step()
    assert optimizer.state[params[0]]["step"].item() == 4
    assert optimizer.state[params[1]]["step"].item() == 2


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("started", [True, False], ids=["started", "fresh"])
def test_it_can_be_pickled_and_copied(how: str, started: bool, device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = combined(params)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    if started:
        optimizer.step()
        scheduler.step()
    both = (params, optimizer)
    params_copy, optimizer_copy = (
        copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    )
    assert type(optimizer_copy) is FusedCombinedOptimizer
    assert next(iter(optimizer_copy.params.values())) is params_copy[0]
    set_grads(params, 1)
    set_grads(params_copy, 1)
    before = [param.detach().clone() for param in params]
    optimizer_copy.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(params, params_copy, strict=True))


def test_a_copy_has_its_hooks(device: torch.device) -> None:
    optimizer = copy.deepcopy(combined(parameters(3, device=device)))
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]


@pytest.mark.cpu_engine  # the process has the engine that is installed
def test_hooks_work_in_a_process_that_only_unpickled(tmp_path: Any) -> None:
    file = tmp_path / "optimizer.pickle"
    file.write_bytes(pickle.dumps(FusedCombinedOptimizer([wrapped({"x": parameters(1)[0]})])))
    code = f"""
import pickle
optimizer = pickle.load(open({str(file)!r}, "rb"))
calls = []
optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
optimizer.register_step_post_hook(lambda *_: calls.append("post"))
optimizer.step()
print(calls)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[-2] == "['pre', 'post']"


# --- with FBGEMM's tables ------------------------------------------------------------------------


def test_tables_and_towers_train_together() -> None:
    torch.manual_seed(0)
    model = fuse_embeddings(EmbeddingRanker(), EMBEDDING_RATE)
    dense: dict[str, nn.Parameter] = {
        name: p for name, p in model.named_parameters() if name.startswith("ranker.")
    }
    part = next(m.fused_optimizer for m in model.modules() if hasattr(m, "fused_optimizer"))
    optimizer = FusedCombinedOptimizer([("tables", part), ("", wrapped(dense, "adam", lr=0.1))])
    for group in part.param_groups:
        group["lr"] = 0.5
    optimizer.sync_fused_learning_rates()
    table = next(value for name, value in model.state_dict().items() if "t_user" in name)
    before = table.clone(), [param.detach().clone() for param in dense.values()]
    model(features()).sum().backward()
    assert not torch.equal(table, before[0])  # in the backward pass
    table_before = table.clone()
    optimizer.step()
    assert torch.equal(table, table_before)
    moved = [not torch.equal(p, b) for p, b in zip(dense.values(), before[1], strict=True)]
    assert any(moved)
