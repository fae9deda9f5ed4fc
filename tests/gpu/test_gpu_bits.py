"""A step on a CUDA device has the bits of one on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.helpers import Mixed, assert_same_bits, everything
from tests.support.optimizers import DTYPES, FUSED, UPDATES, laid_out, numbers

STEPS = 4

# Around the widths of accesses (16 bytes), what a block does at once (256 of them) and the tile
# (4096 elements); the layouts of the parameter and of its gradient.
CASES = [
    ((), "contiguous", "contiguous"),
    ((0, 3), "contiguous", "contiguous"),
    ((1,), "contiguous", "contiguous"),
    ((7, 3), "contiguous", "contiguous"),
    ((1023,), "contiguous", "contiguous"),
    ((4096,), "contiguous", "contiguous"),
    ((4097,), "contiguous", "contiguous"),
    ((300_007,), "contiguous", "contiguous"),
    ((9_001,), "misaligned", "contiguous"),
    ((9_001,), "contiguous", "misaligned"),
    ((8_192,), "misaligned", "misaligned"),
    ((33, 65), "transposed", "contiguous"),
    ((33, 65), "contiguous", "transposed"),
    ((3, 5, 7, 9), "channels_last", "channels_last"),
    ((3, 5, 7, 9), "channels_last", "contiguous"),
    ((70, 31), "gaps", "contiguous"),
    ((70, 31), "contiguous", "gaps"),
]


def _run(
    update: str, dtype: torch.dtype, device: torch.device | str, **options: Any
) -> list[Tensor]:
    algorithm, own = UPDATES[update]
    params = [
        nn.Parameter(laid_out(numbers(shape, index, dtype, device), layout))
        for index, (shape, layout, _) in enumerate(CASES)
    ]
    optimizer = FUSED[algorithm](params, lr=0.1, **own, **options)
    for step in range(STEPS):
        for index, (param, (shape, _, layout)) in enumerate(zip(params, CASES, strict=True)):
            skipped = (index + step) % 7 == 6
            grad = numbers(shape, 100 * (step + 1) + index, dtype, device)
            param.grad = None if skipped else laid_out(grad, layout)
        optimizer.step()
    return everything(optimizer, params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", UPDATES)
def test_values_from_the_host(update: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_same_bits(_run(update, dtype, device), _run(update, dtype, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", UPDATES)
def test_values_computed_on_the_device(
    update: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_same_bits(_run(update, dtype, device, capturable=True), _run(update, dtype, "cpu"))


def _special(dtype: torch.dtype) -> Tensor:
    """Zeros, the smallest and the largest numbers, infinities and NaN of either sign."""
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps
    magnitudes = [0.0, smallest, 3 * smallest, finfo.tiny, 1e-3, 1.0, finfo.max / 2, finfo.max]
    values = torch.tensor([*magnitudes, float("inf"), float("nan")], dtype=torch.float64)
    return torch.cat([values, -values]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", UPDATES)
def test_special_values(update: str, dtype: torch.dtype, device: torch.device) -> None:
    """Every one as a parameter, beside every one as a gradient; subnormals are not flushed."""
    algorithm, own = UPDATES[update]
    values = _special(dtype)
    results = []
    for where in (device, "cpu"):
        param = nn.Parameter(values.repeat_interleave(len(values)).to(where))
        optimizer = FUSED[algorithm]([param], lr=0.1, **own)
        for _ in range(2):
            param.grad = values.repeat(len(values)).to(where)
            optimizer.step()
        results.append(everything(optimizer, [param]))
    assert_same_bits(*results)


def test_many_steps(device: torch.device) -> None:
    """Bias corrections of large step counts, all algorithms and dtypes in one launch."""
    runs = [Mixed(device), Mixed(device, capturable=True), Mixed("cpu")]
    for step in range(120):
        for run in runs:
            run.set_grads(step % 5)
            run.step()
    for run in runs[:2]:
        assert_same_bits(run.tensors(), runs[2].tensors())


def test_steps_on_the_device_repeat_bit_by_bit(device: torch.device) -> None:
    results = []
    for _ in range(2):
        param = nn.Parameter(numbers((1_000_003,), 0, torch.float32, device))
        optimizer = FUSED["adam"]([param])
        for step in range(10):
            param.grad = numbers((1_000_003,), step % 2, torch.float32, device)
            optimizer.step()
        results.append(everything(optimizer, [param]))
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tensor_of_more_than_2_to_the_31_elements(
    dtype: torch.dtype, device: torch.device
) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < 20e9:
        pytest.skip("needs 20 GB of free memory on the device")
    size = 2**31 + 4099
    # Whole numbers below 251, exact in both dtypes as are their halves; 251 is prime, so that no
    # tile begins where another did.
    grad = torch.arange(251, device=device, dtype=dtype).repeat(size // 251 + 1)[:size]
    param = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
    param.grad = grad
    FUSED["sgd"]([param], lr=0.5).step()
    expected = grad.mul_(-0.5).add_(1)
    for begin in range(0, size, 2**28):  # in parts, for the memory that a comparison takes
        part = slice(begin, begin + 2**28)
        assert torch.equal(param.detach()[part], expected[part]), f"after element {begin}"
    del param, grad, expected
    torch.cuda.empty_cache()
