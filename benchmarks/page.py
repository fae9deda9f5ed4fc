"""Writes `docs/performance.md` from the results of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from benchmarks import breakdown, growth, sharded_params, shared_memory_bus, state_formats
from benchmarks.measurement import Measurement
from benchmarks.peers import ALGORITHMS, CLEARING_PEERS, CLIPPING_PEERS, DESCRIPTIONS, PEERS
from benchmarks.table import number, plural, table, with_quartiles
from benchmarks.targets import TARGETS, Target

# Below it, what the allocator keeps and returns outweighs the tensors.
_LEAST_ELEMENTS_FOR_MEMORY: Final = 1_000_000

_HOW: Final = """\
Every peer steps its own copies of the same tensors. A round times one `optimizer.step()` of each
peer, in an order drawn anew; peers are compared within a round, so that a drift of the machine hits
all of them alike. A ratio is the median over the rounds, in brackets the quartiles. *Cold*: between
two steps 96 MB of other memory are touched and the gradients are new tensor objects, as after a
backward pass. *Warm*: the two steps before were the same peer's. The learning rate of every group
is set between steps, as a scheduler does.

Where a figure is not reached, two follow that it would be with less to do. *The ceiling* is a loop
over the same elements that computes next to nothing, and knows without looking where they are; its
memory is as torch allocates it, while our large states are in huge pages where the system grants
them. *With the checks* adds the time of our step of as many groups and tensors of one element
(`scalars` for `mixed-sizes`, `many-groups-of-scalars` for `many-groups`), which is that of finding
the gradients and seeing that nothing else has changed.
"""

_COLUMNS: Final = """\
Median time of a step, and that time over recap_fast's (above 1: slower than recap_fast). Peak
memory is by how much the process grows from before a peer's tensors are made to the peak of its
second step: parameters, gradients, states and what the step needs besides.
"""

_REPRODUCE: Final = """\
On a machine that does nothing else:

    make bench                         # all of this page; twelve minutes on 2 cores, 10 GB
    make bench-compare BASE=HEAD~1     # another revision and the work tree, step by step in turn
    make bench-suite                   # throughput by pytest-benchmark, a table for each workload

and in an environment with the package built, `make bench` leaves one in `.venv`:

    python -m benchmarks.report --quick --only mixed-sizes,scalars     # a first look
    python -m benchmarks.breakdown scalars     # where the time of a small step goes
    python -m benchmarks.pictures FILE         # growth as pictures, from a results file
"""


def _limit(target: Target, threads: Sequence[int]) -> str:
    sign = "≤" if target.figure.sense == "at most" else "≥"
    limits = list(dict.fromkeys(target.limit(count) for count in threads))
    return " / ".join(f"{sign} {limit:g}{target.figure.unit}" for limit in limits)


def _verdict(target: Target, measurements: Sequence[Measurement], threads: int) -> str:
    figure = target.measured(measurements, threads)
    if figure is None:
        return "not measured"
    text = with_quartiles(figure, target.figure.unit)
    if target.met(figure, threads):
        return f"{text} met"
    limits = {
        "the ceiling": target.measured(measurements, threads, "ceiling"),
        "with the checks": target.of_ceiling_and_checks(measurements, threads),
    }
    shown = [f"{name} {number(f.median)}{target.figure.unit}" for name, f in limits.items() if f]
    return "; ".join([f"{text} **not met**", *shown])


def target_rows(
    targets: Iterable[Target], measurements: Sequence[Measurement], threads: Sequence[int]
) -> list[list[str]]:
    """What each figure must reach, and what it is with each number of threads."""
    return [
        [t.text, _limit(t, threads), *(_verdict(t, measurements, n) for n in threads)]
        for t in targets
    ]


def _targets(measurements: Sequence[Measurement]) -> str:
    threads = [n for n in (1, 2) if any(m.threads == n for m in measurements)]
    workloads = {m.workload for m in measurements}
    return table(
        ["figure", "must reach", *(plural(n, "thread") for n in threads)],
        target_rows((t for t in TARGETS if t.workload in workloads), measurements, threads),
    )


def _cell(m: Measurement, peer: str) -> str:
    if peer not in m.timings.microseconds:
        return "-"
    time = m.timings.time(peer).median
    ratio = m.timings.ratio(peer, "recap_fast").median
    return f"{number(time)} µs · {number(ratio)}x"


def _of_one_algorithm(measurements: Sequence[Measurement]) -> str:
    """A row per peer; a column per number of threads and cache state, and one of peak memory."""
    m = measurements[0]
    peers = list(m.timings.microseconds)
    header = [f"{ALGORITHMS[m.algorithm]}, {m.bytes / 1e6:,.4g} MB a step"]
    header += [f"{plural(m.threads, 'thread')}, {m.cache}" for m in measurements]
    rows = [[peer, *(_cell(m, peer) for m in measurements)] for peer in peers]
    if m.peak_memory_mb and m.elements >= _LEAST_ELEMENTS_FOR_MEMORY:
        header.append("peak memory")
        for row, peer in zip(rows, peers, strict=True):
            row.append(f"{number(m.peak_memory_mb[peer])} MB" if peer in m.peak_memory_mb else "-")
    return with_skipped(table(header, rows), m)


def with_skipped(text: str, m: Measurement) -> str:
    """And which peers did not run, with the reason."""
    return "\n".join([text, *(f"{name}: {reason}.\n" for name, reason in m.skipped.items())])


def _side_by_side(
    measurements: Iterable[Measurement], tables: Callable[[list[Measurement]], str]
) -> str:
    """A section per workload, with what `tables` makes of the measurements of each algorithm."""
    parts = []
    for _, group in groupby(measurements, key=lambda m: m.workload):
        of_workload = list(group)
        m = of_workload[0]
        parts.append(
            f"### {m.workload}: {m.description}\n\n{plural(m.groups, 'group')}, "
            f"{plural(m.tensors, 'tensor')}, {m.elements:,} elements.\n"
        )
        by_algorithm = groupby(of_workload, key=lambda m: m.algorithm)
        parts += [tables(list(of_algorithm)) for _, of_algorithm in by_algorithm]
    return "\n".join(parts)


def figures(
    results: Mapping[str, Any],
    *,
    title: str,
    written: str,
    machine: str,
    how: str,
    targets: str,
    columns: str,
    peers: Iterable[str],
    measurements: Iterable[Measurement],
    tables: Callable[[list[Measurement]], str],
) -> list[str]:
    """What the pages of a CPU and of a GPU have in common: targets, then the peers side by side."""
    failed = results.get("failed", {})
    return [
        f"# {title}\n",
        f"Written by {written}; do not edit.\n",
        machine,
        *(f"**{what} failed**: {why}\n" for what, why in failed.items()),
        "## What must be reached\n",
        how,
        targets,
        "## Side by side\n",
        columns,
        "".join(f"* **{name}**: {DESCRIPTIONS[name]}.\n" for name in peers),
        _side_by_side(measurements, tables),
    ]


def _machine(facts: Mapping[str, Any]) -> str:
    caches = ", ".join(f"{level} {size}" for level, size in facts["caches"].items())
    deepspeed = f"DeepSpeed {facts['deepspeed']}" if facts.get("deepspeed") else "no DeepSpeed"
    revision = f"Revision {facts['revision']}, " if facts.get("revision") else ""
    return (
        f"{facts['processor']}, {plural(facts['cores'], 'core')} ({caches or 'caches unknown'}), "
        f"{facts['memory_gb']} GB, {facts['system']}, transparent huge pages "
        f"`{facts['transparent_huge_pages']}`; Python {facts['python']}, torch {facts['torch']} "
        f"({facts['torch_instruction_set']}), {deepspeed}; instruction set in use: "
        f"{facts['instruction_set']}. {revision}{facts['date']}, "
        f"load per core before the run {facts['busy']}.\n"
    )


def render(results: Mapping[str, Any], source: str) -> str:
    """The page.

    Args:
        results: as `benchmarks.report` writes them.
        source: the file they are in, for a link.
    """
    measurements = [Measurement.from_json(data) for data in results["measurements"]]
    parts = figures(
        results,
        title="Performance",
        written=f"`python -m benchmarks.report` from `{source}`",
        machine=_machine(results["machine"]),
        how=_HOW,
        targets=_targets(measurements),
        columns=_COLUMNS,
        peers=PEERS + CLIPPING_PEERS + CLEARING_PEERS,
        measurements=measurements,
        tables=_of_one_algorithm,
    )
    sections = {
        "breakdown": breakdown.section,
        "growth": growth.section,
        "sharded_params": sharded_params.section,
        "shared_memory_bus": shared_memory_bus.section,
        "state_formats": state_formats.section,
    }
    for name, section in sections.items():
        if results.get(name):
            parts.append(section(results[name]))
    parts += ["## How to reproduce\n", _REPRODUCE]
    return "\n".join(parts)
