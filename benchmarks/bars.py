"""Draws the time of a step: the picture in the README."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks import headline
from benchmarks.measurement import Measurement
from benchmarks.table import milliseconds, number

_THREADS: Final = 1

# From the top down, with the colour of its bar.
_PEERS: Final = {
    "reference": (headline.PER_GROUP, "#b8bcc4"),
    "torch fused": ("torch fused=True", "#7f8794"),
    "recap_fast": ("recap_fast", "#ee4c2c"),
}
_COLUMNS: Final = 2
_LABEL_WIDTH: Final = 19  # characters; a longer one takes the panels' room


def _shown(results: Mapping[str, Any]) -> list[Measurement]:
    """What the README's table shows, with one thread."""
    measurements = [Measurement.from_json(data) for data in results["measurements"]]
    of_workloads = headline.shown(measurements).values()
    return [m for some in of_workloads for m in some if m.threads == _THREADS]


def _title(m: Measurement) -> str:
    return headline.label(m).replace("`", "")


def _bars(m: Measurement) -> dict[str, str]:
    """What stands at the bars, by peer: the time, and how often as fast recap_fast is."""
    texts = {}
    for peer in _PEERS:
        if peer in m.timings.microseconds:
            texts[peer] = f"{milliseconds(m.timings.time(peer).median)} ms"
            if peer != "recap_fast":
                ratio = m.timings.ratio(peer, "recap_fast").median
                texts[peer] += f", {number(ratio)}x"
    return texts


def describe(results: Mapping[str, Any]) -> str:
    """What the picture shows, in words: it is written into the file."""
    return "; ".join(
        f"{_title(m)}: " + ", ".join(f"{_PEERS[p][0]} {text}" for p, text in _bars(m).items())
        for m in _shown(results)
    )


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Writes the picture, a panel for each workload with a scale of its own; returns its path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = _shown(results)
    rows = -(-len(shown) // _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(10, 1.6 * rows + 0.9), squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, m in zip(grid.flat, shown, strict=False):
        texts = _bars(m)
        names, colours = zip(*(_PEERS[peer] for peer in texts), strict=True)
        names = [textwrap.fill(name, _LABEL_WIDTH) for name in names]
        times = [m.timings.time(peer).median for peer in texts]
        bars = axes.barh(names, times, color=colours)
        axes.bar_label(bars, list(texts.values()), padding=4, fontsize=9)
        axes.set_title(_title(m), loc="left", fontsize=10)
        axes.set(xlim=(0, 1.35 * max(times)), ylim=(len(_PEERS) - 0.5, -0.5), xticks=[])
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
    facts = results["machine"]
    figure.suptitle(
        f"Time of one Adam step, 1 thread, shorter is better ({facts['processor']}, "
        f"{facts['instruction_set']}, torch {facts['torch']})",
        fontsize=11,
    )
    figure.tight_layout()
    metadata = {"Software": None, "Description": describe(results)}
    figure.savefig(path, dpi=130, facecolor="white", metadata=metadata)
    pyplot.close(figure)
    return path
