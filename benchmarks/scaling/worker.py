"""What each process of a measurement does: trains the demo's model and times or counts."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

import recap_fast
from examples.movielens import data, processes
from examples.movielens.model import MOVIELENS_TABLE_SIZES, build_model, optimizer_configs
from examples.movielens.quiet import quiet_libraries
from examples.movielens.sharding import shard
from recap_fast.embeddings import fuse_embeddings

BATCH_SIZE: Final = 512
RATINGS: Final = 20_000
_CPU: Final = torch.device("cpu")

# Through these, torchrec and FSDP2 exchange tensors; DDP's all-reduce is counted by its hook.
_EXCHANGES: Final = (
    "all_to_all_single",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
)


class Training:
    """The demo's training with the others of the group, on made-up ratings, step by step."""

    def __init__(self, sharding: str, dense: str, table_sizes: dict[str, int] | None = None):
        quiet_libraries()
        share = processes.share()
        steps = 1000  # of the schedules
        dense_config, embedding_config = optimizer_configs(steps)
        model: nn.Module = build_model(0, table_sizes=table_sizes or MOVIELENS_TABLE_SIZES)
        self.elements = sum(
            param.numel()
            for name, param in model.named_parameters()
            if "embedding_bags" not in name
        )
        if share.processes == 1:
            model = fuse_embeddings(model, embedding_config)
        else:
            model = shard(model, embedding_config, sharding=sharding, dense=dense, device=_CPU)
        self.model = model
        self.optimizer, self.scheduler = recap_fast.build_optimizer(
            model, dense_config, embedding_config
        )
        dataset = data.synthetic(RATINGS, seed=0)
        self._batches = dataset.batches(BATCH_SIZE, seed=0, share=share)
        self.batch = next(self._batches)

    def step(self) -> float:
        """One step; returns the seconds of `optimizer.step()`."""
        self.batch = next(self._batches)
        self.optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(
            self.model(self.batch), self.batch.labels
        )
        loss.backward()
        begin = time.perf_counter()
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        self.scheduler.step()
        return seconds


def time_steps(path: str, dense: str, warm_up: int, steps: int) -> None:
    """Writes to `path`: ratings per second, and milliseconds of a step and of the optimizer's."""
    training = Training("table_wise", dense)
    for _ in range(warm_up):
        training.step()
    dist.barrier()
    begin = time.perf_counter()
    optimizer_seconds = [training.step() for _ in range(steps)]
    dist.barrier()
    seconds = time.perf_counter() - begin
    if dist.get_rank() == 0:
        figures = {
            "ratings_per_second": BATCH_SIZE * steps / seconds,
            "step_ms": seconds / steps * 1e3,
            "optimizer_ms": float(torch.tensor(optimizer_seconds).median()) * 1e3,
        }
        Path(path).write_text(json.dumps(figures))


def count_bytes(path: str, sharding: str, dense: str) -> None:
    """Writes to `path` the bytes that a process sends in a step, the mean over all processes.

    "floats" are pooled embeddings and their gradients, and what FSDP2 sends.
    """
    # Enough rows for a shard on each process.
    sizes = {name: max(size, 64) for name, size in MOVIELENS_TABLE_SIZES.items()}
    training = Training(sharding, dense, sizes)
    for _ in range(2):  # DDP and FSDP2 arrange themselves
        training.step()
    with _counting(training) as sent:
        training.step()
    names = ("ids", "floats", "ddp", "number_of_ids")
    sent["number_of_ids"] = training.batch.sparse.values().numel()
    means = processes.mean(torch.tensor([sent[name] for name in names], dtype=torch.float64))
    if dist.get_rank() == 0:
        figures = dict(zip(names, means.tolist(), strict=True))
        Path(path).write_text(json.dumps({**figures, "dense_elements": training.elements}))


@contextmanager
def _counting(training: Training) -> Iterator[Counter[str]]:
    sent: Counter[str] = Counter()
    world_size = dist.get_world_size()
    originals = {name: getattr(dist, name) for name in _EXCHANGES}

    def counted(name: str, *args: Any, **options: Any) -> Any:
        tensors = [*args, options.get("output"), options.get("input")]
        _, given = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)][:2]
        given_bytes = given.numel() * given.element_size()
        if name == "all_to_all_single":
            splits = options.get("input_split_sizes") or (args[3] if len(args) > 3 else None)
            rank = dist.get_rank()
            kept = splits[rank] / max(1, sum(splits)) if splits else 1 / world_size
            leaving = given_bytes * (1 - kept)
        elif name.startswith("all_gather"):
            leaving = given_bytes * (world_size - 1)
        else:
            leaving = given_bytes * (world_size - 1) / world_size
        sent["floats" if given.is_floating_point() else "ids"] += leaving
        return originals[name](*args, **options)

    def hook(_, bucket):  # DDP does not understand annotations that are strings
        buffer = bucket.buffer().div_(world_size)
        if is_counting:
            sent["ddp"] += (
                2 * buffer.numel() * buffer.element_size() * ((world_size - 1) / world_size)
            )
        work = dist.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    is_counting = True
    wrapped = getattr(training.model, "_dmp_wrapped_module", None)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped.register_comm_hook(None, hook)
    for name in _EXCHANGES:
        setattr(dist, name, functools.partial(counted, name))
    try:
        yield sent
    finally:
        is_counting = False
        for name, original in originals.items():
            setattr(dist, name, original)
