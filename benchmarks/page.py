"""Writes `docs/performance.md` from the results of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from benchmarks.interleave import Quartiles
from benchmarks.peers import DESCRIPTIONS
from benchmarks.plan import Measurement
from benchmarks.targets import TARGETS, Target

_ALGORITHMS: Final = {"adam": "Adam", "adagrad": "Adagrad", "sgd": "SGD"}

_HOW: Final = """\
Every peer steps its own copies of the same tensors. A round times one `optimizer.step()` of each
peer, in an order drawn anew; peers are compared within a round, so that a drift of the machine hits
all of them alike. A ratio is the median over the rounds, in brackets the quartiles. *Cold*: between
two steps 96 MB of other memory are touched and the gradients are new tensor objects, as after a
backward pass. *Warm*: the same step was taken just before. The learning rate of every group is set
between steps, as a scheduler does.
"""


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _with_quartiles(q: Quartiles, unit: str) -> str:
    return f"{number(q.median)}{unit} ({number(q.low)} to {number(q.high)})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _limit(target: Target, threads: Sequence[int]) -> str:
    sign = "≤" if target.sense == "at most" else "≥"
    limits = list(dict.fromkeys(target.limits[count] for count in threads))
    return " / ".join(f"{sign} {limit:g}{target.unit}" for limit in limits)


def _verdict(target: Target, measurements: Sequence[Measurement], threads: int) -> str:
    figure = target.measured(measurements, threads)
    if figure is None:
        return "not measured"
    text = _with_quartiles(figure, target.unit)
    if target.met(figure, threads):
        return f"{text} met"
    ceiling = target.of_ceiling(measurements, threads)
    limit = "" if ceiling is None else f"; the ceiling {number(ceiling.median)}{target.unit}"
    return f"{text} **not met**{limit}"


def _targets(measurements: Sequence[Measurement]) -> str:
    threads = [n for n in (1, 2) if any(m.threads == n for m in measurements)]
    workloads = {m.workload for m in measurements}
    return _table(
        ["figure", "must reach", *(_plural(n, "thread") for n in threads)],
        (
            [t.text, _limit(t, threads), *(_verdict(t, measurements, n) for n in threads)]
            for t in TARGETS
            if t.workload in workloads
        ),
    )


def _column(m: Measurement) -> str:
    return f"{_plural(m.threads, 'thread')}, {m.cache}"


def _cell(m: Measurement, peer: str) -> str:
    if peer not in m.timings.microseconds:
        return "-"
    time = m.timings.time(peer).median
    ratio = m.timings.ratio(peer, "recap_fast").median
    return f"{number(time)} µs · {number(ratio)}x"


def _side_by_side(measurements: Sequence[Measurement]) -> str:
    """A section per workload, a table per algorithm, a row per peer."""
    parts = []
    for workload, group in groupby(measurements, key=lambda m: m.workload):
        of_workload = list(group)
        m = of_workload[0]
        parts.append(
            f"### {workload}: {m.description}\n\n"
            f"{_plural(m.groups, 'group')}, {_plural(m.tensors, 'tensor')}, "
            f"{m.elements:,} elements.\n"
        )
        for algorithm, of_algorithm in groupby(of_workload, key=lambda m: m.algorithm):
            columns = list(of_algorithm)
            m = columns[0]
            peers = list(m.timings.microseconds)
            header = [f"{_ALGORITHMS[algorithm]}, {m.bytes / 1e6:,.4g} MB a step"]
            rows = ([peer, *(_cell(column, peer) for column in columns)] for peer in peers)
            parts.append(_table([*header, *map(_column, columns)], rows))
            parts += [f"{name}: {reason}.\n" for name, reason in m.skipped.items()]
    return "\n".join(parts)


def _machine(facts: Mapping[str, Any]) -> str:
    caches = ", ".join(f"{level} {size}" for level, size in facts["caches"].items())
    return (
        f"{facts['processor']}, {_plural(facts['cores'], 'core')} ({caches or 'caches unknown'}), "
        f"{facts['memory_gb']} GB, {facts['system']}, transparent huge pages "
        f"`{facts['transparent_huge_pages']}`; Python {facts['python']}, torch {facts['torch']} "
        f"({facts['torch_instruction_set']}); instruction set in use: "
        f"{facts['instruction_set']}. {facts['date']}, load per core before the run "
        f"{facts['busy']}.\n"
    )


def _memory(peaks: Mapping[str, float]) -> str:
    rows = ([peer, f"{number(megabytes)} MB"] for peer, megabytes in peaks.items())
    return _table(["A, Adam", "peak memory"], rows)


def render(results: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The page.

    Args:
        results: as `benchmarks.report` writes them.
        pictures: paths of the growth pictures, relative to the page.
    """
    measurements = [Measurement.from_json(data) for data in results["measurements"]]
    peers = "\n".join(f"* **{name}**: {text}." for name, text in DESCRIPTIONS.items())
    parts = [
        "# Performance\n",
        "Written by `python -m benchmarks.report`; do not edit.\n",
        _machine(results["machine"]),
        "## What must be reached\n",
        _HOW,
        "Where a figure is not reached, the one of the ceiling follows: a loop that computes next "
        "to nothing.\n",
        _targets(measurements),
        "## Side by side\n",
        "Median time of a step, and that time over recap_fast's (above 1: slower than "
        "recap_fast).\n",
        f"{peers}\n",
        _side_by_side(measurements),
    ]
    if results.get("peak_memory_mb"):
        parts += [
            "## Peak memory\n",
            "Growth of the process from before a peer's tensors are made to the peak of its second "
            "step: parameters, gradients, states and what the step needs besides.\n",
            _memory(results["peak_memory_mb"]),
        ]
    if pictures:
        parts += ["## Growth\n", *(f"![{Path(path).stem}]({path})\n" for path in pictures)]
    parts += [
        "## How to reproduce\n",
        "On a machine that does nothing else, from a checkout with the package built:\n",
        "    python -m benchmarks.report            # under ten minutes on 2 cores, 10 GB\n"
        "    python -m benchmarks.report --growth   # the pictures\n"
        "    python -m benchmarks.breakdown         # where the time of a small step goes\n"
        "    pytest benchmarks --benchmark-enable --benchmark-only\n",
    ]
    return "\n".join(parts)
