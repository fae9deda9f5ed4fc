"""Times steps of an embedding table with sparse gradients: `python -m benchmarks.sparse`.

A table of 1,000,000 x 64 float32 and bags of two random rows each, 4,096 lookups: the gradient
that `torch.nn.EmbeddingBag(sparse=True)` leaves, not coalesced. Both step tables of their own in
turn, with new gradients each time. Writes `benchmarks/results/<machine>-sparse.json`, of which
docs/performance.md has a section.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks import documents, machine, sparse_page
from benchmarks.interleave import OtherMemory, Timings
from benchmarks.sparse_page import LOOKUPS, PER_BAG, ROWS, WIDTH
from recap_fast.optim import FusedAdagrad, FusedSGD, FusedSparseAdam

GRADIENTS: Final = 32  # made in advance, and stepped in turn

ALGORITHMS: Final[dict[str, tuple[type, type]]] = {
    "SGD": (FusedSGD, torch.optim.SGD),
    "Adagrad": (FusedAdagrad, torch.optim.Adagrad),
    "SparseAdam": (FusedSparseAdam, torch.optim.SparseAdam),
}


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


def measure(algorithm: str, rows: int, threads: Sequence[int], seconds: float) -> list[dict]:
    gradients = _gradients(rows)
    made: dict[str, tuple[nn.Parameter, torch.optim.Optimizer]] = {}
    for name, kind in zip(("recap_fast", "torch"), ALGORITHMS[algorithm], strict=True):
        table = nn.Parameter(torch.ones(rows, WIDTH))
        made[name] = table, kind([table], lr=0.01)
        table.grad = gradients[0]
        made[name][1].step()  # makes the state
    measurements = []
    for count in threads:
        torch.set_num_threads(count)
        for cache in ("warm", "cold"):
            timings = _interleave(made, gradients, cache, seconds)
            measurements.append(
                {
                    "algorithm": algorithm,
                    "rows": rows,
                    "threads": count,
                    "cache": cache,
                    "microseconds": {
                        name: [round(t, 1) for t in times]
                        for name, times in timings.microseconds.items()
                    },
                }
            )
    return measurements


def _interleave(
    made: Mapping[str, tuple[nn.Parameter, torch.optim.Optimizer]],
    gradients: Sequence[Tensor],
    cache: str,
    seconds: float,
) -> Timings:
    """As `benchmarks.interleave`; cold: 96 MB of other memory are touched between two steps."""
    memory, order, names = OtherMemory(), random.Random(0), list(made)
    times: dict[str, list[float | None]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end or number < 5:
            order.shuffle(names)
            for name in names:
                table, optimizer = made[name]
                table.grad = gradients[number % GRADIENTS]
                if cache == "cold":
                    memory.touch()
                begin = time.perf_counter_ns()
                optimizer.step()
                times[name].append((time.perf_counter_ns() - begin) / 1e3)
            number += 1
    finally:
        gc.enable()
    return Timings(times)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each combination")
    parser.add_argument("--print", action="store_true", help="writes nothing")
    arguments = parser.parse_args(argv)
    facts = machine.describe()
    threads = [count for count in (1, 2) if count <= facts["cores"]]
    measurements = measure("Adagrad", ROWS // 10, threads[:1], arguments.seconds)
    for algorithm in ALGORITHMS:
        measurements += measure(algorithm, ROWS, threads, arguments.seconds)
    results = {"machine": facts, "sparse": measurements}
    print(sparse_page.table(measurements))
    if not arguments.print:
        path = documents.RESULTS / f"{machine.name(facts)}{sparse_page.SUFFIX}"
        path.write_text(_to_text(results))
        documents.write_sparse()
        print(f"wrote {path} and {documents.PAGE}")
    return 0


def _to_text(results: Mapping[str, Any]) -> str:
    lines = ",\n".join(json.dumps(each) for each in results["sparse"])
    facts = json.dumps(results["machine"], indent=1)
    return f'{{\n "machine": {facts},\n "sparse": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
