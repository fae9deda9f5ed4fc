"""Times the demo's training on several processes.

`python -m benchmarks.scaling` writes `benchmarks/results/<machine>-scaling.json` and prints the
measured table of docs/scaling.md; with a results file as argument it prints that file's.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

import recap_fast
from benchmarks import documents, machine
from benchmarks.interleave import quartiles
from benchmarks.report import to_text
from benchmarks.table import table, with_quartiles
from examples.movielens import data, processes
from examples.movielens.launch import launch
from examples.movielens.model import MOVIELENS_TABLE_SIZES, build_model, optimizer_configs
from examples.movielens.quiet import quiet_libraries
from examples.movielens.sharding import shard
from recap_fast.embeddings import fuse_embeddings

RATINGS: Final = 512  # in a step, of all processes together


def train(path: str, dense: str, steps: int) -> None:
    """Trains for `steps` timed steps; the first process writes their figures to `path`."""
    quiet_libraries()
    share = processes.share()
    dense_config, embedding_config = optimizer_configs(1000)
    model: nn.Module = build_model(0, table_sizes=MOVIELENS_TABLE_SIZES)
    if share.processes == 1:
        model = fuse_embeddings(model, embedding_config)
    else:
        cpu = torch.device("cpu")
        model = shard(model, embedding_config, sharding="table_wise", dense=dense, device=cpu)
    optimizer, scheduler = recap_fast.build_optimizer(model, dense_config, embedding_config)
    batches = data.synthetic(20_000, seed=0).batches(RATINGS, seed=0, share=share)

    def step() -> float:
        """Milliseconds of `optimizer.step()`."""
        batch = next(batches)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
        begin = time.perf_counter()
        optimizer.step()
        milliseconds = (time.perf_counter() - begin) * 1e3
        scheduler.step()
        return milliseconds

    for _ in range(max(2, steps // 5)):
        step()
    dist.barrier()
    begin = time.perf_counter()
    own = [step() for _ in range(steps)]
    dist.barrier()
    each = (time.perf_counter() - begin) / steps
    if dist.get_rank() == 0:
        timed = {"ratings_per_second": RATINGS / each, "step_ms": each * 1e3}
        timed["optimizer_ms"] = float(torch.tensor(own).median())
        Path(path).write_text(json.dumps(timed))


def measure(
    counts: Sequence[int] = (1, 2, 4), repeats: int = 3, steps: int = 50
) -> list[dict[str, Any]]:
    """Every case takes its turn in each repeat."""
    throughput = [
        {"processes": count, "sharding": "table_wise", "dense": dense}
        | {"ratings_per_second": [], "step_ms": [], "optimizer_ms": []}
        for count in counts
        for dense in (("ddp", "fsdp") if count > 1 else ("-",))
    ]
    for _ in range(repeats):
        for timings in throughput:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "figures.json")
                launch(timings["processes"], 1, train, str(path), timings["dense"], steps)
                timed = json.loads(path.read_text())
            for name, figure in timed.items():
                timings[name].append(round(figure, 3))
            print(timings, file=sys.stderr, flush=True)
    return throughput


def throughput_table(results: Mapping[str, Any]) -> str:
    (alone,) = (e for e in results["throughput"] if e["processes"] == 1)
    header = ["processes", "dense part", "ratings/s", "of one process", "step, ms", "optimizer, ms"]
    rows = []
    for e in results["throughput"]:
        if e["sharding"] != "table_wise":
            continue
        speed = quartiles(e["ratings_per_second"])
        over = speed.median / quartiles(alone["ratings_per_second"]).median
        times = (with_quartiles(quartiles(e[name])) for name in ("step_ms", "optimizer_ms"))
        name = {"-": "none", "ddp": "DDP", "fsdp": "FSDP2"}[e["dense"]]
        rows.append([str(e["processes"]), name, with_quartiles(speed), f"{over:.2f}x", *times])
    return table(header, rows)


if __name__ == "__main__":
    if sys.argv[1:]:
        results = json.loads(Path(sys.argv[1]).read_text())
    else:
        facts = machine.describe()
        results = {"machine": facts, "throughput": measure()}
        written = documents.RESULTS / f"{machine.name(facts)}-scaling.json"
        written.write_text(to_text(results))
    print(throughput_table(results))
