"""Loads the extension module and says what this build contains.

The extension reads torch's tensors in C++, so it runs only under the torch release it was built
against. A mismatch would crash; here it is an ImportError that says what to do.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch


def _release(version: str) -> str:
    """``"2.13.0+cpu"`` -> ``"2.13"``: torch keeps its C++ interface within a minor release."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _built_torch_version() -> str:
    try:
        from recap_fast._torch_version import TORCH_VERSION
    except ImportError as error:
        raise ImportError(
            f"recap_fast, found in {Path(__file__).parent}, is not built. If you have installed "
            "it, run Python in another folder than its sources. If not, run "
            "`pip install --no-build-isolation .` in its sources, or with `-e .` to work on it"
        ) from error
    return TORCH_VERSION


def _load() -> ModuleType:
    built = _built_torch_version()
    if _release(built) != _release(torch.__version__):
        raise ImportError(
            f"recap_fast was built against torch {built}, but torch {torch.__version__} is "
            "running; reinstall it under this torch: run `pip install --force-reinstall --no-deps "
            "--no-build-isolation .` in its sources"
        )
    from recap_fast import _C

    return _C


if TYPE_CHECKING:
    from recap_fast import _C

    native = _C
else:
    native = _load()


def _number_of(variable: str, least: int, most: int) -> int | None:
    """What a variable of the environment fixes; None if it leaves it to be measured."""
    value = os.environ.get(variable) or "auto"
    if value == "auto":
        return None
    if not value.isdecimal() or not least <= int(value) <= most:
        raise ValueError(
            f"{variable} in the environment is {value!r}; it must be auto, or a number from "
            f"{least} to {most}"
        )
    return int(value)


_STREAMS = _number_of("RECAP_FAST_STREAMS", 1, 8)
_PREFETCH = _number_of("RECAP_FAST_PREFETCH", 0, 32)
_LEVEL = _number_of("RECAP_FAST_PREFETCH_LEVEL", 1, 2)
native.fix_way(_STREAMS, _PREFETCH, _LEVEL)


def build_info() -> dict[str, Any]:
    """What this build of recap_fast contains.

    Returns:
        ``engines``: names of the engines built in (``"cpu"``, ``"cuda"``);
        ``instruction_sets``: those of the CPU engine that this processor can run, slowest first;
        ``instruction_set``: the one in use;
        ``streams`` and ``prefetch``: in how many parts at once the CPU engine updates a long tensor
        (128 KiB or more), and how many blocks of 256 bytes ahead it asks for memory there, as
        ``RECAP_FAST_STREAMS`` (1 to 8) and ``RECAP_FAST_PREFETCH`` (0 to 32) in the environment
        have it; ``"auto"``: as is fastest here, which is found while the first steps take turns;
        ``ways``: what was found so far, as {class of work: (streams, prefetch, whether with vectors
        of half the width)};
        ``prefetch_level``: the cache, 1 or 2, that is asked to have the memory of short tensors, as
        ``RECAP_FAST_PREFETCH_LEVEL`` has it, or as was found; ``"auto"``: not found yet;
        ``torch_built_against`` and ``torch_running``: torch versions.
    """
    return {
        "engines": ["cpu", "cuda"] if native.has_cuda_engine else ["cpu"],
        "instruction_sets": native.instruction_sets(),
        "instruction_set": native.instruction_set_in_use(),
        "streams": "auto" if _STREAMS is None else _STREAMS,
        "prefetch": "auto" if _PREFETCH is None else _PREFETCH,
        "prefetch_level": _LEVEL or native.chosen_level() or "auto",
        "ways": {
            f"{dtype}, {arrays} arrays of {'4 MiB or more' if large else 'less than 4 MiB'}": way
            for dtype, arrays, large, way in native.chosen_ways()
        },
        "torch_built_against": native.torch_version,
        "torch_running": torch.__version__,
    }


def use_instruction_set(name: str | None) -> None:
    """Makes the CPU engine use the loops compiled for ``name``; None means the fastest.

    Results do not depend on it: this is for tests and measurements.

    Raises:
        ValueError: ``name`` is not built in or this processor cannot run it.
    """
    if not native.use_instruction_set(name or ""):
        raise ValueError(
            f"instruction set {name!r} is not available; this processor and build have "
            f"{native.instruction_sets()}"
        )
