"""What users keep in an optimizer's state beside that of its parameters, or put in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from recap_fast._native import native
from recap_fast.optim import FusedAdam, FusedOptimizer, FusedSGD
from tests.support.optimizers import FUSED, TORCH, assert_unchanged, parameters, snapshot

VALUES: dict[str, Any] = {
    "int": 5,
    "none": None,
    "text": "mine",
    "tensor": torch.tensor([1.0, 2.0]),
    "dict": {"a": torch.tensor(3.0), "k": 7},
    "list": [torch.tensor(3.0)],
}
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}


def _make(make: Callable[..., torch.optim.Optimizer], algorithm: str) -> torch.optim.Optimizer:
    return make(parameters(2), lr=0.1, **OPTIONS.get(algorithm, {}))


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("algorithm", FUSED)
def test_an_entry_under_a_string_is_saved_and_loaded(algorithm: str, kind: str) -> None:
    optimizer = _make(FUSED[algorithm], algorithm)
    optimizer.step()
    optimizer.state["mine"] = copy.deepcopy(VALUES[kind])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for make in (FUSED[algorithm], TORCH[algorithm]):
        fresh = _make(make, algorithm)
        fresh.load_state_dict(saved)
        assert fresh.state["mine"] is saved["state"]["mine"]  # torch hands it on as it is
        fresh.step()
    assert str(saved["state"]["mine"]) == str(VALUES[kind])


@pytest.mark.parametrize("value", [5, "mine"], ids=["int", "text"])
@pytest.mark.parametrize("algorithm", FUSED)
def test_a_plain_value_under_a_parameter_loads_where_torch_loads_it(
    algorithm: str, value: Any
) -> None:
    saved = _make(TORCH[algorithm], algorithm).state_dict()
    saved["state"] = {0: value}
    outcomes = []
    for make in (FUSED[algorithm], TORCH[algorithm]):
        fresh = _make(make, algorithm)
        fresh.step()
        before = dict(fresh.state), fresh.param_groups
        try:
            fresh.load_state_dict(saved)
            outcomes.append("loaded")
        except (TypeError, AttributeError, IndexError) as error:
            outcomes.append(type(error).__name__)
            if isinstance(fresh, FusedOptimizer):
                assert (dict(fresh.state), fresh.param_groups) == before
                fresh.step()
    assert outcomes[0] == outcomes[1]


def test_a_state_that_is_no_dict_is_refused_by_name() -> None:
    optimizer = FusedSGD(parameters(2), momentum=0.9)
    optimizer.state[optimizer.param_groups[0]["params"][1]] = 5
    before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
    with pytest.raises(TypeError, match="state of parameter 1 of param group 0 is a int"):
        optimizer.step()
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], before))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with each plan that is made."""
    made: list[object] = []

    class Counted(native.BoundPlan):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(None)

    monkeypatch.setattr(native, "BoundPlan", Counted)
    return made


def _in_the_state(optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.state["number"] = number


def _in_a_parameters_state(optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["number"] = number


def _among_many(optimizer: torch.optim.Optimizer, number: int) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    state.update({"a": number, "b": torch.ones(2), "c": None, "d": str(number)})


def _in_the_group(optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.param_groups[0]["number"] = number


@pytest.mark.parametrize(
    "note", [_in_the_state, _in_a_parameters_state, _among_many, _in_the_group]
)
@pytest.mark.parametrize("algorithm", FUSED)
def test_a_number_that_changes_every_step_makes_no_plan(
    algorithm: str, note: Callable[[torch.optim.Optimizer, int], None], plans: list[object]
) -> None:
    optimizer = _make(FUSED[algorithm], algorithm)
    optimizer.step()
    note(optimizer, 1000)
    optimizer.step()
    before = len(plans)
    for number in range(1001, 1006):
        note(optimizer, number)
        optimizer.step()
    assert len(plans) == before


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("algorithm", "name"), [("adam", "exp_avg"), ("sgd", "momentum_buffer")])
def test_a_state_that_is_replaced_is_still_noticed(algorithm: str, name: str, many: bool) -> None:
    seen = []
    for make in (FUSED[algorithm], TORCH[algorithm]):
        optimizer = _make(make, algorithm)
        optimizer.step()
        if many:
            _among_many(optimizer, 3)
        optimizer.step()
        for param in optimizer.param_groups[0]["params"]:
            optimizer.state[param][name] = torch.full_like(param.detach(), 2.0)
        optimizer.step()
        optimizer.state[param][name] = None if algorithm == "sgd" else torch.zeros_like(param)
        optimizer.step()
        seen.append([param.detach() for param in optimizer.param_groups[0]["params"]])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [("adam", "exp_avg"), ("adam", "exp_avg_sq"), ("adagrad", "sum"), ("sgd", "momentum_buffer")],
)
def test_tensors_of_the_state_can_be_swapped(algorithm: str, name: str) -> None:
    seen = []
    for make in (FUSED[algorithm], TORCH[algorithm]):
        optimizer = _make(make, algorithm)
        optimizer.step()
        param = optimizer.param_groups[0]["params"][0]
        other = torch.full_like(param.detach(), 0.5)
        torch.utils.swap_tensors(optimizer.state[param][name], other)
        del other
        optimizer.step()
        optimizer.step()
        seen.append([param.detach(), optimizer.state[param][name]])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.cpu_engine  # elsewhere counts are on the device
def test_a_step_count_can_be_swapped() -> None:
    optimizer = FusedAdam(parameters(2))
    optimizer.step()
    param = optimizer.param_groups[0]["params"][0]
    torch.utils.swap_tensors(optimizer.state[param]["step"], torch.tensor(9.0))
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 10


def test_a_failed_load_changes_nothing() -> None:
    params = parameters(2)
    optimizer = FusedAdam(params)
    optimizer.step()
    before = snapshot(optimizer, params)
    groups = optimizer.param_groups
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] = torch.zeros((), device="meta")  # has no value
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups is groups
    assert_unchanged(before, optimizer, params)
    optimizer.step()
    assert all(optimizer.state[param]["step"].item() == 2 for param in params)


@pytest.mark.parametrize("algorithm", FUSED)
def test_a_lazy_clone_of_a_parameter_keeps_its_values(algorithm: str) -> None:
    optimizer = _make(FUSED[algorithm], algorithm)
    optimizer.step()
    for param in optimizer.param_groups[0]["params"]:
        before = param.detach().clone()
        shared = torch._lazy_clone(param.detach())  # of the same memory, until one is written to
        optimizer.step()
        assert torch.equal(shared, before)
        assert not torch.equal(param, before)
