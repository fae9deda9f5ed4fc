"""Measures training on several processes: `python -m benchmarks.scaling`."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks import machine, workloads
from benchmarks.documents import RESULTS, ROOT
from benchmarks.report import to_text
from benchmarks.scaling import page, rows, worker
from benchmarks.scaling.neighbours import watch
from examples.movielens.launch import launch

# A timing during which other processes used more cores than this is taken again, for so long.
_MOST_OF_OTHERS: Final = 0.1
_PATIENCE: Final = 1200  # seconds

PROCESSES: Final = (1, 2, 4)
DIMS: Final = (64, 128)
COUNTED: Final = (
    ("table_wise", "ddp"),
    ("row_wise", "ddp"),
    ("column_wise", "ddp"),
    ("table_wise", "fsdp"),
)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _in_processes(count: int, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """What `function(path, *args)` writes to `path`, on `count` processes of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        launch(count, 1, function, str(path), *args)
        return json.loads(path.read_text())


def _time_alone(count: int, dense: str, steps: int) -> dict[str, float]:
    """One timing, begun when others are quiet, and taken again if they were not all the time."""
    end = time.monotonic() + _PATIENCE
    while True:
        while _is_disturbed(watch(lambda: time.sleep(3))[1]) and time.monotonic() < end:
            pass
        figures, others = watch(
            lambda: _in_processes(count, worker.time_steps, dense, max(1, steps // 5), steps)
        )
        if not _is_disturbed(others) or time.monotonic() >= end:
            return {**figures, "others_cores": -1.0 if others is None else others}
        _say(f"others kept {others:.2f} cores busy: once more")


def _is_disturbed(others: float | None) -> bool:
    return others is not None and others > _MOST_OF_OTHERS


def measure(processes: tuple[int, ...], repeats: int, steps: int) -> dict[str, Any]:
    """All figures; every repeat measures each number of processes once, in an order drawn anew."""
    cases = [(n, dense) for n in processes for dense in (("ddp", "fsdp") if n > 1 else ("-",))]
    measured: dict[tuple[int, str], list[dict[str, float]]] = {case: [] for case in cases}
    order = random.Random(0)
    for repeat in range(repeats):
        for count, dense in order.sample(cases, len(cases)):
            figures = _time_alone(count, dense, steps)
            measured[count, dense].append(figures)
            _say(f"{repeat + 1}/{repeats}: {count} processes, {dense}: {figures}")
    throughput = [
        {
            "processes": count,
            "dense": dense,
            **{name: [round(run[name], 3) for run in runs] for name in runs[0]},
        }
        for (count, dense), runs in measured.items()
    ]
    traffic = [
        {
            "processes": count,
            "sharding": sharding,
            "dense": dense,
            **_in_processes(count, worker.count_bytes, sharding, dense),
        }
        for count in processes
        if count > 1
        for sharding, dense in COUNTED
    ]
    return {
        "throughput": throughput,
        "traffic": traffic,
        "rows": [
            vars(rows.measure(algorithm, dtype, dim))
            for algorithm in rows.ALGORITHMS
            for dtype in rows.DTYPES
            for dim in DIMS
        ],
        "dense": [{"model": "original", "elements": workloads.RECAP.elements}],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Trains the demo's model on 1, 2 and 4 processes and counts what they send; "
        "writes benchmarks/results/<machine>-scaling.json and docs/scaling.md.",
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each timing (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="that are timed (%(default)s)")
    parser.add_argument(
        "--page-from", type=Path, metavar="FILE", help="measures nothing: writes the page of a file"
    )
    arguments = parser.parse_args(argv)
    path = arguments.page_from
    if path is None:
        facts = machine.describe()
        path = RESULTS / f"{machine.name(facts)}-scaling.json"
        results = {"machine": facts, **measure(PROCESSES, arguments.repeats, arguments.steps)}
        path.write_text(to_text(results))
        _say(f"wrote {path}")
    page.PAGE.write_text(page.page_of(path))
    _say(f"wrote {page.PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
