"""Learning rates that follow schedules on a device: in replayed graphs, and without waiting."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.helpers import Mixed, assert_same_bits, captured, spin
from tests.support.optimizers import scheduled, schedules

STEPS = 40
# Numbers, also of capturable optimizers; tensors that the shim fills; and moved by the step itself.
RATES: dict[str, dict[str, bool]] = {
    "host": {},
    "capturable": {"capturable": True},
    "tensors": {"capturable": True, "tensors": True},
    "device_schedule": {"capturable": True, "device_schedule": True},
}


def test_a_replayed_graph_follows_the_schedules(device: torch.device) -> None:
    configs = list(schedules(stretch=3).values())
    from recap_fast.schedules.compute import compute_lr
    from recap_fast.schedules.device import DeviceRates

    replayed, eager = Mixed(device, 3, capturable=True), Mixed("cpu", 3)
    groups = [group for optimizer in eager.optimizers for group in optimizer.param_groups]
    assert len(groups) == len(configs)
    rates = DeviceRates(dict(enumerate(configs)), device)
    replayed.stepper.move_with([rates])
    graph = None
    for step in range(STEPS):
        expected = [compute_lr(config, step) for config in configs]
        # Within one unit in the last place of float32, and in fact far closer.
        torch.testing.assert_close(rates.rates.tolist(), expected, rtol=2**-24, atol=0.0)
        assert rates.step.item() == step
        if step == 0:
            replayed.set_grads(0)
            replayed.step()
            with captured() as graph:
                replayed.step()
        else:
            replayed.write_grads(step)
            graph.replay()
        for group, rate in zip(groups, expected, strict=True):
            group["lr"] = rate
        eager.set_grads(step)
        eager.step()
    for mine, other in zip(replayed.params, eager.params, strict=True):
        limit = 64 * torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine.detach().cpu(), other.detach(), rtol=limit, atol=limit)


def test_the_shim_and_a_replayed_graph_agree(device: torch.device) -> None:
    optimizer, shim, _ = scheduled(device, stretch=3, **RATES["device_schedule"])
    optimizer.step()
    shim.step()
    with captured() as graph:
        optimizer.step()
    (rates,) = optimizer._device_rates
    for _ in range(STEPS):
        torch.testing.assert_close(rates.rates.tolist(), shim.get_last_lr(), rtol=2**-24, atol=0.0)
        graph.replay()
        shim.step()


@pytest.mark.parametrize("mode", RATES)
def test_a_schedule_does_not_wait(
    mode: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    optimizer, shim, params = scheduled(device, stretch=3, **RATES[mode])
    for _ in range(2):
        optimizer.step()
        shim.step()
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    spin()
    spun = torch.cuda.Event()
    spun.record()
    for _ in range(2, STEPS):
        optimizer.step()
        shim.step()
    assert not spun.query(), "the host waited for the device"
    torch.cuda.set_sync_debug_mode("default")

    optimizer, shim, expected = scheduled("cpu", stretch=3)
    for _ in range(STEPS):
        optimizer.step()
        shim.step()
    if mode == "device_schedule":  # whose rates may differ in the last bits
        torch.testing.assert_close([param.cpu() for param in params], expected)
    else:
        assert_same_bits(params, expected)
