"""Puts the embedding tables of a model on FBGEMM's kernels, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.optim import keyed

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.config.convert import as_given_embedding_config
from recap_fast.embeddings.collection import FusedTableCollection
from recap_fast.embeddings.kernel_arguments import table_kernel
from recap_fast.embeddings.tables import (
    Table,
    check_not_wrapped,
    check_tables,
    find_collections,
    find_tables,
)
from recap_fast.names import check_table_names, tables_in


def fuse_embeddings(
    model: nn.Module,
    emb_optimizer_config: EmbeddingOptimizerConfig | Any,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Replaces the `EmbeddingBagCollection`s of a model, in place, by fused ones.

    Weights are copied, names of parameters stay, outputs are equal to float tolerance. Afterwards
    `model.fused_optimizer` is a `keyed.CombinedOptimizer` of all tables by FQN
    ("<path>.embedding_bags.<table>.weight"), where `build_optimizer` finds it; it has a param group
    for each table-batched module, which tables share that agree in collection, pooling, dtype,
    algorithm, hyperparameters and schedule. Subclasses of `EmbeddingBagCollection` and tables
    outside such a collection stay as they are.

    Do this when the model is on its device and has its dtype, before it is wrapped: a table that is
    on another device or has another dtype later is refused by the next forward pass. What else you
    do to a table holds from then on: give it other weights, freeze it (`requires_grad_`), copy the
    model. Pickling is not supported; `state_dict` works. An id that is no row of its table is an
    error.

    Args:
        model: The model, not wrapped; its tables are float32 or float16, of a width that is a
            multiple of 4, and used nowhere else.
        emb_optimizer_config: Algorithm and hyperparameters of each table, and the rate to start
            with: `init_learning_rate`, or else what `learning_rate` gives for step 0. On the CPU,
            FBGEMM has sgd, adagrad, rowwise_adagrad and ema_rowwise_adagrad. Or what
            `config.as_embedding_config` takes.
        device: Where the tables go; by default where they are.

    Returns:
        The model.

    Raises:
        TypeError: `emb_optimizer_config` is None, or of a class that cannot be read.
        ValueError: Something cannot be honoured; the message names it, and nothing was changed.
    """
    emb_optimizer_config = as_given_embedding_config(emb_optimizer_config)
    check_not_wrapped(model)
    collections = find_collections(model)
    tables = find_tables(collections)
    for name, table in tables.items():
        if table.weight.is_meta:
            raise ValueError(f"{name} is on the meta device, without weights: initialise it first")
    check_tables(model, tables)
    check_table_names(emb_optimizer_config, tables_in(name for name, _ in model.named_parameters()))
    device = torch.device(device) if device is not None else _common_device(tables)
    kernels = {
        path: {
            config.name: table_kernel(emb_optimizer_config, config, device)
            for config in collection.embedding_bag_configs()
        }
        for path, collection in collections.items()
    }

    fused = {
        path: FusedTableCollection(collection, kernels[path], device)
        for path, collection in collections.items()
    }
    for path, collection in fused.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, collection)
    model.fused_optimizer = keyed.CombinedOptimizer(
        [
            (f"{path}.embedding_bags", collection.fused_optimizer())
            for path, collection in fused.items()
        ]
    )
    return model


def _common_device(tables: Mapping[str, Table]) -> torch.device:
    names: dict[torch.device, str] = {}
    for name, table in tables.items():
        names.setdefault(table.weight.device, name)
    if len(names) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in names.items())
        raise ValueError(f"the tables are on several devices ({found}): choose one with `device`")
    return next(iter(names))
