"""What a run measures on a CUDA device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from benchmarks import workloads
from benchmarks.builders import STATES
from benchmarks.gpu.peers import BUILDERS, SLOW_PEERS
from benchmarks.interleave import Cache
from benchmarks.workloads import Workload, by_name

NAMES: Final = tuple(name for name in workloads.NAMES if name not in ("ranker-48M", "demo"))

# A step over less than this would take so many copies to fill the cache that making them takes all
# the time; the few kilobytes of scalars are warm in any training, too.
_MOST_COPIES: Final = 24


def working_set(workload: Workload, algorithm: str) -> int:
    """Bytes of parameters, gradients and states."""
    return 4 * (2 + STATES[algorithm]) * workload.elements


def rotating_copies(size: int, l2_bytes: int) -> int:
    """How many copies of `size` bytes are twice as large as the second-level cache."""
    return max(1, math.ceil(2 * l2_bytes / size))


@dataclass(frozen=True)
class Case:
    """One workload, algorithm and cache state.

    Attributes:
        copies: how many copies of the workload each peer steps in turn: with one, a step finds what
            the last one left in the cache, if it fits.
    """

    workload: Workload
    algorithm: str
    cache: Cache
    copies: int

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(name for name in BUILDERS if self.copies == 1 or name not in SLOW_PEERS)


def cases(names: tuple[str, ...], algorithms: tuple[str, ...], l2_bytes: int) -> list[Case]:
    """In the order of importance, since a run may end before the last."""
    out = []
    for algorithm in algorithms:
        for workload in map(by_name, names):
            copies = rotating_copies(working_set(workload, algorithm), l2_bytes)
            if copies <= _MOST_COPIES:
                out.append(Case(workload, algorithm, "cold", copies))
            if copies > 1:
                out.append(Case(workload, algorithm, "warm", 1))
    return out
