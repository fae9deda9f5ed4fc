"""Fused tables instead of unfused ones: what stays the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import keyed
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from tests.support.models import features
from tests.support.table_reference import table
from tests.support.tables import TABLES, Pooled, config_of, fqn, ranker

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
