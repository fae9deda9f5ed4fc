"""The figures that the package must reach, and what a run says of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.clocks import Cache
from benchmarks.interleave import Quartiles, Timings
from benchmarks.measurement import Measurement
from benchmarks.workloads import IN_ONE_GROUP

# Of as many groups and tensors, of one element each.
_ONE_ELEMENT_TWINS: Final = {"mixed-sizes": "scalars", "many-groups": "many-groups-of-scalars"}


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        text: what the figure is.
        workload, algorithm, cache: the measurement it is taken from; without a cache, the first.
        figure: takes it from the timings, for the peer named.
        limits: what it must reach, by number of threads.
        sense: whether a limit is the least or the most.
        unit: written after the figure.
        ours: which of our peers it is about.
        of_host: whether it is about the host's part of a step.
    """

    text: str
    workload: str
    algorithm: str
    cache: Cache | None
    figure: Callable[[Timings, str], Quartiles]
    limits: Mapping[int, float]
    sense: Literal["at most", "at least"]
    unit: str = ""
    ours: str = "recap_fast"
    of_host: bool = False

    def measured(self, measurements: Sequence[Measurement], threads: int) -> Quartiles | None:
        """The figure, or None if it was not measured, or a peer that it needs did not run."""
        return self._of(self.ours, measurements, threads)

    def of_ceiling(self, measurements: Sequence[Measurement], threads: int) -> Quartiles | None:
        """What the figure would be if recap_fast were as fast as the ceiling, or None."""
        return self._of("ceiling", measurements, threads)

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
        both = [None if t is None else t + checks for t in times["ceiling"]]
        try:
            return self.figure(Timings(times | {"ceiling and checks": both}), "ceiling and checks")
        except KeyError:
            return None

    def _measurement(
        self, workload: str | None, measurements: Sequence[Measurement], threads: int
    ) -> Measurement | None:
        key = (workload, self.algorithm, threads)
        for m in measurements:
            if (m.workload, m.algorithm, m.threads) == key and self.cache in (None, m.cache):
                return m
        return None

    def _of(self, peer: str, measurements: Sequence[Measurement], threads: int) -> Quartiles | None:
        m = self._measurement(self.workload, measurements, threads)
        timings = m and (m.host if self.of_host else m.timings)
        try:
            return None if timings is None else self.figure(timings, peer)
        except (KeyError, ValueError):  # it did not run, or sat out
            return None

    def met(self, figure: Quartiles, threads: int) -> bool:
        limit = self.limits[threads]
        return figure.median <= limit if self.sense == "at most" else figure.median >= limit


_NAMES: Final = {"adam": "Adam", "adagrad": "Adagrad", "sgd": "SGD"}


def _time_over(
    other: str, workload: str, most: Mapping[int, float], algorithm: str = "adam"
) -> Target:
    return Target(
        text=f"{workload}, {_NAMES[algorithm]}: time over {other}",
        workload=workload,
        algorithm=algorithm,
        cache="cold",
        figure=lambda timings, peer: timings.ratio(peer, other),
        limits=most,
        sense="at most",
    )


def _speed_up(other: str, workload: str, least: float, cache: Cache = "cold") -> Target:
    return Target(
        text=f"{workload}, {cache}: speed-up over {other}",
        workload=workload,
        algorithm="adam",
        cache=cache,
        figure=lambda timings, peer: timings.ratio(other, peer),
        limits={1: least, 2: least},
        sense="at least",
        unit="x",
    )


def _host_time(workload: str, most: float, cache: Cache) -> Target:
    return Target(
        text=f"{workload}, {cache}: host time of a step",
        workload=workload,
        algorithm="adam",
        cache=cache,
        figure=lambda timings, peer: timings.time(peer),
        limits={1: most, 2: most},
        sense="at most",
        unit=" µs",
    )


def _groups(most: float, cache: Cache) -> Target:
    return Target(
        text=f"many-groups-of-scalars, {cache}: time with 100 groups over time with 1 group",
        workload="many-groups-of-scalars",
        algorithm="adam",
        cache=cache,
        figure=lambda timings, peer: timings.ratio(peer, peer + IN_ONE_GROUP),
        limits={1: most, 2: most},
        sense="at most",
    )


TARGETS: Final = (
    _time_over("torch fused", "ranker-36M", {1: 0.97, 2: 0.90}),
    _time_over("torch fused", "ranker-36M", {1: 0.97, 2: 0.90}, "adagrad"),
    _speed_up("reference", "ranker-36M", 7),
    *(
        _time_over("torch fused", "one-50M-tensor", {1: 1.03, 2: 1.03}, algorithm)
        for algorithm in _NAMES
    ),
    _speed_up("torch fused", "mixed-sizes", 6),
    _speed_up("torch fused", "mixed-sizes", 8, "warm"),
    _speed_up("torch fused", "many-groups", 8),
    _speed_up("torch fused", "many-groups", 15, "warm"),
    _speed_up("DeepSpeed", "many-groups", 4),
    _speed_up("DeepSpeed", "many-groups", 6, "warm"),
    _host_time("scalars", 30, "warm"),
    _host_time("scalars", 30, "cold"),
    _host_time("many-groups-of-scalars", 50, "warm"),
    _host_time("many-groups-of-scalars", 50, "cold"),
    _groups(1.3, "warm"),
    _groups(1.3, "cold"),
)

GPU_OURS: Final = "recap_fast, one optimizer"


def percent_of_copy(timings: Timings, peer: str) -> Quartiles:
    """The speed of a step in bytes that must move, over that of a copy of as many."""
    ratio = timings.ratio("copy", peer)
    return Quartiles(100 * ratio.low, 100 * ratio.median, 100 * ratio.high)


def _of_copy(workload: str, algorithm: str) -> Target:
    return Target(
        text=f"{workload}, {_NAMES[algorithm]}: speed over that of a copy",
        workload=workload,
        algorithm=algorithm,
        cache=None,
        figure=percent_of_copy,
        limits={1: 90},
        sense="at least",
        unit=" %",
        ours=GPU_OURS,
    )


def _gpu_speed_up(other: str, least: float) -> Target:
    return Target(
        text=f"ranker-36M, Adam: speed-up over {other}",
        workload="ranker-36M",
        algorithm="adam",
        cache=None,
        figure=lambda timings, peer: timings.ratio(other, peer),
        limits={1: least},
        sense="at least",
        unit="x",
        ours=GPU_OURS,
    )


GPU_TARGETS: Final = (
    *(_of_copy(name, each) for name in ("ranker-36M", "one-50M-tensor") for each in _NAMES),
    _gpu_speed_up("torch per group", 10),
    _gpu_speed_up("torch fused", 3),
    _gpu_speed_up("torch fused per group", 3),
    Target(
        text="ranker-36M, Adam: host time of a step",
        workload="ranker-36M",
        algorithm="adam",
        cache=None,
        figure=lambda timings, peer: timings.time(peer),
        limits={1: 20},
        sense="at most",
        unit=" µs",
        ours=GPU_OURS,
        of_host=True,
    ),
)
