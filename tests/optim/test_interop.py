"""The fused optimizers in the hands of torch's own tools."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from tests.support.optimizers import (
    FUSED,
    TORCH,
    UPDATES,
    for_loop,
    parameter,
    same_bits,
    set_grads,
)


@pytest.fixture
def process_group(device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _linear(device: torch.device) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(device)


def _backward(model: nn.Module, seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 3, generator=generator).to(device)).square().mean().backward()


@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum"])
def test_distributed_checkpoints_are_those_of_torch(update: str, device: torch.device) -> None:
    algorithm, options = UPDATES[update]
    ours, theirs = _linear(device), _linear(device)
    optimizers = [FUSED[algorithm](ours.parameters(), **options)]
    optimizers.append(for_loop(algorithm, theirs.parameters(), **options))
    saved = []
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        _backward(model, 0, device)
        optimizer.step()
        saved.append(copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert saved[0]["state"].keys() == saved[1]["state"].keys() == {"weight", "bias"}
    # Into a fresh one, whose state torch makes by a step at a rate of zero.
    resumed = _linear(device)
    resumed.load_state_dict(theirs.state_dict())
    optimizer = FUSED[algorithm](resumed.parameters(), **options)
    set_optimizer_state_dict(resumed, optimizer, saved[1])
    for model, own in ((resumed, optimizer), (theirs, optimizers[1])):
        model.zero_grad()
        _backward(model, 1, device)
        own.step()
    torch.testing.assert_close(resumed.state_dict(), theirs.state_dict())


def test_steps_can_be_taken_in_the_backward_pass(device: torch.device) -> None:
    model, other = _linear(device), _linear(device)
    _apply_optimizer_in_backward(FUSED["adam"], model.parameters(), {"lr": 0.1})
    optimizer = FUSED["adam"](other.parameters(), lr=0.1)
    for seed in range(2):
        _backward(model, seed, device)
        optimizer.zero_grad()
        _backward(other, seed, device)
        optimizer.step()
    assert all(
        same_bits(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_zero_redundancy_optimizer_wraps_it(process_group: None, device: torch.device) -> None:
    model, other = _linear(device), _linear(device)
    wrapper = ZeroRedundancyOptimizer(model.parameters(), FUSED["adam"], lr=0.1)
    optimizer = FUSED["adam"](other.parameters(), lr=0.1)
    for seed in range(3):
        for own in (wrapper, optimizer):
            own.zero_grad()
            own.param_groups[0]["lr"] = 0.1 / (1 + seed)
        _backward(model, seed, device)
        _backward(other, seed, device)
        wrapper.step()
        optimizer.step()
    assert all(
        same_bits(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_step_may_be_part_of_a_compiled_function(device: torch.device) -> None:
    """Dynamo leaves the native call to Python."""
    param = parameter((3,), 0, device=device)
    expected = parameter((3,), 0, device=device)
    optimizer = FUSED["adam"]([param], lr=0.1)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    plain = FUSED["adam"]([expected], lr=0.1)
    for step in range(3):
        set_grads([param], step)
        set_grads([expected], step)
        compiled()
        plain.step()
    assert optimizer.state[param]["step"].item() == 3
    assert same_bits(param, expected)


@pytest.mark.parametrize("update", ["adam", "momentum"])
def test_one_cycle_sets_rate_and_momentum(update: str, device: torch.device) -> None:
    algorithm, options = UPDATES[update]
    params = [parameter((3,), 0, device=device) for _ in range(2)]
    optimizers = [
        make([p], **options)
        for make, p in zip((FUSED[algorithm], TORCH[algorithm]), params, strict=True)
    ]
    schedulers = [OneCycleLR(o, max_lr=0.1, total_steps=6) for o in optimizers]
    for step in range(5):
        for param, optimizer, scheduler in zip(params, optimizers, schedulers, strict=True):
            set_grads([param], step)
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(*params)


def test_reduce_on_plateau(device: torch.device) -> None:
    param = parameter((3,), 0, device=device)
    optimizer = FUSED["sgd"]([param], lr=0.5)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(2):
        scheduler.step(1.0)
    set_grads([param], 0)
    expected = param.detach() - 0.25 * param.grad
    optimizer.step()
    torch.testing.assert_close(param.detach(), expected)


def test_optimizers_of_several_threads_do_not_disturb_each_other(device: torch.device) -> None:
    def train(_: int) -> torch.Tensor:
        torch.set_num_threads(2)
        param = parameter((100_000,), 0, device=device)
        optimizer = FUSED["adam"]([param], lr=0.1)
        for step in range(10):
            set_grads([param], step)
            optimizer.step()
        return param.detach()

    with ThreadPoolExecutor(3) as pool:
        results: list[Any] = list(pool.map(train, range(3)))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_inference_tensors_are_stepped_in_inference_mode(device: torch.device) -> None:
    with torch.inference_mode():
        params = [torch.ones(3, device=device) for _ in range(2)]
        for param, make in zip(params, (FUSED["sgd"], TORCH["sgd"]), strict=True):
            param.grad = torch.full_like(param, 0.5)
            make([param], lr=1.0).step()
    assert torch.equal(*params)
