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

from recap_fast.keyed import CombinedOptimizer
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD
from recap_fast.optim.combined import FusedCombinedOptimizer

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


ENTRIES = pytest.mark.xfail(
    strict=True, reason="only names and shapes are checked: torchrec then fails half-way, unnamed"
)
WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str, Any]] = {
    "an unknown name": (_unknown_name, "tower.other", ()),
    "another name": (_renamed, "tower.other", ()),
    "a missing name": (_missing_name, "ebc.weight", ()),
    "another shape": (_other_shape, "ebc.weight", ()),
    "a broadcastable shape": (_broadcastable_shape, "ebc.weight", ()),
    "a missing entry": (_lacks_an_entry, "backbone.weight", ENTRIES),
    "an entry too many": (_has_one_entry_more, "backbone.weight", ENTRIES),
    "another algorithm": (_of_another_algorithm, "ebc.weight", ENTRIES),
    "state for plain SGD": (_of_plain_sgd, "scale", ENTRIES),
}


@both
@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(change, name, id=kind, marks=marks)
        for kind, (change, name, marks) in WRONG.items()
    ],
)
@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
def test_a_checkpoint_of_another_model_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], name: str, used: bool, kind: str
) -> None:
    saved = copy.deepcopy(Run("reference", steps=2).optimizer.state_dict())
    change(saved["state"])
    run = Run(kind, steps=1 if used else 0)
    if not used and change is _missing_name:
        pytest.skip("a parameter without state may still get its first gradient")
    before = run.snapshot()
    with pytest.raises(ValueError, match=f"'{name}'"):
        run.optimizer.load_state_dict(saved)
    run.assert_is(before)


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
    run.optimizer.init_state()
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
    run.optimizer.init_state()
    assert run.optimizer.state[run.params[NAMES[0]]]["step"].item() == 3
    assert run.optimizer.state[run.params[NAMES[0]]]["exp_avg"].any()


@both
def test_init_state_leaves_frozen_parameters_alone(kind: str) -> None:
    run = Run(kind)
    run.params["tower.bias"].requires_grad_(False)
    run.optimizer.init_state({"ebc.weight"})  # torchrec's argument
    assert list(run.optimizer.state_dict()["state"]) == [NAMES[0], *NAMES[2:4]]


@both
def test_init_state_then_in_place_loading(kind: str) -> None:
    """What torch.distributed.checkpoint does: make the state, fill its tensors, load the dict."""
    whole, run = Run("reference", steps=2), Run(kind)
    run.copy_params(whole)
    run.optimizer.init_state()
    saved = run.optimizer.state_dict()
    for name, state in whole.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            saved["state"][name][key].copy_(value)
    run.optimizer.load_state_dict(saved)
    whole.step(2, start=2)
    run.step(2, start=2)
    run.assert_close(whole)


@pytest.mark.xfail(
    strict=True, reason="a momentum buffer that init_state made is not new: dampening applies"
)
def test_init_state_does_not_change_the_trajectory_of_dampened_momentum() -> None:
    results = []
    for init in (True, False):
        param = nn.Parameter(torch.ones(3))
        optimizer = FusedCombinedOptimizer(
            [
                keyed.KeyedOptimizerWrapper(
                    {"x": param}, lambda p: FusedSGD(p, lr=1.0, momentum=0.9, dampening=0.5)
                )
            ]
        )
        if init:
            optimizer.init_state()
        param.grad = torch.ones(3)
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


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
