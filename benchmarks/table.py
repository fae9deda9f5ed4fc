"""Figures and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which a table can do without
    from benchmarks.interleave import Quartiles


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def milliseconds(microseconds: float) -> str:
    """Three significant digits."""
    value = microseconds / 1e3
    return number(value) if value >= 1 else f"{value:.3g}"


def with_quartiles(q: Quartiles, unit: str = "") -> str:
    return f"{number(q.median)}{unit} ({number(q.low)} to {number(q.high)})"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
