"""Draws growth, one log-log picture for each dimension."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.growth import Curves


def path_of(results: Path, curves: Curves) -> Path:
    """Beside the results: `<machine>-growth-<dimension>.png`."""
    return results.with_name(f"{results.stem}-growth-{curves.name}.png")


def draw(all_curves: Iterable[Curves], results: Path) -> list[Path]:
    """Writes the pictures.

    Args:
        all_curves: what to draw.
        results: the file that holds these figures.

    Returns:
        The paths of the pictures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
        paths.append(path_of(results, curves))
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
    return paths
