"""What `fuse_embeddings` refuses, and that it changes nothing then."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings, plan, set_table_optimizers
from tests.support.models import Ranker, tables
from tests.support.table_reference import table
from tests.support.tables import TABLES, Pooled, config_of, fqn, ranker

SGD = config_of()
MEAN = PoolingType.MEAN
HALF = DataType.FP16

OTHER_RATE = {"learning_rate": {"constant": 0.25}}


def tied_to_a_layer() -> nn.Module:
    model = ranker()
    model.head = nn.Linear(4, 6)
    model.head.weight = model.ebc.embedding_bags["t_user"].weight
    return model


def collection_in_two_places() -> nn.Module:
    model = ranker()
    model.other = model.ebc
    return model


def with_in_backward_optimizer() -> nn.Module:
    model = ranker()
    model.ebc.embedding_bags["t_item"].weight._in_backward_optimizers = [object()]
    return model


def on_meta() -> nn.Module:
    model = nn.Module()
    model.ebc = EmbeddingBagCollection(tables(), device=torch.device("meta"))
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], EmbeddingOptimizerConfig, str]] = {
    "no collection": (Ranker, SGD, "no EmbeddingBagCollection to fuse"),
    "bare collection": (
        lambda: EmbeddingBagCollection(tables()),
        SGD,
        "itself an EmbeddingBagCollection",
    ),
    "fused already": (lambda: fuse_embeddings(ranker(), SGD), SGD, "has a fused_optimizer already"),
    "wrapped": (lambda: torch.compile(ranker()), SGD, "wrapped in OptimizedModule"),
    "double": (lambda: ranker().double(), SGD, f"{TABLES[0]} is torch.float64"),
    "cast": (
        lambda: ranker().half(),
        SGD,
        f"{TABLES[0]} is torch.float16, but its data_type is FP32",
    ),
    "bfloat16": (
        lambda: Pooled(table("a", "user", data_type=DataType.BF16)),
        SGD,
        f"{fqn('a')} is torch.float16, but its data_type is BF16",
    ),
    "width": (
        lambda: Pooled(table("a", "user", dim=6)),
        SGD,
        f"{fqn('a')} has the width 6",
    ),
    "mean of weighted": (
        lambda: Pooled(table("a", "user", pooling=MEAN), is_weighted=True),
        SGD,
        f"{fqn('a')} has mean pooling in a weighted collection",
    ),
    "tied": (tied_to_a_layer, SGD, f"{TABLES[0]} and head.weight are the same table"),
    "two places": (
        collection_in_two_places,
        SGD,
        f"{TABLES[0]} and other.embedding_bags.t_user.weight are the same table",
    ),
    "in backward": (with_in_backward_optimizer, SGD, f"{TABLES[1]} is already updated"),
    "meta": (on_meta, SGD, f"{TABLES[0]} is on the meta device"),
    "no rate": (
        ranker,
        config_of(learning_rate=None, tables={"t_user": OTHER_RATE}),
        "has no rate for the table t_item: set learning_rate or init_learning_rate",
    ),
    "mistyped table": (
        ranker,
        config_of(tables={"t_usr": {"sgd": {}}}),
        "the model has no table 't_usr'; did you mean 't_user'?",
    ),
    "unknown table": (
        ranker,
        config_of(tables={"x": {"sgd": {}}}),
        "the model has no table 'x'; there are 't_user', 't_item'",
    ),
    "weight decay of one table": (
        ranker,
        config_of(
            tables={"t_user": {"rowwise_adagrad": {"weight_decay": 0.5, "weight_decay_mode": "l2"}}}
        ),
        "rowwise_adagrad.weight_decay is 0.5 for the table t_user, but FBGEMM ignores it on the "
        "CPU, except for float16 tables and tables of several features",
    ),
}


@pytest.mark.parametrize(("make", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_changed(
    make: Callable[[], nn.Module], config: EmbeddingOptimizerConfig, message: str
) -> None:
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=re.escape(message)):
        fuse_embeddings(model, config)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    "take",
    [
        fuse_embeddings,
        lambda model, config: set_table_optimizers(model, config, "cpu"),
        lambda model, config: plan(model, config, world_size=1, device="cpu", batch_size=2),
    ],
    ids=["fuse_embeddings", "set_table_optimizers", "plan"],
)
def test_there_must_be_a_configuration(take: Callable[[nn.Module, None], object]) -> None:
    with pytest.raises(TypeError, match=r"emb_optimizer_config must be .*; found NoneType"):
        take(ranker(), None)
