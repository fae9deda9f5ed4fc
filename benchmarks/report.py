"""Runs the benchmarks and writes results and page: `python -m benchmarks.report [--gpu]`."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import (
    activity,
    breakdown,
    card,
    clocks,
    documents,
    growth,
    machine,
    plan,
    sparse,
    workloads,
)
from benchmarks.clocks import HostClock, device_clock
from benchmarks.measurement import build, measure
from benchmarks.peers import ALGORITHMS, GPU_PEERS

# Runs that are not whole go here, so that the committed results are always of a whole one.
_PARTIAL: Final = documents.ROOT / "build" / "benchmarks"

_QUICK_SCALE: Final = 0.1
_BUSY: Final = 0.25
_ACTIVITY_SHARE: Final = 0.15  # of a run on a GPU
_PARTS: Final = ("growth", "breakdown", "sparse")


def _some_of(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} not in {list(names)}")
        return chosen

    return parse


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Times every workload and writes benchmarks/results/<machine>.json, "
        "docs/performance.md and the figures in README.md. If not all is timed, results and page "
        "go to build/benchmarks/ instead, as those of a GPU do.",
    )
    names = (*workloads.NAMES, *_PARTS)
    parser.add_argument("--gpu", action="store_true", help="on the current CUDA device")
    parser.add_argument("--only", type=_some_of(names), metavar="X,Y", help=f"of {','.join(names)}")
    parser.add_argument("--algorithms", type=_some_of(tuple(ALGORITHMS)), metavar="adam,sgd")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results and page go")
    parser.add_argument(
        "--quick", action="store_true", help="on a CPU: Adam, a tenth of the time, for a first look"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", metavar="N", help="on a CPU (default: 1 and 2)"
    )
    parser.add_argument(
        "--seconds", type=float, default=240, help="on a GPU: for all of it (default: %(default)s)"
    )
    parser.add_argument(
        "--documents-from",
        type=Path,
        metavar="FILE",
        help="measures nothing: writes page and figures of a results file",
    )
    return parser.parse_args(argv)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def to_text(results: Mapping[str, Any]) -> str:
    """JSON with one line for each entry of a list, so that a diff can be read."""
    parts = []
    for name, value in results.items():
        text = json.dumps(value, indent=1)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(entry) for entry in value) + "\n ]"
        parts.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


class _Run:
    """What is measured part by part: one that fails is named, and the rest goes on."""

    def __init__(self, results: dict[str, Any], after_each: Callable[[], None]) -> None:
        self.results = results
        self._after_each = after_each

    def attempt(self, what: str, call: Callable[[], None]) -> None:
        begin = time.monotonic()
        try:
            call()
            _say(f"{what}: {time.monotonic() - begin:.0f} s")
        except Exception as error:
            self.results.setdefault("failed", {})[what] = f"{type(error).__name__}: {error}"
            _say(f"{what} failed\n{traceback.format_exc()}")
        self._after_each()

    def extend(self, what: str, name: str, make: Callable[[], Iterable[Any]]) -> None:
        """Adds to the list `name` of the results."""

        def call() -> None:
            entries = self.results.setdefault(name, [])
            for entry in make():
                entries.append(entry)

        self.attempt(what, call)


def run_on_cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    facts = machine.describe()
    if facts["busy"] > _BUSY:
        _say(f"the machine is busy (load per core {facts['busy']}): figures will be unsteady")
    threads = arguments.threads or [n for n in (1, 2) if n <= facts["cores"]]
    scale = _QUICK_SCALE if arguments.quick else 1.0
    algorithms = arguments.algorithms or (("adam",) if arguments.quick else tuple(ALGORITHMS))
    only = arguments.only or (*workloads.NAMES, *_PARTS)
    run = _Run({"machine": facts, "measurements": []}, lambda: None)
    of_cache = {cache: HostClock(cache) for cache in ("cold", "warm")}

    for case in plan.CASES:
        if case.workload in only and case.algorithm in algorithms:

            def measured(case: plan.Case = case) -> Iterable[dict[str, Any]]:
                shorter = replace(case, seconds=case.seconds * scale)
                return (m.to_json() for m in measure(shorter, of_cache, threads))

            run.extend(f"{case.workload} {case.algorithm}", "measurements", measured)
    parts: dict[str, Callable[[], Iterable[Any]]] = {
        "growth": lambda: map(vars, growth.measure(plan.GROWTH_SECONDS * scale)),
        "breakdown": breakdown.measure,
        "sparse": lambda: sparse.measure_all(threads, plan.SPARSE_SECONDS * scale),
    }
    for name, make in parts.items():
        if name in only:
            run.extend(name, name, make)
    whole = not (arguments.quick or arguments.only or arguments.threads or arguments.algorithms)
    folder = arguments.out or (documents.RESULTS if whole else _PARTIAL)
    path = folder / f"{machine.name(facts)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_text(run.results))
    documents.write(path)
    return run.results


def count(name: str, device: torch.device | str = "cuda") -> dict[str, list[int]]:
    """Launches, copies and memory sets of one step of each peer, in the steady state."""
    counted = {}
    built = build(workloads.by_name(name), GPU_PEERS, "adam", device=device)
    for peer, (own,) in built.peers.items():
        seen = activity.of(own.step)
        counted[peer] = [seen.launches, seen.copies, seen.sets]
    return counted


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run_on_gpu(
    arguments: argparse.Namespace, device: torch.device | str = "cuda"
) -> dict[str, Any]:
    """Writes after each part, since a run may be ended before it is over."""
    begin = time.monotonic()
    end = begin + arguments.seconds * (1 - _ACTIVITY_SHARE)
    facts = {**machine.describe(), **card.describe()}
    results: dict[str, Any] = {"machine": facts, "state": card.state(), "copy_gb_per_s": None}
    results |= {"activity": {}, "failed": {}, "measurements": []}
    path = (arguments.out or _PARTIAL) / f"{card.file_name(facts['card'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = arguments.only or plan.GPU_NAMES
    algorithms = arguments.algorithms or tuple(ALGORITHMS)

    def after_each() -> None:
        _free()
        path.write_text(to_text(results))
        path.with_suffix(".md").write_text(documents.page_of(path))

    run = _Run(results, after_each)

    def measure_copy() -> None:
        speed = clocks.copy_gigabytes_per_second(device)
        results["copy_gb_per_s"] = round(speed, 1)

    run.attempt("copy", measure_copy)
    todo = plan.gpu_cases(names, algorithms, facts["l2_bytes"])
    for index, case in enumerate(todo):
        now = time.monotonic()
        own_end = now + (end - now) / (len(todo) - index)

        def measured(case: plan.Case = case, own_end: float = own_end) -> Iterable[dict[str, Any]]:
            of_cache = dict.fromkeys(case.caches, device_clock)
            found = measure(case, of_cache, end=own_end, device=device)
            return (m.to_json() for m in found)

        run.extend(f"{case.workload} {case.algorithm} {case.caches[0]}", "measurements", measured)
    # Last: a profiler may slow down what comes after it.
    for name in names if "adam" in algorithms else ():
        if results["activity"] and time.monotonic() - begin > arguments.seconds:
            _say(f"{name}: no time left to count launches")
            continue

        def count_one(name: str = name) -> None:
            results["activity"][name] = count(name, device)

        run.attempt(f"{name} launches", count_one)
    _say(f"wrote {path}")
    return results


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if something failed, which the results name; 2 if nothing can run here."""
    arguments = _arguments(argv)
    if arguments.documents_from:
        documents.write(arguments.documents_from)
        return 0
    if arguments.gpu and (reason := card.why_not()):
        _say(f"nothing measured: {reason}")
        return 2
    results = (run_on_gpu if arguments.gpu else run_on_cpu)(arguments)
    return 1 if results.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
