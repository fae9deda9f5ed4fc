"""Peak memory of the peers, from Linux's account of this process."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

from benchmarks import peers
from benchmarks.workloads import Workload

_STATUS = Path("/proc/self/status")


def _megabytes(field: str) -> float:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(match.group(1)) / 1e3


def _return_free_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peaks(workload: Workload, algorithm: str) -> dict[str, float]:
    """Megabytes that the process grows by, for each peer: making it and taking two steps.

    Raises:
        OSError: this system does not tell.
    """
    initial = peers.initial_values(workload)
    grown = {}
    for name in peers.PEERS:
        _return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        before = _megabytes("VmRSS")
        try:
            peer = peers.build(name, initial, algorithm)
        except peers.Unavailable:
            continue
        peer.step()
        peer.step()
        grown[name] = round(_megabytes("VmHWM") - before, 1)
        del peer
    return grown
