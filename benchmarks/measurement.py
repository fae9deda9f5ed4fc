"""Times one case of the plan."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import card, peers, workloads
from benchmarks.clocks import Cache, Clock
from benchmarks.interleave import Timings, interleave
from benchmarks.memory import peak_of
from benchmarks.peers import SLOW_PEERS, Peer, Unavailable
from benchmarks.plan import Case
from benchmarks.workloads import IN_ONE_GROUP, Workload


@dataclass(frozen=True)
class Measurement:
    """The timings of one workload, algorithm, thread count and cache state.

    Attributes:
        bytes: what a step must move.
        peak_memory_mb: growth of the process from before a peer's tensors are made to the peak of
            its second step, by peer; empty where the system does not tell.
        skipped: peers that did not run, with the reason.
        host: of the host's part of a step, where the clock takes it.
        copies: of the workload, stepped in turn.
        state: of the card.
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

    host: Timings | None = None
    copies: int = 1
    state: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key not in ("timings", "host")}
        own["microseconds"] = self.timings.rounded()
        return own | ({"host_microseconds": self.host.rounded()} if self.host else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measurement:
        own = dict(data)
        timings = Timings(own.pop("microseconds"))
        host = Timings(own.pop("host_microseconds")) if "host_microseconds" in own else None
        return Measurement(timings=timings, host=host, **own)


@dataclass
class Built:
    """The copies of each peer, after two steps, and what `Measurement` says of them."""

    peers: dict[str, list[Peer]] = field(default_factory=dict)
    peak_memory_mb: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def build(
    workload: Workload,
    names: Iterable[str],
    algorithm: str,
    copies: int = 1,
    device: torch.device | str = "cpu",
) -> Built:
    """Makes so many copies of each peer that can run here."""
    built = Built()
    initial = peers.initial_values(workload, device)
    for name in names:
        try:
            first, peak = peak_of(peers.build_and_step, name, initial, algorithm)
            further = (peers.build_and_step(name, initial, algorithm) for _ in range(copies - 1))
            built.peers[name] = [first, *further]
        except Unavailable as reason:
            built.skipped[name] = str(reason)
            continue
        if peak is not None and torch.device(device).type == "cpu":
            built.peak_memory_mb[name] = peak
    return built


def measure(
    case: Case,
    clocks: Mapping[Cache, Clock],
    threads: Iterable[int] = (1,),
    *,
    workload: Workload | None = None,
    end: float | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Measurement]:
    """Times a case.

    Args:
        case: what to time.
        clocks: what times it, by the state of the caches.
        threads: the numbers of threads to time it with.
        workload: one that has no name in `workloads`, instead of the case's.
        end: when to end, on the clock of `time.monotonic`, whatever `case.seconds` is.
        device: where the tensors are.

    Raises:
        ImportError: the workload is the demo's and cannot be built here.
    """
    workload = workload or workloads.by_name(case.workload)
    built = build(workload, case.peers, case.algorithm, case.copies, device)
    if case.in_one_group:
        one = build(workload.in_one_group(), case.in_one_group, case.algorithm, device=device)
        built.peers |= {name + IN_ONE_GROUP: copies for name, copies in one.peers.items()}
    for count in threads:
        torch.set_num_threads(count)
        for cache in case.caches:
            seconds = case.seconds if end is None else end - time.monotonic()
            timings, *host = interleave(
                built.peers, clocks[cache], seconds=seconds, slow=SLOW_PEERS
            )
            yield Measurement(
                workload=workload.name,
                description=workload.description,
                groups=len(workload.groups),
                tensors=workload.tensors,
                elements=workload.elements,
                algorithm=case.algorithm,
                threads=count,
                cache=cache,
                bytes=peers.bytes_per_step(workload, case.algorithm),
                timings=timings,
                peak_memory_mb=built.peak_memory_mb,
                skipped=built.skipped,
                host=host[0] if host else None,
                copies=case.copies,
                state=card.state() if host else {},
            )
