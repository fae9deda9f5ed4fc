"""Types for the arguments of the command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A type for argparse: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            wanted = f"a whole number >= {least}"
            if value is not None and value > most:
                wanted = f"a whole number from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{shown!r} is not {wanted}")
        return value

    return parse
