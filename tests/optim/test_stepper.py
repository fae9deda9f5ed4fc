"""What a plan changes of the optimizer's state: for a step that is taken, and for no other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from recap_fast._native import native
from recap_fast.optim import FusedAdam, FusedSGD
from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import (
    FUSED,
    assert_unchanged,
    for_loop,
    parameters,
    set_grads,
    snapshot,
)


@pytest.fixture
def after_new_state(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Runs a function once, between the making of new state and the step."""

    def install(function: Callable[[], None]) -> None:
        build, functions = Stepper._build, [function]

        def build_and_run(self: Stepper, new_states: Any = ()) -> Any:
            built = build(self, new_states)
            if len(new_states) > 0 and functions:
                functions.pop()()
            return built

        monkeypatch.setattr(Stepper, "_build", build_and_run)

    return install


@pytest.mark.cpu_engine  # elsewhere the host does not see that it was skipped
def test_a_step_skipped_after_all_makes_no_state(after_new_state: Any) -> None:
    params = parameters(2)
    optimizer = FusedSGD(params, lr=1.0, momentum=0.9, dampening=0.5)
    optimizer.found_inf = torch.zeros(())
    after_new_state(lambda: optimizer.found_inf.fill_(1.0))
    before = snapshot(optimizer, params)
    optimizer.step()
    assert_unchanged(before, optimizer, params)
    optimizer.found_inf.zero_()
    optimizer.step()  # the first, in which a gradient counts whole
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)


@pytest.mark.parametrize("when", ["_new_states", "_build"])
def test_groups_added_under_a_first_step_are_stepped_too(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    params = parameters(3)
    optimizer = FusedAdam(params[:2])
    original = getattr(Stepper, when)

    def and_add(self: Stepper, *args: Any) -> Any:
        made = original(self, *args)
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": params[2:]})
        return made

    monkeypatch.setattr(Stepper, when, and_add)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1, 1]


@pytest.mark.parametrize("entries", [{}, {"momentum_buffer": None}, {"note": 1}])
def test_an_entry_that_was_there_stays_as_it_was(
    entries: dict[str, Any], after_new_state: Any
) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    params = parameters(2)
    optimizer = FusedSGD(params, lr=1.0, momentum=0.9)
    entry = optimizer.state[params[0]]
    entry.update(entries)
    after_new_state(fail)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.state[params[0]] is entry and entry == entries
    assert params[1] not in optimizer.state
    optimizer.step()
    assert torch.equal(entry["momentum_buffer"], params[0].grad)


def test_state_of_parameters_that_have_it_is_not_touched(after_new_state: Any) -> None:
    def fail() -> None:
        raise MemoryError

    params = parameters(2)
    grad, params[1].grad = params[1].grad, None
    optimizer = FusedAdam(params)
    optimizer.step()
    params[1].grad = grad
    before = snapshot(optimizer, params)
    after_new_state(fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize("algorithm", FUSED)
def test_groups_and_parameters_may_be_tuples(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch takes them; and they are no reason to build a plan for every step."""
    builds = []
    keep = Stepper._keep
    monkeypatch.setattr(Stepper, "_keep", lambda *args: (builds.append(1), keep(*args))[1])
    results = []
    for make in (FUSED.__getitem__(algorithm), partial(for_loop, algorithm)):
        params = parameters(3)
        optimizer = make(params, lr=0.1)
        optimizer.param_groups[0]["params"] = tuple(params)
        optimizer.param_groups = tuple(optimizer.param_groups)
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            if step == 1:
                built = len(builds)
        results.append(params)
    assert len(builds) == built
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def _strided(state: dict[str, Any]) -> None:
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()


def _counted_in_a_number(state: dict[str, Any]) -> None:
    state["step"] = int(state["step"])


def _counted_in_half(state: dict[str, Any]) -> None:
    state["step"] = state["step"].half()


TO_ADOPT = [_strided, _counted_in_a_number, _counted_in_half]


def _trained() -> tuple[FusedAdam, list[torch.Tensor]]:
    params = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    optimizer = FusedAdam(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("edit", TO_ADOPT)
def test_to_build_a_plan_changes_nothing(edit: Callable[[dict[str, Any]], None]) -> None:
    """To adopt it does, by a copy with the same values."""
    optimizer, params = _trained()
    edit(optimizer.state[params[0]])
    states = [dict(optimizer.state[param]) for param in params]
    values = copy.deepcopy(states)
    group = optimizer.param_groups[0]
    source = native.GroupSource("adam", "group", group, optimizer.state, ["p", "q"], False)
    plan = native.BoundPlan([source], [optimizer], [], False)
    assert plan.step(None, None) == native.STALE
    for param, state in zip(params, states, strict=True):
        assert all(optimizer.state[param][key] is value for key, value in state.items())
    plan.adopt()
    for param, state in zip(params, values, strict=True):
        for key, value in state.items():
            assert torch.equal(
                torch.as_tensor(value), optimizer.state[param][key].to(torch.as_tensor(value))
            )
    assert plan.step(None, None) == native.STEPPED


@pytest.mark.parametrize("edit", TO_ADOPT)
def test_a_plan_that_is_refused_changes_nothing(edit: Callable[[dict[str, Any]], None]) -> None:
    optimizer, params = _trained()
    edit(optimizer.state[params[0]])
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(5)
    states = [dict(optimizer.state[param]) for param in params]
    with pytest.raises(RuntimeError, match="'exp_avg' of parameter"):
        optimizer.step()
    for param, state in zip(params, states, strict=True):
        assert all(optimizer.state[param][key] is value for key, value in state.items())


def _grow(group: dict[str, Any]) -> None:
    group.update({f"note {i}": i for i in range(50)})


def _shrink(group: dict[str, Any]) -> None:
    for key in [key for key in group if str(key).startswith("note")]:
        del group[key]


def _reorder(group: dict[str, Any]) -> None:
    for key in ("lr", "params"):
        group[key] = group.pop(key)


def _make_anew(group: dict[str, Any]) -> None:
    items = dict(group)
    group.clear()
    group.update(items)


def _number_as_key(group: dict[str, Any]) -> None:
    group[7] = "of no meaning"  # type: ignore[index]


def test_rates_are_read_wherever_the_dict_of_a_group_keeps_them(device: torch.device) -> None:
    param = nn.Parameter(torch.zeros(3, device=device))
    optimizer = FusedSGD([param])
    (group,) = optimizer.param_groups
    expected = 0.0
    for number, change in enumerate(
        [_grow, _shrink, _reorder, _make_anew, _number_as_key, _grow, _shrink, _reorder]
    ):
        change(group)
        for step in range(3):
            group["lr"] = 2.0 ** -(number + step)
            param.grad = torch.ones_like(param)
            optimizer.step()
            expected -= group["lr"]
            assert param.eq(expected).all()


def test_memory_that_a_dict_has_left_is_not_read(device: torch.device) -> None:
    """Where the keys of a dict were there may be smaller ones, and behind them the former items."""
    for _ in range(20):
        param = nn.Parameter(torch.zeros(4, device=device))
        optimizer = FusedSGD([param], lr=1.0)
        (group,) = optimizer.param_groups
        group.update({f"note {i}": i for i in range(80)})
        group.update({f"further {i}": i for i in range(700)})
        for i in range(700):
            del group[f"further {i}"]
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.step()
        items = {**group, "lr": 2.5}
        kept = [bytearray(2900) for _ in range(200)]  # leaves the keys no other place
        group.clear()
        group.update(items)
        before = param.detach().clone()
        optimizer.step()
        assert before.sub(param).eq(2.5).all(), len(kept)
