"""Runs the benchmarks on the current CUDA device and writes `<card>.json` and `<card>.md`."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import peers as any_peers
from benchmarks.builders import STATES, Unavailable
from benchmarks.gpu import activity, card, page, peers, plan, timing
from benchmarks.peers import Peer
from benchmarks.workloads import by_name

_OUT: Final = Path(__file__).parent.parent.parent / "build" / "benchmarks"
_ACTIVITY_SHARE: Final = 0.15
_ACTIVITY_ALGORITHM: Final = "adam"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _some_of(names: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} not in {list(names)}")
        return chosen

    return parse


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=_OUT, metavar="DIR", help="where to (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=240, help="for all of it (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        type=_some_of(plan.NAMES),
        default=plan.NAMES,
        metavar="NAME,NAME",
        help="workloads",
    )
    parser.add_argument(
        "--algorithms", type=_some_of(tuple(STATES)), default=tuple(STATES), metavar="adam,sgd"
    )
    parser.add_argument(
        "--page-from", type=Path, metavar="FILE", help="measures nothing: prints a results file"
    )
    return parser.parse_args(argv)


@dataclass
class _Built:
    copies: dict[str, list[Peer]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def _build(case: plan.Case, device: torch.device | str) -> _Built:
    built = _Built()
    initial = peers.initial_values(case.workload, device)
    for name in case.peers:
        try:
            built.copies[name] = [
                peers.build(name, initial, case.algorithm) for _ in range(case.copies)
            ]
        except Unavailable as reason:
            built.skipped[name] = str(reason)
    return built


def measure(case: plan.Case, end: float, device: torch.device | str = "cuda") -> dict[str, Any]:
    """Times one case until `end`, on the clock of `time.monotonic`."""
    built = _build(case, device)
    times = timing.interleave(built.copies, end=end, slow=peers.SLOW_PEERS)
    workload = case.workload
    return {
        "workload": workload.name,
        "description": workload.description,
        "groups": len(workload.groups),
        "tensors": workload.tensors,
        "elements": workload.elements,
        "algorithm": case.algorithm,
        "cache": case.cache,
        "copies": case.copies,
        "bytes": any_peers.bytes_per_step(workload, case.algorithm),
        "state": card.state(),
        "skipped": built.skipped,
        "microseconds": _rounded(times.step.microseconds),
        "host_microseconds": _rounded(times.host.microseconds),
    }


def _rounded(times: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {name: [None if t is None else round(t, 2) for t in own] for name, own in times.items()}


def count(name: str, device: torch.device | str = "cuda") -> dict[str, list[int]]:
    """Launches, copies and memory sets of one step of each peer, in the steady state."""
    counted = {}
    for peer, (own, *_) in _build(
        plan.Case(by_name(name), _ACTIVITY_ALGORITHM, "warm", 1), device
    ).copies.items():
        seen = activity.of(own.step)
        counted[peer] = [seen.launches, seen.copies, seen.sets]
    return counted


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class _Run:
    """Collects results and writes them after each, since a run may be ended before it is over."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.results: dict[str, Any] = {
            **{"card": facts, "state": card.state(), "copy_gb_per_s": None},
            **{"measurements": [], "activity": {}, "failed": {}},
        }
        self.path = out / f"{card.file_name(facts['card'])}.json"
        out.mkdir(parents=True, exist_ok=True)

    def attempt(self, what: str, call: Any) -> None:
        begin = time.monotonic()
        try:
            call()
            _say(f"{what}: {time.monotonic() - begin:.0f} s")
        except Exception as error:
            self.results["failed"][what] = f"{type(error).__name__}: {error}"
            _say(f"{what} failed\n{traceback.format_exc()}")
        _free()
        self.path.write_text(to_text(self.results))
        self.path.with_suffix(".md").write_text(page.render(self.results, self.path.name))


def to_text(results: dict[str, Any]) -> str:
    """JSON with one line for each measurement, so that a diff can be read."""
    lists = {"measurements": results["measurements"]}
    head = {key: value for key, value in results.items() if key not in lists}
    lines = ",\n".join(json.dumps(entry) for entry in results["measurements"])
    return json.dumps(head, indent=1)[:-2] + f',\n "measurements": [\n{lines}\n ]\n}}\n'


def run(arguments: argparse.Namespace, device: torch.device | str = "cuda") -> dict[str, Any]:
    """Measures what the arguments ask for and writes it."""
    begin = time.monotonic()
    end = begin + arguments.seconds * (1 - _ACTIVITY_SHARE)
    facts = card.describe()
    results = (own := _Run(arguments.out, facts)).results

    def measure_copy() -> None:
        results["copy_gb_per_s"] = round(timing.copy_gigabytes_per_second(device), 1)

    own.attempt("copy", measure_copy)
    todo = plan.cases(arguments.only, arguments.algorithms, facts["l2_bytes"])
    for index, case in enumerate(todo):
        now = time.monotonic()
        share = (end - now) / (len(todo) - index)

        def measure_case(case: plan.Case = case, end: float = now + share) -> None:
            results["measurements"].append(measure(case, end, device))

        own.attempt(f"{case.workload.name} {case.algorithm} {case.cache}", measure_case)
    # Last: a profiler may slow down what comes after it.
    for name in arguments.only if _ACTIVITY_ALGORITHM in arguments.algorithms else ():
        if results["activity"] and time.monotonic() - begin > arguments.seconds:
            _say(f"{name}: no time left to count launches")
            continue

        def count_one(name: str = name) -> None:
            results["activity"][name] = count(name, device)

        own.attempt(f"{name} launches", count_one)
    _say(f"wrote {own.path}")
    return results


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if something failed, which the results name; 2 if nothing can run here."""
    arguments = _arguments(argv)
    if arguments.page_from:
        print(page.render(json.loads(arguments.page_from.read_text()), arguments.page_from.name))
        return 0
    if reason := card.why_not():
        _say(f"nothing measured: {reason}")
        return 2
    return 1 if run(arguments)["failed"] else 0
