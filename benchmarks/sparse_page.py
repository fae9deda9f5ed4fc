"""What docs/performance.md says of sparse gradients, from the results of `benchmarks.sparse`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.interleave import Timings

ROWS: Final = 1_000_000
WIDTH: Final = 64
LOOKUPS: Final = 4096
PER_BAG: Final = 2

SUFFIX: Final = "-sparse.json"
HEADING: Final = "## Sparse gradients\n"

_HOW: Final = f"""\
A table of {ROWS:,} x {WIDTH} float32, of which {LOOKUPS:,} random rows are looked up, {PER_BAG} in
each bag: the gradient of `torch.nn.EmbeddingBag(sparse=True)`, not coalesced, another one at each
step. Medians of one `optimizer.step()`; a ratio is the median over rounds in which both were
timed, in brackets the quartiles. *Cold*: 96 MB of other memory are touched between two steps.
Where the load per core is above a quarter, other programs ran meanwhile, and two threads wait for
each other: there, only the ratios say something. Written by `python -m benchmarks.sparse`.
"""


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """What the page of figures says of sparse gradients; empty without results."""
    if not results:
        return ""
    parts = [HEADING, _HOW]
    for result in results:
        facts = result["machine"]
        parts.append(
            f"{facts['processor']}, {facts['cores']} cores, {facts['instruction_set']}, torch "
            f"{facts['torch']}; revision {facts['revision']}, {facts['date']}, load per core "
            f"before the run {facts['busy']}.\n"
        )
        parts.append(table(result["sparse"]))
    return "\n".join(parts)


def table(measurements: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| algorithm | rows | threads | caches | recap_fast | torch | speed-up |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for each in measurements:
        timings = Timings(each["microseconds"])
        ratio = timings.ratio("torch", "recap_fast")
        ours, theirs = (timings.time(name).median for name in ("recap_fast", "torch"))
        lines.append(
            f"| {each['algorithm']} | {each['rows']:,} | {each['threads']} | {each['cache']} "
            f"| {ours:,.0f} µs | {theirs:,.0f} µs "
            f"| {ratio.median:.1f}x ({ratio.low:.1f} to {ratio.high:.1f}) |"
        )
    return "\n".join(lines) + "\n"


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of all machines, in `folder`."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"*{SUFFIX}"))]
