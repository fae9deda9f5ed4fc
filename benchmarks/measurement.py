"""Times one entry of the plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from benchmarks import peers, workloads
from benchmarks.interleave import Cache, Timings, interleave
from benchmarks.memory import peak_of
from benchmarks.peers import Peer, Unavailable
from benchmarks.plan import SLOW_PEERS, Entry
from benchmarks.workloads import IN_ONE_GROUP, Workload

# Whose steps are timed once more with all tensors in one param group.
_ONE_GROUP_PEERS: Final = ("recap_fast", "torch fused", "torch fused per group")


@dataclass(frozen=True)
class Measurement:
    """The timings of one workload, algorithm, thread count and cache state.

    Attributes:
        bytes: what a step must move.
        peak_memory_mb: growth of the process from before a peer's tensors are made to the peak of
            its second step, by peer; empty where the system does not tell.
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
    peak_memory_mb: dict[str, float] = field(default_factory=dict)
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


@dataclass
class _Built:
    """Peers that have taken two steps, and what `Measurement` says of them."""

    peers: dict[str, Peer] = field(default_factory=dict)
    peak_memory_mb: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def _build(workload: Workload, names: Iterable[str], algorithm: str) -> _Built:
    built = _Built()
    initial = peers.initial_values(workload)

    def build_and_step(name: str) -> Peer:
        peer = peers.build(name, initial, algorithm)
        peer.step()
        peer.step()
        return peer

    for name in names:
        try:
            built.peers[name], peak = peak_of(build_and_step, name)
        except Unavailable as reason:
            built.skipped[name] = str(reason)
            continue
        if peak is not None:
            built.peak_memory_mb[name] = peak
    return built


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
        built = _build(workload, entry.peers, algorithm)
        if workload is workloads.MANY_GROUPS_OF_SCALARS:
            one_group = _build(workload.in_one_group(), _ONE_GROUP_PEERS, algorithm)
            for name, peer in one_group.peers.items():
                built.peers[name + IN_ONE_GROUP] = peer
        for count in threads:
            torch.set_num_threads(count)
            for cache in entry.caches:
                timings = interleave(
                    built.peers,
                    cache=cache,
                    budget_seconds=entry.budget_seconds * budget_scale,
                    slow=SLOW_PEERS,
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
                    bytes=peers.bytes_per_step(workload, algorithm),
                    timings=timings,
                    peak_memory_mb=built.peak_memory_mb,
                    skipped=built.skipped,
                )
