"""What a run measures on a CPU, and what on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import workloads
from benchmarks.clocks import Cache
from benchmarks.peers import (
    ALGORITHMS,
    CLEARING_PEERS,
    CLIPPING_PEERS,
    GPU_PEERS,
    PEERS,
    SLOW_PEERS,
    working_set,
)

LARGE_PEERS: Final = ("recap_fast", "torch fused", "DeepSpeed", "ceiling")
"""Where every peer has 50 M elements or more: those that the targets speak of, and the ceiling."""


@dataclass(frozen=True)
class Case:
    """One workload and algorithm.

    Attributes:
        workload: its name.
        algorithm: what steps it.
        caches: each is timed.
        peers: those that take part.
        seconds: how long, for each state of the caches and number of threads.
        copies: of the workload, which each peer steps in turn: with one, a step finds what the last
            one left in the cache, if it fits.
        in_one_group: peers that are timed once more, with all tensors in one param group.
    """

    workload: str
    algorithm: str
    caches: tuple[Cache, ...] = ("cold", "warm")
    peers: tuple[str, ...] = PEERS
    seconds: float = 2.5
    copies: int = 1
    in_one_group: tuple[str, ...] = ()


# --- on a CPU ------------------------------------------------------------------------------------

_ALL: Final = PEERS + CLIPPING_PEERS + CLEARING_PEERS
_ONE_GROUP: Final = ("recap_fast", "torch fused", "torch fused per group")


def _case(workload: str, algorithm: str) -> Case:
    # Steps over many megabytes are cold whatever came before them.
    return {
        "ranker-36M": Case(workload, algorithm, ("cold",), _ALL, seconds=12),
        "mixed-sizes": Case(workload, algorithm, peers=_ALL),
        "one-50M-tensor": Case(workload, algorithm, ("cold",), LARGE_PEERS, seconds=7),
        "many-groups-of-scalars": Case(workload, algorithm, in_one_group=_ONE_GROUP),
        "ranker-48M": Case(workload, algorithm, ("cold",), seconds=8),
        "demo": Case(workload, algorithm, ("cold",)),
    }.get(workload, Case(workload, algorithm))


CASES: Final = tuple(_case(name, each) for name in workloads.NAMES for each in ALGORITHMS)

GROWTH_SECONDS: Final = 1.0
"""For each size of each dimension of `growth`."""

SPARSE_SECONDS: Final = 0.8
"""For each algorithm, state of the caches and number of threads of `sparse`."""

SHARDED_SECONDS: Final = 3.0
"""For each number of processes of `sharded_params`."""

BUSY_SECONDS: Final = 3.0
"""For each algorithm and number of threads of `shared_memory_bus`, alone and not."""

FORMAT_SECONDS: Final = 3.0
"""For each algorithm and number of threads of `state_formats`."""

# --- on a GPU ------------------------------------------------------------------------------------

GPU_NAMES: Final = tuple(name for name in workloads.NAMES if name not in ("ranker-48M", "demo"))

# A step over less than this would take so many copies to fill the cache that making them takes all
# the time; the few kilobytes of scalars are warm in any training, too.
_MOST_COPIES: Final = 24


def _gpu_case(workload: str, algorithm: str, cache: Cache, copies: int = 1) -> Case:
    """Slow peers have no rotating copies."""
    peers = tuple(name for name in GPU_PEERS if copies == 1 or name not in SLOW_PEERS)
    return Case(workload, algorithm, (cache,), peers, copies=copies)


def gpu_cases(names: Sequence[str], algorithms: Sequence[str], l2_bytes: int) -> list[Case]:
    """In the order of importance, since a run may end before the last."""
    cases = []
    for algorithm in algorithms:
        for name in names:
            # As many as are together twice as large as the second-level cache.
            size = working_set(workloads.by_name(name), algorithm)
            copies = max(1, math.ceil(2 * l2_bytes / size))
            if copies <= _MOST_COPIES:
                cases.append(_gpu_case(name, algorithm, "cold", copies))
            if copies > 1:
                cases.append(_gpu_case(name, algorithm, "warm"))
    return cases
