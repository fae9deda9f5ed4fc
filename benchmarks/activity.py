"""What the device does during some calls, counted by torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

# The kernel of `torch.cuda._sleep`. A profile begins and ends with one: it shows that the profile
# covers everything between, and is not counted.
_MARKER: Final = "spin_kernel"
_MARKER_CYCLES: Final = 2_000_000  # about a millisecond


class NothingSeen(RuntimeError):
    """The profiler recorded no device activity, not even the markers."""


@dataclass(frozen=True)
class Activity:
    """Attributes:
    kernels: how often each kernel ran, by its name.
    copies: between any two memories, on the device too.
    sets: of memory to one value.
    """

    kernels: Counter[str]
    copies: int
    sets: int

    @property
    def launches(self) -> int:
        return self.kernels.total()


def read(trace: Mapping[str, Any]) -> Activity:
    """Reads it from a trace in Chrome's format, as torch's profiler exports it.

    Raises:
        NothingSeen: the trace does not have both markers.
    """
    names: dict[str, list[str]] = {"kernel": [], "gpu_memcpy": [], "gpu_memset": []}
    for event in trace["traceEvents"]:
        if event.get("cat") in names:
            names[event["cat"]].append(event["name"])
    kernels = Counter(names["kernel"])
    markers = [name for name in kernels if _MARKER in name]
    if sum(kernels[name] for name in markers) != 2:
        raise NothingSeen("torch's profiler does not see what this device does")
    for name in markers:
        del kernels[name]
    return Activity(kernels, len(names["gpu_memcpy"]), len(names["gpu_memset"]))


def of(call: Callable[[], Any], times: int = 1) -> Activity:
    """Calls it and reads what the current device did.

    Raises:
        NothingSeen: see there.
    """
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        torch.cuda._sleep(_MARKER_CYCLES)
        for _ in range(times):
            call()
        torch.cuda._sleep(_MARKER_CYCLES)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return read(json.loads(path.read_text()))
