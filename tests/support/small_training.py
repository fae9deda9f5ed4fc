"""A small training of the demo's ranker, the same on one process as on several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

import recap_fast
from examples.movielens import data, processes
from examples.movielens.model import build_model, optimizer_configs
from examples.movielens.sharding import shard, whole_state
from examples.movielens.train import evaluate
from recap_fast.config import (
    EmbeddingAdagradConfig,
    EmbeddingOptimizerConfig,
    EmbeddingRowwiseAdagradConfig,
    EmbeddingSgdConfig,
    LearningRate,
    MultiTaskLearningRates,
    RecapAdamConfig,
    RecapOptimizerConfig,
    RecapSgdConfig,
)
from recap_fast.embeddings import fuse_embeddings
from tests.support.processes import device

STEPS = 10
BATCH_SIZE = 48
RATINGS = 1000
SIZES = {
    "embedding_dim": 16,
    "num_blocks": 2,
    "block_features": 16,
    "backbone_features": 32,
    "tower_features": (16, 8),
}
_TABLES = {
    "sgd": (0.3, EmbeddingSgdConfig),
    "adagrad": (0.02, EmbeddingAdagradConfig),
    "rowwise_adagrad": (0.02, EmbeddingRowwiseAdagradConfig),
}


def configs(dense: str, tables: str) -> tuple[RecapOptimizerConfig, EmbeddingOptimizerConfig]:
    """`dense` is "adam", with the demo's schedules, or "sgd", with a constant rate per group."""
    rate, kind = _TABLES[tables]
    embeddings = EmbeddingOptimizerConfig(
        learning_rate=LearningRate(constant=rate), **{tables: kind()}
    )
    if dense == "adam":
        rates = optimizer_configs(STEPS)[0].multi_task_learning_rates
        return RecapOptimizerConfig(
            multi_task_learning_rates=rates, adam=RecapAdamConfig()
        ), embeddings
    rates = MultiTaskLearningRates(
        tower_learning_rates={
            task: LearningRate(constant=0.01 * (number + 1))
            for number, task in enumerate(data.TASKS)
        },
        backbone_learning_rate=LearningRate(constant=0.03),
    )
    return RecapOptimizerConfig(multi_task_learning_rates=rates, sgd=RecapSgdConfig()), embeddings


def table_sizes(dataset: data.Dataset) -> dict[str, int]:
    """Enough rows for a shard on each of four processes."""
    return {name: max(size, 10) for name, size in dataset.table_sizes.items()}


def train(
    dense: str,
    tables: str,
    *,
    clip_grad_norm: float | None = None,
    place: Callable[..., nn.Module] = fuse_embeddings,
    without_batch: Collection[int] = (),
    without_step: Collection[int] = (),
) -> dict[str, Any]:
    """Trains on this process, or with the others of the group.

    Args:
        dense, tables, clip_grad_norm: the optimizers.
        place: fuses or shards the tables.
        without_batch: numbers of batches to leave out.
        without_step: numbers of batches after which to leave out the dense step only.

    Returns:
        The state dicts before and after, losses, AUCs, and the norms of the dense gradients.
    """
    dataset = data.synthetic(RATINGS, seed=0)
    share = processes.share()
    model = build_model(0, table_sizes=table_sizes(dataset), **SIZES)
    dense_config, embedding_config = configs(dense, tables)
    model = place(model, embedding_config)
    before = state_of(model)
    optimizer, scheduler = recap_fast.build_optimizer(
        model, dense_config, embedding_config, clip_grad_norm=clip_grad_norm
    )
    losses, norms = [], []
    batches = dataset.batches(BATCH_SIZE, seed=0, share=share)
    for step in range(STEPS):
        batch = next(batches).to(device())
        if step not in without_batch:
            optimizer.zero_grad()
            logits = model(batch)
            loss = (
                nn.functional.binary_cross_entropy_with_logits(
                    logits, batch.labels, reduction="none"
                )
                .mean(dim=0)
                .sum()
            )
            loss.backward()
            loss = loss.detach()
            losses.append(float(processes.mean(loss) if share.processes > 1 else loss))
            if step not in without_step:
                optimizer.step()
                norms.append(None if clip_grad_norm is None else float(optimizer.grad_norm))
        scheduler.step()
    return {
        "before": before,
        "after": state_of(model),
        "losses": losses,
        "norms": norms,
        "auc": evaluate(model, dataset, batch_size=16, share=share, device=device()),
    }


def train_sharded(sharding: str, part: str, *optimizers: str, **options: Any) -> dict[str, Any]:
    """`train` with the others of the group; `part` is for `shard`'s `dense`."""
    place = functools.partial(shard, sharding=sharding, dense=part, device=device())
    return train(*optimizers, place=place, **options)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.cpu().clone() for name, value in whole_state(model).items()}


def largest_difference(ours: dict, expected: dict, before: dict) -> tuple[float, str]:
    """The largest difference of any element over the longest way of any in its tensor.

    Beyond a unit in the last place of the tensor's largest value, which decides of short ways.
    """
    assert ours.keys() == expected.keys() == before.keys()
    differences = {}
    for name, value in expected.items():
        unit = torch.finfo(value.dtype).eps * float(value.abs().max())
        difference = max(0.0, float((ours[name] - value).abs().max()) - unit)
        differences[name] = difference / float((value - before[name]).abs().max())
    name = max(differences, key=differences.get)
    return differences[name], name
