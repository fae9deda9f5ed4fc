"""What a step that is given a scale leaves in `.grad`: the gradient divided by it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recap_fast.optim import FusedAdam, FusedSGD
from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import (
    DTYPES,
    FUSED,
    LAYOUTS,
    grad_scaler,
    laid_out,
    numbers,
    parameter,
    parameters,
    same_bits,
    set_grads,
)

# Its reciprocal is not a float32 number.
SCALE = 3.0 * 2**8


def _step(
    params: list[nn.Parameter], found: float | None = 0.0, scale: float = SCALE, **options: bool
) -> None:
    optimizer = FusedSGD(params, lr=1.0, **options)
    device = params[0].device
    optimizer.grad_scale = torch.full((), scale, device=device)
    optimizer.found_inf = None if found is None else torch.full((), found, device=device)
    optimizer.step()


def _unscaled(grad: Tensor, scale: float = SCALE) -> Tensor:
    """As torch.amp.GradScaler does it: times the float32 reciprocal, rounded once."""
    inverse = torch.tensor(1 / scale, dtype=torch.float32, device=grad.device)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return (grad.to(wide) * inverse.to(wide)).to(grad.dtype)


@pytest.mark.parametrize("found", [0.0, None], ids=["found_inf", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_any_kind_are_unscaled_in_place(
    dtype: torch.dtype, layout: str, found: float | None, device: torch.device
) -> None:
    shapes = [(), (1,), (0, 3), (5,), (2, 3, 4, 5), (4099,)]
    for own_layout in ("contiguous", layout):
        params, grads = [], []
        for seed, shape in enumerate(shapes):
            param = parameter(shape, seed, dtype, device, own_layout)
            values = numbers(shape, 100 + seed, torch.float64, device) * SCALE
            param.grad = laid_out(values.to(dtype), layout)
            params.append(param)
            grads.append(param.grad)
        expected = [_unscaled(grad) for grad in grads]
        # The step divides by itself, without the rounding that a 16-bit gradient takes in memory.
        stepped = [
            (param.detach().double() - param.grad.double() / SCALE).to(dtype) for param in params
        ]
        _step(params, found)
        for param, grad, unscaled, new in zip(params, grads, expected, stepped, strict=True):
            assert param.grad is grad
            assert same_bits(grad, unscaled)
            torch.testing.assert_close(param.detach(), new)


def test_a_gradient_that_two_parameters_share_is_unscaled_once(device: torch.device) -> None:
    params = [parameter((3, 4), seed, device=device) for seed in range(3)]
    shared = numbers((3, 4), 9, torch.float32, device) * SCALE
    expected = _unscaled(shared)
    params[0].grad = params[1].grad = shared
    params[2].grad = shared.view(4, 3).view(3, 4)  # another tensor over the same memory
    _step(params)
    assert all(same_bits(param.grad, expected) for param in params)


def test_gradients_that_overlap_are_unscaled_once(device: torch.device) -> None:
    memory = numbers((20,), 9, torch.float32, device) * SCALE
    expected = _unscaled(memory)
    # 0 to 12 and 4 to 8 and 10 to 14, side by side with 14 to 18 and every second from 15 on.
    grads = [
        memory[0:12],
        memory[4:8],
        memory[10:14],
        memory[14:18],
        memory[15::2],
        memory.as_strided((2, 3), (1, 1)),
    ]
    params = [parameter(grad.shape, seed, device=device) for seed, grad in enumerate(grads)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    untouched = memory[18].clone()
    _step(params)
    written = torch.ones(20, dtype=torch.bool)
    written[18] = False
    assert same_bits(memory[written], expected[written])
    assert same_bits(memory[18], untouched)


def test_gradients_side_by_side_in_one_buffer(device: torch.device) -> None:
    """As DistributedDataParallel has them, with gradient_as_bucket_view."""
    bucket = numbers((30,), 9, torch.float32, device) * SCALE
    expected = _unscaled(bucket)
    params = [parameter((size,), size, device=device) for size in (10, 4, 16)]
    for param, grad in zip(params, bucket.split([10, 4, 16]), strict=True):
        param.grad = grad
    _step(params)
    assert same_bits(bucket, expected)


def _expanded(device: torch.device) -> Tensor:
    return torch.tensor([[7.0], [9.0]], device=device).expand(2, 3)


def _requires_grad(device: torch.device) -> Tensor:
    return torch.full((2, 3), 7.0, device=device, requires_grad=True) * 2.0


def _of_inference_mode(device: torch.device) -> Tensor:
    with torch.inference_mode():
        return torch.full((2, 3), 7.0, device=device)


def _negated(device: torch.device) -> Tensor:
    return torch.complex(torch.ones(2, 3), torch.full((2, 3), 7.0)).to(device).conj().imag


def _zero(device: torch.device) -> Tensor:
    return torch._efficientzerotensor((2, 3), device=device)


@pytest.mark.parametrize("make", [_expanded, _requires_grad, _of_inference_mode, _negated, _zero])
def test_gradients_that_torch_would_not_write_everywhere(
    make: Callable[[torch.device], Tensor], device: torch.device
) -> None:
    param = parameter((2, 3), 0, device=device)
    before = param.detach().clone()
    param.grad = make(device)
    expected = _unscaled(param.grad.detach().clone())
    _step([param])
    assert torch.equal(param.grad, expected)
    torch.testing.assert_close(param.detach(), before - expected)


@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_versions_of_gradients_count_it(layout: str, device: torch.device) -> None:
    param = parameter((2, 3), 0, device=device)
    param.grad = laid_out(torch.ones(2, 3, device=device), layout)
    weight = torch.ones(2, 3, device=device, requires_grad=True)
    product = (weight * param.grad).sum()  # autograd keeps the gradient, to multiply by it
    version = param.grad._version
    _step([param])
    assert param.grad._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("algorithm", FUSED)
def test_a_skipped_step_leaves_them_as_torchs_fused_step_does(
    algorithm: str, device: torch.device
) -> None:
    param = parameter((2, 3), 0, device=device)
    param.grad = numbers((2, 3), 1, torch.float32, device)
    before = param.detach().clone(), param.grad.clone()
    for optimizer in (
        FUSED[algorithm]([param]),
        *([torch.optim.Adam([param], fused=True)] if algorithm == "adam" else []),
    ):
        optimizer.grad_scale = torch.full((), SCALE, device=device)
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()
        assert same_bits(param, before[0]) and same_bits(param.grad, before[1])


def test_they_stay_scaled_if_asked_to(device: torch.device) -> None:
    params = parameters(3, device=device)
    before = [param.grad.clone() for param in params]
    versions = [param.grad._version for param in params]
    _step(params, unscale_grads=False)
    for param, grad, version in zip(params, before, versions, strict=True):
        assert same_bits(param.grad, grad) and param.grad._version == version


def test_clipping_by_the_step_does_not_show_in_them(device: torch.device) -> None:
    params = parameters(4, device=device)
    for param in params:
        param.grad.mul_(SCALE)
    expected = [_unscaled(param.grad) for param in params]
    optimizer = FusedAdam(params)
    stepper = Stepper([optimizer], max_norm=1e-3)
    scale, found = torch.full((), SCALE, device=device), torch.zeros((), device=device)
    stepper.step(scale, found, unscale_grads=True)
    assert all(same_bits(param.grad, want) for param, want in zip(params, expected, strict=True))
    params[1].grad[0, 0] = float("inf")
    before = [param.grad.clone() for param in params]
    stepper.step(scale, found, unscale_grads=True)  # skipped for the norm's sake
    assert all(same_bits(param.grad, old) for param, old in zip(params, before, strict=True))


def test_a_gradient_that_is_refused_leaves_all_scaled(device: torch.device) -> None:
    params = parameters(2, device=device)
    params[1].grad = params[1].grad.to_sparse()
    before = params[0].grad.clone()
    with pytest.raises(RuntimeError, match="sparse"):
        _step(params)
    assert same_bits(params[0].grad, before)


def test_a_scale_that_the_user_sets_is_multiplied_by_the_scalers(device: torch.device) -> None:
    """As when gradients are a sum over micro-batches, and a step is to take their mean."""
    params = parameters(2, device=device)
    expected = [_unscaled(param.grad * 2**10, 2.0**12) for param in params]
    optimizer = FusedSGD(params, lr=1.0, step_supports_amp_scaling=True)
    optimizer.grad_scale = torch.full((), 4.0, device=device)
    for param in params:
        param.grad.mul_(2.0**10)
    grad_scaler(device, 2.0**10).step(optimizer)
    assert all(same_bits(param.grad, want) for param, want in zip(params, expected, strict=True))


def test_no_scale_no_pass(device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = FusedAdam(params)
    for seed in range(2):
        set_grads(params, seed)
        grads = [param.grad.clone() for param in params]
        versions = [param.grad._version for param in params]
        optimizer.found_inf = torch.zeros((), device=device)  # without a scale
        optimizer.step()
        for param, grad, version in zip(params, grads, versions, strict=True):
            assert same_bits(param.grad, grad) and param.grad._version == version


def test_a_step_warns_of_nothing(device: torch.device) -> None:
    params = parameters(2, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(params)
