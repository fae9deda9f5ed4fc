"""A step in the steady state is one launch without copies, counted by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import activity
from benchmarks.workloads import RANKER_36M
from recap_fast.optim import FusedAdam, FusedSGD
from recap_fast.optim.stepper import Stepper
from tests.gpu.helpers import Mixed, captured

STEPS = 5
KERNEL = "update_tiles"


def _assert_launches(seen: activity.Activity, launches: int) -> None:
    assert all(KERNEL in name for name in seen.kernels), seen.kernels
    assert (seen.launches, seen.copies, seen.sets) == (launches, 0, 0)


def _groups(device: torch.device) -> list[dict[str, Any]]:
    """The ranker of 36 M, 128 tensors in 12 groups, each dimension at most 64."""
    groups = []
    for number, shapes in enumerate(RANKER_36M.groups):
        params = []
        for shape in shapes:
            param = nn.Parameter(torch.randn([min(size, 64) for size in shape], device=device))
            param.grad = torch.randn_like(param)
            params.append(param)
        groups.append({"params": params, "lr": 0.01 * (number + 1)})
    return groups


def _host(device: torch.device) -> Callable[[], Any]:
    optimizer = FusedAdam(_groups(device))

    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
            for param in group["params"]:
                param.grad = param.grad.detach()  # as a backward pass: another object
        optimizer.step()

    return step


def _capturable(device: torch.device) -> Callable[[], Any]:
    return FusedAdam(_groups(device), capturable=True).step


def _scaled(device: torch.device) -> Callable[[], Any]:
    """As GradScaler hands them over, and without the launches of torch that unscale gradients."""
    optimizer = FusedAdam(_groups(device), unscale_grads=False)
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    return optimizer.step


def _tensor_rate(device: torch.device) -> Callable[[], Any]:
    rate = torch.tensor(0.1, device=device)
    groups = [{**group, "lr": rate} for group in _groups(device)]
    return FusedAdam(groups, capturable=True).step


def _scheduled(device: torch.device) -> Callable[[], Any]:
    config = pytest.importorskip("recap_fast.config")
    from recap_fast.schedules.device import DeviceRates

    ramp = config.LinearRampToConstant(learning_rate=0.1, num_ramp_steps=100)
    schedule = config.LearningRate(linear_ramp_to_constant=ramp)
    optimizer = FusedAdam(_groups(device), capturable=True)
    stepper = Stepper([optimizer])
    stepper.move_with([DeviceRates(dict.fromkeys(range(12), schedule), device)])

    def step(owner: FusedAdam = optimizer) -> None:  # the stepper does not keep it
        stepper.step(None, None)

    return step


def _mixed(device: torch.device) -> Callable[[], Any]:
    run = Mixed(device)
    run.set_grads(0)
    return run.step


def _mixed_capturable(device: torch.device) -> Callable[[], Any]:
    run = Mixed(device, capturable=True)
    run.set_grads(0)
    return run.step


@pytest.mark.parametrize(
    "make",
    [_host, _capturable, _scaled, _tensor_rate, _scheduled, _mixed, _mixed_capturable],
    ids=lambda make: make.__name__[1:],
)
def test_a_step_is_one_launch_without_copies(
    make: Callable[[torch.device], Callable[[], Any]], device: torch.device
) -> None:
    step = make(device)
    for _ in range(2):
        step()
    _assert_launches(activity.of(step, STEPS), STEPS)


def test_a_replayed_step_is_one_launch_without_copies(device: torch.device) -> None:
    step = _capturable(device)
    step()
    with captured() as graph:
        step()
    graph.replay()
    _assert_launches(activity.of(graph.replay, STEPS), STEPS)


# A launch has room for some 4,000 slots in 12 groups.
@pytest.mark.parametrize(("tensors", "launches"), [(3_900, 1), (7_000, 2), (10_000, 3)])
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_more_slots_than_a_launch_takes(
    tensors: int, launches: int, capturable: bool, device: torch.device
) -> None:
    values = torch.randn(tensors, device=device)
    params = [nn.Parameter(value) for value in values.clone().unbind()]
    grads = torch.randn(tensors, device=device)
    for param, grad in zip(params, grads.unbind(), strict=True):
        param.grad = grad
    groups = [{"params": list(params[number::12])} for number in range(12)]
    optimizer = FusedSGD(groups, lr=0.5, capturable=capturable)
    optimizer.step()
    _assert_launches(activity.of(optimizer.step), launches)
    after = torch.stack([param.detach() for param in params])
    torch.testing.assert_close(after, values - grads, rtol=1e-6, atol=1e-6)


def test_a_step_without_gradients_launches_nothing(device: torch.device) -> None:
    groups = _groups(device)
    optimizer = FusedAdam(groups)
    optimizer.step()
    optimizer.zero_grad()
    _assert_launches(activity.of(optimizer.step), 0)


def test_the_combined_optimizer_is_one_launch(device: torch.device) -> None:
    pytest.importorskip("torchrec")
    from tests.support.optimizers import combined, parameters

    optimizer = combined(parameters(6, device=device))
    for _ in range(2):
        optimizer.step()
    _assert_launches(activity.of(optimizer.step, STEPS), STEPS)
