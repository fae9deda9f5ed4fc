"""Steps of an embedding table with sparse gradients, ours and torch's.

A table of 1,000,000 x 64 float32 and bags of two random rows each, 4,096 lookups: the gradient
that `torch.nn.EmbeddingBag(sparse=True)` leaves, not coalesced. Both step tables of their own in
turn, with new gradients each time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.clocks import Cache, HostClock
from benchmarks.interleave import Timings, interleave
from benchmarks.peers import Peer
from benchmarks.table import number, plural, table, with_quartiles
from recap_fast.optim import FusedAdagrad, FusedSGD, FusedSparseAdam

ROWS: Final = 1_000_000
WIDTH: Final = 64
LOOKUPS: Final = 4096
PER_BAG: Final = 2
GRADIENTS: Final = 32  # made in advance, and stepped in turn

ALGORITHMS: Final[dict[str, tuple[type, type]]] = {
    "SGD": (FusedSGD, torch.optim.SGD),
    "Adagrad": (FusedAdagrad, torch.optim.Adagrad),
    "SparseAdam": (FusedSparseAdam, torch.optim.SparseAdam),
}

_HOW: Final = f"""\
A table of {ROWS:,} x {WIDTH} float32, of which {LOOKUPS:,} random rows are looked up, {PER_BAG} in
each bag: the gradient of `torch.nn.EmbeddingBag(sparse=True)`, not coalesced, another one at each
step. Medians of one `optimizer.step()`; a ratio is the median over rounds in which both were
timed, in brackets the quartiles. *Cold*: 96 MB of other memory are touched between two steps;
*warm*: none. Where the load per core is above a quarter, other programs ran meanwhile, and two
threads wait for each other: there, only the ratios say something.
"""


def _gradients(rows: int) -> list[Tensor]:
    """Of bags of `PER_BAG` rows: rows of one bag have the same values."""
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for _ in range(GRADIENTS):
        indices = torch.randint(rows, (1, LOOKUPS), generator=generator)
        bags = torch.randn(LOOKUPS // PER_BAG, WIDTH, generator=generator)
        values = bags.repeat_interleave(PER_BAG, dim=0)
        gradients.append(torch.sparse_coo_tensor(indices, values, (rows, WIDTH)))
    return gradients


class _Table(Peer):
    """An optimizer of one table, which has another gradient at each step."""

    def __init__(self, kind: type, rows: int, gradients: Sequence[Tensor]) -> None:
        table = nn.Parameter(torch.ones(rows, WIDTH))
        optimizer = kind([table], lr=0.01)
        super().__init__(optimizer.step, optimizer.param_groups, [table])
        self._gradients = itertools.cycle(gradients)
        self.restore_gradients()

    def restore_gradients(self) -> None:
        (table,) = self.params
        table.grad = next(self._gradients)

    renew_gradients = restore_gradients


def _measure(
    algorithm: str, rows: int, threads: Iterable[int], seconds: float
) -> Iterator[dict[str, Any]]:
    """Times it warm and cold with each number of threads, for so long each."""
    gradients = _gradients(rows)
    kinds = zip(("recap_fast", "torch"), ALGORITHMS[algorithm], strict=True)
    tables = {name: [_Table(kind, rows, gradients)] for name, kind in kinds}
    for (peer,) in tables.values():
        peer.step()  # makes the state
    caches: tuple[Cache, ...] = ("warm", "cold")
    for count, cache in itertools.product(threads, caches):
        torch.set_num_threads(count)
        (timings,) = interleave(tables, HostClock(cache), seconds=seconds)
        case = {"algorithm": algorithm, "rows": rows, "threads": count, "cache": cache}
        yield case | {"microseconds": timings.rounded(1)}


def measure(threads: Sequence[int], seconds: float) -> Iterator[dict[str, Any]]:
    """Every algorithm, and one on a table of a tenth of the rows."""
    yield from _measure("Adagrad", ROWS // 10, threads[:1], seconds)
    for algorithm in ALGORITHMS:
        yield from _measure(algorithm, ROWS, threads, seconds)


def _row(measured: Mapping[str, Any]) -> list[str]:
    timings = Timings(measured["microseconds"])
    times = (f"{number(timings.time(name).median)} µs" for name in ("recap_fast", "torch"))
    return [
        f"{measured['algorithm']}, {measured['rows']:,} rows, "
        f"{plural(measured['threads'], 'thread')}, {measured['cache']}",
        *times,
        with_quartiles(timings.ratio("torch", "recap_fast"), "x"),
    ]


def section(results: Iterable[Mapping[str, Any]]) -> str:
    """What the page says, of the results of each machine that have figures of it."""
    parts = ["## Sparse gradients\n", _HOW]
    for facts, measurements in ((each["machine"], each["sparse"]) for each in results):
        parts.append(
            f"{facts['processor']}, {facts['cores']} cores, {facts['instruction_set']}, torch "
            f"{facts['torch']}; revision {facts['revision']}, {facts['date']}, load per core "
            f"before the run {facts['busy']}.\n"
        )
        header = ["step", "recap_fast", "torch", "speed-up"]
        parts.append(table(header, map(_row, measurements)))
    return "\n".join(parts)
