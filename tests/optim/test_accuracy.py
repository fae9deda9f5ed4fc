"""How far a long run strays from float64 truth, against torch's own kernels.

Parameters start at zero. Started at one, the rounding of the parameter itself, the same for
everyone, would hide all else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.optimizers import FUSED, TORCH, for_loop

ELEMENTS = 40_000
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", {"lr": 1e-3}),
    "adam_l2": ("adam", {"lr": 1e-3, "weight_decay": 0.01}),
    "amsgrad": ("adam", {"lr": 1e-3, "amsgrad": True}),
    "adamw": ("adamw", {"lr": 1e-3, "weight_decay": 0.01}),
    "adagrad": ("adagrad", {"lr": 1e-2}),
    "adagrad_l2": ("adagrad", {"lr": 1e-2, "lr_decay": 1e-3, "weight_decay": 0.01}),
    "sgd": ("sgd", {"lr": 1e-2}),
    "momentum": ("sgd", {"lr": 1e-2, "momentum": 0.9}),
    "nesterov_l2": ("sgd", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
}
# Nobody's errors are the same as another's: these are how much chance moves the ratio of the root
# mean squares and of the maxima of 40,000 errors of equal distribution.
CHANCE_RMS, CHANCE_MAX = 1.01, 1.15


def _errors(
    make: list[Callable[[list[nn.Parameter]], torch.optim.Optimizer]],
    truth: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    dtype: torch.dtype,
    devices: Sequence[torch.device | str],
    checkpoints: tuple[int, ...],
) -> dict[int, list[Tensor]]:
    """The errors of the parameters after some steps, for each optimizer of `make` on its device."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(ELEMENTS, dtype=dtype, device=d)) for d in devices]
    true_param = nn.Parameter(torch.zeros(ELEMENTS, dtype=torch.float64))
    optimizers = [*[m([p]) for m, p in zip(make, params, strict=True)], truth([true_param])]
    errors = {}
    for step in range(1, checkpoints[-1] + 1):
        noise = torch.randn(ELEMENTS, generator=generator)
        grad = (noise * 0.1 + 0.02).to(dtype)
        for param in params:
            param.grad = grad.to(param.device)
        true_param.grad = grad.double()
        for optimizer in optimizers:
            optimizer.step()
        if step in checkpoints:
            errors[step] = [(p.detach().cpu().double() - true_param.detach()).abs() for p in params]
    return errors


@pytest.mark.parametrize("case", OPTIONS)
def test_float32_errors_are_no_larger_than_those_of_torchs_fused_kernels(
    case: str, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """Of those of the CPU on any device: those of CUDA compute in double in between."""
    algorithm, options = OPTIONS[case]
    errors = _errors(
        [
            lambda p: FUSED[algorithm](p, **options),
            lambda p: TORCH[algorithm](p, fused=True, **options),
        ],
        lambda p: for_loop(algorithm, p, **options),
        torch.float32,
        (device, "cpu"),
        checkpoints=(1, 10, 100, 500),
    )
    for step, (ours, theirs) in errors.items():
        rms = (ours.square().mean() / theirs.square().mean()).sqrt().item()
        worst = (ours.max() / theirs.max()).item()
        record_property(f"step {step}", f"rms {rms:.3f} max {worst:.3f}")
        assert rms <= CHANCE_RMS, f"after {step} steps the error is {rms:.3f} times torch's"
        assert worst <= CHANCE_MAX, f"after {step} steps the worst error is {worst:.3f} times"


def test_adams_second_moment_does_not_drift(device: torch.device) -> None:
    """torch's rounded coefficients of exp_avg_sq do not add up to one; ours must."""
    param, true_param = (
        nn.Parameter(torch.zeros(1000, dtype=dtype, device=device))
        for dtype in (torch.float32, torch.float64)
    )
    ours, truth = FUSED["adam"]([param]), for_loop("adam", [true_param])
    param.grad = torch.full_like(param, 0.7)
    true_param.grad = param.grad.double()
    for _ in range(1000):
        ours.step()
        truth.step()
    second = truth.state[true_param]["exp_avg_sq"]
    error = ((ours.state[param]["exp_avg_sq"].double() - second) / second).abs().max().item()
    # Each step rounds once, and forgets a thousandth of what it rounded before: a random walk of
    # some 30 half units, where a drift would be a thousand.
    assert error < 30 * 2**-24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", OPTIONS)
def test_16_bit_errors_are_no_larger_than_those_of_torchs_for_loop(
    case: str, dtype: torch.dtype, device: torch.device
) -> None:
    algorithm, options = OPTIONS[case]
    errors = _errors(
        [
            lambda p: FUSED[algorithm](p, **options),
            lambda p: for_loop(algorithm, p, **options),
        ],
        lambda p: for_loop(algorithm, p, **options),
        dtype,
        (device, "cpu"),
        checkpoints=(1, 10, 50),
    )
    for step, (ours, theirs) in errors.items():
        # torch's loop rounds eps to float16, to zero, and divides by it where the square vanishes.
        assert ours.isfinite().all()
        finite = theirs.isfinite()
        ours, theirs = ours[finite], theirs[finite]
        rms = (ours.square().mean() / theirs.square().mean()).sqrt().item()
        assert rms <= CHANCE_RMS, f"after {step} steps the error is {rms:.3f} times the loop's"
