"""The embedding tables of a model, and whether FBGEMM can train them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recap_fast.names import is_wrapped

DTYPES = {DataType.FP32: torch.float32, DataType.FP16: torch.float16}


class Table(NamedTuple):
    """A table of an `EmbeddingBagCollection`: its own configuration and its weights."""

    config: EmbeddingBagConfig
    weight: nn.Parameter
    is_weighted: bool


def check_not_wrapped(model: nn.Module) -> None:
    """Raises if the model is inside DDP, torch.compile or the like, or has fused tables already."""
    if is_wrapped(model):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}: choose the optimizers of its "
            "embedding tables before that"
        )
    if hasattr(model, "fused_optimizer"):
        raise ValueError("the model has a fused_optimizer already: fuse its embeddings only once")


def find_collections(model: nn.Module) -> dict[str, EmbeddingBagCollection]:
    """Returns the `EmbeddingBagCollection`s by path; subclasses are something else."""
    collections = {
        path: module
        for path, module in model.named_modules()
        if type(module) is EmbeddingBagCollection
    }
    if not collections:
        raise ValueError("the model has no EmbeddingBagCollection to fuse")
    if "" in collections:
        raise ValueError(
            "the model is itself an EmbeddingBagCollection, which cannot be replaced in place: put "
            "it into a module"
        )
    return collections


def find_tables(collections: Mapping[str, EmbeddingBagCollection]) -> dict[str, Table]:
    """Returns the tables of collections by FQN."""
    return {
        f"{path}.embedding_bags.{config.name}.weight": Table(
            config, collection.embedding_bags[config.name].weight, collection.is_weighted()
        )
        for path, collection in collections.items()
        for config in collection.embedding_bag_configs()
    }


def check_tables(model: nn.Module, tables: Mapping[str, Table]) -> None:
    """Raises if FBGEMM cannot train one of the tables in place of the model."""
    for name, table in tables.items():
        _check_table(name, table)
    _check_sole_names(model, {name: table.weight for name, table in tables.items()})


def _check_table(name: str, table: Table) -> None:
    config, weight = table.config, table.weight
    if weight.dtype not in DTYPES.values():
        raise ValueError(
            f"{name} is {weight.dtype}: the kernels are for float32 and float16 tables; set its "
            "data_type to FP32 or FP16, or leave the collection unfused"
        )
    if DTYPES.get(config.data_type) != weight.dtype:
        raise ValueError(
            f"{name} is {weight.dtype}, but its data_type is {config.data_type.name}: make the "
            "collection with the data_type that its tables are to have"
        )
    if weight.shape[1] % 4 != 0:
        raise ValueError(
            f"{name} has the width {weight.shape[1]}: FBGEMM needs an embedding_dim that is a "
            "multiple of 4"
        )
    if table.is_weighted and config.pooling == PoolingType.MEAN:
        raise ValueError(
            f"{name} has mean pooling in a weighted collection: FBGEMM would ignore one of the "
            "two; use sum pooling"
        )
    if getattr(weight, "_in_backward_optimizers", None):
        raise ValueError(
            f"{name} is already updated by another optimizer in the backward pass "
            "(apply_optimizer_in_backward): choose one of the two"
        )


def _check_sole_names(model: nn.Module, tables: Mapping[str, nn.Parameter]) -> None:
    """Raises if a table is known by another name too: in another collection, or tied to a layer."""
    fqn_by_id: dict[int, str] = {}
    for name, table in tables.items():
        fqn_by_id.setdefault(id(table), name)
    for name, param in model.named_parameters(remove_duplicate=False):
        fqn = fqn_by_id.get(id(param), name)
        if fqn != name:
            raise ValueError(
                f"{fqn} and {name} are the same table: a fused table cannot be shared; leave the "
                "collection unfused"
            )
