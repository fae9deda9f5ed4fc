"""Tensors of every memory layout, the algorithms by name, and comparison bit by bit."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast import build_info
from recap_fast.optim import DENSE, FusedOptimizer
from recap_fast.torch_classes import TORCH_CLASSES

if TYPE_CHECKING:  # a test that needs torchrec is skipped without it, when it asks for one of these
    from torchrec.optim import keyed

    from recap_fast.config import LearningRate
    from recap_fast.keyed.fused import FusedCombinedOptimizer
    from recap_fast.scheduler import RecapLRShim

FUSED: Mapping[str, type[FusedOptimizer]] = DENSE
TORCH: Mapping[str, type[torch.optim.Optimizer]] = TORCH_CLASSES
# Which of torch's ways to step a class has.
WAYS: Mapping[str, tuple[str, ...]] = {
    name: tuple(way for way in ("foreach", "fused") if way in inspect.signature(kind).parameters)
    for name, kind in TORCH.items()
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

# Whether CPU tensors are stepped by the emulated CUDA engine, see tests/conftest.py.
EMULATED = "RECAP_FAST_TEST_EXTENSION" in os.environ and "cuda" in build_info()["engines"]


def is_stepped_on_device(param: Tensor) -> bool:
    """Whether the CUDA engine steps it."""
    return param.is_cuda or EMULATED


# One set of options for every update that the engine knows.
UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", {}),
    "adam_l2": ("adam", {"weight_decay": 0.1}),
    "adam_maximize": ("adam", {"maximize": True}),
    "amsgrad": ("adam", {"amsgrad": True}),
    "amsgrad_l2": ("adam", {"amsgrad": True, "weight_decay": 0.1}),
    "adamw": ("adamw", {"weight_decay": 0.1}),
    "adamw_amsgrad": ("adamw", {"weight_decay": 0.1, "amsgrad": True}),
    "adagrad": ("adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    "adagrad_l2": ("adagrad", {"weight_decay": 0.1, "maximize": True}),
    "sgd": ("sgd", {}),
    "sgd_l2": ("sgd", {"weight_decay": 0.1, "maximize": True}),
    "momentum": ("sgd", {"momentum": 0.9, "dampening": 0.3}),
    "momentum_l2": ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "nesterov_l2": ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "rmsprop": ("rmsprop", {}),
    "rmsprop_momentum": ("rmsprop", {"momentum": 0.9, "weight_decay": 0.1}),
    "rmsprop_centered": ("rmsprop", {"centered": True, "maximize": True}),
    "rmsprop_centered_momentum": ("rmsprop", {"centered": True, "momentum": 0.9}),
    "lion": ("lion", {"weight_decay": 0.1}),
}


def for_loop(algorithm: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """The oracle: torch's own class, one tensor and one operation at a time."""
    return TORCH[algorithm](params, **dict.fromkeys(WAYS[algorithm], False), **options)


# --- tensors of a given memory layout ------------------------------------------------------------


def _contiguous(values: Tensor) -> Tensor:
    return values.contiguous()


def _transposed(values: Tensor) -> Tensor:
    """Dense, with the order of dimensions in memory reversed."""
    order = tuple(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


def _with_gaps(values: Tensor) -> Tensor:
    """Every second element of a tensor twice as wide."""
    wide = values.unsqueeze(-1).repeat(*[1] * values.dim(), 2)
    return wide[..., 0]


def _misaligned(values: Tensor) -> Tensor:
    """Starts one element into its storage, where no vector load is aligned."""
    flat = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
    out = flat[1:].view(values.shape)
    return out.copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "gaps": _with_gaps,
    "misaligned": _misaligned,
}


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A copy of `values` with the memory layout of that name."""
    return LAYOUTS[layout](values.clone())


def numbers(
    shape: Sequence[int], seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Numbers of either sign and of magnitude 0.1 to 2.1, the same on every device.

    Away from zero, so that no sum with a weight decay of at most 0.01 cancels.
    """
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * 2 + 0.1
    sign = torch.randint(0, 2, tuple(shape), generator=generator) * 2 - 1
    return (magnitude * sign).to(dtype).to(device)


def parameter(
    shape: Sequence[int],
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
) -> nn.Parameter:
    """A parameter without a gradient."""
    return nn.Parameter(laid_out(numbers(shape, seed, dtype, device), layout))


def parameters(
    count: int = 3, seed: int = 0, device: torch.device | str = "cpu", grads: bool = True
) -> list[nn.Parameter]:
    """Small float32 parameters of shapes (2, 3), (3, 3), (4, 3) ..., with gradients."""
    out = [parameter((index + 2, 3), seed + index, device=device) for index in range(count)]
    if grads:
        set_grads(out, seed)
    return out


def set_grads(params: Iterable[Tensor], seed: int) -> None:
    """Gives each parameter a new gradient, contiguous if it is."""
    for index, param in enumerate(params):
        param.grad = numbers(param.shape, 1000 * (seed + 1) + index, param.dtype, param.device)


# --- mixed precision ----------------------------------------------------------------------------

SCALE = 2.0**10


def grad_scaler(device: torch.device | str, scale: float = SCALE) -> torch.amp.GradScaler:
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, init_scale=scale, growth_interval=10_000)
    scaler.scale(torch.ones((), device=device))  # makes the scale's tensor
    return scaler


def set_scaled_grads(params: Sequence[Tensor], seed: int, scale: float = SCALE) -> None:
    set_grads(params, seed)
    for param in params:
        param.grad.mul_(scale)


def schedules(stretch: int = 1) -> dict[str, LearningRate]:
    """One of each kind, of which the longest changes for 9 `stretch` steps."""
    config = pytest.importorskip("recap_fast.config")
    piecewise = config.PiecewiseConstant(
        learning_rate_boundaries=[2 * stretch, 5 * stretch],
        learning_rate_values=[0.1, 0.03, 0.007],
    )
    ramp = config.LinearRampToConstant(learning_rate=0.1, num_ramp_steps=3 * stretch)
    cosine = config.LinearRampToCosine(
        learning_rate=0.1,
        final_learning_rate=0.01,
        num_ramp_steps=2 * stretch,
        final_num_steps=9 * stretch,
    )
    return {
        "constant": config.LearningRate(constant=0.05),
        "piecewise": config.LearningRate(piecewise_constant=piecewise),
        "ramp": config.LearningRate(linear_ramp_to_constant=ramp),
        "cosine": config.LearningRate(linear_ramp_to_cosine=cosine),
    }


# --- optimizers under torchrec's keys ------------------------------------------------------------


def wrapped(
    params: dict[str, nn.Parameter], algorithm: str = "adam", **options: Any
) -> keyed.KeyedOptimizerWrapper:
    keyed = pytest.importorskip("torchrec.optim.keyed")
    return keyed.KeyedOptimizerWrapper(params, lambda p: FUSED[algorithm](p, **options))


def combine(parts: Sequence[tuple[str, keyed.KeyedOptimizer]]) -> FusedCombinedOptimizer:
    module = pytest.importorskip("recap_fast.keyed.fused")
    return module.FusedCombinedOptimizer(parts)


def shim(
    optimizer: FusedCombinedOptimizer, configs: dict[str, LearningRate], device_schedule: bool
) -> RecapLRShim:
    module = pytest.importorskip("recap_fast.scheduler")
    return module.RecapLRShim(optimizer, configs, device_schedule=device_schedule)


def scheduled(
    device: torch.device | str,
    *,
    tensors: bool = False,
    device_schedule: bool = False,
    stretch: int = 1,
    **options: Any,
) -> tuple[FusedCombinedOptimizer, RecapLRShim, list[nn.Parameter]]:
    """Four parameters, each with an algorithm and one of the `schedules` of its own.

    Args:
        device: where they are.
        tensors: whether each `lr` is a tensor, there too.
        device_schedule: of the shim.
        stretch: of the schedules.
        options: for every optimizer, such as ``capturable``.
    """
    params = parameters(4, device=device)
    algorithms = ("adam", "adagrad", "sgd", "adamw")
    parts = []
    for index, (algorithm, param) in enumerate(zip(algorithms, params, strict=True)):
        if tensors:
            options["lr"] = torch.zeros((), dtype=torch.float64, device=device)
        parts.append(("abcd"[index], wrapped({str(index): param}, algorithm, **options)))
    optimizer = combine(parts)
    return optimizer, shim(optimizer, schedules(stretch), device_schedule), params


def combined(params: Sequence[nn.Parameter], **options: Any) -> FusedCombinedOptimizer:
    """The first parameter on Adam as `a.0`, the second on Adagrad as `b.1`, the rest on SGD.

    All of these have the `options`.
    """
    rest = {str(i): p for i, p in enumerate(params[2:], 2)}
    return combine(
        [
            ("a", wrapped({"0": params[0]}, "adam", lr=0.1, **options)),
            ("b", wrapped({"1": params[1]}, "adagrad", lr=0.1, **options)),
            ("c", wrapped(rest, "sgd", lr=0.1, momentum=0.9, **options)),
        ]
    )


# --- comparison bit by bit -----------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, so that -0.0 is not 0.0 and a NaN equals itself."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def snapshot(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> tuple[list[Tensor], list[dict[str, Any] | None]]:
    """Copies of all parameters and states; None for a parameter without a state entry."""
    states = [
        {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in optimizer.state[param].items()
        }
        if param in optimizer.state
        else None
        for param in params
    ]
    return [param.detach().clone() for param in params], states


def assert_unchanged(
    before: tuple[list[Tensor], list[dict[str, Any] | None]],
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    skipped: bool = False,
) -> None:
    """Every parameter, state entry and step count is bit for bit what it was.

    After a step that GradScaler skipped on a device, where the host cannot know of it, there may be
    the state of a first step: all zero.
    """
    after = snapshot(optimizer, params)
    for index, (old, new) in enumerate(zip(before[0], after[0], strict=True)):
        assert same_bits(old, new), f"parameter {index} was written"
    for index, (old_state, new_state) in enumerate(zip(before[1], after[1], strict=True)):
        if skipped and old_state is None and new_state and is_stepped_on_device(params[index]):
            assert not any(value.any() for value in new_state.values()), f"parameter {index}"
            continue
        assert (old_state is None) == (new_state is None), f"state of parameter {index}"
        if old_state is not None and new_state is not None:
            assert old_state.keys() == new_state.keys(), f"state of parameter {index}"
            for key, value in old_state.items():
                assert same_bits(value, new_state[key]), f"{key} of parameter {index} was written"


def assert_same(
    ours: torch.optim.Optimizer,
    our_params: Sequence[Tensor],
    theirs: torch.optim.Optimizer,
    their_params: Sequence[Tensor],
    rtol: float = 1e-5,
) -> None:
    """The same parameters, states and step counts, up to rounding.

    A count may be on the device in one and on the host in the other: as torch's are if `fused` or
    `capturable`, and ours while a `GradScaler` decides there which steps are taken.
    """
    for index, (mine, other) in enumerate(zip(our_params, their_params, strict=True)):
        name = f"parameter {index}"
        torch.testing.assert_close(mine.data, other.data, rtol=rtol, atol=1e-6, msg=name)
        assert (mine in ours.state) == (other in theirs.state), name
        if mine not in ours.state:
            continue
        my_state, other_state = ours.state[mine], theirs.state[other]
        assert my_state.keys() == other_state.keys(), name
        for key, value in other_state.items():
            found = my_state[key]
            torch.testing.assert_close(
                found.cpu() if key == "step" else found,
                value.cpu() if key == "step" else value,
                rtol=rtol,
                atol=1e-6,
                msg=lambda m, k=key, n=name: f"{n} {k}: {m}",
            )
