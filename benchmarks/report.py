"""Runs the benchmarks and writes results, page and pictures: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import growth, machine, memory, page, workloads
from benchmarks.plan import ENTRIES, Measurement, measure

_ROOT: Final = Path(__file__).parent.parent
_RESULTS: Final = _ROOT / "benchmarks" / "results"
_PAGE: Final = _ROOT / "docs" / "performance.md"
# Runs that are not whole go here instead, so that the committed results are always of a whole one.
_PARTIAL: Final = _ROOT / "build" / "benchmarks"

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
        description=f"Times every workload and writes {_RESULTS.relative_to(_ROOT)}/<machine>.json "
        f"and {_PAGE.relative_to(_ROOT)}. With --quick, --only or --threads both go to "
        f"{_PARTIAL.relative_to(_ROOT)}/ instead.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the time, for a first look"
    )
    parser.add_argument("--only", type=some_of, metavar="A,E", help=f"some of {','.join(names)}")
    parser.add_argument(
        "--threads", type=int, nargs="+", metavar="N", help="numbers of threads (default: 1 and 2)"
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help="instead: time over elements, tensors and groups, as pictures",
    )
    parser.add_argument(
        "--page-from", type=Path, metavar="FILE", help="instead: write the page from a results file"
    )
    return parser.parse_args(argv)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace, facts: Mapping[str, Any]) -> dict[str, Any]:
    threads = arguments.threads or [n for n in (1, 2) if n <= facts["cores"]]
    measurements: list[Measurement] = []
    for entry in ENTRIES:
        if arguments.only and entry.name not in arguments.only:
            continue
        if arguments.quick:
            entry = replace(entry, algorithms=("adam",))
        begin = time.monotonic()
        try:
            measurements += measure(entry, threads, _QUICK_SCALE if arguments.quick else 1.0)
        except ImportError as error:
            _say(f"{entry.name}: skipped, {error}")
            continue
        _say(f"{entry.name}: {time.monotonic() - begin:.0f} s")
    results: dict[str, Any] = {
        "machine": facts,
        "measurements": [m.to_json() for m in measurements],
    }
    if not arguments.only or "A" in arguments.only:
        torch.set_num_threads(max(threads))
        results["peak_memory_mb"] = memory.peaks(workloads.A, "adam")
    return results


def _to_text(results: Mapping[str, Any]) -> str:
    """JSON with one line for each measurement, so that a diff of two runs can be read."""
    measurements = ",\n".join(json.dumps(m) for m in results["measurements"])
    rest = {key: value for key, value in results.items() if key != "measurements"}
    return f'{json.dumps(rest, indent=1)[:-2]},\n "measurements": [\n{measurements}\n]}}\n'


def _write_page(results: Mapping[str, Any], path: Path) -> None:
    stem = machine.name(results["machine"])
    pictures = [
        f"../{picture.relative_to(_ROOT)}"
        for name in growth.DIMENSIONS
        if (picture := _RESULTS / f"{stem}-growth-{name}.png").exists()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.render(results, pictures))
    _say(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.page_from:
        _write_page(json.loads(arguments.page_from.read_text()), _PAGE)
        return 0
    facts = machine.describe()
    if facts["busy"] > _BUSY:
        _say(f"the machine is busy (load per core {facts['busy']}): figures will be unsteady")
    whole = not (arguments.quick or arguments.only or arguments.threads)
    directory = _RESULTS if whole else _PARTIAL
    directory.mkdir(parents=True, exist_ok=True)
    if arguments.growth:
        for path in growth.draw(directory, machine.name(facts), quick=arguments.quick):
            _say(f"wrote {path}")
        return 0
    results = _run(arguments, facts)
    path = directory / f"{machine.name(facts)}.json"
    path.write_text(_to_text(results))
    _say(f"wrote {path}")
    _write_page(results, _PAGE if whole else _PARTIAL / _PAGE.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
