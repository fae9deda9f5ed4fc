"""Draws results: the time of a step for the README, and growth when asked.

`python -m benchmarks.pictures FILE` draws the growth in a results file, a log-log picture for each
dimension, to build/benchmarks/.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks import headline
from benchmarks.measurement import Measurement
from benchmarks.table import milliseconds, number

_FOLDER: Final = Path(__file__).parent.parent / "build" / "benchmarks"

# From the top down, with the colour of its bar.
_PEERS: Final = {
    "reference": (headline.PER_GROUP, "#b8bcc4"),
    "torch fused": ("torch fused=True", "#7f8794"),
    "recap_fast": ("recap_fast", "#ee4c2c"),
}
_COLUMNS: Final = 2
_LABEL_WIDTH: Final = 19  # characters; a longer one takes the panels' room


def load_pyplot() -> Any:
    """Raises ImportError if matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _panels(results: Mapping[str, Any]) -> list[tuple[str, Measurement, dict[str, str]]]:
    """What the README's table shows with one thread: title, measurement, and what stands at the
    bars by peer: the time, and how often as fast recap_fast is.
    """
    measurements = [Measurement.from_json(data) for data in results["measurements"]]
    panels = []
    for m in (m for some in headline.shown(measurements).values() for m in some if m.threads == 1):
        texts = {}
        for peer in filter(m.timings.microseconds.__contains__, _PEERS):
            texts[peer] = f"{milliseconds(m.timings.time(peer).median)} ms"
            if peer != "recap_fast":
                texts[peer] += f", {number(m.timings.ratio(peer, 'recap_fast').median)}x"
        panels.append((headline.label(m).replace("`", ""), m, texts))
    return panels


def describe(results: Mapping[str, Any]) -> str:
    """What the picture of a step shows, in words: it is written into the file."""
    return "; ".join(
        f"{title}: " + ", ".join(f"{_PEERS[peer][0]} {text}" for peer, text in texts.items())
        for title, _, texts in _panels(results)
    )


def draw_steps(results: Mapping[str, Any], path: Path) -> Path:
    """Writes a picture with a panel for each workload, with a scale of its own; returns its path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    panels = _panels(results)
    rows = -(-len(panels) // _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(10, 1.6 * rows + 0.9), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, m, texts) in zip(grid.flat, panels, strict=False):
        names, colours = zip(*(_PEERS[peer] for peer in texts), strict=True)
        names = [textwrap.fill(name, _LABEL_WIDTH) for name in names]
        times = [m.timings.time(peer).median for peer in texts]
        bars = axes.barh(names, times, color=colours)
        axes.bar_label(bars, list(texts.values()), padding=4, fontsize=9)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlim=(0, 1.35 * max(times)), ylim=(len(_PEERS) - 0.5, -0.5), xticks=[])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
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


def draw_growth(
    growth: Iterable[Mapping[str, Any]], name: str, folder: Path = _FOLDER
) -> list[Path]:
    """Writes `<name>-growth-<dimension>.png` for each dimension; returns the paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for curves in growth:
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for peer, times in curves["microseconds"].items():
            points = [(s, t) for s, t in zip(curves["sizes"], times, strict=True) if t is not None]
            style = {"linestyle": "--", "color": "grey"} if peer == "ceiling" else {}
            axes.loglog(*zip(*points, strict=True), marker="o", label=peer, **style)
        axes.set(xlabel=curves["axis"], ylabel="cold Adam step, 1 thread [µs]")
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize="small")
        paths.append(folder / f"{name}-growth-{curves['name']}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
    return paths


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(*draw_growth(json.loads(source.read_text())["growth"], source.stem), sep="\n")
