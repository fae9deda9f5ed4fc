"""What a full run measures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from benchmarks import peers as peers_module
from benchmarks import workloads
from benchmarks.interleave import Cache, Timings, interleave
from benchmarks.peers import ALGORITHMS, PEERS, Unavailable, bytes_per_step
from benchmarks.workloads import Workload

# Whose steps are timed once more with all tensors in one param group.
_ONE_GROUP_PEERS: Final = ("recap_fast", "torch fused", "torch fused per group")
IN_ONE_GROUP: Final = " in one group"

# Several times slower than the others on every workload.
_SLOW_PEERS: Final = ("reference", "torch for-loop", "torch foreach")

# 50 M elements for each peer: only those that the targets speak of, and the ceiling.
_LARGE_PEERS: Final = ("recap_fast", "torch fused", "DeepSpeed", "ceiling")


@dataclass(frozen=True)
class Entry:
    """One workload: what of it to time, and for how long each combination."""

    name: str
    algorithms: tuple[str, ...] = ALGORITHMS
    caches: tuple[Cache, ...] = ("cold", "warm")
    peers: tuple[str, ...] = PEERS
    budget_seconds: float = 3.0


# Steps over many megabytes are cold whatever came before them.
ENTRIES: Final = (
    Entry("A", caches=("cold",), budget_seconds=20),
    Entry("B"),
    Entry("C", caches=("cold",), peers=_LARGE_PEERS, budget_seconds=10),
    Entry("D"),
    Entry("E"),
    Entry("F"),
    Entry("RECAP", algorithms=("adam",), caches=("cold",), budget_seconds=20),
    Entry("DEMO", algorithms=("adam",), caches=("cold",)),
)


@dataclass(frozen=True)
class Measurement:
    """The timings of one workload, algorithm, thread count and cache state.

    Attributes:
        bytes: what a step must move.
        skipped: peers that did not run, with the reason.
    """

    workload: str
    description: str
    groups: int
    tensors: int
    elements: int
    algorithm: str
    threads: int
    cache: Cache
    bytes: int
    timings: Timings
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key != "timings"}
        return own | {
            "microseconds": {
                name: [None if t is None else round(t, 2) for t in times]
                for name, times in self.timings.microseconds.items()
            }
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Measurement:
        own = {key: value for key, value in data.items() if key != "microseconds"}
        return Measurement(timings=Timings(data["microseconds"]), **own)


def _build(
    workload: Workload, names: Iterable[str], algorithm: str
) -> tuple[dict[str, peers_module.Peer], dict[str, str]]:
    built, skipped = {}, {}
    initial = peers_module.initial_values(workload)
    for name in names:
        try:
            built[name] = peers_module.build(name, initial, algorithm)
        except Unavailable as reason:
            skipped[name] = str(reason)
    return built, skipped


def measure(
    entry: Entry, threads: Iterable[int], budget_scale: float = 1.0
) -> Iterable[Measurement]:
    """Times one entry of the plan.

    Args:
        entry: what to time.
        threads: the numbers of threads to time it with.
        budget_scale: multiplies how long each combination is timed.

    Raises:
        ImportError: the workload is the demo's and cannot be built here.
    """
    workload = workloads.by_name(entry.name)
    for algorithm in entry.algorithms:
        peers, skipped = _build(workload, entry.peers, algorithm)
        if workload.name == "F":
            one_group, _ = _build(workload.in_one_group(), _ONE_GROUP_PEERS, algorithm)
            peers |= {name + IN_ONE_GROUP: peer for name, peer in one_group.items()}
        for count in threads:
            torch.set_num_threads(count)
            for cache in entry.caches:
                timings = interleave(
                    peers,
                    cache=cache,
                    budget_seconds=entry.budget_seconds * budget_scale,
                    slow=_SLOW_PEERS,
                )
                yield Measurement(
                    workload=workload.name,
                    description=workload.description,
                    groups=len(workload.groups),
                    tensors=workload.tensors,
                    elements=workload.elements,
                    algorithm=algorithm,
                    threads=count,
                    cache=cache,
                    bytes=bytes_per_step(workload, algorithm),
                    timings=timings,
                    skipped=skipped,
                )
