"""Times the demo's training on several processes, and counts what each sends.

`python -m benchmarks.scaling` writes `benchmarks/results/<machine>-scaling.json` and prints the
measured tables of docs/scaling.md; with a results file as argument it prints that file's.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
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
FEATURES: Final = 6  # of a rating, each with a table
DIM: Final = 32
SHARDINGS: Final = ("table_wise", "row_wise", "column_wise")

# Through these, torchrec and FSDP2 exchange tensors; DDP's all-reduce is counted by its hook.
_EXCHANGES: Final = (
    *("all_to_all_single", "all_gather_into_tensor", "all_gather_single"),
    *("reduce_scatter_tensor", "reduce_scatter_single"),
)


def tables_by_formula(
    sharding: str, gpus: int, ratings: int, features: int, ids: float, dim: int
) -> tuple[float, float]:
    """Bytes that each GPU sends in a step to look up `ids` of each of its ratings and features.

    Returns:
        Of ids and their counts, 8 bytes each; of pooled embeddings, float32, in one direction.
    """
    others, counts = gpus - 1, 8 * ratings * features
    pooled = 4 * ratings * features * dim
    if sharding == "row_wise":  # an id to the GPU that has it; counts and parts of sums to all
        return counts * ids * others / gpus + counts * others, pooled * others
    shards = {"table_wise": 1, "column_wise": gpus}[sharding]  # ids go to every shard of a table
    return counts * (ids + 1) * shards * others / gpus, pooled * others / gpus


def dense_by_formula(kind: str, elements: int, gpus: int) -> float:
    """Bytes that each GPU sends for float32 parameters in no table, by rings.

    DDP reduces the gradients to all; FSDP2 gathers parameters twice, and reduces gradients once.
    """
    return {"ddp": 2, "fsdp": 3}[kind] * 4 * elements * (gpus - 1) / gpus


def train(path: str, sharding: str, dense: str, steps: int) -> None:
    """Trains for `steps` timed steps and a counted one; the first process writes to `path`."""
    quiet_libraries()
    share = processes.share()
    sizes = MOVIELENS_TABLE_SIZES
    if sharding != "table_wise":  # rows for a shard on each process
        sizes = {name: max(size, 64) for name, size in sizes.items()}
    dense_config, embedding_config = optimizer_configs(1000)
    model: nn.Module = build_model(0, table_sizes=sizes)
    elements = sum(p.numel() for n, p in model.named_parameters() if "embedding_bags" not in n)
    if share.processes == 1:
        model = fuse_embeddings(model, embedding_config)
    else:
        cpu = torch.device("cpu")
        model = shard(model, embedding_config, sharding=sharding, dense=dense, device=cpu)
    optimizer, scheduler = recap_fast.build_optimizer(model, dense_config, embedding_config)
    batches = data.synthetic(20_000, seed=0).batches(RATINGS, seed=0, share=share)

    def step() -> tuple[float, int]:
        """Milliseconds of `optimizer.step()`, and the number of ids."""
        batch = next(batches)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
        begin = time.perf_counter()
        optimizer.step()
        milliseconds = (time.perf_counter() - begin) * 1e3
        scheduler.step()
        return milliseconds, batch.sparse.values().numel()

    for _ in range(max(2, steps // 5)):
        step()
    dist.barrier()
    begin = time.perf_counter()
    own = [step()[0] for _ in range(steps)]
    dist.barrier()
    each = (time.perf_counter() - begin) / steps
    sent = _count(model)
    sent["number_of_ids"] = step()[1]
    names = ("ids", "floats", "ddp", "number_of_ids")
    means = processes.mean(torch.tensor([sent[name] for name in names], dtype=torch.float64))
    if dist.get_rank() == 0:
        timed = {"ratings_per_second": RATINGS / each, "step_ms": each * 1e3}
        timed["optimizer_ms"] = float(torch.tensor(own).median())
        counted = {**dict(zip(names, means.tolist(), strict=True)), "dense_elements": elements}
        Path(path).write_text(json.dumps([timed, counted]))


def _count(model: nn.Module) -> Counter[str]:
    """Counts bytes that leave this process from here on: "floats" are all but ids and DDP's."""
    sent: Counter[str] = Counter()
    rank, world = dist.get_rank(), dist.get_world_size()

    def counted(name: str, original: Any, *args: Any, **options: Any) -> Any:
        tensors = [*args, options.get("output"), options.get("input")]
        _, given = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)][:2]
        leaving = given.numel() * given.element_size() * (world - 1) / world
        if name.startswith("all_gather"):
            leaving *= world
        splits = options.get("input_split_sizes") or (args[3] if len(args) > 3 else None)
        if name == "all_to_all_single" and splits:
            kept = splits[rank] / max(1, sum(splits))
            leaving = given.numel() * given.element_size() * (1 - kept)
        sent["floats" if given.is_floating_point() else "ids"] += leaving
        return original(*args, **options)

    def hook(_, bucket):  # DDP does not understand annotations that are strings
        buffer = bucket.buffer().div_(world)
        sent["ddp"] += 2 * buffer.numel() * buffer.element_size() * (world - 1) / world
        work = dist.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    wrapped = getattr(model, "_dmp_wrapped_module", None)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped.register_comm_hook(None, hook)
    for name in _EXCHANGES:
        setattr(dist, name, partial(counted, name, getattr(dist, name)))
    return sent


def measure(
    counts: Sequence[int] = (1, 2, 4), repeats: int = 3, steps: int = 50
) -> dict[str, list[dict[str, Any]]]:
    """Every case takes its turn in each repeat; the bytes are those of the last."""
    many = [*((sharding, "ddp") for sharding in SHARDINGS), ("table_wise", "fsdp")]
    throughput, traffic = [], []
    for count in counts:
        for sharding, dense in many if count > 1 else [("table_wise", "-")]:
            case = {"processes": count, "sharding": sharding, "dense": dense}
            throughput.append(case | {"ratings_per_second": [], "step_ms": [], "optimizer_ms": []})
            traffic.append(case)
    for _ in range(repeats):
        for timings, counted in zip(throughput, traffic, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "figures.json")
                case = (timings["sharding"], timings["dense"], steps)
                launch(timings["processes"], 1, train, str(path), *case)
                timed, sent = json.loads(path.read_text())
            for name, figure in timed.items():
                timings[name].append(round(figure, 3))
            counted |= sent
            print(timings, file=sys.stderr, flush=True)
    return {"throughput": throughput, "traffic": [e for e in traffic if e["processes"] > 1]}


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


def compared(e: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Bytes that a process sends in a step: of what, as counted, and by the formulas."""
    count, sharding, ratings = e["processes"], e["sharding"], RATINGS // e["processes"]
    each = e["number_of_ids"] / ratings / FEATURES
    ids, pooled = tables_by_formula(sharding, count, ratings, FEATURES, each, DIM)
    dense = dense_by_formula(e["dense"], e["dense_elements"], count)
    if e["dense"] == "fsdp":  # by the calls of torchrec
        return [("dense, FSDP2", e["floats"] - 2 * pooled, dense)]
    return [
        ("ids", e["ids"], ids),
        ("pooled, both ways", e["floats"], 2 * pooled),
        ("dense, DDP", e["ddp"], dense),
    ]


def traffic_table(results: Mapping[str, Any]) -> str:
    return table(
        ["kB that a process sends in a step", "counted", "by formula"],
        (
            [
                f"{e['processes']} processes, {e['sharding']}: {name}",
                *(f"{figure / 1e3:,.1f}" for figure in figures),
            ]
            for e in results["traffic"]
            for name, *figures in compared(e)
        ),
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        results = json.loads(Path(sys.argv[1]).read_text())
    else:
        facts = machine.describe()
        results = {"machine": facts, **measure()}
        written = documents.RESULTS / f"{machine.name(facts)}-scaling.json"
        written.write_text(to_text(results))
    print(throughput_table(results), traffic_table(results), sep="\n")
