"""Runs the benchmarks and writes results and page: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks import breakdown, documents, growth, machine
from benchmarks.measurement import Measurement, measure
from benchmarks.plan import ENTRIES, GROWTH_BUDGET_SECONDS

# Runs that are not whole go here, so that the committed results are always of a whole one.
_PARTIAL: Final = documents.ROOT / "build" / "benchmarks"

_QUICK_SCALE: Final = 0.1
_BUSY: Final = 0.25


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [entry.name for entry in ENTRIES]

    def some_of(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} not in {names}")
        return chosen

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Times every workload and writes benchmarks/results/<machine>.json, "
        "docs/performance.md and the figures in README.md. With --quick, --only or --threads, "
        "results and page go to build/benchmarks/ instead.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the time, for a first look"
    )
    parser.add_argument(
        "--only", type=some_of, metavar="NAME,NAME", help=f"some of {','.join(names)}"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", metavar="N", help="numbers of threads (default: 1 and 2)"
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


def _run(arguments: argparse.Namespace, facts: Mapping[str, Any]) -> dict[str, Any]:
    threads = arguments.threads or [n for n in (1, 2) if n <= facts["cores"]]
    scale = _QUICK_SCALE if arguments.quick else 1.0
    measurements: list[Measurement] = []
    for entry in ENTRIES:
        if arguments.only and entry.name not in arguments.only:
            continue
        if arguments.quick:
            entry = replace(entry, algorithms=("adam",))
        begin = time.monotonic()
        try:
            measurements += measure(entry, threads, scale)
        except ImportError as error:
            _say(f"{entry.name}: skipped, {error}")
            continue
        _say(f"{entry.name}: {time.monotonic() - begin:.0f} s")
    results: dict[str, Any] = {
        "machine": facts,
        "measurements": [m.to_json() for m in measurements],
    }
    if not arguments.only:
        begin = time.monotonic()
        curves = growth.measure(GROWTH_BUDGET_SECONDS * scale)
        results["growth"] = [vars(c) for c in curves]
        results["breakdown"] = breakdown.measure()
        _say(f"growth and breakdown: {time.monotonic() - begin:.0f} s")
    return results


def to_text(results: Mapping[str, Any]) -> str:
    """JSON with one line for each fact, measurement and curve, so that a diff can be read."""
    facts = json.dumps(results["machine"], indent=1)
    lists = [
        f' "{name}": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n ]"
        for name, entries in results.items()
        if name != "machine"
    ]
    return "{\n" + ",\n".join([f' "machine": {facts}', *lists]) + "\n}\n"


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.documents_from:
        documents.write(arguments.documents_from)
        return 0
    facts = machine.describe()
    if facts["busy"] > _BUSY:
        _say(f"the machine is busy (load per core {facts['busy']}): figures will be unsteady")
    whole = not (arguments.quick or arguments.only or arguments.threads)
    path = (documents.RESULTS if whole else _PARTIAL) / f"{machine.name(facts)}.json"
    results = _run(arguments, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_text(results))
    _say(f"wrote {path}")
    documents.write(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
