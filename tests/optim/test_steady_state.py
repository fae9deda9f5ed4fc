"""What a step costs once its plan is made, counted in calls and not in seconds.

One call into the extension, and Python's work does not grow with parameters: these are what make a
step fast, and easily lost.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from recap_fast._native import native
from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import (
    FUSED,
    LAYOUTS,
    UPDATES,
    combine,
    numbers,
    parameter,
    parameters,
    set_grads,
    wrapped,
)

if TYPE_CHECKING:
    from recap_fast.keyed.fused import FusedCombinedOptimizer


def _extension_calls(action: Callable[[], object]) -> list[str]:
    """The functions and methods of the extension that are called, constructors too.

    Each is wrapped by one that counts. A profiler would not do: CPython 3.12.0 to 3.12.4 does not
    tell it of methods that are bound builtins.
    """
    seen: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(native).items()):
            if not isinstance(value, type):
                if callable(value):
                    patch.setattr(native, name, counting(name, value))
                continue
            for method in vars(value):
                if method == "__init__" or (
                    not method.startswith("__") and callable(getattr(value, method))
                ):
                    wrapper = counting(f"{name}.{method}", getattr(value, method))
                    patch.setattr(value, method, wrapper)
        action()
    return seen


def _calls(action: Callable[[], object]) -> Counter[str]:
    """The names of all functions called, as far as a profiler sees them: `python:` or `c:NAME`."""
    seen: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen[f"python:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            seen[f"c:{argument.__name__}"] += 1

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    del seen["c:setprofile"]
    return seen


def _instructions(action: Callable[[], object]) -> int:
    """How many of Python's instructions are executed."""
    executed = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal executed
        frame.f_trace_opcodes = True
        executed += event == "opcode"
        return trace

    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks whether any frame has it, just now
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return executed


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Stepper]:
    """Grows by one whenever a stepper builds a plan."""
    seen: list[Stepper] = []
    build = Stepper._build

    def counting(self: Stepper, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return build(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "_build", counting)
    return seen


def _combined(
    groups: int, params_per_group: int, device: torch.device
) -> tuple[FusedCombinedOptimizer, list[nn.Parameter]]:
    names = list(UPDATES)
    params: list[nn.Parameter] = []
    parts = []
    for index in range(groups):
        algorithm, options = UPDATES[names[index % len(names)]]
        own = {str(i): parameter((3, 2), i, device=device) for i in range(params_per_group)}
        params += own.values()
        parts.append((str(index), wrapped(own, algorithm, **options)))
    return combine(parts), params


@pytest.mark.parametrize("update", UPDATES)
def test_a_step_is_one_native_call(update: str, device: torch.device) -> None:
    algorithm, options = UPDATES[update]
    params = parameters(3, device=device)
    optimizer = FUSED[algorithm](params, **options)
    optimizer.step()
    assert _extension_calls(optimizer.step) == ["BoundPlan.step_plainly"]


def test_calls_into_the_extension_are_counted(device: torch.device) -> None:
    optimizer = FUSED["adam"](parameters(3, device=device))
    calls = _extension_calls(optimizer.step)  # the first, which builds a plan
    assert {"GroupSource.__init__", "BoundPlan.__init__", "BoundPlan.step"} <= set(calls)
    assert len(_extension_calls(lambda: [optimizer.step() for _ in range(3)])) == 3


def test_a_step_of_many_groups_is_one_native_call(device: torch.device) -> None:
    optimizer, params = _combined(groups=30, params_per_group=2, device=device)
    set_grads(params, 0)
    optimizer.step()
    assert _extension_calls(optimizer.step) == ["BoundPlan.step_plainly"]


def test_calls_do_not_grow_with_parameters(device: torch.device) -> None:
    counts = []
    for params_per_group in (1, 50):
        optimizer, params = _combined(4, params_per_group, device)
        set_grads(params, 0)
        optimizer.step()
        counts.append(_calls(optimizer.step))
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) < 60


def test_no_parameter_is_touched_from_python(device: torch.device) -> None:
    """Reading an attribute of each would be an instruction for each."""
    executed = []
    for params_per_group in (1, 50):
        optimizer, params = _combined(4, params_per_group, device)
        set_grads(params, 0)
        optimizer.step()
        executed.append(_instructions(optimizer.step))
    assert executed[0] == executed[1]
    assert 0 < executed[0] < 1000


def test_a_group_costs_python_a_few_instructions(device: torch.device) -> None:
    executed = []
    for groups in (1, 41):
        optimizer, params = _combined(groups, 2, device)
        set_grads(params, 0)
        optimizer.step()
        executed.append(_instructions(optimizer.step))
    assert executed[1] - executed[0] <= 40 * 25


def test_python_functions_called_do_not_grow_with_groups(device: torch.device) -> None:
    counts = []
    for groups in (1, 40):
        optimizer, params = _combined(groups, 2, device)
        set_grads(params, 0)
        optimizer.step()
        calls = _calls(optimizer.step)
        counts.append({k: v for k, v in calls.items() if k.startswith("python:")})
    assert counts[0] == counts[1]


def test_hooks_do_not_make_the_native_call_more_than_one(device: torch.device) -> None:
    optimizer, params = _combined(3, 2, device)
    set_grads(params, 0)
    for _, part in optimizer.optimizers:
        part._optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step()
    # The first only finds the hooks.
    assert _extension_calls(optimizer.step) == ["BoundPlan.step_plainly", "BoundPlan.step"]


# --- when the plan is built ----------------------------------------------------------------------


def _new_gradients(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    set_grads(params, 7)


def _zeroed_gradients(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


def _some_without(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[0].grad = None


def _other_strides(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[0].grad = LAYOUTS["transposed"](params[0].grad)


def _new_rate(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5


def _new_hyperparameters(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0].update(betas=(0.5, 0.6), eps=0.1, weight_decay=0.3, maximize=True)


def _values_in_place(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        params[0].mul_(2)
    optimizer.state[params[0]]["exp_avg"].zero_()
    optimizer.state[params[0]]["step"].fill_(9)


def _saved(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state_dict()


def _put_back(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """The items are the same again, but the dicts have been changed."""
    entries = optimizer.state[params[-1]]
    entries["exp_avg_sq"] = entries.pop("exp_avg_sq")
    optimizer.state[params[-1]] = optimizer.state.pop(params[-1])


@pytest.mark.parametrize(
    "change",
    [
        _new_gradients,
        _zeroed_gradients,
        _some_without,
        _other_strides,
        _new_rate,
        _new_hyperparameters,
        _values_in_place,
        _saved,
        _put_back,
    ],
)
def test_what_changes_in_training_does_not_rebuild_the_plan(
    change: Any, builds: list[Stepper], device: torch.device
) -> None:
    params = parameters(3, device=device)
    optimizer = FUSED["adam"](params)
    optimizer.step()
    built = len(builds)
    for _ in range(3):
        change(params, optimizer)
        optimizer.step()
    assert len(builds) == built


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_memory_layout_rebuilds_the_plan(
    layout: str, builds: list[Stepper], device: torch.device
) -> None:
    params = [parameter((2, 3, 4, 5), i, device=device, layout=layout) for i in range(2)]
    optimizer = FUSED["adam"](params)
    set_grads(params, 0)
    optimizer.step()
    built = len(builds)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    assert len(builds) == built


def test_a_scheduler_does_not_rebuild_the_plan(builds: list[Stepper], device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FUSED["adam"](params)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    built = len(builds)
    for _ in range(3):
        scheduler.step()
        optimizer.step()
    assert len(builds) == built


@pytest.mark.parametrize("update", ["adam", "adagrad", "sgd", "momentum"])
def test_the_first_step_builds_the_plan_at_most_twice(
    update: str, builds: list[Stepper], device: torch.device
) -> None:
    """Once to find which states are missing, once with them."""
    algorithm, options = UPDATES[update]
    FUSED[algorithm](parameters(3, device=device), **options).step()
    assert len(builds) <= 2


def test_a_change_of_layout_rebuilds_the_plan_once(
    builds: list[Stepper], device: torch.device
) -> None:
    params = parameters(2, device=device)
    optimizer = FUSED["adam"](params)
    optimizer.step()
    built = len(builds)
    params[0].data = params[0].data.clone()
    optimizer.step()
    optimizer.step()
    assert len(builds) == built + 1


def test_steps_keep_no_python_object(device: torch.device) -> None:
    optimizer, params = _combined(4, 5, device)
    set_grads(params, 0)
    for _ in range(3):
        optimizer.step()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(1000):
        optimizer.step()
    gc.collect()
    assert sys.getallocatedblocks() - before < 100  # a leak would be 1000 at least


def test_a_step_allocates_no_tensor(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("counts allocations of the CPU")
    params = [nn.Parameter(numbers((1000,), i, torch.float32, device)) for i in range(3)]
    optimizer = FUSED["adam"](params)
    set_grads(params, 0)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profiler:
        optimizer.step()
    allocated = [event for event in profiler.events() if event.cpu_memory_usage > 0]
    assert not allocated
