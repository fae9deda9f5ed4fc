"""The results of a run on a GPU as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks import page
from benchmarks.measurement import Measurement
from benchmarks.peers import ALGORITHMS, GPU_PEERS
from benchmarks.table import number, table, with_quartiles
from benchmarks.targets import GPU_OURS, GPU_TARGETS, percent_of_copy

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


def _targets(results: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
    launches = results["activity"].get("ranker-36M", {}).get(GPU_OURS)
    counted = "not measured"
    if launches:
        met = "met" if launches == [1, 0, 0] else "**not met**"
        counted = f"{launches[0]} and {launches[1] + launches[2]} {met}"
    rows = [["ranker-36M, Adam: launches and copies of a step", "1 and 0", counted]]
    rows += page.target_rows(GPU_TARGETS, measurements, [1])
    return table(["figure", "must reach", "measured"], rows)


def _row(m: Measurement, peer: str, activity: Mapping[str, Sequence[int]]) -> list[str]:
    assert m.host is not None
    over_ours, of_copy, launches, copies = "-", "-", "-", "-"
    if GPU_OURS in m.timings.microseconds:
        over_ours = f"{number(m.timings.ratio(peer, GPU_OURS).median)}x"
    if "copy" in m.timings.microseconds:
        of_copy = f"{percent_of_copy(m, peer).median:.0f} %"
    if m.algorithm == "adam" and peer in activity:
        launches, copies = str(activity[peer][0]), str(sum(activity[peer][1:]))
    time = m.timings.time(peer)
    speed = f"{m.bytes / time.median / 1e3:,.0f}"
    host = number(m.host.time(peer).median)
    return [peer, with_quartiles(time), over_ours, speed, of_copy, host, launches, copies]


def _measurement(m: Measurement, activity: Mapping[str, Sequence[int]]) -> str:
    copies = f", {m.copies} copies in turn" if m.copies > 1 else ""
    clocks = f", {m.state['sm_mhz']} MHz" if "sm_mhz" in m.state else ""
    title = f"**{ALGORITHMS[m.algorithm]}, {m.cache}**{copies}, "
    title += f"{m.bytes / 1e6:,.4g} MB a step{clocks}.\n\n"
    header = ["", "step, µs", "over ours", "GB/s", "of copy", "host, µs", "launches", "copies"]
    rows = [_row(m, peer, activity) for peer in m.timings.microseconds]
    return page.with_skipped(title + table(header, rows), m)


def _card(results: Mapping[str, Any]) -> str:
    facts, state = results["machine"], results["state"]
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
        f"{facts['card']}, {facts['multiprocessors']} multiprocessors, "
        f"{facts['card_memory_gb']} GB, second-level cache {facts['l2_bytes'] / 2**20:.0f} MB"
        f"{driver}; host {facts['processor']}; Python {facts['python']}, torch {facts['torch']}, "
        f"CUDA {facts['cuda']}. {speed}{clocks}{facts['date']}.\n"
    )


def render(results: Mapping[str, Any], source: str) -> str:
    """The page.

    Args:
        results: as `benchmarks.report --gpu` writes them.
        source: what to call the file they are in.
    """
    measurements = [Measurement.from_json(data) for data in results["measurements"]]

    def tables(of_algorithm: list[Measurement]) -> str:
        activity = results["activity"].get(of_algorithm[0].workload, {})
        return "\n".join(_measurement(m, activity) for m in of_algorithm)

    return "\n".join(
        page.figures(
            results,
            title=f"Performance on {results['machine']['card']}",
            written=f"`python -m benchmarks.report --gpu` with `{source}`",
            machine=_card(results),
            how=_HOW,
            targets=_targets(results, measurements),
            columns=_COLUMNS,
            peers=GPU_PEERS,
            measurements=sorted(measurements, key=lambda m: m.workload),
            tables=tables,
        )
    )
