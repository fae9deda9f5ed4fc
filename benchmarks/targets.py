"""The figures that the package must reach, and what a run says of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from benchmarks.clocks import Cache
from benchmarks.interleave import Quartiles, Timings
from benchmarks.measurement import Measurement
from benchmarks.peers import ALGORITHMS
from benchmarks.workloads import IN_ONE_GROUP

# Of as many groups and tensors, of one element each.
_ONE_ELEMENT_TWINS: Final = {"mixed-sizes": "scalars", "many-groups": "many-groups-of-scalars"}


@dataclass(frozen=True)
class Figure:
    """What must reach a limit.

    Attributes:
        text: what it is.
        sense: whether the limit is the least or the most.
        unit: written after it.
        take: takes it from a measurement, for the peer named.
    """

    text: str
    sense: Literal["at most", "at least"]
    unit: str
    take: Callable[[Measurement, str], Quartiles]


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        workload, algorithm, cache: the measurement it is taken from; without a cache, the first.
        figure: what is taken from it.
        limits: what it must reach with one thread, and with more if that is something else.
        ours: which of our peers it is about.
    """

    workload: str
    figure: Figure
    limits: tuple[float, ...]
    algorithm: str = "adam"
    cache: Cache | None = "cold"
    ours: str = "recap_fast"

    @property
    def text(self) -> str:
        of = [self.workload, ALGORITHMS[self.algorithm], *([self.cache] if self.cache else [])]
        return f"{', '.join(of)}: {self.figure.text}"

    def limit(self, threads: int) -> float:
        return self.limits[min(threads, len(self.limits)) - 1]

    def measured(
        self, measurements: Sequence[Measurement], threads: int, peer: str = ""
    ) -> Quartiles | None:
        """The figure, of ours or what it would be at the speed of another `peer`.

        None if it was not measured, or a peer that it needs did not run.
        """
        m = self._measurement(self.workload, measurements, threads)
        return m and self._take(m, peer or self.ours)

    def of_ceiling_and_checks(
        self, measurements: Sequence[Measurement], threads: int
    ) -> Quartiles | None:
        """What the figure would be at the time of the ceiling and of our step without elements.

        None if the workload has no twin of as many groups and tensors of one element.
        """
        own = self._measurement(self.workload, measurements, threads)
        twin = self._measurement(_ONE_ELEMENT_TWINS.get(self.workload), measurements, threads)
        if own is None or twin is None or "ceiling" not in own.timings.microseconds:
            return None
        checks = twin.timings.time(self.ours).median
        times = own.timings.microseconds
        slower = [None if t is None else t + checks for t in times["ceiling"]]
        return self._take(replace(own, timings=Timings(times | {"ceiling": slower})), "ceiling")

    def _measurement(
        self, workload: str | None, measurements: Sequence[Measurement], threads: int
    ) -> Measurement | None:
        key = (workload, self.algorithm, threads)
        for m in measurements:
            if (m.workload, m.algorithm, m.threads) == key and self.cache in (None, m.cache):
                return m
        return None

    def _take(self, m: Measurement, peer: str) -> Quartiles | None:
        try:
            return self.figure.take(m, peer)
        except (KeyError, ValueError):  # it did not run, or sat out
            return None

    def met(self, figure: Quartiles, threads: int) -> bool:
        limit = self.limit(threads)
        return figure.median <= limit if self.figure.sense == "at most" else figure.median >= limit


def _time_over(other: str) -> Figure:
    name = f"time over {other}"
    return Figure(name, "at most", "", lambda m, peer: m.timings.ratio(peer, other))


def _speed_up(other: str) -> Figure:
    name = f"speed-up over {other}"
    return Figure(name, "at least", "x", lambda m, peer: m.timings.ratio(other, peer))


def percent_of_copy(m: Measurement, peer: str) -> Quartiles:
    """The speed of a step in bytes that must move, over that of a copy of as many."""
    ratio = m.timings.ratio("copy", peer)
    return Quartiles(100 * ratio.low, 100 * ratio.median, 100 * ratio.high)


_HOST_TIME: Final = Figure(
    *("host time of a step", "at most", " µs"),
    lambda m, peer: (m.host or m.timings).time(peer),  # on a CPU the host does all of it
)
_GROUPS: Final = Figure(
    *("time with 100 groups over time with 1 group", "at most", ""),
    lambda m, peer: m.timings.ratio(peer, peer + IN_ONE_GROUP),
)
_OF_COPY: Final = Figure("speed over that of a copy", "at least", " %", percent_of_copy)

_FUSED: Final = _time_over("torch fused")
_CACHES: Final[tuple[Cache, ...]] = ("warm", "cold")

TARGETS: Final = (
    *(Target("ranker-36M", _FUSED, (0.97, 0.90), each) for each in ("adam", "adagrad")),
    Target("ranker-36M", _speed_up("reference"), (7,)),
    *(Target("one-50M-tensor", _FUSED, (1.03,), each) for each in ALGORITHMS),
    Target("mixed-sizes", _speed_up("torch fused"), (6,)),
    Target("mixed-sizes", _speed_up("torch fused"), (8,), cache="warm"),
    Target("many-groups", _speed_up("torch fused"), (8,)),
    Target("many-groups", _speed_up("torch fused"), (15,), cache="warm"),
    Target("many-groups", _speed_up("DeepSpeed"), (4,)),
    Target("many-groups", _speed_up("DeepSpeed"), (6,), cache="warm"),
    *(Target("scalars", _HOST_TIME, (30,), cache=cache) for cache in _CACHES),
    *(Target("many-groups-of-scalars", _HOST_TIME, (50,), cache=cache) for cache in _CACHES),
    *(Target("many-groups-of-scalars", _GROUPS, (1.3,), cache=cache) for cache in _CACHES),
)

GPU_OURS: Final = "recap_fast, one optimizer"


def _on_gpu(workload: str, figure: Figure, limit: float, algorithm: str = "adam") -> Target:
    return Target(workload, figure, (limit,), algorithm, cache=None, ours=GPU_OURS)


GPU_TARGETS: Final = (
    *(_on_gpu(w, _OF_COPY, 90, a) for w in ("ranker-36M", "one-50M-tensor") for a in ALGORITHMS),
    _on_gpu("ranker-36M", _speed_up("torch per group"), 10),
    _on_gpu("ranker-36M", _speed_up("torch fused"), 3),
    _on_gpu("ranker-36M", _speed_up("torch fused per group"), 3),
    _on_gpu("ranker-36M", _HOST_TIME, 20),
)
