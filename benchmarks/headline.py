"""The figures in the README: a marked block, taken from the results of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from benchmarks.measurement import Measurement
from benchmarks.table import number, table

_BEGIN: Final = "<!-- headline figures: written by python -m benchmarks.report -->"
_END: Final = "<!-- end of headline figures -->"
_BLOCK: Final = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)

_ROWS: Final = {
    "RECAP": "the original's shipped model, {elements} elements",
    "DEMO": "the model of `make demo`, {elements} elements",
    "B": "480 tensors of 64 to 4,096 elements in 12 groups",
    "D": "400 tensors of 1,024 elements in 100 groups",
    "F": "400 tensors of one element in 100 groups",
    "C": "one tensor of 50 M elements",
}
_PEERS: Final = {
    "reference": "the reference",
    "torch fused": "torch `fused=True`",
    "DeepSpeed": "DeepSpeed",
}


def _cell(by_threads: Iterable[Measurement], peer: str) -> str:
    """How often as fast as the peer, for each number of threads."""
    ratios = [
        f"{number(m.timings.ratio(peer, 'recap_fast').median)}x"
        for m in by_threads
        if peer in m.timings.microseconds
    ]
    return " / ".join(ratios) or "-"


def _row(measurements: Iterable[Measurement], workload: str) -> list[str] | None:
    """None if the workload was not measured."""
    key = (workload, "adam", "cold")
    found = [m for m in measurements if (m.workload, m.algorithm, m.cache) == key]
    if not found:
        return None
    text = _ROWS[workload].format(elements=f"{found[0].elements / 1e6:.3g} M")
    return [text, *(_cell(found, peer) for peer in _PEERS)]


def render(results: Mapping[str, Any], source: str) -> str:
    """The block, with its marks.

    Args:
        results: as `benchmarks.report` writes them.
        source: the file they are in, for a link.
    """
    facts = results["machine"]
    measurements = [Measurement.from_json(data) for data in results["measurements"]]
    threads = " / ".join(str(n) for n in sorted({m.threads for m in measurements}))
    rows = [row for workload in _ROWS if (row := _row(measurements, workload))]
    return "\n".join(
        [
            _BEGIN,
            "How many times as fast `optimizer.step()` is, Adam, cold caches, with "
            f"{threads} threads (medians):\n",
            table(["", *(f"over {name}" for name in _PEERS.values())], rows),
            f"{facts['processor']}, {facts['cores']} cores, {facts['instruction_set']}, torch "
            f"{facts['torch']}; from [{source}]({source}).",
            _END,
        ]
    )


def replace(readme: str, block: str) -> str:
    """The README with its block replaced.

    Raises:
        ValueError: it has no such block, or several.
    """
    text, count = _BLOCK.subn(lambda _: block, readme)
    if count != 1:
        raise ValueError(f"README.md must hold one block from {_BEGIN} to {_END}, found {count}")
    return text
