"""What stochastic rounding and master weights are for: small changes count in the mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from recap_fast.optim import FusedAdam, FusedSGD
from tests.support.formats import SHORT, master_of
from tests.support.optimizers import numbers

COUNT = 100_000
# How far between two numbers of 16 bits a result is.
PARTS = [1 / 8192, 0.1, 0.5, 0.75, 1 - 1 / 1024]


def _assert_mean(values: torch.Tensor, lower: float, place: float, part: float) -> None:
    """Each is one of two neighbours, and their mean is right within four standard deviations."""
    assert set(values.unique().tolist()) <= {lower, lower + place}
    deviation = place * math.sqrt(part * (1 - part) / values.numel())
    assert abs(values.double().mean().item() - lower - part * place) < 4 * deviation


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("begin", [1.0, -3.0, 0.0])
@pytest.mark.parametrize("dtype", SHORT)
def test_parameters_are_rounded_without_bias(dtype: torch.dtype, begin: float, part: float) -> None:
    """Also among the subnormal numbers of float16, which begin at zero."""
    if begin == 0 and dtype == torch.bfloat16:
        pytest.skip("float32 is as exact near zero")
    # Of the numbers from `begin` away from zero.
    scale = {0.0: torch.finfo(dtype).smallest_normal, 1.0: 1.0, -3.0: 2.0}[begin]
    place = torch.finfo(dtype).eps * scale
    param = nn.Parameter(torch.full((COUNT,), begin, dtype=dtype))
    # A gradient of one, and a rate that makes the change.
    optimizer = FusedSGD([("w", param)], lr=part * place, stochastic_rounding=True, maximize=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    _assert_mean(param.detach(), begin, place, part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", SHORT)
def test_states_are_rounded_without_bias(dtype: torch.dtype, part: float) -> None:
    place = torch.finfo(dtype).eps
    param = nn.Parameter(torch.zeros(COUNT))
    optimizer = FusedSGD([("w", param)], lr=0.1, momentum=0.5, state_dtype=dtype)
    param.grad = torch.full((COUNT,), 1 + part * place)
    optimizer.step()
    momentum = optimizer.state[param]["momentum_buffer"]
    exact = (param.grad[0].item() - 1) / place  # itself rounded to float32
    _assert_mean(momentum, 1.0, place, exact)


def test_chances_of_parameters_states_and_steps_are_apart() -> None:
    """Equal elements, of which each is rounded by chances of its own."""
    param = nn.Parameter(torch.ones(COUNT, dtype=torch.bfloat16))
    optimizer = FusedAdam([("w", param)], lr=0.3 / 128, amsgrad=True, stochastic_rounding=True)
    drawn = []
    for _ in range(2):
        with torch.no_grad():
            param.fill_(1.0)
        param.grad = torch.full_like(param, 0.7)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if param in optimizer.state:
                optimizer.state[param][name].zero_()
        optimizer.step()
        values = [param.detach(), *list(optimizer.state[param].values())[1:]]
        drawn += [value.double() for value in values if value.unique().numel() == 2]
    assert len(drawn) >= 6
    correlations = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("dtype", SHORT)
def test_the_second_moment_follows_gradients_that_hardly_change(dtype: torch.dtype) -> None:
    """Rounded to nearest, it stops far below them: a step changes it by less than half a place."""
    count, steps = 4096, 3000
    grads = [1 + 0.01 * numbers((count,), seed, torch.float64) for seed in range(32)]
    moments = {}
    for name, options in {"chance": {"state_dtype": dtype}, "nearest": {}}.items():
        param = nn.Parameter(torch.zeros(count, dtype=dtype))
        optimizer = FusedAdam([("w", param)], lr=0.0, betas=(0.9, 0.999), **options)
        own = [grad.to(dtype) for grad in grads]
        for step in range(steps):
            param.grad = own[step % len(own)]
            optimizer.step()
        moments[name] = optimizer.state[param]["exp_avg_sq"].double().mean().item()
    exact = torch.zeros(count, dtype=torch.float64)
    squares = [grad.to(dtype).double().square() for grad in grads]
    for step in range(steps):
        exact.lerp_(squares[step % len(squares)], 0.001)
    expected = exact.mean().item()
    assert moments["chance"] == pytest.approx(expected, rel=0.005)
    assert moments["nearest"] < 0.9 * expected


# --- a weight of one, a gradient of 0.01 and a rate of 1e-4 --------------------------------------


def _moved(dtype: torch.dtype, count: int, **formats: Any) -> tuple[nn.Parameter, FusedAdam]:
    param = nn.Parameter(torch.ones(count, dtype=dtype))
    optimizer = FusedAdam([("w", param)], lr=1e-4, **formats)
    grad = torch.full((count,), 0.01, dtype=torch.bfloat16).to(dtype)
    for _ in range(100):
        param.grad = grad
        optimizer.step()
    return param, optimizer


def test_rounded_to_nearest_it_does_not_move() -> None:
    param, _ = _moved(torch.bfloat16, 16)
    assert param.eq(1).all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_with_a_master_it_moves_as_in_float32(state_dtype: torch.dtype) -> None:
    wide, _ = _moved(torch.float32, 4096, state_dtype=state_dtype)
    param, optimizer = _moved(torch.bfloat16, 4096, state_dtype=state_dtype, master_weights=True)
    # The same chances, since they are of the same name: to the bit.
    assert torch.equal(master_of(param, optimizer.state[param]), wide.detach())
    assert wide.mean().item() == pytest.approx(0.99, abs=2e-4)
    assert torch.equal(param.detach(), wide.detach().bfloat16())


def test_by_chance_it_moves_so_in_the_mean() -> None:
    wide, _ = _moved(torch.float32, 1)
    param, _ = _moved(torch.bfloat16, 16_384, stochastic_rounding=True)
    # A place below one is 2^-8, and each step goes there with a chance of 1e-4 * 2^8.
    deviation = math.sqrt(100 * 1e-4 * 2**-8 / 16_384)
    assert abs(param.double().mean().item() - wide.item()) < 4 * deviation
