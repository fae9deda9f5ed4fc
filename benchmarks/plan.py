"""What a full run measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.interleave import Cache
from benchmarks.peers import ALGORITHMS, CLIPPING_PEERS, PEERS

SLOW_PEERS: Final = ("reference", "torch for-loop", "torch foreach")
"""Several times slower than the others on every workload: they sit out most rounds."""

LARGE_PEERS: Final = ("recap_fast", "torch fused", "DeepSpeed", "ceiling")
"""Where every peer has 50 M elements or more: those that the targets speak of, and the ceiling."""


@dataclass(frozen=True)
class Entry:
    """One workload: what of it to time, and for how long each combination."""

    name: str
    algorithms: tuple[str, ...] = ALGORITHMS
    caches: tuple[Cache, ...] = ("cold", "warm")
    peers: tuple[str, ...] = PEERS
    budget_seconds: float = 2.5


# Steps over many megabytes are cold whatever came before them.
ENTRIES: Final = (
    Entry("ranker-36M", caches=("cold",), peers=PEERS + CLIPPING_PEERS, budget_seconds=12),
    Entry("mixed-sizes", peers=PEERS + CLIPPING_PEERS),
    Entry("one-50M-tensor", caches=("cold",), peers=LARGE_PEERS, budget_seconds=7),
    Entry("many-groups"),
    Entry("scalars"),
    Entry("many-groups-of-scalars"),
    Entry("ranker-48M", caches=("cold",), budget_seconds=8),
    Entry("demo", caches=("cold",)),
)

GROWTH_BUDGET_SECONDS: Final = 1.0
"""For each size of each dimension of `growth`."""
