"""Runs the benchmarks and writes results and page: `python -m benchmarks.report [--gpu]`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    sharded_params,
    shared_memory_bus,
    sparse,
    state_formats,
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
_PARTS: Final = (
    *("growth", "breakdown", "sharded_params", "shared_memory_bus", "state_formats", "sparse"),
)


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


def _write(results: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_text(results))
    documents.write(path)


@contextlib.contextmanager
def _part(
    what: str, results: dict[str, Any], after: Callable[[], Any] = lambda: None
) -> Iterator[None]:
    """One part of a run: if it fails the results name it, and the rest goes on."""
    gc.collect()  # what the part before has left
    torch.cuda.empty_cache()
    begin = time.monotonic()
    try:
        yield
        _say(f"{what}: {time.monotonic() - begin:.0f} s")
    except Exception as error:
        results.setdefault("failed", {})[what] = f"{type(error).__name__}: {error}"
        _say(f"{what} failed\n{traceback.format_exc()}")
    after()


def run_on_cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    facts = machine.describe()
    if facts["busy"] > _BUSY:
        _say(f"the machine is busy (load per core {facts['busy']}): figures will be unsteady")
    threads = arguments.threads or [n for n in (1, 2) if n <= facts["cores"]]
    scale = _QUICK_SCALE if arguments.quick else 1.0
    algorithms = arguments.algorithms or (("adam",) if arguments.quick else tuple(ALGORITHMS))
    only = arguments.only or (*workloads.NAMES, *_PARTS)
    results: dict[str, Any] = {"machine": facts, "measurements": []}
    of_cache = {cache: HostClock(cache) for cache in ("cold", "warm")}
    for case in plan.CASES:
        if case.workload in only and case.algorithm in algorithms:
            with _part(f"{case.workload} {case.algorithm}", results):
                shorter = replace(case, seconds=case.seconds * scale)
                for m in measure(shorter, of_cache, threads):
                    results["measurements"].append(m.to_json())
    parts = {  # each begins when its first entry is asked for
        "growth": growth.measure(plan.GROWTH_SECONDS * scale),
        "breakdown": breakdown.measure(),
        "sharded_params": sharded_params.measure(plan.SHARDED_SECONDS * scale),
        "shared_memory_bus": shared_memory_bus.measure(threads, plan.BUSY_SECONDS * scale),
        "state_formats": state_formats.measure(threads, plan.FORMAT_SECONDS * scale),
        "sparse": sparse.measure(threads, plan.SPARSE_SECONDS * scale),
    }
    for name, entries in parts.items():
        if name in only:
            with _part(name, results):
                results[name] = list(entries)
    whole = not (arguments.quick or arguments.only or arguments.threads or arguments.algorithms)
    folder = arguments.out or (documents.RESULTS if whole else _PARTIAL)
    _write(results, folder / f"{machine.name(facts)}.json")
    return results


def count(name: str, device: torch.device | str = "cuda") -> dict[str, list[int]]:
    """Launches, copies and memory sets of one step of each peer, in the steady state."""
    built = build(workloads.by_name(name), GPU_PEERS, "adam", device=device)
    seen = {peer: activity.of(own.step) for peer, (own,) in built.peers.items()}
    return {peer: [each.launches, each.copies, each.sets] for peer, each in seen.items()}


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
    part = functools.partial(_part, results=results, after=lambda: _write(results, path))
    names = arguments.only or plan.GPU_NAMES
    algorithms = arguments.algorithms or tuple(ALGORITHMS)

    with part("copy"):
        results["copy_gb_per_s"] = round(clocks.copy_gigabytes_per_second(device), 1)
    todo = plan.gpu_cases(names, algorithms, facts["l2_bytes"])
    for index, case in enumerate(todo):
        now = time.monotonic()
        own_end = now + (end - now) / (len(todo) - index)
        with part(f"{case.workload} {case.algorithm} {case.caches[0]}"):
            of_cache = dict.fromkeys(case.caches, device_clock)
            for m in measure(case, of_cache, end=own_end, device=device):
                results["measurements"].append(m.to_json())
    # Last: a profiler may slow down what comes after it.
    for name in names if "adam" in algorithms else ():
        if results["activity"] and time.monotonic() - begin > arguments.seconds:
            _say(f"{name}: no time left to count launches")
            continue
        with part(f"{name} launches"):
            results["activity"][name] = count(name, device)
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
