"""Times steps against `torch.optim` with ``fused=True``, as ratios within one round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn, optim

from recap_fast._native import build_info
from recap_fast.optim import FusedAdam

SECONDS: Final = 0.7  # for each measurement
_LEAST_ROUNDS: Final = 5
_WARMING_STEPS: Final = 3
# Touched before each step, since a backward pass leaves little of parameters and states in caches.
_EVICT_BYTES: Final = 96 * 2**20


@dataclass(frozen=True)
class Workload:
    """Tensors by param group."""

    name: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def description(self) -> str:
        """For example ``"2.6 M elements, 40 tensors, 4 groups"``."""
        sizes = [size for group in self.groups for size in group]
        millions = sum(sizes) / 1e6
        return f"{millions:.1f} M elements, {len(sizes)} tensors, {len(self.groups)} groups"


WORKLOADS: Final = (
    Workload("small", (tuple(64 * 2**power for power in range(7)) * 5,) * 12),
    Workload("middling", ((65_536,) * 10,) * 4),
)


@dataclass(frozen=True)
class Ratio:
    """Milliseconds of a step (medians), and torch's time over ours: median and quartiles."""

    what: str
    ours: float
    torch: float
    low: float
    median: float
    high: float


def ratios(seconds: float = SECONDS) -> Iterator[Ratio]:
    """Of Adam on each workload: with one thread, with torch's threads, and on a GPU.

    Args:
        seconds: for each measurement.
    """
    has_cuda = "cuda" in build_info()["engines"] and torch.cuda.is_available()
    before = torch.get_num_threads()
    for workload in WORKLOADS:
        what = f"Adam, {workload.name} ({workload.description})"
        try:
            for threads in sorted({1, before}):
                torch.set_num_threads(threads)
                where = f"{threads} thread{'s' * (threads > 1)}"
                yield _ratio(f"{what}, {where}", workload, torch.device("cpu"), seconds)
        finally:
            torch.set_num_threads(before)
        if has_cuda:
            yield _ratio(f"{what}, GPU", workload, torch.device("cuda"), seconds)


def _ratio(what: str, workload: Workload, device: torch.device, seconds: float) -> Ratio:
    peers = [
        FusedAdam(_groups(workload, device), lr=1e-3),
        optim.Adam(_groups(workload, device), lr=1e-3, fused=True),
    ]
    other_memory = torch.zeros(_EVICT_BYTES // 4, device=device)
    for peer in peers:
        for _ in range(_WARMING_STEPS):
            peer.step()
    times: list[list[float]] = [[], []]
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < _LEAST_ROUNDS:
        for number in order.sample(range(len(peers)), len(peers)):
            other_memory.add_(1.0)
            times[number].append(_milliseconds(peers[number], device))
    low, median, high = _quartiles([b / a for a, b in zip(*times, strict=True)])
    ours, theirs = (statistics.median(each) for each in times)
    return Ratio(what, ours, theirs, low, median, high)


def _groups(workload: Workload, device: torch.device) -> list[dict[str, Any]]:
    groups = []
    for sizes in workload.groups:
        params = [nn.Parameter(torch.ones(size, device=device)) for size in sizes]
        for param in params:
            param.grad = torch.full_like(param, 0.1)
        groups.append({"params": params})
    return groups


def _milliseconds(optimizer: optim.Optimizer, device: torch.device) -> float:
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    optimizer.step()
    if is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")
