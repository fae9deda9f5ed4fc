"""Runs pairs one after the other: `python -m tools.matrix 2.13.0/1.8.0/1.8.0 2.15.0@python3.12`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tools.matrix import page, pairs
from tools.matrix import results as data
from tools.matrix.commands import Command, Places, commands
from tools.matrix.pairs import Pair
from tools.matrix.results import Result

ROOT: Final = Path(__file__).parent.parent.parent
RESULTS: Final = ROOT / "tools" / "matrix" / "results.json"
PAGE: Final = ROOT / "docs" / "compatibility.md"

_FACTS: Final = """\
import json, platform, torch
from benchmarks import machine
from recap_fast import build_info
facts = machine.describe() | build_info()
print(json.dumps({**facts, "python": platform.python_version(), "torch": torch.__version__}))
"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.matrix",
        description="Builds and tests the last commit with other releases of torch, torchrec and "
        "Python, and writes tools/matrix/results.json and docs/compatibility.md. Needs only git "
        "and the interpreters.",
    )
    parser.add_argument(
        "pairs", nargs="*", type=pairs.parse, metavar="TORCH[/TORCHREC/FBGEMM][@PYTHON]"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "matrix", help="a folder for environments"
    )
    parser.add_argument(
        "--tests", action="append", default=[], metavar="PATH", help="these only; may be repeated"
    )
    parser.add_argument(
        "--cuda", choices=("ON", "OFF", "AUTO"), default="OFF", help="build the CUDA engine?"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="another results file")
    parser.add_argument("--page", type=Path, default=PAGE, help="another page")
    parser.add_argument("--hours", type=float, default=3.0, help="the most that a command may take")
    parser.add_argument("--dry-run", action="store_true", help="prints the commands")
    return parser.parse_args(argv)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _variables(places: Places) -> dict[str, str]:
    """The environment's commands come first; no package is found elsewhere."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": f"{places.environment / 'bin'}{os.pathsep}{kept['PATH']}"}


def _run(steps: Iterable[Command], places: Places, commit: str, seconds: float) -> str:
    """Returns "tested", or what could not be done; the logs tell why."""
    for command in steps:
        begin = time.monotonic()
        with open(places.log(command.step), "a") as log:
            log.write(f"$ {shlex.join(command.words)}\n")
            log.flush()
            try:
                status = subprocess.run(
                    command.words,
                    cwd=places.sources if places.sources.exists() else places.folder,
                    env=_variables(places) | command.variables,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                return f"{command.step}: not done after {seconds / 3600:g} hours"
        _say(f"  {command.step}: {time.monotonic() - begin:.0f} s, status {status}")
        if command.step == "build" and status == 0:
            places.built.write_text(commit)
        # pytest's 1: some tests failed, which the report tells.
        if status not in ((0, 1) if command.step == "test" else (0,)):
            return f"{command.step} failed"
    return "tested"


def _facts(places: Places) -> dict[str, Any]:
    """Of the machine and the build; empty where the build cannot be imported."""
    command = [str(places.python), "-c", _FACTS]
    done = subprocess.run(
        command, cwd=places.sources, env=_variables(places), capture_output=True, text=True
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}


def _machine(facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    engines = " and ".join(facts["engines"])
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB, "
        f"{facts['system']}, {facts['instruction_set']}, engines: {engines}"
    )


def run_pair(pair: Pair, arguments: argparse.Namespace, commit: str) -> Result:
    """Installs, builds and tests one pair."""
    places = Places(arguments.cache.resolve() / pair.name)
    places.folder.mkdir(parents=True, exist_ok=True)
    for old in (places.report, *places.folder.glob("*.log")):
        old.unlink(missing_ok=True)
    steps = commands(pair, places, ROOT, commit, arguments.tests, arguments.cuda)
    outcome = _run(steps, places, commit, arguments.hours * 3600)
    facts = _facts(places) if places.built.exists() else {}
    counts = data.read_report(places.report) if places.report.exists() else {}
    return Result(
        python=facts.get("python", pair.python_release),
        torch=pair.torch,
        torchrec=pair.torchrec,
        fbgemm=pair.fbgemm,
        tests=arguments.tests,
        outcome=outcome,
        commit=commit[:9],
        date=datetime.date.today().isoformat(),
        machine=_machine(facts),
        **counts,
    )


def _write(results: Sequence[Result], arguments: argparse.Namespace) -> None:
    data.write(arguments.results, results)
    source = os.path.relpath(arguments.results.resolve(), ROOT)
    arguments.page.write_text(page.render(results, source))


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a pair could not be tested or a test failed."""
    arguments = _arguments(argv)
    commit = _git("rev-parse", "HEAD")
    if arguments.dry_run:
        for pair in arguments.pairs:
            places = Places(arguments.cache.resolve() / pair.name)
            for each in commands(pair, places, ROOT, commit, arguments.tests, arguments.cuda):
                print(*(f"{k}={v}" for k, v in each.variables.items()), shlex.join(each.words))
        return 0
    if _git("status", "--porcelain", "--untracked-files=no"):
        _say(f"what is not committed is not tested: this is {commit[:9]}")
    all_well = True
    for pair in arguments.pairs:
        _say(f"{pair.name}:")
        result = run_pair(pair, arguments, commit)
        _say(f"  {result.outcome}: {result.passed} passed, {len(result.failed)} failed")
        all_well = all_well and result.outcome == "tested" and not result.failed
        # After each, so that an interruption loses one.
        _write(data.merge(data.read(arguments.results), result), arguments)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
