"""CombinedOptimizer over torch's optimizers and over ours: state, checkpoints, copies.

Every test that loads or compares runs in both directions between the reference (torch.optim) and
the fused optimizers.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupStage

from recap_fast.keyed import CombinedOptimizer
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD

NAMES = ["tower.weight", "tower.bias", "backbone.weight", "ebc.weight", "scale"]
SHAPES = [(2, 3), (3,), (4, 3), (5, 2), ()]
KINDS = ["reference", "fused"]


def _params(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in zip(NAMES, SHAPES, strict=True)
    }


def _set_grads(params: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator)


def _optimizer(kind: str, params: dict[str, nn.Parameter]) -> CombinedOptimizer:
    """Adam with amsgrad, Adagrad, SGD with momentum and without, under keys as in a recap model."""
    fused = kind == "fused"
    adam = FusedAdam if fused else torch.optim.Adam
    adagrad = FusedAdagrad if fused else torch.optim.Adagrad
    sgd = FusedSGD if fused else torch.optim.SGD
    tower = {name.removeprefix("tower."): params[name] for name in NAMES[:2]}
    wrap = keyed.KeyedOptimizerWrapper
    return (FusedCombinedOptimizer if fused else CombinedOptimizer)(
        [
            ("tower", wrap(tower, lambda p: adam(p, lr=0.1, amsgrad=True))),
            ("", wrap({NAMES[2]: params[NAMES[2]]}, lambda p: adagrad(p, lr=0.1))),
            ("ebc", wrap({"weight": params[NAMES[3]]}, lambda p: sgd(p, lr=0.1, momentum=0.9))),
            ("", wrap({NAMES[4]: params[NAMES[4]]}, lambda p: sgd(p, lr=0.1))),
        ]
    )


class Run:
    """Parameters and their optimizer, after some steps."""

    def __init__(self, kind: str, steps: int = 0, seed: int = 0) -> None:
        self.params = _params(seed)
        self.optimizer = _optimizer(kind, self.params)
        self.step(steps)

    def step(self, steps: int = 1, start: int = 0) -> None:
        for step in range(start, start + steps):
            _set_grads(self.params, step)
            self.optimizer.step()

    def copy_params(self, other: Run) -> None:
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(other.params[name])

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        params = {name: param.detach().clone() for name, param in self.params.items()}
        return params, copy.deepcopy(self.optimizer.state_dict())

    def assert_is(self, before: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        params, saved = self.snapshot()
        assert all(torch.equal(value, before[0][name]) for name, value in params.items())
        assert saved["state"].keys() == before[1]["state"].keys()
        for name, state in before[1]["state"].items():
            assert saved["state"][name].keys() == state.keys()
            for key, value in state.items():
                assert torch.equal(saved["state"][name][key], value), f"{key} of {name}"

    def assert_close(self, other: Run) -> None:
        for name, param in self.params.items():
            torch.testing.assert_close(param, other.params[name], msg=lambda m, n=name: f"{n}: {m}")


both = pytest.mark.parametrize("kind", KINDS)
directions = pytest.mark.parametrize(
    ("source", "target"), [(a, b) for a in KINDS for b in KINDS], ids=lambda kind: kind
)


# --- state dicts ---------------------------------------------------------------------------------


def test_state_dicts_of_both_have_the_same_keys_shapes_and_dtypes() -> None:
    ours, theirs = (Run(kind, steps=2).optimizer.state_dict() for kind in KINDS)
    assert ours.keys() == theirs.keys()
    assert list(ours["state"]) == list(theirs["state"]) == NAMES[:4]  # plain SGD has no state
    for name, state in theirs["state"].items():
        assert list(ours["state"][name]) == list(state)
        for key, value in state.items():
            other = ours["state"][name][key]
            assert (other.shape, other.dtype, other.stride()) == (
                value.shape,
                value.dtype,
                value.stride(),
            )


@directions
@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
@pytest.mark.parametrize("through_file", [True, False], ids=["torch.save", "deepcopy"])
def test_a_checkpoint_resumes_the_trajectory(
    source: str, target: str, used: bool, through_file: bool
) -> None:
    whole = Run(source, steps=2)
    saved = copy.deepcopy(whole.optimizer.state_dict())
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    resumed = Run(target, steps=3 if used else 0, seed=9)
    resumed.copy_params(whole)
    resumed.optimizer.load_state_dict(saved)
    whole.step(3, start=2)
    resumed.step(3, start=2)
    resumed.assert_close(whole)
    assert resumed.optimizer.state[resumed.params[NAMES[0]]]["step"].item() == 5


@directions
def test_a_checkpoint_of_a_parameter_that_never_had_a_gradient(source: str, target: str) -> None:
    whole = Run(source)
    _set_grads(whole.params, 0)
    whole.params["tower.bias"].grad = whole.params["ebc.weight"].grad = None
    whole.optimizer.step()
    resumed = Run(target)
    resumed.copy_params(whole)
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    assert "ebc.weight" not in resumed.optimizer.state_dict()["state"]
    whole.step(2, start=1)
    resumed.step(2, start=1)
    resumed.assert_close(whole)


@directions
def test_param_groups_are_saved_and_loaded_on_request(source: str, target: str) -> None:
    whole, resumed = Run(source, steps=1), Run(target, steps=1)
    for run in (whole, resumed):
        run.optimizer.save_param_groups(True)
    whole.optimizer.param_groups[0]["lr"] = 0.75
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    assert resumed.optimizer.param_groups[0]["lr"] == 0.75
    whole.step(2, start=1)
    resumed.step(2, start=1)
    resumed.assert_close(whole)


@both
def test_a_checkpoint_from_before_the_first_step_loads_into_a_fresh_optimizer(kind: str) -> None:
    run = Run(kind)
    fresh = Run(kind)
    fresh.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    fresh.step()
    run.step()
    fresh.assert_close(run)


def _unknown_name(state: dict[str, Any]) -> None:
    state["tower.other"] = state["tower.bias"]


def _renamed(state: dict[str, Any]) -> None:
    state["tower.other"] = state.pop("tower.bias")


def _missing_name(state: dict[str, Any]) -> None:
    del state["ebc.weight"]


def _other_shape(state: dict[str, Any]) -> None:
    state["ebc.weight"]["momentum_buffer"] = torch.zeros(6, 2)


def _broadcastable_shape(state: dict[str, Any]) -> None:
    state["ebc.weight"]["momentum_buffer"] = torch.zeros(1, 2)


def _lacks_an_entry(state: dict[str, Any]) -> None:
    del state["backbone.weight"]["sum"]


def _has_one_entry_more(state: dict[str, Any]) -> None:
    state["backbone.weight"]["exp_avg"] = torch.zeros(4, 3)


def _of_another_algorithm(state: dict[str, Any]) -> None:
    state["ebc.weight"] = {"exp_avg": torch.zeros(5, 2)}


def _of_plain_sgd(state: dict[str, Any]) -> None:
    state["scale"] = {"momentum_buffer": torch.zeros(())}


def _no_tensor(state: dict[str, Any]) -> None:
    state["backbone.weight"]["step"] = 2


def _none(state: dict[str, Any]) -> None:
    state["backbone.weight"]["sum"] = None


def _step_of_another_shape(state: dict[str, Any]) -> None:
    state["tower.bias"]["step"] = torch.zeros(2)


# What is changed, and how the message names it.
WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an unknown name": (_unknown_name, "'tower.other'"),
    "another name": (_renamed, "'tower.other'"),
    "a missing name": (_missing_name, "'ebc.weight'"),
    "another shape": (_other_shape, r"'ebc.weight' has shape \(6, 2\)"),
    "a broadcastable shape": (_broadcastable_shape, r"'ebc.weight' has shape \(1, 2\)"),
    "a step of another shape": (_step_of_another_shape, r"'step' of 'tower.bias' has shape \(2,\)"),
    "no tensor": (_no_tensor, "'step' of 'backbone.weight' is a int"),
    "none": (_none, "'sum' of 'backbone.weight' is a NoneType"),
    "a missing entry": (_lacks_an_entry, "'backbone.weight' .*missing sum, unknown none"),
    "an entry too many": (_has_one_entry_more, "'backbone.weight' .*missing none, unknown exp_avg"),
    "another algorithm": (
        _of_another_algorithm,
        "'ebc.weight' .*missing momentum_buffer, unknown exp_avg",
    ),
    "state for plain SGD": (_of_plain_sgd, "'scale' .*missing none, unknown momentum_buffer"),
}


@both
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
def test_a_checkpoint_of_another_model_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str, used: bool, kind: str
) -> None:
    saved = copy.deepcopy(Run("reference", steps=2).optimizer.state_dict())
    change(saved["state"])
    run = Run(kind, steps=1 if used else 0)
    if not used and change is _missing_name:
        pytest.skip("a parameter without state may still get its first gradient")
    before = run.snapshot()
    with pytest.raises(ValueError, match=message):
        run.optimizer.load_state_dict(saved)
    run.assert_is(before)


def _without_groups(saved: dict[str, Any]) -> None:
    del saved["param_groups"]


def _without_a_group(saved: dict[str, Any]) -> None:
    del saved["param_groups"][1]


def _with_another_option(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["betas"] = (0.9, 0.99)


def _of_another_parameter(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"] = ["scale"]


@both
@pytest.mark.parametrize(
    "change", [_without_groups, _without_a_group, _with_another_option, _of_another_parameter]
)
@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
def test_other_param_groups_are_refused_before_anything_changes(
    used: bool, change: Callable[[dict[str, Any]], None], kind: str
) -> None:
    whole, run = Run("reference", steps=2), Run(kind, steps=1 if used else 0)
    for other in (whole, run):
        other.optimizer.save_param_groups(True)
    saved = copy.deepcopy(whole.optimizer.state_dict())
    change(saved)
    before = run.snapshot()
    with pytest.raises(ValueError, match="the param group of"):
        run.optimizer.load_state_dict(saved)
    run.assert_is(before)


@both
def test_an_optimizer_whose_state_is_unknown_is_refused_before_anything_changes(kind: str) -> None:
    def make() -> tuple[CombinedOptimizer, dict[str, nn.Parameter]]:
        params = _params()
        sgd = FusedSGD if kind == "fused" else torch.optim.SGD
        parts = [
            keyed.KeyedOptimizerWrapper({"x": params["scale"]}, lambda p: sgd(p, momentum=0.9)),
            keyed.KeyedOptimizerWrapper({"y": params["tower.bias"]}, torch.optim.Adadelta),
        ]
        return (FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer)(parts), params

    whole, params = make()
    _set_grads(params, 0)
    whole.step()
    saved = copy.deepcopy(whole.state_dict())
    fresh, _ = make()
    with pytest.raises(TypeError, match="Adadelta"):
        fresh.load_state_dict(saved)
    with pytest.raises(TypeError, match="Adadelta"):
        fresh.init_state(count_step=False)
    assert fresh.state_dict()["state"] == {}
    whole.load_state_dict(saved)  # it has state to load into


@both
def test_the_state_of_another_algorithm_is_refused(kind: str) -> None:
    """As after the configuration went from adam to adagrad: other entries, the same names."""
    params = {"x": nn.Parameter(torch.ones(3)), "y": nn.Parameter(torch.ones(2))}
    old = CombinedOptimizer([keyed.KeyedOptimizerWrapper(params, torch.optim.Adam)])
    _set_grads(params, 0)
    old.step()
    new_class = FusedAdagrad if kind == "fused" else torch.optim.Adagrad
    make = FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer
    new = make([keyed.KeyedOptimizerWrapper(params, lambda p: new_class(p))])
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(ValueError):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert all(
        torch.equal(new.state_dict()["state"][name][key], value)
        for name, state in before["state"].items()
        for key, value in state.items()
    )


# --- init_state ----------------------------------------------------------------------------------


@both
def test_init_state_makes_state_and_changes_nothing_else(kind: str) -> None:
    run, plain = Run(kind), Run(kind)
    _set_grads(run.params, 0)
    run.params["tower.bias"].grad = None
    before = {name: param.detach().clone() for name, param in run.params.items()}
    grads = {name: param.grad for name, param in run.params.items()}
    run.optimizer.init_state(count_step=False)
    for name, param in run.params.items():
        assert torch.equal(param, before[name])
        assert param.grad is grads[name]
    state = run.optimizer.state_dict()["state"]
    assert list(state) == NAMES[:4]
    for entries in state.values():
        for key, value in entries.items():
            assert not value.any(), key  # step counts too
    run.step(3)
    plain.step(3)
    run.assert_close(plain)
    run.optimizer.init_state(count_step=False)
    assert run.optimizer.state[run.params[NAMES[0]]]["step"].item() == 3
    assert run.optimizer.state[run.params[NAMES[0]]]["exp_avg"].any()


@both
def test_init_state_leaves_frozen_parameters_alone(kind: str) -> None:
    run = Run(kind)
    run.params["tower.bias"].requires_grad_(False)
    run.optimizer.init_state({"ebc.weight"}, count_step=False)
    assert list(run.optimizer.state_dict()["state"]) == [NAMES[0], *NAMES[2:4]]


@both
def test_init_state_then_in_place_loading(kind: str) -> None:
    """What torch.distributed.checkpoint does: make the state, fill its tensors, load the dict."""
    whole, run = Run("reference", steps=2), Run(kind)
    run.copy_params(whole)
    run.optimizer.init_state(count_step=False)
    saved = run.optimizer.state_dict()
    for name, state in whole.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            saved["state"][name][key].copy_(value)
    run.optimizer.load_state_dict(saved)
    whole.step(2, start=2)
    run.step(2, start=2)
    run.assert_close(whole)


class Dampened:
    """One parameter under SGD with momentum and dampening, whose first gradient counts whole."""

    def __init__(self, kind: str) -> None:
        sgd = FusedSGD if kind == "fused" else torch.optim.SGD
        make = FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer
        self.param = nn.Parameter(torch.ones(3))
        wrapper = keyed.KeyedOptimizerWrapper(
            {"x": self.param}, lambda p: sgd(p, lr=1.0, momentum=0.75, dampening=0.5)
        )
        self.optimizer = make([wrapper])

    def steps(self, count: int) -> list[float]:
        """How far each step goes, with a gradient of 1."""
        moved = []
        for _ in range(count):
            before = self.param.detach().clone()
            self.param.grad = torch.ones(3)
            self.optimizer.step()
            moved.append((before - self.param.detach())[0].item())
        return moved


@both
def test_init_state_does_not_change_the_trajectory_of_dampened_momentum(kind: str) -> None:
    run = Dampened(kind)
    run.optimizer.init_state(count_step=False)
    run.optimizer.init_state(count_step=False)
    assert run.steps(2) == [1.0, 0.75 + 0.5]


@directions
@pytest.mark.parametrize("before", ["fresh", "initialised", "used"])
@pytest.mark.parametrize("through_file", [True, False], ids=["torch.save", "deepcopy"])
def test_dampened_momentum_resumes(
    source: str, target: str, before: str, through_file: bool
) -> None:
    """From before the first step, and from after it; into an optimizer before or after its own."""
    for started, expected in ((False, [1.0, 1.25]), (True, [1.25, 1.4375])):
        whole, resumed = Dampened(source), Dampened(target)
        whole.optimizer.init_state(count_step=False)
        if started:
            whole.steps(1)
        saved = copy.deepcopy(whole.optimizer.state_dict())
        if through_file:
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        if before == "initialised":
            resumed.optimizer.init_state(count_step=False)
        elif before == "used":
            resumed.steps(3)
        resumed.optimizer.load_state_dict(saved)
        assert resumed.steps(2) == expected


def test_loading_none_for_a_buffer_keeps_dtypes() -> None:
    """A loaded buffer has the dtype of its parameter, though there was none to load into."""
    run = Dampened("fused")
    run.optimizer.init_state(count_step=False)
    saved = {"x": {"momentum_buffer": torch.full((3,), 1.0, dtype=torch.float64)}}
    run.optimizer.load_state_dict({"state": saved})
    assert run.optimizer.state[run.param]["momentum_buffer"].dtype == torch.float32
    assert run.steps(1) == [1.25]


# --- wrapped and nested optimizers ---------------------------------------------------------------


def _clipping(part: keyed.KeyedOptimizer) -> keyed.KeyedOptimizer:
    return GradientClippingOptimizer(part, GradientClipping.VALUE, max_gradient=0.5)


def _warmup(part: keyed.KeyedOptimizer) -> keyed.KeyedOptimizer:
    return WarmupOptimizer(part, [WarmupStage(max_iters=10, value=0.0)], lr=0.1)


def _nested(part: keyed.KeyedOptimizer) -> keyed.KeyedOptimizer:
    return keyed.CombinedOptimizer([("inner", part)])


COMPOSED: dict[str, Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer]] = {
    "clipping": _clipping,
    "warm-up": _warmup,
    "nested": _nested,
    "nested ours": lambda part: CombinedOptimizer([("inner", part)]),
    "nested fused": lambda part: FusedCombinedOptimizer([("inner", part)]),
    "clipping of nested": lambda part: _clipping(_nested(part)),
    "clipping of warm-up": lambda part: _clipping(_warmup(part)),
    "warm-up of nested": lambda part: _warmup(_nested(part)),
    "nested warm-up": lambda part: _nested(_warmup(part)),
}
composed = pytest.mark.parametrize("compose", COMPOSED.values(), ids=COMPOSED)


class Composed(Run):
    """Two parameters, one under a composed optimizer, the other directly."""

    def __init__(
        self,
        kind: str,
        compose: Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer],
        steps: int = 0,
        seed: int = 0,
    ) -> None:
        self.params = {name: p for name, p in _params(seed).items() if name in NAMES[2:4]}
        adam = FusedAdam if kind == "fused" else torch.optim.Adam
        backbone, table = (
            keyed.KeyedOptimizerWrapper({"weight": param}, lambda p: adam(p, lr=0.1))
            for param in self.params.values()
        )
        make = FusedCombinedOptimizer if kind == "fused" else CombinedOptimizer
        self.optimizer = make([("backbone", compose(backbone)), ("ebc", table)])
        self.step(steps)


@composed
@directions
@pytest.mark.parametrize("before", ["fresh", "initialised", "used"])
def test_a_checkpoint_of_a_composed_optimizer_resumes(
    source: str,
    target: str,
    before: str,
    compose: Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer],
) -> None:
    whole = Composed(source, compose, steps=2)
    saved = copy.deepcopy(whole.optimizer.state_dict())
    resumed = Composed(target, compose, steps=3 if before == "used" else 0, seed=9)
    if before == "initialised":
        resumed.optimizer.init_state(count_step=False)
    resumed.copy_params(whole)
    resumed.optimizer.load_state_dict(saved)
    whole.step(3, start=2)
    resumed.step(3, start=2)
    resumed.assert_close(whole)
    assert resumed.optimizer.state[resumed.params[NAMES[2]]]["step"].item() == 5


@composed
@both
def test_init_state_of_a_composed_optimizer_then_in_place_loading(
    kind: str, compose: Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer]
) -> None:
    whole, run = Composed("reference", compose, steps=2), Composed(kind, compose)
    grads = {name: param.grad for name, param in run.params.items()}
    run.copy_params(whole)
    run.optimizer.init_state(count_step=False)
    assert grads == {name: param.grad for name, param in run.params.items()}
    saved = run.optimizer.state_dict()
    expected = whole.optimizer.state_dict()["state"]
    assert saved["state"].keys() == expected.keys()
    for name, state in expected.items():
        assert saved["state"][name].keys() == state.keys()
        for key, value in state.items():
            assert not saved["state"][name][key].any()
            saved["state"][name][key].copy_(value)
    run.optimizer.load_state_dict(saved)
    whole.step(2, start=2)
    run.step(2, start=2)
    run.assert_close(whole)


@composed
@both
def test_init_state_of_a_composed_optimizer_does_not_change_the_trajectory(
    kind: str, compose: Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer]
) -> None:
    run, plain = Composed(kind, compose), Composed(kind, compose)
    run.optimizer.init_state(count_step=False)
    run.step(3)
    plain.step(3)
    run.assert_close(plain)


@composed
def test_a_wrong_checkpoint_of_a_composed_optimizer_is_refused(
    compose: Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer],
) -> None:
    saved = copy.deepcopy(Composed("fused", compose, steps=2).optimizer.state_dict())
    name = next(name for name, state in saved["state"].items() if "exp_avg" in state)
    del saved["state"][name]["exp_avg"]
    run = Composed("fused", compose, steps=1)
    before = run.snapshot()
    with pytest.raises(ValueError, match=f"'{name}' .*missing exp_avg"):
        run.optimizer.load_state_dict(saved)
    run.assert_is(before)


@both
def test_state_and_groups_are_those_in_use(kind: str) -> None:
    """torch's load_state_dict gives an optimizer inside new ones; its wrapper has the old."""
    run = Run(kind, steps=1)
    inner = run.optimizer.optimizers[2][1]._optimizer
    inner.load_state_dict(copy.deepcopy(inner.state_dict()))
    param = run.params["ebc.weight"]
    assert run.optimizer.state[param] is inner.state[param]
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = param.detach().clone()
    run.step(start=1)
    assert torch.equal(param, before)


# --- step, zero_grad, copies ---------------------------------------------------------------------


@both
def test_a_closure_is_evaluated_once_and_its_loss_returned(kind: str) -> None:
    run = Run(kind)
    _set_grads(run.params, 0)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return 0.25

    with torch.no_grad():
        assert run.optimizer.step(closure) == 0.25
    assert calls == [True]
    assert run.optimizer.step() is None


@both
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_honours_set_to_none(kind: str, set_to_none: bool) -> None:
    run = Run(kind)
    _set_grads(run.params, 0)
    run.optimizer.zero_grad(set_to_none=set_to_none)
    for param in run.params.values():
        assert param.grad is None if set_to_none else not param.grad.any()


@both
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_it_can_be_copied_with_a_scheduler_attached(kind: str, how: str) -> None:
    run = Run(kind, steps=1)
    scheduler = LambdaLR(run.optimizer, lambda step: 0.5**step)
    scheduler.step()
    other = Run.__new__(Run)
    both_parts = (run.params, run.optimizer)
    other.params, other.optimizer = (
        copy.deepcopy(both_parts) if how == "deepcopy" else pickle.loads(pickle.dumps(both_parts))
    )
    assert type(other.optimizer) is type(run.optimizer)
    assert other.optimizer.params.keys() == run.optimizer.params.keys()
    before = {name: param.detach().clone() for name, param in run.params.items()}
    other.step(2, start=1)
    assert all(torch.equal(param, before[name]) for name, param in run.params.items())
    run.step(2, start=1)
    other.assert_close(run)


@both
def test_the_two_kinds_follow_the_same_trajectory(kind: str) -> None:
    run, reference = Run(kind, steps=20), Run("reference", steps=20)
    run.assert_close(reference)


@pytest.mark.parametrize("kind", KINDS)
def test_copying_a_wrapper_leaves_others_of_its_class_able_to_step(kind: str) -> None:
    """torch has the class of what it copies look for hooks, which torchrec made none for."""

    class Clipping(GradientClippingOptimizer):  # so that no other test is concerned
        pass

    params = _params()
    inner = _optimizer(kind, params)
    clipping = Clipping(inner, clipping=GradientClipping.NORM, max_gradient=1.0)
    optimizer = type(inner)([("", clipping)])
    copied_params, copied = copy.deepcopy((params, optimizer))
    for seed in range(2):
        for own, each in ((params, optimizer), (copied_params, copied)):
            _set_grads(own, seed)
            each.step()
    for name, param in params.items():
        torch.testing.assert_close(param, copied_params[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [None, 3])
def test_state_that_is_no_mapping_is_refused_by_name(kind: str, entries: Any) -> None:
    params = _params()
    optimizer = _optimizer(kind, params)
    _set_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    state = {**before, "tower.bias": entries}
    state["tower.weight"] = {k: v + 1 for k, v in before["tower.weight"].items()}
    found = type(entries).__name__
    with pytest.raises(ValueError, match=f"the state of 'tower.bias' is a {found} in the state"):
        optimizer.load_state_dict({"state": state})
    for name, own in optimizer.state_dict()["state"].items():
        for key, value in own.items():
            assert torch.equal(value, before[name][key])
