"""The results of a run as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from benchmarks.gpu.peers import COPY, DESCRIPTIONS, OURS, REFERENCE
from benchmarks.interleave import Quartiles, Timings
from benchmarks.table import number, plural, table, with_quartiles

_ALGORITHMS: Final = {"adam": "Adam", "adagrad": "Adagrad", "sgd": "SGD"}

_HOW: Final = """\
Every peer steps its own copies of the same float32 tensors. A round times, for each peer in an
order drawn anew, a batch of steps between two CUDA events, and the host's part of single steps
without waiting for the device. Peers are compared within a round; a figure is the median over the
rounds, in brackets the quartiles. *Cold*: the copies that a batch goes through are together twice
as large as the second-level cache. *Warm*: each step is over the same tensors as the last.
"""

_COLUMNS: Final = """\
*Step* is the time of a step within a batch, whichever of device and host bounds it; *over ours*
divides it by that of "recap_fast, one optimizer" (above 1: slower); *of copy* is the speed in bytes
that must move, over that of a copy on the device of as many bytes; *host* is how long a call of
`step` takes; *launches* and *copies* are a profiler's count for one step.
"""


def _timings(measurement: Mapping[str, Any], which: str = "microseconds") -> Timings:
    return Timings(measurement[which])


def _find(results: Mapping[str, Any], workload: str, algorithm: str) -> Mapping[str, Any] | None:
    """The first measurement of it; cold ones come before warm ones."""
    for m in results["measurements"]:
        if (m["workload"], m["algorithm"]) == (workload, algorithm):
            return m
    return None


def _verdict(figure: Quartiles, unit: str, met: bool) -> str:
    return f"{with_quartiles(figure, unit)} {'met' if met else '**not met**'}"


def _figure(
    results: Mapping[str, Any],
    workload: str,
    algorithm: str,
    take: Callable[[Mapping[str, Any]], Quartiles],
    judge: Callable[[float], bool],
    unit: str,
) -> str:
    measurement = _find(results, workload, algorithm)
    if measurement is None:
        return "not measured"
    try:
        figure = take(measurement)
    except (KeyError, ValueError):
        return "not measured"
    return _verdict(figure, unit, judge(figure.median))


def _percent_of_copy(measurement: Mapping[str, Any], peer: str = OURS) -> Quartiles:
    ratio = _timings(measurement).ratio(COPY, peer)
    return Quartiles(100 * ratio.low, 100 * ratio.median, 100 * ratio.high)


def _targets(results: Mapping[str, Any]) -> str:
    rows = []
    launches = results["activity"].get("ranker-36M", {}).get(OURS)
    counted = "not measured"
    if launches:
        met = "met" if launches == [1, 0, 0] else "**not met**"
        counted = f"{plural(launches[0], 'launch')}, {launches[1] + launches[2]} {met}"
    rows.append(["ranker-36M, Adam: launches and copies of a step", "1 and 0", counted])
    for workload in ("ranker-36M", "one-50M-tensor"):
        for algorithm, label in _ALGORITHMS.items():
            shown = _figure(results, workload, algorithm, _percent_of_copy, lambda m: m >= 90, " %")
            rows.append([f"{workload}, {label}: speed over that of a copy", "≥ 90 %", shown])
    for other, least in ((REFERENCE, 10), ("torch fused", 3), ("torch fused per group", 3)):

        def speed_up(m: Mapping[str, Any], other: str = other) -> Quartiles:
            return _timings(m).ratio(other, OURS)

        def enough(median: float, least: float = least) -> bool:
            return median >= least

        shown = _figure(results, "ranker-36M", "adam", speed_up, enough, "x")
        rows.append([f"ranker-36M, Adam: speed-up over {other}", f"≥ {least}x", shown])
    shown = _figure(
        results,
        *("ranker-36M", "adam"),
        lambda m: _timings(m, "host_microseconds").time(OURS),
        lambda m: m <= 20,
        " µs",
    )
    rows.append(["ranker-36M, Adam: host time of a step", "≤ 20 µs", shown])
    return table(["figure", "must reach", "measured"], rows)


def _row(m: Mapping[str, Any], peer: str, activity: Mapping[str, Sequence[int]]) -> list[str]:
    step, host = _timings(m), _timings(m, "host_microseconds")
    over_ours = number(step.ratio(peer, OURS).median) + "x" if OURS in m["microseconds"] else "-"
    of_copy = "-"
    if COPY in m["microseconds"]:
        of_copy = f"{_percent_of_copy(m, peer).median:.0f} %"
    launches, copies = "-", "-"
    if m["algorithm"] == "adam" and peer in activity:
        launches, copies = str(activity[peer][0]), str(sum(activity[peer][1:]))
    time = step.time(peer)
    speed = f"{m['bytes'] / time.median / 1e3:,.0f}"
    return [
        peer,
        with_quartiles(time),
        over_ours,
        speed,
        of_copy,
        number(host.time(peer).median),
        launches,
        copies,
    ]


def _measurement(m: Mapping[str, Any], activity: Mapping[str, Sequence[int]]) -> str:
    copies = f", {m['copies']} copies in turn" if m["copies"] > 1 else ""
    clocks = m["state"].get("sm_mhz")
    title = f"**{_ALGORITHMS[m['algorithm']]}, {m['cache']}**{copies}, "
    title += f"{m['bytes'] / 1e6:,.4g} MB a step"
    title += f", {clocks} MHz.\n\n" if clocks else ".\n\n"
    header = ["", "step, µs", "over ours", "GB/s", "of copy", "host, µs", "launches", "copies"]
    rows = [_row(m, peer, activity) for peer in m["microseconds"]]
    skipped = "".join(f"\n{name}: {reason}.\n" for name, reason in m["skipped"].items())
    return title + table(header, rows) + skipped


def _side_by_side(results: Mapping[str, Any]) -> str:
    parts = []
    ordered = sorted(results["measurements"], key=lambda m: m["workload"])
    for name, group in groupby(ordered, key=lambda m: m["workload"]):
        of_workload = list(group)
        m = of_workload[0]
        parts.append(
            f"### {name}: {m['description']}\n\n{plural(m['groups'], 'group')}, "
            f"{plural(m['tensors'], 'tensor')}, {m['elements']:,} elements.\n"
        )
        activity = results["activity"].get(name, {})
        parts += [_measurement(one, activity) for one in of_workload]
    return "\n".join(parts)


def _card(results: Mapping[str, Any]) -> str:
    facts, state = results["card"], results["state"]
    driver = f", driver {state['driver']}" if "driver" in state else ""
    copy = results["copy_gb_per_s"]
    speed = f"A large copy on the device moves {copy:,} GB/s, read and written. " if copy else ""
    clocks = (
        f"At the start: {state['sm_mhz']} MHz, memory {state['memory_mhz']} MHz, "
        f"{state['celsius']} °C, {state['watts']} W. "
        if state
        else ""
    )
    return (
        f"{facts['card']}, {facts['multiprocessors']} multiprocessors, {facts['memory_gb']} GB, "
        f"second-level cache {facts['l2_bytes'] / 2**20:.0f} MB{driver}; Python "
        f"{facts['python']}, torch {facts['torch']}, CUDA {facts['cuda']}. {speed}{clocks}"
        f"{facts['date']}.\n"
    )


def render(results: Mapping[str, Any], source: str) -> str:
    """The page.

    Args:
        results: as `benchmarks.gpu.report` writes them.
        source: what to call the file they are in.
    """
    peers = "\n".join(f"* **{name}**: {text}." for name, text in DESCRIPTIONS.items())
    parts = [
        f"# Performance on {results['card']['card']}\n",
        f"Written by `python -m benchmarks.gpu` with `{source}`; do not edit.\n",
        _card(results),
    ]
    parts += [f"**{what} failed**: {why}\n" for what, why in results["failed"].items()]
    parts += [
        "## What must be reached\n",
        _HOW,
        _targets(results),
        "## Side by side\n",
        _COLUMNS,
        f"{peers}\n",
        _side_by_side(results),
    ]
    return "\n".join(parts)
