"""A small training that saves itself half-way, and one that goes on from what was saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch import nn

import recap_fast
import recap_fast.reference
from examples.movielens import data, processes
from examples.movielens.model import build_model
from recap_fast import checkpoint
from recap_fast.config import EmbeddingOptimizerConfig, RecapOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from tests.checkpoint.snapshots import Snapshot, take
from tests.support.processes import device, run
from tests.support.sharded_models import shard_tables
from tests.support.small_training import BATCH_SIZE, RATINGS, SIZES, configs, table_sizes

T = TypeVar("T")

SAVED_STEP, STEPS = 3, 6


@dataclass(frozen=True)
class Setup:
    """How to train.

    Attributes:
        world_size: how many processes.
        sharding: a `layout` of `sharded_models` for all tables; "mixed" for `MIXED`; "fused" for
            `fuse_embeddings`, "unfused" for tables as they are.
        dense: "ddp" or "fsdp", for what is not a table.
        tables: an algorithm; "mixed" for adagrad with exceptions.
        algorithm: of the rest, "adam" or "sgd".
        builder: "fast" or "reference".
    """

    world_size: int = 1
    sharding: str = "fused"
    dense: str = "ddp"
    tables: str = "adagrad"
    algorithm: str = "adam"
    builder: str = "fast"

    def __str__(self) -> str:
        parts = (self.sharding, self.dense, self.tables, self.algorithm, self.builder)
        return f"{self.world_size}-" + "-".join(parts)


MIXED = {
    "user": "table_wise",
    "item": "column_wise",
    "occupation": "data_parallel",
    "gender": "column_wise",
    "age_bucket": "table_wise",
    "genre": "data_parallel",
}
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "sgd": {"sgd": {}},
    "adagrad": {"adagrad": {}},
    "rowwise_adagrad": {"rowwise_adagrad": {}},
    # Moves the slow halves after passes 2, 4 and 6.
    "ema_rowwise_adagrad": {"ema_rowwise_adagrad": {"step_ema": 2}},
    # Not for fused tables on the CPU.
    "adam": {"adam": {"beta_2": 0.9}},
}


class Training:
    """A model with its optimizer and batches, of one process."""

    def __init__(self, setup: Setup, seed: int) -> None:
        dense_config, table_config = _configs(setup)
        self.dataset = data.synthetic(RATINGS, seed=0)
        model = build_model(seed, table_sizes=table_sizes(self.dataset), **SIZES)
        self.model: nn.Module
        if setup.sharding == "fused":
            self.model = fuse_embeddings(model, table_config)
        elif setup.sharding == "unfused":
            self.model = model
        else:
            kinds = MIXED if setup.sharding == "mixed" else setup.sharding
            self.model = shard_tables(model, table_config, kinds, setup.dense)
        builder = recap_fast if setup.builder == "fast" else recap_fast.reference
        self.optimizer, self.scheduler = builder.build_optimizer(
            self.model, dense_config, table_config
        )

    def train(self, first: int, stop: int) -> None:
        batches = self.dataset.batches(BATCH_SIZE, 0, share=processes.share(), start=first)
        for _ in range(first, stop):
            batch = next(batches).to(device())
            self.optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(
                self.model(batch), batch.labels, reduction="none"
            )
            loss.mean(dim=0).sum().backward()
            self.optimizer.step()
            self.scheduler.step()


def _configs(setup: Setup) -> tuple[RecapOptimizerConfig, EmbeddingOptimizerConfig]:
    dense, _ = configs(setup.algorithm, "sgd")
    if setup.tables == "mixed":
        exceptions = {
            "occupation": {"sgd": {}},
            "genre": {"sgd": {}, **_rate(0.2, 0.1, 0.3)},
            "item": _rate(0.03, 0.01, 0.02),
            "age_bucket": _ALGORITHMS["ema_rowwise_adagrad"],
        }
        fields = {"adagrad": {}, "tables": exceptions}
    else:
        fields = _ALGORITHMS[setup.tables]
    rate = _rate(0.1, 0.3, 0.2) if setup.tables == "sgd" else _rate(0.01, 0.02, 0.03)
    return dense, EmbeddingOptimizerConfig(**rate, **fields)


def _rate(*values: float) -> dict[str, Any]:
    """It changes before and after the save, and is another then than at the start."""
    pieces = {"learning_rate_boundaries": [1, 4], "learning_rate_values": values}
    return {"learning_rate": {"piecewise_constant": pieces}}


def train_and_save(setup: Setup, folder: str) -> list[Snapshot]:
    """On one process: at the start, where it is saved, and at the end."""
    training = Training(setup, seed=0)
    moments = [take(training.model, training.optimizer)]
    training.train(0, SAVED_STEP)
    checkpoint.save(
        folder, SAVED_STEP, training.model, training.optimizer, training.scheduler, extra="extra"
    )
    moments.append(take(training.model, training.optimizer))
    training.train(SAVED_STEP, STEPS)
    return [*moments, take(training.model, training.optimizer)]


def load_and_train(setup: Setup, folder: str, steps_before: int) -> list[Snapshot]:
    """On one process: right after loading into other weights, and at the end."""
    training = Training(setup, seed=1)
    training.train(0, steps_before)
    found = checkpoint.load(folder, training.model, training.optimizer, training.scheduler)
    assert found == checkpoint.Loaded(SAVED_STEP, "extra", Path(folder) / f"step-{SAVED_STEP:08}")
    moments = [take(training.model, training.optimizer)]
    training.train(found.step, STEPS)
    return [*moments, take(training.model, training.optimizer)]


def be_refused(setup: Setup, folder: str) -> tuple[str, list[Snapshot]]:
    """On one process: why loading is refused, and the moments before and after."""
    training = Training(setup, seed=1)
    training.train(0, 2)
    before = take(training.model, training.optimizer)
    with pytest.raises(checkpoint.CheckpointMismatchError) as caught:
        checkpoint.load(folder, training.model, training.optimizer, training.scheduler)
    return str(caught.value), [before, take(training.model, training.optimizer)]


def call_each(calls: list[tuple[Callable[..., T], Setup, Any]]) -> list[T]:
    """On one process: makes one call after the other, since to start takes longer than to train."""
    results = []
    for function, setup, *args in calls:
        try:
            results.append(function(setup, *args))
        except Exception as error:
            raise RuntimeError(f"{function.__name__}, {setup}: {error}") from error
    return results


def on_all(calls: list[tuple[Callable[..., T], Setup, Any]], backend: str) -> list[list[T]]:
    """Calls functions on all processes of their setups; returns for each what it returned, by rank.

    Tables that are not sharded train in this process, without a process group, on the CPU.
    """
    alone = ("fused", "unfused")
    sizes = [0 if call[1].sharding in alone else call[1].world_size for call in calls]
    results: list[Any] = [None] * len(calls)
    for size in sorted(set(sizes)):
        indices = [index for index, own in enumerate(sizes) if own == size]
        own_calls = [calls[index] for index in indices]
        ranks = run(size, call_each, own_calls, backend=backend) if size else [call_each(own_calls)]
        for index, *by_rank in zip(indices, *ranks, strict=True):
            results[index] = by_rank
    return results
