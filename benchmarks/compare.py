"""Compares the work tree with another revision: `python -m benchmarks.compare BASE`."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks import revision, workloads
from benchmarks.clocks import Cache
from benchmarks.interleave import Timings, interleave
from benchmarks.peers import ALGORITHMS
from benchmarks.side import Side
from benchmarks.table import number, plural, table, with_quartiles
from benchmarks.workloads import Workload

_ROOT: Final = Path(__file__).parent.parent
_BUILDS: Final = _ROOT / "build" / "compare"

_SHORT: Final = (
    *(workloads.MIXED_SIZES, workloads.MANY_GROUPS, workloads.SCALARS),
    workloads.MANY_GROUPS_OF_SCALARS,
    Workload("one-5M-tensor", "one tensor of 5 M elements", (((5_000_000,),),)),
)
_CACHES: Final[tuple[Cache, ...]] = ("cold", "warm")

# Where a process happens to have its tensors makes its steps of small ones faster or slower than
# another's of the same code, by some ten percent.
_PROCESSES: Final = 5

# For as long, threads of the side that has just stepped spin before they sleep.
_PAUSE_SECONDS: Final = 0.02


_LEAST: Final = 1e-30


@dataclass(frozen=True)
class Comparison:
    """One workload, algorithm, number of threads and cache state.

    Attributes:
        label: which.
        timings: of a step of "base" and of "tree".
        difference: largest difference between the parameters of both after all steps, relative to
            the largest parameter of its tensor; 0 means that all have the same bits.
    """

    label: str
    timings: Timings
    difference: float


def _sample(cache: Cache, side: Side) -> tuple[float]:
    time.sleep(_PAUSE_SECONDS)
    return (side.step(cache),)


def _clock(cache: Cache) -> Callable[[Sequence[Side]], Callable[[], tuple[float]]]:
    return lambda sides: functools.partial(_sample, cache, *sides)


def _difference(sides: Iterable[Side]) -> float:
    found = 0.0
    for a, b in zip(*(side.parameters() for side in sides), strict=True):
        if not torch.equal(a.view(torch.int32), b.view(torch.int32)):
            furthest = (a - b).abs().nan_to_num(nan=torch.inf).max()
            relative = float(furthest / a.abs().max().clamp_min(_LEAST))
            found = max(found, relative, _LEAST)  # zeros may differ in their signs
    return found


def compare(
    base: Path,
    tree: Path,
    chosen: Sequence[Workload],
    *,
    algorithms: Sequence[str] = ("adam",),
    threads: Sequence[int] = (1, 2),
    processes: int = _PROCESSES,
    seconds: float = 3.0,
    least_rounds: int = 10,
) -> Iterator[Comparison]:
    """Times both in turn, with cold and with warm caches.

    Args:
        base, tree: folders that hold the package recap_fast.
        chosen: what to step.
        algorithms, threads: each combination is timed.
        processes: each side has so many, one after the other.
        seconds: how long each combination is timed, by all processes together.
        least_rounds: how many rounds each combination has in each process whatever the time.
    """
    for count in threads:
        timings: dict[tuple[str, Cache], list[Timings]] = {}
        differences: dict[str, float] = {}
        for _ in range(processes):
            with Side(base, count) as base_side, Side(tree, count) as tree_side:
                sides = {"base": [base_side], "tree": [tree_side]}
                for workload, algorithm in itertools.product(chosen, algorithms):
                    for (side,) in sides.values():
                        side.load(workload.groups, algorithm)
                    case = f"{workload.name}, {algorithm}, {plural(count, 'thread')}"
                    for cache in _CACHES:
                        (timed,) = interleave(
                            *(sides, _clock(cache)),
                            seconds=seconds / processes,
                            least_rounds=least_rounds,
                        )
                        timings.setdefault((case, cache), []).append(timed)
                    differs = _difference((base_side, tree_side))
                    differences[case] = max(differences.get(case, 0.0), differs)
        for (case, cache), parts in timings.items():
            yield Comparison(f"{case}, {cache}", Timings.joined(parts), differences[case])


def render(comparisons: Iterable[Comparison], base: str) -> str:
    """A Markdown table; the ratio is taken within rounds."""
    return table(
        ["step", base, "work tree", "work tree over base", "parameters"],
        (
            [
                c.label,
                *(f"{number(c.timings.time(side).median)} µs" for side in ("base", "tree")),
                with_quartiles(c.timings.ratio("tree", "base")),
                f"differ by {c.difference:.1e}" if c.difference else "same bits",
            ]
            for c in comparisons
        ),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Builds recap_fast of BASE and steps it and the work tree's in turn, each in "
        "processes of its own. Prints times, and the median ratio with quartiles.",
    )
    add = parser.add_argument
    add("base", nargs="?", default="HEAD", metavar="BASE", help="default: HEAD")
    add("--all", action="store_true", help="every workload and algorithm, not some with Adam")
    add("--threads", type=int, nargs="+", metavar="N", default=[1, 2])
    add("--seconds", type=float, default=3.0, help="to time each combination (default: 3)")
    arguments = parser.parse_args(argv)
    try:
        commit = revision.commit_of(_ROOT, arguments.base)
        print(f"building {commit[:12]}", file=sys.stderr)
        base = revision.build(_ROOT, commit, _BUILDS)
    except revision.CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    comparisons = []
    for comparison in compare(
        *(base, _ROOT),
        [workloads.by_name(name) for name in workloads.NAMES] if arguments.all else _SHORT,
        algorithms=tuple(ALGORITHMS) if arguments.all else ("adam",),
        threads=arguments.threads,
        seconds=arguments.seconds,
    ):
        print(comparison.label, file=sys.stderr)
        comparisons.append(comparison)
    print(render(comparisons, f"{arguments.base} ({commit[:12]})"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
