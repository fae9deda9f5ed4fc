"""How the time of a step grows with elements, with tensors and with groups, as log-log pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

from benchmarks import peers
from benchmarks.interleave import interleave
from benchmarks.workloads import Workload

_PEERS: Final = ("recap_fast", "reference", "torch fused", "torch fused per group", "DeepSpeed")
_MOST_ELEMENTS_OF_SLOW_PEERS: Final = 10_000_000
_SLOW_PEERS: Final = ("reference", "torch fused per group")


def _elements(count: int) -> Workload:
    return Workload(f"{count} elements", "", (((count // 10,),) * 10,))


def _tensors(count: int) -> Workload:
    return Workload(f"{count} tensors", "", (((256,),) * count,))


def _groups(count: int) -> Workload:
    """1,000 tensors of 64 elements, dealt out to the groups."""
    sizes = [1000 // count + (index < 1000 % count) for index in range(count)]
    return Workload(f"{count} groups", "", tuple(((64,),) * size for size in sizes))


DIMENSIONS: Final[Mapping[str, tuple[str, Callable[[int], Workload], tuple[int, ...]]]] = {
    "elements": (
        "elements in 10 tensors of one group",
        _elements,
        (10**4, 10**5, 10**6, 10**7, 10**8),
    ),
    "tensors": (
        "tensors of 256 elements in one group",
        _tensors,
        (1, 10, 100, 1_000, 10_000),
    ),
    "groups": ("groups of 1,000 tensors of 64 elements", _groups, (1, 3, 10, 30, 100, 300, 1_000)),
}
"""By name: the axis, the workload of a size, and the sizes."""


def _times(workload: Workload, budget_seconds: float) -> dict[str, float]:
    """Median microseconds of a cold Adam step, by peer."""
    initial = peers.initial_values(workload)
    built = {}
    for name in _PEERS:
        if name in _SLOW_PEERS and workload.elements > _MOST_ELEMENTS_OF_SLOW_PEERS:
            continue
        try:
            built[name] = peers.build(name, initial, "adam")
        except peers.Unavailable:
            continue
    timings = interleave(built, cache="cold", budget_seconds=budget_seconds, min_rounds=5)
    return {name: timings.time(name).median for name in built}


def draw(directory: Path, stem: str, quick: bool = False) -> list[Path]:
    """Measures with one thread and writes one picture for each of `DIMENSIONS`.

    Args:
        directory: where the pictures go, as `<stem>-growth-<dimension>.png`.
        stem: how the file names begin.
        quick: leaves out the largest size of each, and takes less time for the others.

    Returns:
        The paths of the pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    torch.set_num_threads(1)
    paths = []
    for name, (axis, make, sizes) in DIMENSIONS.items():
        sizes = sizes[:-1] if quick else sizes
        points = [_times(make(size), 0.5 if quick else 3.0) for size in sizes]
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for peer in _PEERS:
            xs = [size for size, times in zip(sizes, points, strict=True) if peer in times]
            ys = [times[peer] for times in points if peer in times]
            if xs:
                axes.loglog(xs, ys, marker="o", label=peer)
        axes.set(xlabel=axis, ylabel="cold Adam step, one thread [µs]")
        axes.grid(True, which="major", alpha=0.3)
        axes.legend()
        path = directory / f"{stem}-growth-{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        paths.append(path)
    return paths
