"""Writes `docs/performance.md` from the results of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from benchmarks.breakdown import VALUES, WHOLE
from benchmarks.measurement import Measurement
from benchmarks.peers import ALGORITHMS, CLIPPING_PEERS, DESCRIPTIONS, PEERS
from benchmarks.plan import LARGE_PEERS
from benchmarks.table import number, plural, table, with_quartiles
from benchmarks.targets import TARGETS, Target
from benchmarks.workloads import IN_ONE_GROUP

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

_SMALL_STEPS: Final = """\
Warm Adam steps with one thread, ten in a row, by differences of medians, as
`python -m benchmarks.breakdown` prints them.
"""

_LARGE: Final = f"""\
Cold Adam steps with 1 thread. With 50 M elements and more there are only the peers that
`one-50M-tensor` has ({", ".join(LARGE_PEERS)}), for the sake of memory.
"""

_REPRODUCE: Final = """\
On a machine that does nothing else:

    make bench                         # all of this page; under ten minutes on 2 cores, 10 GB
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


def _small_steps(breakdown: Sequence[Mapping[str, Any]]) -> str:
    """A column per workload, and one of what each further param group costs."""
    times = {b["workload"]: b["microseconds"] for b in breakdown}
    (many,) = [b for b in breakdown if b["workload"] == "many-groups-of-scalars"]
    whole, single = many["microseconds"], times[f"many-groups-of-scalars{IN_ONE_GROUP}"]
    groups, entries = many["groups"], many["entries"]
    further = groups - 1
    each = {part: (whole[part] - single[part]) * 1e3 / further for part in whole}
    left = 0.3 * single[WHOLE] * 1e3 / further
    in_dict = entries * many["nanoseconds_per_entry"]
    return (
        table(
            ["", *(f"{name}, µs" for name in times), "each further group, ns"],
            (
                [part, *(f"{of[part]:.1f}" for of in times.values()), f"{each[part]:.0f}"]
                for part in whole
            ),
        )
        + f"""
For {groups} groups to take at most 1.3 times as long as one, {left:.0f} ns are left for each
further one. To compare the {entries} entries of its dict with those of the step before,
any of which may have been set, takes {in_dict:.0f} ns, and to compute its values
{each[VALUES]:.0f} ns; besides, its learning rate is read, and its optimizer's `state` and
`param_groups` are looked up.
"""
    )


def _growth(curves: Mapping[str, Any]) -> str:
    """The figures of one dimension."""
    rows = (
        [peer, *("-" if time is None else number(time) for time in times)]
        for peer, times in curves["microseconds"].items()
    )
    return (
        f"### {curves['name'].capitalize()}\n\nMicroseconds by number of {curves['axis']}:\n\n"
    ) + table([curves["name"], *(f"{size:,}" for size in curves["sizes"])], rows)


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
        peers=PEERS + CLIPPING_PEERS,
        measurements=measurements,
        tables=_of_one_algorithm,
    )
    if results.get("breakdown"):
        parts += ["## Where the time of a small step goes\n", _SMALL_STEPS]
        parts.append(_small_steps(results["breakdown"]))
    if results.get("growth"):
        parts += ["## Growth\n", _LARGE, *map(_growth, results["growth"])]
    parts += ["## How to reproduce\n", _REPRODUCE]
    return "\n".join(parts)
