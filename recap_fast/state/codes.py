"""States of 8 bits: a code for each element, and a scale for each block of 128.

The native step defines them, in ``csrc/numerics/codes.h``: a code is a floating point number of 4
bits of exponent, without a sign and with 4 bits of mantissa where states are never negative, else
with a sign and 3 bits. Its value is multiplied by the scale of its block.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

EIGHT_BITS: Final = "8bit"
"""What `state_dtype` is for such states."""

ELEMENTS_OF_SCALE: Final = 128

FEWEST: Final = 4096
"""Elements of a parameter that has such states; those of smaller ones are float32."""

NEVER_NEGATIVE: Final = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
_OTHERS: Final = frozenset({"exp_avg", "grad_avg", "momentum_buffer"})
_LEAST_SCALE: Final = 2.0**-120  # whose reciprocal is finite

SCALES: Final = frozenset(f"{name}_scale" for name in NEVER_NEGATIVE | _OTHERS)
"""Names of scales in a parameter's state."""


def scale_name(state: str) -> str:
    """The entry beside ``state`` with its scales: float32, one for each block, of one dimension."""
    return f"{state}_scale"


def takes_codes(param: Tensor) -> bool:
    """Whether a parameter with ``state_dtype="8bit"`` has codes, or float32.

    Blocks follow each other in memory, so that it must be contiguous.
    """
    return param.numel() >= FEWEST and param.is_contiguous()


def scale_count(param: Tensor) -> int:
    """How many blocks a parameter has; the last may have fewer elements."""
    return -(-param.numel() // ELEMENTS_OF_SCALE)


def new_code(value: float) -> tuple[int, float]:
    """Code and scale of states that are ``value``, 0 or more, before the first step."""
    return (255, value / 1.9375) if value else (0, 0.0)


def is_encoded(entries: Any, name: str) -> bool:
    """Whether the state ``name`` in ``entries`` is of codes, with their scales beside them."""
    codes = entries.get(name)
    return (
        isinstance(codes, Tensor)
        and codes.dtype == torch.uint8
        and isinstance(entries.get(scale_name(name)), Tensor)
    )


def decoded(name: str, codes: Tensor, scales: Tensor) -> Tensor:
    """Returns the float32 values of the state ``name``, exactly, in the shape of ``codes``."""
    values = _values(name).to(codes.device)[codes.reshape(-1).long()]
    return (values * _of_elements(scales, codes.numel())).reshape(codes.shape)


def encoded(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of the state ``name``, rounded to nearest.

    Args:
        name: of the state.
        values: a floating point tensor of any shape.
    """
    flat = values.detach().reshape(-1).float()
    magnitudes = flat.abs()
    table = _values(name).to(values.device)
    sizes = table if name in NEVER_NEGATIVE else table[:128]
    scales = scales_of(name, flat)
    shares = magnitudes / _of_elements(scales, flat.numel())
    codes = torch.bucketize(shares, (sizes[1:] + sizes[:-1]) / 2)
    if name in NEVER_NEGATIVE:
        # A second moment that becomes zero would make a step as large as eps allows.
        codes = codes.maximum((magnitudes > 0).long())
    else:
        codes += 128 * flat.signbit()
    return codes.to(torch.uint8).view(values.shape), scales


def scales_of(name: str, flat: Tensor) -> Tensor:
    """Returns the scales of the float32 values of a state, of one dimension.

    That of a block with a NaN or an infinity is NaN.
    """
    padding = -flat.numel() % ELEMENTS_OF_SCALE
    blocks = torch.nn.functional.pad(flat.abs(), (0, padding)).view(-1, ELEMENTS_OF_SCALE)
    largest = 1.9375 if name in NEVER_NEGATIVE else 1.875
    part = torch.tensor(largest).reciprocal().to(flat.device)
    scales = (blocks.amax(1) * part).clamp_(min=_LEAST_SCALE)
    return torch.where(scales.isfinite(), scales, torch.nan)


def _of_elements(scales: Tensor, count: int) -> Tensor:
    return scales.repeat_interleave(ELEMENTS_OF_SCALE)[:count]


@cache
def _values(name: str) -> Tensor:
    """By code, before the scale."""
    if name in NEVER_NEGATIVE:
        return _minifloats(4)
    sizes = _minifloats(3)
    return torch.cat([sizes, -sizes])


def _minifloats(mantissa: int) -> Tensor:
    """0, and those of 4 bits of exponent that are less than 2, in their order."""
    code = torch.arange(16 << mantissa)
    part = 1 + (code % 2**mantissa) / 2**mantissa
    values: Tensor = part * 2.0 ** ((code >> mantissa) - 15)
    values[0] = 0
    return values
