"""Times several peers in turn, so that a drift of the machine hits all of them alike.

One round times one step of each peer, in an order drawn anew. Peers are compared within a round;
what is reported is the median of these ratios, with quartiles.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from benchmarks.peers import Peer

Cache = Literal["cold", "warm"]

_EVICT_BYTES: Final = 96 * 2**20
_SLOW_STRIDE: Final = 4
_WARMING_STEPS: Final = 2


@dataclass(frozen=True)
class Quartiles:
    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Raises ValueError if there are no values."""
    if not values:
        raise ValueError("quartiles need at least one value")
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Timings:
    """Microseconds of one step, by peer and round; None where the peer sat the round out."""

    microseconds: dict[str, list[float | None]]

    @classmethod
    def joined(cls, parts: Sequence[Timings]) -> Timings:
        """The rounds of all `parts`, which are of the same peers."""
        return cls(
            {
                peer: [t for part in parts for t in part.microseconds[peer]]
                for peer in parts[0].microseconds
            }
        )

    def time(self, peer: str) -> Quartiles:
        return quartiles([t for t in self.microseconds[peer] if t is not None])

    def ratio(self, peer: str, other: str) -> Quartiles:
        """The time of `peer` over that of `other`, of the rounds in which both ran."""
        pairs = zip(self.microseconds[peer], self.microseconds[other], strict=True)
        return quartiles([a / b for a, b in pairs if a is not None and b is not None])


class OtherMemory:
    """Memory that a backward pass would touch between two steps."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(_EVICT_BYTES // 4)

    def touch(self) -> None:
        self._buffer.add_(1.0)


def time_step(peer: Peer, cache: Cache, memory: OtherMemory) -> float:
    """One step of `peer` in microseconds.

    Cold: gradients are new tensor objects and 96 MB of other memory were touched since the last
    step. Warm: the two steps before were the peer's too; one leaves some of the caches to the peer
    before it. The learning rates were set anew either way.
    """
    if cache == "cold":
        peer.renew_gradients()
        peer.set_learning_rates()
        memory.touch()
    else:
        for _ in range(_WARMING_STEPS):
            peer.restore_gradients()
            peer.step()
        peer.restore_gradients()
        peer.set_learning_rates()
    begin = time.perf_counter_ns()
    peer.step()
    return (time.perf_counter_ns() - begin) / 1e3


def interleave(
    peers: Mapping[str, Peer],
    *,
    cache: Cache,
    budget_seconds: float,
    slow: Collection[str] = (),
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> Timings:
    """Times steps of `peers` in turn, at torch's number of threads.

    Args:
        peers: what to time, by name.
        cache: what a step finds in the caches.
        budget_seconds: rounds begin until this time is over.
        slow: peers that take part in every fourth round only, to leave time for the others.
        min_rounds, max_rounds: how many rounds there are whatever the time.
    """
    memory = OtherMemory()
    order = random.Random(0)
    names = list(peers)
    for peer in peers.values():
        peer.step()  # makes states and plans
        peer.step()

    times: dict[str, list[float | None]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.monotonic() + budget_seconds
        for number in range(max_rounds):
            if number >= min_rounds and time.monotonic() >= end:
                break
            order.shuffle(names)
            for name in names:
                sits_out = name in slow and number % _SLOW_STRIDE != 0
                times[name].append(None if sits_out else time_step(peers[name], cache, memory))
    finally:
        if collecting:
            gc.enable()
    return Timings(times)
