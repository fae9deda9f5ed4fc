"""Zeros, subnormal and overflowing numbers, infinities, NaN, and hyperparameters at their limits.

All elements are independent, so one tensor holds one case each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.optimizers import FUSED, UPDATES, for_loop

# Per dtype: below the smallest normal number; squares that underflow; ordinary ones; squares that
# overflow; the largest number; infinity; NaN.
GRADS = {
    torch.float32: [1e-40, 1e-30, 1e-4, 1.0, 1e15, 1e30, 3e38, float("inf"), float("nan")],
    torch.float64: [1e-310, 1e-200, 1e-4, 1.0, 1e150, 1e200, 1e308, float("inf"), float("nan")],
}


def _assert_as_torch(case: str, ours: Tensor, theirs: Tensor) -> None:
    theirs = theirs.to(ours.dtype)
    for index, (mine, other) in enumerate(zip(ours.flatten(), theirs.flatten(), strict=True)):
        what = f"{case}, element {index}: {mine.item()} where torch has {other.item()}"
        if other.isnan():
            assert mine.isnan(), what
        elif other.isinf():
            assert mine == other, what
        else:
            assert torch.isclose(mine, other, rtol=1e-5, atol=1e-6), what


def _compare(
    algorithm: str,
    options: dict[str, Any],
    grads: list[Tensor],
    device: torch.device,
    start: float = 1.0,
    torch_dtype: torch.dtype | None = None,
) -> None:
    """Steps ours and torch's through `grads` and compares the parameter and its state each time.

    Torch's are of `torch_dtype`, or of the dtype of ours.
    """
    dtypes = (grads[0].dtype, torch_dtype or grads[0].dtype)
    params = [
        nn.Parameter(torch.full_like(grads[0], start, dtype=dtype, device=device))
        for dtype in dtypes
    ]
    ours = FUSED[algorithm]([params[0]], **options)
    theirs = for_loop(algorithm, [params[1]], **options)
    for step, grad in enumerate(grads):
        params[0].grad = grad.to(device)
        params[1].grad = grad.to(device, dtypes[1], copy=True)
        ours.step()
        theirs.step()
        _assert_as_torch(f"parameter after step {step}", params[0].detach(), params[1].detach())
        for key, value in theirs.state.get(params[1], {}).items():
            _assert_as_torch(f"{key} after step {step}", ours.state[params[0]][key], value)


@pytest.mark.parametrize("dtype", GRADS)
@pytest.mark.parametrize("first", [True, False], ids=["at first", "later"])
@pytest.mark.parametrize("update", UPDATES)
def test_unusual_gradients_have_the_effect_they_have_in_torch(
    update: str, first: bool, dtype: torch.dtype, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    values = [0.0, *GRADS[dtype], *(-grad for grad in GRADS[dtype])]
    unusual = torch.tensor(values, dtype=dtype)
    usual = torch.full_like(unusual, 0.5)
    grads = [unusual, usual, usual] if first else [usual, unusual, usual, unusual]
    _compare(algorithm, {"lr": 0.1, **options}, grads, device)


@pytest.mark.parametrize("update", UPDATES)
def test_unusual_parameters_have_the_effect_they_have_in_torch(
    update: str, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    for start in (0.0, -0.0, 1e-40, 3e38, float("inf"), float("nan")):
        grads = [torch.tensor([0.5, -0.5, 0.0])] * 2
        _compare(algorithm, {"lr": 0.1, **options}, grads, device, start)


@pytest.mark.parametrize("update", ["adam", "amsgrad", "adamw"])
def test_an_overflown_second_moment_leaves_the_parameter_finite(
    update: str, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    param = nn.Parameter(torch.ones(3, device=device))
    optimizer = FUSED[algorithm]([param], lr=0.1, **{**options, "weight_decay": 0.0})
    for grad in (1e30, 1.0, 1e30, 0.0):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
        assert optimizer.state[param]["exp_avg_sq"].isinf().all()
        assert (param == 1).all()


def test_a_gradient_whose_weighted_square_is_finite_does_not_overflow(device: torch.device) -> None:
    """(1 - beta2) g * g is in range up to g = 5e20, although g * g is not from 1.8e19.

    In which order torch multiplies in float32 differs between its devices.
    """
    grads = [torch.tensor([3e19, 1e20, 5e20]), torch.ones(3), torch.ones(3)]
    _compare("adam", {"lr": 0.1}, grads, device, torch_dtype=torch.float64)


@pytest.mark.parametrize("beta2", [0.0, 0.3])
def test_a_second_moment_of_short_memory_overflows_to_infinity(
    beta2: float, device: torch.device
) -> None:
    """And stays there, or with no memory at all is NaN: torch multiplies it by zero."""
    grads = [torch.full((3,), 1e30), torch.ones(3), torch.ones(3)]
    _compare("adam", {"lr": 0.1, "betas": (0.9, beta2)}, grads, device)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0), (0.0, 0.0), (0.5, 0.5), (0.3, 0.2)])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e3])
@pytest.mark.parametrize("update", ["adam", "amsgrad_l2", "adamw"])
def test_adam_hyperparameters_at_their_limits(
    update: str, eps: float, betas: tuple[float, float], device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    grads = [torch.tensor([0.5, -2.0, 1e-4]), torch.tensor([0.3, 0.0, 0.0]), torch.zeros(3)]
    _compare(algorithm, {"lr": 0.1, "betas": betas, "eps": eps, **options}, grads, device)


@pytest.mark.parametrize("update", ["adam", "amsgrad", "adagrad"])
def test_zero_over_zero_is_nan_as_in_torch(update: str, device: torch.device) -> None:
    algorithm, options = UPDATES[update]
    options = {**options, "eps": 0.0}
    options.pop("initial_accumulator_value", None)
    _compare(algorithm, {"lr": 0.1, **options}, [torch.tensor([0.0, 0.5])] * 2, device)


@pytest.mark.parametrize("lr", [0.0, 24601.0])
@pytest.mark.parametrize("update", UPDATES)
def test_learning_rates_of_zero_and_of_the_sentinel(
    update: str, lr: float, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    _compare(algorithm, {**options, "lr": lr}, [torch.tensor([0.5, -2.0, 1e-4])], device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_counts_go_on_from_large_ones(dtype: torch.dtype, device: torch.device) -> None:
    """As a float32 count of steps does in torch, ours stops at 2^24."""
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizers = [FUSED["adam"]([params[0]]), for_loop("adam", [params[1]])]
    for param, optimizer in zip(params, optimizers, strict=True):
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.state[param]["step"] = torch.tensor(2.0**24, dtype=dtype)
        optimizer.step()
    expected = 2.0**24 if dtype == torch.float32 else 2.0**24 + 1
    assert all(
        o.state[p]["step"].item() == expected for p, o in zip(params, optimizers, strict=True)
    )
    torch.testing.assert_close(params[0], params[1])
