"""Learning rates that follow schedules on a device: in replayed graphs, and without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.helpers import Mixed, assert_same_bits, captured, spin
from tests.optim.helpers import parameters, schedules, wrapped

STEPS = 40
ALGORITHMS = ("adam", "adagrad", "sgd", "adamw")


def test_a_replayed_graph_follows_the_schedules(device: torch.device) -> None:
    configs = list(schedules(stretch=3).values())
    from recap_fast.device_rates import DeviceRates
    from recap_fast.schedules import compute_lr

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
        assert rates.epoch.item() == step
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


def _with_shim(device: torch.device | str, mode: str) -> tuple[Any, Any, list[Any]]:
    """Four parameters, each with an algorithm and a schedule of its own.

    Args:
        device: where they are.
        mode: the rates are numbers ("host"), numbers of capturable optimizers ("capturable"),
            tensors that the shim fills ("tensors"), or follow "device_schedule".
    """
    pytest.importorskip("torchrec")
    from recap_fast.optim.combined import FusedCombinedOptimizer
    from recap_fast.shim import RecapLRShim

    params = parameters(len(ALGORITHMS), device=device)
    parts = []
    for algorithm, param in zip(ALGORITHMS, params, strict=True):
        options: dict[str, Any] = {} if mode == "host" else {"capturable": True}
        if mode == "tensors":
            options["lr"] = torch.zeros((), dtype=torch.float64, device=device)
        parts.append((algorithm, wrapped({"x": param}, algorithm, **options)))
    optimizer = FusedCombinedOptimizer(parts)
    shim = RecapLRShim(optimizer, schedules(stretch=3), device_schedule=mode == "device_schedule")
    return optimizer, shim, params


def test_the_shim_and_a_replayed_graph_agree(device: torch.device) -> None:
    optimizer, shim, _ = _with_shim(device, "device_schedule")
    optimizer.step()
    shim.step()
    with captured() as graph:
        optimizer.step()
    (rates,) = optimizer._device_rates
    for _ in range(STEPS):
        torch.testing.assert_close(rates.rates.tolist(), shim.get_last_lr(), rtol=2**-24, atol=0.0)
        graph.replay()
        shim.step()


@pytest.mark.parametrize("mode", ["host", "capturable", "tensors", "device_schedule"])
def test_a_schedule_does_not_wait(
    mode: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    optimizer, shim, params = _with_shim(device, mode)
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

    optimizer, shim, expected = _with_shim("cpu", "host")
    for _ in range(STEPS):
        optimizer.step()
        shim.step()
    if mode == "device_schedule":  # whose rates may differ in the last bits
        torch.testing.assert_close([param.cpu() for param in params], expected)
    else:
        assert_same_bits(params, expected)
