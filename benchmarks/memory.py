"""Peak memory of a call, from Linux's account of this process."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _megabytes(field: str) -> float:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(match.group(1)) * 1024 / 1e6


def resident_megabytes() -> float:
    """What this process has in memory now. Raises OSError where the system does not tell."""
    return _megabytes("VmRSS")


def _return_free_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_of(call: Callable[..., _Result], *arguments: Any) -> tuple[_Result, float | None]:
    """Calls it.

    Returns:
        What the call returned, and by how many megabytes the process grew from before it to its
        peak; None where the system does not tell.
    """
    try:
        _return_free_memory()
        _CLEAR.write_text("5")  # VmHWM starts again from VmRSS
        before = resident_megabytes()
    except (OSError, AttributeError):
        return call(*arguments), None
    result = call(*arguments)
    return result, round(_megabytes("VmHWM") - before, 1)
