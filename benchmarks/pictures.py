"""Draws growth, one log-log picture for each dimension: `python -m benchmarks.pictures FILE`.

FILE holds the results of `benchmarks.report`. The pictures go to build/benchmarks/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from benchmarks.growth import Curves

FOLDER: Final = Path(__file__).parent.parent / "build" / "benchmarks"


def draw(all_curves: Iterable[Curves], name: str, folder: Path = FOLDER) -> list[Path]:
    """Writes `<name>-growth-<dimension>.png` for each of the curves; returns the paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for curves in all_curves:
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for peer, times in curves.microseconds.items():
            points = [(s, t) for s, t in zip(curves.sizes, times, strict=True) if t is not None]
            style = {"linestyle": "--", "color": "grey"} if peer == "ceiling" else {}
            axes.loglog(*zip(*points, strict=True), marker="o", label=peer, **style)
        axes.set(xlabel=curves.axis, ylabel="cold Adam step, 1 thread [µs]")
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize="small")
        paths.append(folder / f"{name}-growth-{curves.name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
    return paths


if __name__ == "__main__":
    source = Path(sys.argv[1])
    growth = json.loads(source.read_text())["growth"]
    print(*draw([Curves(**data) for data in growth], source.stem), sep="\n")
