"""torch.amp.GradScaler without a host that waits for the device."""

from __future__ import annotations

import pytest
import torch

from recap_fast.optim import FusedAdam, FusedSGD
from tests.gpu.helpers import assert_same_bits, everything, spin
from tests.support.optimizers import (
    FUSED,
    SCALE,
    UPDATES,
    grad_scaler,
    parameters,
    set_scaled_grads,
)


def test_the_check_notices_waiting(device: torch.device, no_waiting: None) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device=device).item()


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("algorithm", ["adam", "adagrad", "sgd"])
def test_a_scaled_step_does_not_wait(
    algorithm: str, capturable: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    params = parameters(6, device=device)
    options = {"momentum": 0.9} if algorithm == "sgd" else {}
    optimizer = FUSED[algorithm](
        params, capturable=capturable, step_supports_amp_scaling=True, **options
    )
    scaler = grad_scaler(device)
    for _ in range(2):  # the first builds the plan, with values from the device
        set_scaled_grads(params, 0)
        scaler.step(optimizer)
        scaler.update()
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    for _ in range(3):
        spin()
        spun = torch.cuda.Event()
        spun.record()
        scaler.step(optimizer)
        scaler.update()
        assert not spun.query(), "the host waited for the device"
    torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[params[0]].get("step", torch.tensor(5)).item() == 5


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_a_step_does_not_wait(
    capturable: bool, scaled: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    params = parameters(6, device=device)
    optimizer = FusedAdam(params, capturable=capturable)
    if scaled:
        optimizer.grad_scale = torch.tensor(SCALE, device=device)
        optimizer.found_inf = torch.zeros((), device=device)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    spin()
    spun = torch.cuda.Event()
    spun.record()
    for step in range(5):
        if not capturable:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
    assert not spun.query(), "the host waited for the device"


@pytest.mark.parametrize("update", UPDATES)
def test_scaled_steps_have_the_bits_of_the_cpu(update: str, device: torch.device) -> None:
    """The third of them is skipped: on the device nobody but the kernel knows."""
    algorithm, options = UPDATES[update]
    results = []
    for where in (device, "cpu"):
        params = parameters(4, device=where)
        optimizer = FUSED[algorithm](params, lr=0.1, step_supports_amp_scaling=True, **options)
        scaler = grad_scaler(where)
        for step in range(5):
            set_scaled_grads(params, step)
            if step == 2:
                params[3].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if step == 2:
                scaler.update(SCALE)
        assert scaler.get_scale() == SCALE
        results.append(everything(optimizer, params) + [param.grad for param in params])
    assert_same_bits(*results)


def test_a_skipped_first_step_leaves_the_next_one_the_first(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedSGD(
        params, lr=1.0, momentum=0.9, dampening=0.5, step_supports_amp_scaling=True
    )
    scaler = grad_scaler(device)
    set_scaled_grads(params, 0)
    params[0].grad[0, 0] = float("nan")
    before = [param.detach().clone() for param in params]
    scaler.step(optimizer)
    assert_same_bits([param.detach() for param in params], before)
    scaler.update(SCALE)
    set_scaled_grads(params, 1)
    scaler.step(optimizer)
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)
