"""The figures in the README: a marked block, taken from the results of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from benchmarks.measurement import Measurement
from benchmarks.peers import ALGORITHMS
from benchmarks.table import milliseconds, number, plural, table

_BEGIN: Final = "<!-- headline figures: written by python -m benchmarks.report -->"
_END: Final = "<!-- end of headline figures -->"
_BLOCK: Final = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)

WORKLOADS: Final = {
    "ranker-48M": "the ranker of the-algorithm-ml, {elements} elements",
    "demo": "the model of `make demo`, {elements} elements",
    "mixed-sizes": "480 tensors of 64 to 4,096 elements in 12 groups",
    "many-groups": "400 tensors of 1,024 elements in 100 groups",
    "many-groups-of-scalars": "400 tensors of one element in 100 groups",
    "one-50M-tensor": "one tensor of 50 M elements",
}
"""What is shown, in this order, and what it is called."""

PER_GROUP: Final = "torch, an optimizer per group"
"""What the peer "reference" is called wherever it is shown."""

_PEERS: Final = {
    "reference": PER_GROUP,
    "torch fused": "torch `fused=True`",
    "DeepSpeed": "DeepSpeed",
}

_ONE_OPTIMIZER: Final = "torch for-loop"

_EXPLAINED: Final = f"""\
*{PER_GROUP}* is what the-algorithm-ml trains with: one `torch.optim.Adam` per
group, without `fused=True`. It is `recap_fast.reference`, and the row "reference" in
[docs/performance.md](docs/performance.md). Caches are cold, as they are after a backward \
pass. A ratio
above 1 means that recap_fast is faster; it is the median over rounds in which both were timed."""

_EXPLAINED_ONE: Final = f"""\
Milliseconds of a single `torch.optim.Adam` over all groups, with torch's default implementation
on a CPU (the row "{_ONE_OPTIMIZER}" in that page):"""


def label(measurement: Measurement) -> str:
    """What a workload of `WORKLOADS` is called."""
    elements = f"{measurement.elements / 1e6:.3g} M"
    return WORKLOADS[measurement.workload].format(elements=elements)


def shown(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """The cold Adam steps of each workload of `WORKLOADS` that was measured, by threads."""
    found: dict[str, list[Measurement]] = {workload: [] for workload in WORKLOADS}
    for m in measurements:
        if m.workload in WORKLOADS and (m.algorithm, m.cache) == ("adam", "cold"):
            found[m.workload].append(m)
    return {
        workload: sorted(some, key=lambda m: m.threads) for workload, some in found.items() if some
    }


def _times(by_threads: Iterable[Measurement], peer: str) -> str:
    return " / ".join(milliseconds(m.timings.time(peer).median) for m in by_threads)


def _cell(by_threads: Iterable[Measurement], peer: str) -> str:
    """The time of the peer, and how often as fast recap_fast is, for each number of threads."""
    timed = [m for m in by_threads if peer in m.timings.microseconds]
    ratios = " / ".join(f"{number(m.timings.ratio(peer, 'recap_fast').median)}x" for m in timed)
    return f"{_times(timed, peer)} ({ratios})" if timed else "-"


def _lost(results: Mapping[str, Any]) -> Iterator[str]:
    """Every figure, of any algorithm, in which a peer of the table is faster than recap_fast."""
    facts = results["machine"]
    machine = "{processor} with {instruction_set} at {revision}".format(**facts)
    measurements = map(Measurement.from_json, results["measurements"])
    for m in (m for m in measurements if m.workload in WORKLOADS and m.cache == "cold"):
        for peer in filter(m.timings.microseconds.__contains__, _PEERS):
            ratio = m.timings.ratio(peer, "recap_fast").median
            if ratio < 1:
                yield (
                    f"* {label(m)}, {ALGORITHMS[m.algorithm]}, {plural(m.threads, 'thread')}, "
                    f"{machine}: {_times([m], 'recap_fast')} ms against "
                    f"{_times([m], peer)} ms of {_PEERS[peer]} ({ratio:.3g}x)"
                )


def render(
    results: Mapping[str, Any],
    source: str,
    others: Iterable[Mapping[str, Any]] = (),
) -> str:
    """The block, with its marks.

    Args:
        results: as `benchmarks.report` writes them.
        source: the file they are in, for a link.
        others: results of other machines, of which lost figures are listed too.
    """
    facts = results["machine"]
    measurements = [Measurement.from_json(data) for data in results["measurements"]]
    threads = " / ".join(str(n) for n in sorted({m.threads for m in measurements}))
    rows = [
        [label(some[0]), _times(some, "recap_fast"), *(_cell(some, peer) for peer in _PEERS)]
        for some in shown(measurements).values()
    ]
    lost = [line for each in (results, *others) for line in _lost(each)]
    parts = [
        _BEGIN,
        f"Milliseconds of one `optimizer.step()`, Adam, with {threads} threads (medians), and how "
        "many times as fast recap_fast is:\n",
        table(["", "recap_fast", *_PEERS.values()], rows),
        f"{facts['processor']}, {facts['cores']} cores, {facts['instruction_set']}, torch "
        f"{facts['torch']}; from [{source}]({source}).\n",
        _EXPLAINED,
    ]
    one = [
        f"* {label(some[0])}: {_cell(some, _ONE_OPTIMIZER)}"
        for some in shown(measurements).values()
        if any(_ONE_OPTIMIZER in m.timings.microseconds for m in some)
    ]
    if one:
        parts += [f"\n{_EXPLAINED_ONE}\n", *one]
    if lost:
        said = "recap_fast was slower in these cases, each at the revision named"
        parts += [f"\nOn the machines measured, {said}:\n", *lost]
    return "\n".join([*parts, _END])


def replace(readme: str, block: str) -> str:
    """The README with its block replaced.

    Raises:
        ValueError: it has no such block, or several.
    """
    text, count = _BLOCK.subn(lambda _: block, readme)
    if count != 1:
        raise ValueError(f"README.md must hold one block from {_BEGIN} to {_END}, found {count}")
    return text
