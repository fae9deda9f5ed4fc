"""Steps small plans on every engine and compares the results bit by bit.

All instruction sets of the CPU engine, any number of threads and the CUDA engine give the same
bits. The results are those of `torch.optim` up to rounding.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn, optim

from recap_fast._native import build_info, use_instruction_set
from recap_fast.optim import (
    DENSE,
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedOptimizer,
    FusedRMSprop,
    FusedRowwiseAdagrad,
    FusedSGD,
)

_STEPS: Final = 3
_RATES: Final = (0.1, 0.01, 0.001)  # of the param groups
_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS: Final = {8: torch.int64, 4: torch.int32, 2: torch.int16}
# Around the widths of vectors, the 16-bit block (512 elements) and the tile (8192).
_SHAPES: Final = ((1,), (7,), (33,), (73, 7), (27, 19), (64, 128), (8193,), (667, 30))
# Times torch's own distance from exact arithmetic: it rounds as often, at other places.
_MORE_THAN_TORCH: Final = 4.0


@dataclass(frozen=True)
class Check:
    """What was compared with what, and what is wrong; None if nothing is."""

    what: str
    problem: str | None


@dataclass(frozen=True)
class _Update:
    name: str
    fused: type[FusedOptimizer]
    torch: type[optim.Optimizer] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    has_cuda_kernel: bool = True


_NAMED: Final = (
    _Update("Adam", FusedAdam, optim.Adam),
    _Update("Adam, L2", FusedAdam, optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    _Update("Adam, lazy", FusedAdam, None, {"lazy": True}, has_cuda_kernel=False),
    _Update("AdamW", FusedAdamW, optim.AdamW, {"weight_decay": 0.1}),
    _Update("Adagrad", FusedAdagrad, optim.Adagrad, {"weight_decay": 0.1}),
    _Update("row-wise Adagrad", FusedRowwiseAdagrad, has_cuda_kernel=False),
    _Update("RMSprop", FusedRMSprop, optim.RMSprop, {"centered": True, "momentum": 0.9}),
    _Update("SGD", FusedSGD, optim.SGD),
    _Update("SGD, momentum", FusedSGD, optim.SGD, {"momentum": 0.9, "nesterov": True}),
)
_UPDATES: Final = (
    *_NAMED,
    *(
        _Update(kind.__name__.removeprefix("Fused"), kind, None, {"weight_decay": 0.1})
        for kind in DENSE.values()
        if not any(update.fused is kind for update in _NAMED)
    ),
)


def checks() -> Iterator[Check]:
    """Yields each check when it is done.

    Afterwards torch's threads and the instruction set are as before.
    """
    info = build_info()
    with _as_before():
        use_instruction_set("baseline")
        torch.set_num_threads(1)
        try:
            expected = {update.name: _run(update, update.fused) for update in _UPDATES}
        except Exception as error:
            yield Check("CPU engine, baseline, 1 thread: steps", _said(error))
            return
        for instructions, threads in itertools.product(info["instruction_sets"], (1, 2)):
            if (instructions, threads) == ("baseline", 1):
                continue
            use_instruction_set(instructions)
            torch.set_num_threads(threads)
            yield _compare(
                f"CPU engine, {instructions}, {threads} thread{'s' * (threads > 1)}:"
                " the bits of baseline, 1 thread",
                expected,
                _UPDATES,
            )
        yield _compare_with_torch(expected)
        if "cuda" in info["engines"] and torch.cuda.is_available():
            updates = [update for update in _UPDATES if update.has_cuda_kernel]
            for number, on_device in itertools.product(
                range(torch.cuda.device_count()), (False, True)
            ):
                yield _compare(
                    f"CUDA engine, GPU {number}, rates {'on the device' if on_device else 'sent'}:"
                    " the bits of the CPU engine",
                    expected,
                    updates,
                    device=torch.device("cuda", number),
                    capturable=on_device,
                )


@contextmanager
def _as_before() -> Iterator[None]:
    threads, instructions = torch.get_num_threads(), build_info()["instruction_set"]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        use_instruction_set(instructions)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# --- steps ---------------------------------------------------------------------------------------


def _numbers(dtypes: Iterable[torch.dtype], seed: int) -> list[Tensor]:
    """The same for each dtype, up to its rounding; some rows are zero."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in _SHAPES]
    if seed > 0:
        for value in values:
            value[::5] = 0
    return [value.to(dtype) for dtype in dtypes for value in values]


def _run(
    update: _Update,
    optimizer_class: type[optim.Optimizer],
    dtypes: Sequence[torch.dtype] = _DTYPES,
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Tensor]:
    """Parameters and states by name, after some steps of one optimizer on all dtypes."""
    params = [nn.Parameter(values.to(device)) for values in _numbers(dtypes, 0)]
    groups = [
        {"params": params[number :: len(_RATES)], "lr": rate} for number, rate in enumerate(_RATES)
    ]
    optimizer = optimizer_class(groups, **update.options, **options)
    for step in range(_STEPS):
        for param, grad in zip(params, _numbers(dtypes, 1 + step), strict=True):
            param.grad = grad.to(device)
        optimizer.step()
    named = {}
    for param in params:
        where = f"{param.dtype} of shape {tuple(param.shape)}".removeprefix("torch.")
        named[f"parameter, {where}"] = param.detach().cpu()
        named |= {f"{key}, {where}": value.cpu() for key, value in optimizer.state[param].items()}
    return named


# --- comparisons ---------------------------------------------------------------------------------


def _compare(
    what: str,
    expected: dict[str, dict[str, Tensor]],
    updates: Iterable[_Update],
    **options: Any,
) -> Check:
    try:
        for update in updates:
            actual = _run(update, update.fused, **options)
            for name, value in expected[update.name].items():
                count = _different_elements(value, actual[name])
                if count:
                    elements = f"{count} of {value.numel()} elements"
                    return Check(what, f"{update.name}: {elements} differ in the {name}")
    except Exception as error:
        return Check(what, _said(error))
    return Check(what, None)


def _different_elements(a: Tensor, b: Tensor) -> int:
    integers = _INTEGERS[a.element_size()]
    return int((a.view(integers) != b.view(integers)).sum())


def _compare_with_torch(expected: dict[str, dict[str, Tensor]]) -> Check:
    """In float32, against the same steps of torch in float64; torch's own float32 is the scale."""
    what = "CPU engine against torch.optim, float32: equal up to rounding"
    try:
        for update in _UPDATES:
            if update.torch is None:
                continue
            ways = {"foreach", "fused"} & inspect.signature(update.torch).parameters.keys()
            plain: dict[str, Any] = dict.fromkeys(ways, False)
            theirs = _run(update, update.torch, (torch.float32,), **plain)
            exact = _run(update, update.torch, (torch.float64,), **plain)
            for (name, other), truth in zip(theirs.items(), exact.values(), strict=True):
                unit = torch.finfo(torch.float32).eps * float(truth.abs().max())
                error = float((expected[update.name][name] - truth).abs().max())
                allowed = _MORE_THAN_TORCH * float((other - truth).abs().max()) + unit
                if not error <= allowed:  # not a number is wrong too
                    return Check(
                        what,
                        f"{update.name}: off by {error:.1e} in the {name}; torch's own rounding"
                        f" allows {allowed:.1e}",
                    )
    except Exception as error:
        return Check(what, _said(error))
    return Check(what, None)
