"""Compares the work tree with another revision: `python -m benchmarks.compare BASE`."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks import revision, workloads
from benchmarks.clocks import Cache
from benchmarks.interleave import Timings
from benchmarks.peers import ALGORITHMS
from benchmarks.side import Side
from benchmarks.table import number, plural, table, with_quartiles
from benchmarks.workloads import Workload

_ROOT: Final = Path(__file__).parent.parent
_BUILDS: Final = _ROOT / "build" / "compare"

_5M: Final = Workload("one-5M-tensor", "one tensor of 5 M elements", (((5_000_000,),),))
_SHORT: Final = ("mixed-sizes", "many-groups", "scalars", "many-groups-of-scalars", _5M.name)

# Where a process happens to have its tensors makes its steps of small ones faster or slower than
# another's of the same code, by some ten percent.
_PROCESSES: Final = 5

# For as long, threads of the side that has just stepped spin before they sleep.
_PAUSE_SECONDS: Final = 0.02


@dataclass(frozen=True)
class Comparison:
    """One workload, algorithm, number of threads and cache state.

    Attributes:
        label: which.
        timings: of a step of "base" and of "tree".
        difference: largest difference between the parameters of both after all steps, relative to
            the largest parameter of its tensor.
    """

    label: str
    timings: Timings
    difference: float


def _difference(base: Side, tree: Side) -> float:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("base.pt", "tree.pt")]
        base.save(paths[0])
        tree.save(paths[1])
        pairs = zip(*(torch.load(path) for path in paths), strict=True)
        return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _rounds(base: Side, tree: Side, cache: Cache, budget_seconds: float, least: int) -> Timings:
    """Both step once a round; who begins alternates."""
    times: dict[str, list[float | None]] = {"base": [], "tree": []}
    turns = [("base", base), ("tree", tree)]
    end = time.monotonic() + budget_seconds
    while len(times["base"]) < least or time.monotonic() < end:
        for name, side in turns:
            time.sleep(_PAUSE_SECONDS)
            times[name].append(side.step(cache))
        turns.reverse()
    return Timings(times)


def compare(
    base: Path,
    tree: Path,
    chosen: Sequence[Workload],
    *,
    algorithms: Sequence[str] = ("adam",),
    threads: Sequence[int] = (1, 2),
    caches: Sequence[Cache] = ("cold", "warm"),
    processes: int = _PROCESSES,
    budget_seconds: float = 3.0,
    least_rounds: int = 10,
) -> Iterator[Comparison]:
    """Times both in turn.

    Args:
        base, tree: folders that hold the package recap_fast.
        chosen: what to step.
        algorithms, threads, caches: each combination is timed.
        processes: each side has so many, one after the other.
        budget_seconds: how long each combination is timed, by all processes together.
        least_rounds: how many rounds each combination has in each process whatever the time.
    """
    for count in threads:
        of_all: dict[str, list[tuple[Timings, float]]] = {}
        for _ in range(processes):
            with Side(base, count) as base_side, Side(tree, count) as tree_side:
                for workload, algorithm in itertools.product(chosen, algorithms):
                    for side in (base_side, tree_side):
                        side.load(workload.groups, algorithm)
                    for cache in caches:
                        budget = budget_seconds / processes
                        timings = _rounds(base_side, tree_side, cache, budget, least_rounds)
                        label = f"{workload.name}, {algorithm}, {plural(count, 'thread')}, {cache}"
                        of_one = (timings, _difference(base_side, tree_side))
                        of_all.setdefault(label, []).append(of_one)
        for label, found in of_all.items():
            parts, differences = zip(*found, strict=True)
            yield Comparison(label, Timings.joined(parts), max(differences))


def render(comparisons: Iterable[Comparison], base: str) -> str:
    """A Markdown table; the ratio is taken within rounds."""
    return table(
        ["step", base, "work tree", "work tree over base", "parameters"],
        (
            [
                c.label,
                *(f"{number(c.timings.time(side).median)} µs" for side in ("base", "tree")),
                with_quartiles(c.timings.ratio("tree", "base")),
                f"differ by {c.difference:.1e}" if c.difference else "equal",
            ]
            for c in comparisons
        ),
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Builds recap_fast of BASE and steps it and the work tree's in turn, each in "
        "processes of its own. Prints times, and the median ratio with quartiles.",
    )
    parser.add_argument("base", nargs="?", default="HEAD", metavar="BASE", help="default: HEAD")
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"every workload with every algorithm, instead of {', '.join(_SHORT)} with Adam",
    )
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", default=[1, 2])
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="to time each combination (default: 3)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    names = workloads.NAMES if arguments.all else _SHORT
    chosen = [_5M if name == _5M.name else workloads.by_name(name) for name in names]
    try:
        commit = revision.commit_of(_ROOT, arguments.base)
        print(f"building {commit[:12]}", file=sys.stderr)
        base = revision.build(_ROOT, commit, _BUILDS)
    except revision.CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    comparisons = []
    for comparison in compare(
        base,
        _ROOT,
        chosen,
        algorithms=tuple(ALGORITHMS) if arguments.all else ("adam",),
        threads=arguments.threads,
        budget_seconds=arguments.seconds,
    ):
        print(comparison.label, file=sys.stderr)
        comparisons.append(comparison)
    print(render(comparisons, f"{arguments.base} ({commit[:12]})"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
