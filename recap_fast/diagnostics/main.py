"""The command line: prints what was found, and whether all is well."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import recap_fast

_DEMO = (
    "the demo is in examples/movielens of the sources: run `make demo` there, or"
    " `python -m examples.movielens`"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Examines this build.

    Returns:
        The exit status: 0; 1 if a check failed or the extension does not load; 2 for wrong
        arguments and for `demo`, which is elsewhere.
    """
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        return _fail(_DEMO, status=2)
    try:
        return _examine()
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)


def _examine() -> int:
    print(f"recap_fast {recap_fast.__version__} in {Path(recap_fast.__file__).parent}")
    try:
        from recap_fast.diagnostics import versions
    except (ImportError, OSError) as error:
        return _fail(f"torch cannot be imported ({error}): install it, then recap_fast anew")
    _print_section("Versions", versions.versions())
    try:
        info = recap_fast.build_info()
    except (ImportError, OSError, ValueError) as error:  # missing, for another torch, misconfigured
        return _fail(str(error))
    _print_section("Build", _described(info))
    is_well = _check()
    _time()
    for line in _described_ways(recap_fast.build_info()):
        print(f"  {line}")
    _print_missing(info)
    return 0 if is_well else 1


def _described(info: dict[str, Any]) -> dict[str, str]:
    return {
        "for torch": info["torch_built_against"],
        "engines": ", ".join(info["engines"]),
        "instruction sets": f"{', '.join(info['instruction_sets'])}; {info['instruction_set']} is"
        " in use",
    }


def _described_ways(info: dict[str, Any]) -> tuple[str, str]:
    """How the CPU engine updates long and short tensors: what is fixed, and what was found."""
    fixed = [
        f"RECAP_FAST_{name.upper()}={info[name]}"
        for name in ("streams", "prefetch")
        if info[name] != "auto"
    ]
    found = [
        f"in {streams} parts at once, {prefetch} blocks ahead"
        f"{', narrow' if narrow else ''} ({work})"
        for work, (streams, prefetch, narrow) in info["ways"].items()
    ]
    later = "the fastest way is found in the first steps"
    level = info["prefetch_level"]
    return (
        f"Long tensors: {'; '.join(fixed + found) or later}",
        f"Short tensors: {later if level == 'auto' else f'by way of the level {level} cache'}",
    )


def _check() -> bool:
    from recap_fast.diagnostics import bits

    print("\nChecks", flush=True)
    is_well = True
    for check in bits.checks():
        is_well = is_well and check.problem is None
        print(f"  {'ok    ' if check.problem is None else 'FAILED'}  {check.what}", flush=True)
        if check.problem is not None:
            print(f"          {check.problem}", flush=True)
    return is_well


def _time() -> None:
    from recap_fast.diagnostics import speed

    print("\nSpeed of a step against torch.optim with fused=True, caches cold: medians, quartiles")
    print(f"  Load of the machine before: {os.getloadavg()[0]:.1f}", flush=True)
    for ratio in speed.ratios():
        print(
            f"  {ratio.what}:\n    {ratio.ours:.3g} ms, torch {ratio.torch:.3g} ms:"
            f" {ratio.median:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})",
            flush=True,
        )


def _print_missing(info: dict[str, Any]) -> None:
    from recap_fast.diagnostics import missing

    lines = list(missing.missing(info)) or ["nothing"]
    print("\nMissing")
    for line in lines:
        print(f"  {line}")


def _print_section(title: str, facts: Mapping[str, str]) -> None:
    width = max(map(len, facts))
    print(f"\n{title}")
    for name, value in facts.items():
        print(f"  {name:<{width}}  {value}", flush=True)


def _fail(message: str, status: int = 1) -> int:
    print(f"recap-fast: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recap-fast",
        description=(
            "Examines recap_fast on this machine, in some seconds: prints versions and what is"
            " built; steps small plans on every engine and compares their bits; times steps"
            " against torch.optim; says what is missing and how to get it."
        ),
        epilog="Exit status: 0, or 1 if a check failed or the extension does not load.",
    )
    parser.add_argument("command", nargs="?", choices=["demo"], help=argparse.SUPPRESS)
    return parser
