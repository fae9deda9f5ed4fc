"""Writes `docs/compatibility.md` from the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.table import plural, table
from tools.matrix.results import Result

_HOW: Final = """\
# Compatibility

Written by `python -m tools.matrix` from `{source}`; do not edit.

Each row is one run, in an environment that was made for it: the releases were installed with pip,
the extension was built against this torch, and the tests were run. A row without torchrec leaves
out the files of tests that need it, and says how many. Some tests are skipped on every machine that
has no GPU.

Other releases may work. A torch older than 2.11 is refused when the extension is built, and a torch
newer than those below is a warning.

"""

_REPRODUCE: Final = """\
## How to add a row

    make matrix PAIRS="2.14.1/1.9.2/1.9.0 2.15.0@python3.12"

A pair is `TORCH[/TORCHREC/FBGEMM][@PYTHON]`. What is installed stays in a folder
(`CACHE=build/matrix`), so that the next run goes on from there. `MATRIX="--tests tests/optim"` runs
some tests only; the row says so.
"""

_HEADER: Final = (
    "torch",
    "torchrec / FBGEMM",
    "Python",
    "tests",
    "passed",
    "failed",
    "skipped",
    "files left out",
    "commit",
    "date",
)


def _tests(result: Result) -> str:
    return ", ".join(f"`{path}`" for path in result.tests) or "all"


def _row(result: Result) -> list[str]:
    theirs = f"{result.torchrec} / {result.fbgemm}" if result.torchrec else "-"
    counts = [str(result.passed), str(len(result.failed)), str(result.skipped)]
    if result.outcome != "tested":
        counts = [f"**{result.outcome}**", "-", "-"]
    where = [result.torch, theirs, result.python, _tests(result)]
    return [*where, *counts, str(result.left_out), result.commit, result.date]


def _failures(results: Sequence[Result]) -> str:
    parts = []
    for result in results:
        if result.failed:
            named = "\n".join(f"* `{name}`" for name in result.failed)
            count = plural(len(result.failed), "failure")
            with_torchrec = f", torchrec {result.torchrec}" if result.torchrec else ""
            where = f"torch {result.torch}{with_torchrec}, Python {result.python}"
            parts.append(f"{count} with {where} ({_tests(result)}):\n\n{named}\n")
    return "\n".join(["## What failed\n", *parts]) if parts else "No test failed.\n"


def _machines(results: Sequence[Result]) -> str:
    lines = dict.fromkeys(result.machine for result in results if result.machine)
    return "\n".join(["Run on:\n", *(f"* {line}" for line in lines)]) + "\n"


def render(results: Sequence[Result], source: str) -> str:
    """The page.

    Args:
        results: of all pairs.
        source: what the page calls their file.
    """
    shown = table(_HEADER, [_row(result) for result in results])
    parts = [_HOW.format(source=source) + shown, _machines(results), _failures(results)]
    return "\n".join([*parts, _REPRODUCE])
