"""Fused tables instead of unfused ones: what stays the same, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import keyed
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from tests.embeddings.examples import TABLES, Pooled, config_of, fqn, ranker
from tests.embeddings.reference import table
from tests.models import Ranker, features, tables

SGD = config_of()
ADAGRAD = config_of(adagrad={"eps": 1e-3})
MEAN = PoolingType.MEAN
HALF = DataType.FP16


# What stays the same


@pytest.mark.parametrize("config", [SGD, ADAGRAD], ids=["sgd", "adagrad"])
def test_names_weights_and_outputs_stay(config: EmbeddingOptimizerConfig) -> None:
    unfused, fused = ranker(), ranker()
    assert fuse_embeddings(fused, config) is fused
    assert isinstance(fused.ebc, FusedEmbeddingBagCollection)
    assert [config.name for config in fused.ebc.embedding_bag_configs()] == ["t_user", "t_item"]
    expected, found = unfused.state_dict(), fused.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.testing.assert_close(fused(features()), unfused(features()))
    assert isinstance(fused.fused_optimizer, keyed.CombinedOptimizer)
    assert list(fused.fused_optimizer.params) == TABLES
    assert list(fused.fused_optimizer.state_dict()["state"]) == TABLES
    (group,) = fused.fused_optimizer.param_groups
    assert [len(param) for param in group["params"]] == [6, 9]


COLLECTIONS: dict[str, list[EmbeddingBagConfig]] = {
    "shared feature": [table("a", "user", "item"), table("b", "item", "last_item", dim=4)],
    "mean": [table("a", "user", pooling=MEAN), table("b", "item", "last_item", pooling=MEAN)],
    "sum, then mean": [
        table("a", "user"),
        table("b", "item"),
        table("c", "last_item", pooling=MEAN),
    ],
    "alternating": [
        table("a", "user", pooling=MEAN),
        table("b", "item", "user", dim=4),
        table("c", "last_item", "item", pooling=MEAN, dim=12),
        table("d", "last_item", dim=16),
    ],
    "features in another order": [table("a", "last_item"), table("b", "item")],
}


@pytest.mark.parametrize("configs", COLLECTIONS.values(), ids=COLLECTIONS)
def test_outputs_of_features_and_poolings(configs: list[EmbeddingBagConfig]) -> None:
    model = Pooled(*configs)
    expected = model.inner["ebc"](features())
    fused = fuse_embeddings(model, SGD).inner["ebc"](features())
    assert fused.keys() == expected.keys()
    assert fused.length_per_key() == expected.length_per_key()
    torch.testing.assert_close(fused.to_dict(), expected.to_dict())
    torch.testing.assert_close(fused.values(), expected.values())


def test_outputs_of_float16_tables() -> None:
    """Pooled in float32; the unfused tables pool in float16."""
    configs = [table("a", "user", data_type=HALF), table("b", "item"), table("c", "user")]
    model = Pooled(*configs)
    expected = model.inner["ebc"](features())
    weights = model.state_dict()
    fused = fuse_embeddings(model, SGD).inner["ebc"](features())
    assert fused.values().dtype == torch.float32
    torch.testing.assert_close(fused.values(), expected.values(), rtol=2**-10, atol=2**-9)
    found = model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert [found[fqn(name)].dtype for name in "abc"] == [
        torch.float16,
        torch.float32,
        torch.float32,
    ]


def test_gradients_reach_the_right_columns() -> None:
    """Of tables whose kernels are in another order than they are."""
    configs = COLLECTIONS["alternating"]
    unfused, fused = Pooled(*configs), fuse_embeddings(Pooled(*configs), config_of())
    factors = torch.randn(5, 56, generator=torch.Generator().manual_seed(0))
    for model in (unfused, fused):
        (model.inner["ebc"](features()).values() * factors).sum().backward()
    for name, weight in unfused.named_parameters():
        expected = weight - 0.5 * weight.grad
        torch.testing.assert_close(fused.get_parameter(name).detach(), expected.detach())


def test_weighted_features() -> None:
    model = Pooled(table("a", "user", "item"), table("b", "last_item"), is_weighted=True)
    expected = model.inner["ebc"](features(weighted=True)).values()
    fused = fuse_embeddings(model, SGD).inner["ebc"]
    assert fused.is_weighted()
    torch.testing.assert_close(fused(features(weighted=True)).values(), expected)


def test_features_may_change_their_places_from_batch_to_batch() -> None:
    unfused, fused = Pooled(*COLLECTIONS["alternating"]), Pooled(*COLLECTIONS["alternating"])
    fuse_embeddings(fused, SGD)
    for order in ([0, 1, 2], [2, 0, 1], [0, 1, 2], [1, 2, 0]):
        batch = features().permute(order)
        torch.testing.assert_close(
            fused.inner["ebc"](batch).values(), unfused.inner["ebc"](batch).values()
        )


def lengths_and_values(lengths: list[int], values: list[int], *keys: str) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(keys) or ["user", "item", "last_item"],
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int32),
    )


@pytest.mark.parametrize("batch", [0, 2], ids=["no examples", "empty bags"])
def test_batches_without_ids(batch: int) -> None:
    model = fuse_embeddings(Pooled(*COLLECTIONS["alternating"]), ADAGRAD)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pooled = model.inner["ebc"](lengths_and_values([0] * 3 * batch, [])).values()
    assert torch.equal(pooled, torch.zeros(batch, 56))
    pooled.sum().backward()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_batches_that_do_not_fit_are_refused() -> None:
    ebc = fuse_embeddings(Pooled(table("a", "user"), table("b", "item")), SGD).inner["ebc"]
    with pytest.raises(ValueError, match="the features lack item"):
        ebc(lengths_and_values([1], [1], "user"))
    with pytest.raises(RuntimeError, match="idx < num_rows"):
        ebc(lengths_and_values([1, 1], [1, 6], "user", "item"))
    ragged = KeyedJaggedTensor(
        keys=["user", "item"],
        values=torch.tensor([1, 1, 1]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[1], [2]],
    )
    with pytest.raises(ValueError, match="the same number of examples"):
        ebc(ragged)


def test_random_numbers_do_not_depend_on_fusing() -> None:
    model = ranker()
    state = torch.random.get_rng_state()
    fuse_embeddings(model, SGD)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_state_dicts_load_in_both_directions() -> None:
    unfused, fused = ranker(seed=1), fuse_embeddings(ranker(seed=2), SGD)
    fused.load_state_dict(unfused.state_dict())
    expected = unfused(features())
    torch.testing.assert_close(fused(features()), expected)

    fused(features()).sum().backward()
    unfused.load_state_dict(fused.state_dict())
    torch.testing.assert_close(unfused(features()), fused(features()))
    assert not torch.equal(unfused(features()), expected)


def test_several_collections_have_one_optimizer() -> None:
    model = nn.ModuleDict({"first": ranker(seed=0), "second": ranker(seed=1)})
    fuse_embeddings(model, SGD)
    assert list(model.fused_optimizer.params) == [
        f"{place}.{name}" for place in ("first", "second") for name in TABLES
    ]


def test_the_mode_is_kept_and_followed() -> None:
    model = Pooled(table("a", "user")).eval()
    collection = fuse_embeddings(model, SGD).inner["ebc"]
    assert not collection.training
    assert [kernel.training for kernel in collection._kernels] == [False]
    model.train()
    assert [kernel.training for kernel in collection._kernels] == [True]


# Which tables share a kernel

FOUR = [table(name, feature) for name, feature in zip("abcd", "aabb", strict=True)]
OTHER_RATE = {"learning_rate": {"constant": 0.25}}
GROUPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all alike": ({}, ["abcd"]),
    "named, but alike": (
        {"a": {"sgd": {}}, "b": {"learning_rate": {"constant": 0.5}}},
        ["abcd"],
    ),
    "an algorithm": ({"b": {"adagrad": {}}, "c": {"adagrad": {}}}, ["ad", "bc"]),
    "a hyperparameter": ({"b": {"adagrad": {}}, "c": {"adagrad": {"eps": 1e-3}}}, ["ad", "b", "c"]),
    "a schedule": ({"a": OTHER_RATE, "d": OTHER_RATE}, ["ad", "bc"]),
    "schedules that start alike": (
        {
            "a": {
                "learning_rate": {
                    "piecewise_constant": {
                        "learning_rate_boundaries": [3],
                        "learning_rate_values": [0.5, 0.25],
                    }
                }
            }
        },
        ["a", "bcd"],
    ),
    "clipping": ({"d": {"gradient_clipping": 1.0}}, ["abc", "d"]),
}


@pytest.mark.parametrize(("own", "expected"), GROUPS.values(), ids=GROUPS)
def test_tables_that_agree_share_a_param_group(own: dict[str, Any], expected: list[str]) -> None:
    model = fuse_embeddings(Pooled(*FOUR), config_of(tables=own))
    params = {id(param): name for name, param in model.fused_optimizer.params.items()}
    groups = [
        [params[id(p)] for p in group["params"]] for group in model.fused_optimizer.param_groups
    ]
    assert groups == [[fqn(name) for name in group] for group in expected]
    assert len(model.inner["ebc"]._kernels) == len(expected)


def test_pooling_and_dtype_take_kernels_of_their_own() -> None:
    configs = [
        table("a", "x", pooling=MEAN),
        table("b", "x", data_type=HALF),
        table("c", "x"),
        table("d", "x", pooling=MEAN),
    ]
    groups = fuse_embeddings(Pooled(*configs), SGD).fused_optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [2, 1, 1]


def test_every_table_has_its_own_algorithm_rate_and_state() -> None:
    own = {
        "b": {"adagrad": {}},
        "c": {"rowwise_adagrad": {}, **OTHER_RATE},
        "d": {"ema_rowwise_adagrad": {}},
    }
    model = fuse_embeddings(Pooled(*FOUR), config_of(tables=own))
    state = model.fused_optimizer.state_dict()["state"]
    shapes = {
        name: {key: tuple(value.shape) for key, value in state[fqn(name)].items()}
        for name in "abcd"
    }
    assert shapes == {
        "a": {},
        "b": {"sum": (6, 8)},
        "c": {"sum": (6,)},
        "d": {"sum": (6,), "step": (1,)},
    }
    assert [group["lr"] for group in model.fused_optimizer.param_groups] == [0.5, 0.5, 0.25, 0.5]


# Rates to start with


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {
                "learning_rate": {
                    "linear_ramp_to_constant": {"learning_rate": 0.8, "num_ramp_steps": 4}
                }
            },
            0,
        ),
        ({"init_learning_rate": 0.25}, 0.25),
        ({"learning_rate": None, "init_learning_rate": 0.25}, 0.25),
        ({}, 0.5),
    ],
)
def test_rate_to_start_with(options: dict[str, Any], expected: float) -> None:
    unfused, fused = ranker(), fuse_embeddings(ranker(), config_of(**options))
    assert [group["lr"] for group in fused.fused_optimizer.param_groups] == [expected]
    for model in (unfused, fused):
        model(features()).sum().backward()
    weight = unfused.get_parameter(TABLES[1])
    torch.testing.assert_close(
        fused.get_parameter(TABLES[1]).detach(), weight.detach() - expected * weight.grad
    )


# Loading state


def test_loaded_state_trains_on() -> None:
    """With "step", FBGEMM's count of forward passes."""
    config = config_of(ema_rowwise_adagrad={"step_ema": 3})
    straight, resumed = (fuse_embeddings(ranker(), config) for _ in range(2))

    def step(model: nn.Module, number: int) -> None:
        model(features(number)).sum().backward()

    for number in range(2):
        step(straight, number)
    resumed(features())  # so that it is at another pass, and has another iter_cpu
    resumed.load_state_dict(straight.state_dict())
    resumed.fused_optimizer.load_state_dict(straight.fused_optimizer.state_dict())
    for number in range(2, 5):
        step(straight, number)
        step(resumed, number)
    for name in TABLES:
        assert torch.equal(resumed.get_parameter(name), straight.get_parameter(name))
        (expected, found) = (
            model.fused_optimizer.state_dict()["state"][name] for model in (straight, resumed)
        )
        assert found["step"].tolist() == expected["step"].tolist() == [5]
        assert torch.equal(found["sum"], expected["sum"])


# What is refused


def frozen() -> nn.Module:
    model = ranker()
    model.ebc.embedding_bags["t_item"].requires_grad_(False)
    return model


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
    "frozen": (frozen, SGD, f"{TABLES[1]} is frozen"),
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
