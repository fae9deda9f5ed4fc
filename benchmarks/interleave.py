"""Times several peers in turn, so that a drift of the machine hits all of them alike.

One round takes one sample of each peer, in an order drawn anew. Peers are compared within a round;
what is reported is the median of these ratios, with quartiles.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_SLOW_STRIDE: Final = 4


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

    def rounded(self, digits: int = 2) -> dict[str, list[float | None]]:
        """What is written of them."""
        return {
            peer: [None if t is None else round(t, digits) for t in times]
            for peer, times in self.microseconds.items()
        }

    def time(self, peer: str) -> Quartiles:
        return quartiles([t for t in self.microseconds[peer] if t is not None])

    def ratio(self, peer: str, other: str) -> Quartiles:
        """The time of `peer` over that of `other`, of the rounds in which both ran."""
        pairs = zip(self.microseconds[peer], self.microseconds[other], strict=True)
        return quartiles([a / b for a, b in pairs if a is not None and b is not None])


def interleave(
    peers: Mapping[str, Sequence[Any]],
    clock: Callable[[Sequence[Any]], Callable[[], tuple[float, ...]]],
    *,
    seconds: float,
    slow: Collection[str] = (),
    least_rounds: int = 5,
    most_rounds: int = 200,
) -> tuple[Timings, ...]:
    """Times steps of `peers` in turn, at torch's number of threads.

    Args:
        peers: what to time, by name: the copies of each.
        clock: what times them: makes of the copies what takes a sample.
        seconds: rounds begin until this time is over.
        slow: peers that take part in every fourth round only, to leave time for the others.
        least_rounds, most_rounds: how many rounds there are whatever the time.

    Returns:
        A `Timings` for each figure that the clock takes.
    """
    order = random.Random(0)
    names = list(peers)
    samplers = {name: clock(copies) for name, copies in peers.items()}
    samples: dict[str, list[tuple[float, ...] | None]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        for number in range(most_rounds):
            if number >= least_rounds and time.monotonic() >= end:
                break
            order.shuffle(names)
            for name in names:
                sits_out = name in slow and number % _SLOW_STRIDE != 0
                samples[name].append(None if sits_out else samplers[name]())
    finally:
        if collecting:
            gc.enable()
    figures = len(samples[names[0]][0] or ())  # in the first round all take part
    return tuple(
        Timings({name: [s and s[figure] for s in own] for name, own in samples.items()})
        for figure in range(figures)
    )
