"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what this build is; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        return _fail(
            "the demo is in examples/movielens of the sources: run `make demo` there, or"
            " `python -m examples.movielens`",
            status=2,
        )
    try:
        from recap_fast import build_info

        info = build_info()
    except ImportError as error:  # the extension is missing or does not fit torch
        return _fail(str(error))
    for name, value in info.items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"recap-fast: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recap-fast", description="Prints what this build of recap_fast is."
    )
    parser.add_argument("command", nargs="?", choices=["demo"], help=argparse.SUPPRESS)
    return parser
