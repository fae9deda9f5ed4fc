"""What a round of the fuzz draws: options, parameters and gradients, all from one `Random`."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.optimizers import DTYPES, LAYOUTS, laid_out, numbers

_POOL = numbers((1 << 15,), 0, torch.float64)  # drawn once: values are cut out of it

# Around the widths of vectors, then the engine's 16-bit block (512) and its tile (8192).
_SMALL = [
    *[(), (0,), (1,), (3, 0), (1, 1), (2,), (5,), (7,), (8,), (9,), (15,), (16,), (17,), (31,)],
    *[
        (32,),
        (33,),
        (63,),
        (65,),
        (3, 5),
        (1, 6),
        (6, 1),
        (4, 8),
        (7, 1, 3),
        (2, 3, 4, 5),
        (11, 13),
    ],
]
_LARGE = [(511,), (512,), (513,), (1025,), (61, 67), (8191,), (8192,), (8193,), (2, 8, 33, 17)]

RATES = [0.0, 1e-3, 0.1, 1, 1.0]
_DECAYS = [0, 0.0, 0.01]  # larger ones would let a sum with a gradient cancel more often
_BETAS = [0.0, 0.3, 0.5, 0.9, 0.999]
_EPS = [1e-10, 1e-8, 1e-3]

_ADAM = {
    "betas": lambda draw: (draw.choice(_BETAS), draw.choice(_BETAS)),
    "eps": lambda draw: draw.choice(_EPS),
    "weight_decay": lambda draw: draw.choice(_DECAYS),
    "amsgrad": lambda draw: draw.random() < 0.3,
    "maximize": lambda draw: draw.random() < 0.3,
}
# How to draw each option but `lr`. All of them may change in the course of a training.
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {**_ADAM, "decoupled_weight_decay": lambda draw: draw.random() < 0.2},
    "adamw": _ADAM,
    "adagrad": {
        "lr_decay": lambda draw: draw.choice([0, 0.0, 0.3]),
        "weight_decay": lambda draw: draw.choice(_DECAYS),
        "initial_accumulator_value": lambda draw: draw.choice([0, 0.0, 0.5]),
        "eps": lambda draw: draw.choice(_EPS),
        "maximize": lambda draw: draw.random() < 0.3,
    },
    "rmsprop": {
        # Not 0: the variance is 0 then, which torch rounds to less, and the root of that is NaN.
        "alpha": lambda draw: draw.choice(_BETAS[1:]),
        "eps": lambda draw: draw.choice(_EPS),
        "weight_decay": lambda draw: draw.choice(_DECAYS),
        "momentum": lambda draw: draw.choice([0, 0.0, 0.5, 0.9]),
        "centered": lambda draw: draw.random() < 0.3,
        "maximize": lambda draw: draw.random() < 0.3,
    },
    "lion": {
        "betas": lambda draw: (draw.choice(_BETAS), draw.choice(_BETAS)),
        "weight_decay": lambda draw: draw.choice(_DECAYS),
        "maximize": lambda draw: draw.random() < 0.3,
    },
    "sgd": {
        "momentum": lambda draw: draw.choice([0, 0.0, 0.5, 0.9]),
        "dampening": lambda draw: draw.choice([0, 0.0, 0.3]),
        "weight_decay": lambda draw: draw.choice(_DECAYS),
        "nesterov": lambda draw: draw.random() < 0.3,
        "maximize": lambda draw: draw.random() < 0.3,
    },
}


def draw_rate(draw: Random) -> float | Tensor:
    rate = draw.choice(RATES)
    if draw.random() < 0.7:
        return rate
    dtype = draw.choice([torch.float32, torch.float64])
    return torch.tensor([rate] if draw.random() < 0.3 else rate, dtype=dtype)


def draw_options(draw: Random, algorithm: str) -> dict[str, Any]:
    """Arguments of a constructor or a param group, some left to their defaults."""
    options = {key: of(draw) for key, of in OPTIONS[algorithm].items() if draw.random() < 0.7}
    if options.get("nesterov"):  # what the constructor asks for
        options.update(momentum=0.9, dampening=0)
    if draw.random() < 0.9:
        options["lr"] = draw_rate(draw)
    return options


def draw_shape(draw: Random) -> tuple[int, ...]:
    return draw.choice(_LARGE if draw.random() < 0.02 else _SMALL)


def draw_values(draw: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of either sign and of magnitude 0.1 to 2.1."""
    count = 1
    for size in shape:
        count *= size
    start = draw.randrange(len(_POOL) - count)
    return _POOL[start : start + count].to(dtype, copy=True).view(shape)


def draw_parameter(draw: Random) -> nn.Parameter:
    values = draw_values(draw, draw_shape(draw), draw.choice(DTYPES))
    return nn.Parameter(laid_out(values, draw.choice(list(LAYOUTS))))


def draw_flat_parameters(draw: Random, count: int) -> list[nn.Parameter]:
    """Side by side in one storage, as DDP and FSDP keep them, some elements apart."""
    dtype = draw.choice(DTYPES)
    values = [draw_values(draw, draw_shape(draw), dtype) for _ in range(count)]
    room = torch.zeros(sum(each.numel() + 2 for each in values), dtype=dtype)
    params, offset = [], 0
    for each in values:
        offset += draw.randrange(3)
        view = room[offset : offset + each.numel()].view(each.shape)
        params.append(nn.Parameter(view.copy_(each)))
        offset += each.numel()
    return params


def draw_gradient(draw: Random, param: Tensor) -> Tensor:
    """Of any memory layout; seldom zero, large, or with elements that are not finite."""
    shape, dtype = tuple(param.shape), param.dtype
    if draw.random() < 0.1:
        return draw_values(draw, (), dtype).expand(shape)
    if draw.random() < 0.05:
        return torch.zeros(shape, dtype=dtype)
    values = draw_values(draw, shape, dtype)
    if draw.random() < 0.05:
        values *= 1e3 if dtype == torch.float16 else 1e6  # whose squares float32 holds
    if draw.random() < 0.03 and values.numel():
        values.view(-1)[:: draw.choice([1, 2, 5])] = draw.choice(
            [float("inf"), float("-inf"), float("nan")]
        )
    if draw.random() < 0.5:
        return values
    return laid_out(values, draw.choice(list(LAYOUTS)))
