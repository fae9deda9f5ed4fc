"""Compiles ceiling.cpp for this machine and calls it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("ceiling.cpp")
_BUILD = Path(__file__).parent.parent / "build" / "benchmarks"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")


class CannotCompile(RuntimeError):
    """There is no compiler, or it refused the source; the message says which."""


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((compiler, _FLAGS)).encode()).hexdigest()[:16]
    library = _BUILD / f"ceiling-{key}.so"
    if not library.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        compiled = library.with_suffix(".o")
        for command in (
            [compiler, *_FLAGS, "-fopenmp", "-c", str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(library)],
        ):
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise CannotCompile(f"no compiler {compiler!r}; set CXX") from error
            except subprocess.CalledProcessError as error:
                raise CannotCompile(f"{' '.join(command)}: {error.stderr}") from error
    return ctypes.CDLL(str(library))


def make_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[Tensor]]
) -> Callable[[], None]:
    """Returns a function that takes one step over float32 tensors of equal sizes.

    It reads `params`, `grads` and up to two lists of `states`, writes all but the gradients, and
    uses torch's number of threads.

    Raises:
        CannotCompile: see there.
    """
    step = _library().recap_ceiling
    step.restype = None
    count = len(params)
    addresses = ctypes.c_void_p * count

    def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
        return addresses(*(tensor.data_ptr() for tensor in tensors))

    lists = [pointers(tensors) for tensors in (params, grads, *states)]
    lists += [None] * (4 - len(lists))
    sizes = (ctypes.c_int64 * count)(*(param.numel() for param in params))
    rate = ctypes.c_float(1e-9)  # small enough to run forever

    def run() -> None:
        step(*lists, sizes, ctypes.c_int64(count), len(states), torch.get_num_threads(), rate)

    run.tensors = (params, grads, states)  # alive for as long as their addresses are used
    return run
