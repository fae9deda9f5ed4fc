"""A small training that saves itself half-way, and one that goes on from what was saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.types import ShardedTensor

import recap_fast
import recap_fast.reference
from recap_fast import checkpoint
from recap_fast.config import (
    EmbeddingEmaRowwiseAdagradConfig,
    EmbeddingOptimizerConfig,
    LearningRate,
    PiecewiseConstant,
    RecapOptimizerConfig,
)
from recap_fast.demo import data, processes
from recap_fast.demo.model import build_model
from recap_fast.embeddings import fuse_embeddings
from recap_fast.embeddings.kernel_optimizer import counts_forward_passes
from recap_fast.keyed import leaves
from tests.distributed.processes import run
from tests.distributed.sharded_models import local_parts, shard_tables
from tests.distributed.small_training import BATCH_SIZE, RATINGS, SIZES, configs, table_sizes

T = TypeVar("T")

SAVED_STEP, STEPS = 6, 12
# What torchrec calls the one state of both kinds of Adagrad.
_STATE_NAMES = {"momentum1": "sum", "momentum_1": "sum"}
_WRAPPERS = ("_dmp_wrapped_module", "module")


@dataclass(frozen=True)
class Setup:
    """How to train.

    Attributes:
        world_size: how many processes.
        sharding: a `layout` of `sharded_models`; "fused" for `fuse_embeddings` in this process.
        dense: "ddp" or "fsdp", for what is not a table.
        tables: a key of `TABLE_RATES`.
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


TABLE_RATES = {
    "sgd": [0.1, 0.3, 0.2],
    "adagrad": [0.01, 0.02, 0.03],
    "rowwise_adagrad": [0.01, 0.02, 0.03],
    "ema_rowwise_adagrad": [0.01, 0.02, 0.03],
}


@dataclass
class Snapshot:
    """A training at some moment, as one process or, assembled, all of them see it.

    Attributes:
        values: whole tensors of the model and of the optimizer's state, by name; as one process
            sees them, their shape and what it has of them, with its place.
        rates: by parameter, of the param group and of the kernel that updates it.
        step_counts: what counts steps, by parameter.
    """

    values: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    step_counts: dict[str, int] = field(default_factory=dict)


class Training:
    """A model with its optimizer and batches, of one process."""

    def __init__(self, setup: Setup, seed: int) -> None:
        dense_config, table_config = _configs(setup)
        self.dataset = data.synthetic(RATINGS, seed=0)
        model = build_model(seed, table_sizes=table_sizes(self.dataset), **SIZES)
        self.model: nn.Module
        if setup.sharding == "fused":
            self.model = fuse_embeddings(model, table_config)
        else:
            self.model = shard_tables(model, table_config, setup.sharding, setup.dense)
        builder = recap_fast if setup.builder == "fast" else recap_fast.reference
        self.optimizer, self.scheduler = builder.build_optimizer(
            self.model, dense_config, table_config
        )

    def train(self, first: int, stop: int) -> None:
        batches = self.dataset.batches(BATCH_SIZE, 0, share=processes.share(), start=first)
        for _ in range(first, stop):
            batch = next(batches)
            self.optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(
                self.model(batch), batch.labels, reduction="none"
            )
            loss.mean(dim=0).sum().backward()
            self.optimizer.step()
            self.scheduler.step()

    def snapshot(self) -> Snapshot:
        found = Snapshot()
        for name, value in self.model.state_dict().items():
            found.values[name] = _parts(value)
        names = {param: bare(name) for name, param in self.optimizer.params.items()}
        for leaf in leaves(self.optimizer):
            kernel = getattr(leaf, "_emb_module", None)
            for group in leaf.param_groups:
                # Kernels have a float32, and all of them agree on it.
                rate = float(torch.tensor(group["lr"]))
                in_use = rate if kernel is None else kernel.get_learning_rate()
                for param in group["params"]:
                    found.rates[names[param]] = (rate, in_use)
                    if kernel is not None and counts_forward_passes(kernel):
                        found.step_counts[names[param]] = int(kernel.iter_cpu)
        for name, entries in self.optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                key = key.rpartition(".")[2]
                if key not in ("step", "iter"):
                    found.values[f"{bare(name)}: {_STATE_NAMES.get(key, key)}"] = _parts(value)
                elif not is_table(name):
                    found.step_counts[bare(name)] = int(value)
        return found


def _configs(setup: Setup) -> tuple[RecapOptimizerConfig, EmbeddingOptimizerConfig]:
    is_ema = setup.tables == "ema_rowwise_adagrad"
    dense, tables = configs(setup.algorithm, "adagrad" if is_ema else setup.tables)
    # Before and after the save, the rate changes; and it is another then than at the start.
    rate = LearningRate(
        piecewise_constant=PiecewiseConstant(
            learning_rate_boundaries=[3, 9], learning_rate_values=TABLE_RATES[setup.tables]
        )
    )
    changes: dict[str, Any] = {"learning_rate": rate}
    if is_ema:  # moves after passes 4, 8 and 12
        section = EmbeddingEmaRowwiseAdagradConfig(step_ema=4)
        changes |= {"adagrad": None, "ema_rowwise_adagrad": section}
    return dense, tables.model_copy(update=changes)


def bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_table(name: str) -> bool:
    return "embedding_bags" in name


def _parts(value: torch.Tensor) -> tuple[tuple[int, ...], list[tuple[torch.Tensor, Any]]]:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    shape = tuple(value.size() if isinstance(value, ShardedTensor) else value.shape)
    return shape, [(part.clone(), place) for part, place in local_parts(value)]


def assemble(ranks: list[Snapshot]) -> Snapshot:
    """Returns what all processes see together, who agree on what several of them have."""
    whole = Snapshot()
    for own in ranks:
        for name, (shape, parts) in own.values.items():
            value = whole.values.setdefault(name, torch.full(shape, torch.nan))
            for part, place in parts:
                there = value[place]
                assert there.isnan().all() or torch.equal(there, part), name
                there.copy_(part)
        for name, value in own.rates.items():
            assert whole.rates.setdefault(name, value) == value, name
        for name, value in own.step_counts.items():
            assert whole.step_counts.setdefault(name, value) == value, name
    assert not any(value.isnan().any() for value in whole.values.values())
    return whole


def train_and_save(setup: Setup, folder: str) -> list[Snapshot]:
    """On one process: at the start, where it is saved, and at the end."""
    training = Training(setup, seed=0)
    moments = [training.snapshot()]
    training.train(0, SAVED_STEP)
    checkpoint.save(
        folder, SAVED_STEP, training.model, training.optimizer, training.scheduler, extra="extra"
    )
    moments.append(training.snapshot())
    training.train(SAVED_STEP, STEPS)
    return [*moments, training.snapshot()]


def load_and_train(setup: Setup, folder: str, steps_before: int) -> list[Snapshot]:
    """On one process: right after loading into other weights, and at the end."""
    training = Training(setup, seed=1)
    training.train(0, steps_before)
    found = checkpoint.load(folder, training.model, training.optimizer, training.scheduler)
    assert found == checkpoint.Loaded(SAVED_STEP, "extra", Path(folder) / "step-00000006")
    moments = [training.snapshot()]
    training.train(found.step, STEPS)
    return [*moments, training.snapshot()]


def be_refused(setup: Setup, folder: str) -> tuple[str, list[Snapshot]]:
    """On one process: why loading is refused, and the moments before and after."""
    training = Training(setup, seed=1)
    training.train(0, 2)
    before = training.snapshot()
    with pytest.raises(checkpoint.CheckpointMismatchError) as caught:
        checkpoint.load(folder, training.model, training.optimizer, training.scheduler)
    return str(caught.value), [before, training.snapshot()]


def call_each(calls: list[tuple[Callable[..., T], Setup, Any]]) -> list[T]:
    """On one process: makes one call after the other, since to start takes longer than to train."""
    results = []
    for function, setup, *args in calls:
        try:
            results.append(function(setup, *args))
        except Exception as error:
            raise RuntimeError(f"{function.__name__}, {setup}: {error}") from error
    return results


def on_all(calls: list[tuple[Callable[..., T], Setup, Any]]) -> list[list[T]]:
    """Calls functions on all processes of their setups; returns for each what it returned, by rank.

    Fused tables are trained in this process, without a process group.
    """
    sizes = [0 if call[1].sharding == "fused" else call[1].world_size for call in calls]
    results: list[Any] = [None] * len(calls)
    for size in sorted(set(sizes)):
        indices = [index for index, own in enumerate(sizes) if own == size]
        own_calls = [calls[index] for index in indices]
        ranks = run(size, call_each, own_calls) if size else [call_each(own_calls)]
        for index, *by_rank in zip(indices, *ranks, strict=True):
            results[index] = by_rank
    return results


def assemble_moments(ranks: list[list[Snapshot]]) -> list[Snapshot]:
    """Returns what all processes see together at each moment."""
    return [assemble(list(moment)) for moment in zip(*ranks, strict=True)]
