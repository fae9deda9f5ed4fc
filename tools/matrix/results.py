"""What was found, as data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


@dataclass(frozen=True)
class Result:
    """One run of one pair.

    Attributes:
        python, torch, torchrec, fbgemm: releases; None: not installed.
        tests: the paths that were run; none means all.
        outcome: "tested", or what could not be done.
        commit: of recap_fast.
        date: of the run.
        machine: its processor and what the build has.
        passed, skipped: how many tests.
        failed: the names of tests that failed, or could not be collected.
        left_out: how many files of tests were left out, since they need torchrec.
        seconds: of the tests.
    """

    python: str
    torch: str
    torchrec: str | None
    fbgemm: str | None
    tests: list[str]
    outcome: str
    commit: str
    date: str
    machine: str
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    left_out: int = 0
    seconds: float = 0.0

    @property
    def pair(self) -> tuple[str | None, ...]:
        return (self.torch, self.torchrec, self.fbgemm, self.python)


def read_report(path: Path) -> dict[str, Any]:
    """The counts of `Result`, from a report in JUnit's format."""
    passed, skipped, left_out, failed = 0, 0, 0, []
    root = ElementTree.parse(path).getroot()
    for case in root.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            name = f"{case.get('classname')}::{case.get('name')}".removeprefix("::")
            if name not in failed:  # it may fail once more when it is torn down
                failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            if skip.get("message") == "collection skipped":
                left_out += 1
            else:
                skipped += 1
        else:
            passed += 1
    seconds = sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
    counts = {"passed": passed, "skipped": skipped, "failed": failed, "left_out": left_out}
    return counts | {"seconds": round(seconds, 1)}


def read(path: Path) -> list[Result]:
    """Those of earlier runs; none if there is no file."""
    if not path.exists():
        return []
    return [Result(**data) for data in json.loads(path.read_text())]


def write(path: Path, results: Iterable[Result]) -> None:
    """One line for each result, so that a diff can be read."""
    lines = ",\n".join(json.dumps(asdict(result)) for result in results)
    path.write_text(f"[\n{lines}\n]\n")


def merge(results: Iterable[Result], new: Result) -> list[Result]:
    """The new one takes the place of an older one of the same pair and tests, newest torch first.

    A run of all tests takes the place of those of some, too.
    """
    kept = [
        old
        for old in results
        if old.pair != new.pair or (new.tests and sorted(old.tests) != sorted(new.tests))
    ]
    return sorted([*kept, new], key=_order)


def _order(result: Result) -> tuple[Any, ...]:
    numbers = [
        [-int(part) for part in release.split("+")[0].split(".") if part.isdigit()]
        for release in (result.torch, result.torchrec or "0", result.python)
    ]
    return *numbers, result.tests
