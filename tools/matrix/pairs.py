"""Releases that are tested together."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

_TEXT: Final = re.compile(
    r"(?P<torch>[\w.+-]+)(/(?P<torchrec>[\w.+-]+)/(?P<fbgemm>[\w.+-]+))?(@(?P<python>.+))?"
)
_ASK_RELEASE: Final = "import sys; print('{}.{}'.format(*sys.version_info))"


class NoSuchPython(ValueError):
    """An interpreter cannot be run."""


@dataclass(frozen=True)
class Pair:
    """What one environment gets.

    Attributes:
        torch: its release, such as "2.14.1".
        torchrec, fbgemm: releases that go with it; None: neither, and tests that need them are left
            out.
        python: the command of the interpreter.
        python_release: such as "3.12".
    """

    torch: str
    torchrec: str | None
    fbgemm: str | None
    python: str
    python_release: str

    @property
    def name(self) -> str:
        """Of its environment's folder."""
        parts = [f"python{self.python_release}", f"torch{self.torch}"]
        if self.torchrec:
            parts += [f"torchrec{self.torchrec}", f"fbgemm{self.fbgemm}"]
        return "-".join(parts)


def parse(text: str) -> Pair:
    """Reads `TORCH[/TORCHREC/FBGEMM][@PYTHON]`; without an interpreter it is the one that runs.

    Raises:
        ValueError: it is written otherwise.
        NoSuchPython: the interpreter cannot be run.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not TORCH[/TORCHREC/FBGEMM][@PYTHON], as 2.14.1/1.9.2/1.9.0")
    python = match["python"] or sys.executable
    return Pair(match["torch"], match["torchrec"], match["fbgemm"], python, _release_of(python))


def _release_of(python: str) -> str:
    try:
        done = subprocess.run([python, "-c", _ASK_RELEASE], capture_output=True, text=True)
    except OSError as error:
        raise NoSuchPython(f"cannot run the interpreter {python}: {error}") from error
    if done.returncode != 0:
        raise NoSuchPython(f"cannot run the interpreter {python}: {done.stderr.strip()}")
    return done.stdout.strip()
