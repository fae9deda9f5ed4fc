"""How the time of a step grows with elements, with tensors and with groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from benchmarks.clocks import HostClock
from benchmarks.measurement import measure as measure_case
from benchmarks.plan import LARGE_PEERS, Case
from benchmarks.table import number, table
from benchmarks.workloads import Groups, Workload

_PEERS: Final = (
    *("recap_fast", "reference", "torch foreach", "torch fused", "torch fused per group"),
    *("DeepSpeed", "ceiling"),
)
_LARGE_ELEMENTS: Final = 50_000_000

_LARGE: Final = f"""\
Cold Adam steps with 1 thread. With 50 M elements and more there are only the peers that
`one-50M-tensor` has ({", ".join(LARGE_PEERS)}), for the sake of memory.
"""


class Dimension(NamedTuple):
    """What grows."""

    name: str
    axis: str  # what is counted, and what stays as it is
    make: Callable[[int], Groups]  # those of a size
    sizes: Sequence[int]


def _deal(tensors: int, groups: int) -> Groups:
    """Tensors of 64 elements in groups of equal sizes, give or take one."""
    sizes = [tensors // groups + (index < tensors % groups) for index in range(groups)]
    return tuple(((64,),) * size for size in sizes)


DIMENSIONS: Final = (
    Dimension(
        "elements",
        "elements in 10 tensors of one group",
        lambda count: (((count // 10,),) * 10,),
        (10**4, 10**5, 10**6, 10**7, 10**8),
    ),
    Dimension(
        "tensors",
        "tensors of 256 elements in one group",
        lambda count: (((256,),) * count,),
        (1, 10, 100, 1_000, 10_000),
    ),
    Dimension(
        "groups",
        "groups of 1,000 tensors of 64 elements",
        lambda count: _deal(1000, count),
        (1, 3, 10, 30, 100, 300, 1_000),
    ),
)


def _medians(workload: Workload, seconds: float) -> dict[str, float]:
    names = LARGE_PEERS if workload.elements >= _LARGE_ELEMENTS else _PEERS
    case = Case(workload.name, "adam", ("cold",), names, seconds)
    (m,) = measure_case(case, {"cold": HostClock("cold")}, workload=workload)
    return {name: round(m.timings.time(name).median, 2) for name in m.timings.microseconds}


def measure(
    seconds: float, dimensions: Iterable[Dimension] = DIMENSIONS
) -> Iterator[dict[str, Any]]:
    """Times cold Adam steps with one thread, for so long for each size.

    Yields:
        For each dimension its `name`, `axis` and `sizes`, and `microseconds`: by peer the median
        for each size, None where it was not measured.
    """
    torch.set_num_threads(1)
    for dimension in dimensions:
        points = [
            _medians(Workload(f"{size} {dimension.name}", "", dimension.make(size)), seconds)
            for size in dimension.sizes
        ]
        measured = [name for name in _PEERS if any(name in point for point in points)]
        yield {
            "name": dimension.name,
            "axis": dimension.axis,
            "sizes": list(dimension.sizes),
            "microseconds": {name: [point.get(name) for point in points] for name in measured},
        }


def section(all_curves: Iterable[Mapping[str, Any]]) -> str:
    """What the page says: a table for each dimension."""
    parts = ["## Growth\n", _LARGE]
    for curves in all_curves:
        parts.append(f"### {curves['name'].capitalize()}\n")
        parts.append(f"Microseconds by number of {curves['axis']}:\n")
        rows = (
            [peer, *("-" if time is None else number(time) for time in times)]
            for peer, times in curves["microseconds"].items()
        )
        parts.append(table([curves["name"], *(f"{size:,}" for size in curves["sizes"])], rows))
    return "\n".join(parts)
