"""Fused tables against the same tables unfused, updated by slow and obvious code."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad, keyed

from recap_fast.config import (
    EmbeddingAdagradConfig,
    EmbeddingAdamConfig,
    EmbeddingLarsSgdConfig,
    EmbeddingOptimizerConfig,
    EmbeddingRowwiseAdagradConfig,
    EmbeddingSgdConfig,
)
from recap_fast.embeddings import _optimizer_arguments, find_fused_optimizer, fuse_embeddings
from tests.models import EmbeddingRanker, Ranker, constant, features, ramp, tables

TABLES = ["ebc.embedding_bags.t_user.weight", "ebc.embedding_bags.t_item.weight"]
SGD = EmbeddingOptimizerConfig(learning_rate=constant(0.1))
ADAGRAD = EmbeddingOptimizerConfig(
    learning_rate=constant(0.1), adagrad=EmbeddingAdagradConfig(eps=1e-3)
)


def ranker(seed: int = 0) -> EmbeddingRanker:
    torch.manual_seed(seed)
    return EmbeddingRanker()


def set_rate(model: nn.Module, rate: float) -> None:
    for group in model.fused_optimizer.param_groups:
        group["lr"] = rate
    model.fused_optimizer.step()


class Pooled(nn.Module):
    """A collection of its own tables below another module, without the rest of a model."""

    def __init__(self, *configs: EmbeddingBagConfig, is_weighted: bool = False) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(
            {"ebc": EmbeddingBagCollection(list(configs), is_weighted=is_weighted)}
        )


def table(
    name: str,
    *feature_names: str,
    dim: int = 4,
    pooling: PoolingType = PoolingType.SUM,
    data_type: DataType = DataType.FP32,
) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=6,
        embedding_dim=dim,
        feature_names=list(feature_names),
        pooling=pooling,
        data_type=data_type,
    )


# What stays the same


@pytest.mark.parametrize("config", [SGD, ADAGRAD], ids=["sgd", "adagrad"])
def test_names_weights_and_outputs_stay(config: EmbeddingOptimizerConfig) -> None:
    unfused, fused = ranker(), ranker()
    assert fuse_embeddings(fused, config) is fused
    assert isinstance(fused.ebc, FusedEmbeddingBagCollection)
    expected, found = unfused.state_dict(), fused.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.testing.assert_close(fused(features()), unfused(features()))
    assert isinstance(fused.fused_optimizer, keyed.CombinedOptimizer)
    assert list(fused.fused_optimizer.params) == TABLES
    assert list(fused.fused_optimizer.state_dict()["state"]) == TABLES
    (group,) = fused.fused_optimizer.param_groups
    assert [len(param) for param in group["params"]] == [6, 9]


MEAN = PoolingType.MEAN
COLLECTIONS = {
    "shared feature": [table("a", "user", "item"), table("b", "item", "last_item", dim=8)],
    "mean": [table("a", "user", pooling=MEAN), table("b", "item", "last_item", pooling=MEAN)],
    "sum, then mean": [
        table("a", "user"),
        table("b", "item"),
        table("c", "last_item", pooling=MEAN),
    ],
}


@pytest.mark.parametrize("configs", COLLECTIONS.values(), ids=COLLECTIONS)
def test_outputs_of_features_and_poolings(configs: list[EmbeddingBagConfig]) -> None:
    model = Pooled(*configs)
    unfused = model.inner["ebc"]
    expected = unfused(features())
    fused = fuse_embeddings(model, SGD).inner["ebc"](features())
    assert fused.keys() == expected.keys()
    torch.testing.assert_close(fused.to_dict(), expected.to_dict())
    assert next(iter(model.fused_optimizer.params)) == "inner.ebc.embedding_bags.a.weight"


def test_weighted_features() -> None:
    model = Pooled(table("a", "user", "item"), table("b", "last_item"), is_weighted=True)
    expected = model.inner["ebc"](features(weighted=True)).values()
    fused = fuse_embeddings(model, SGD).inner["ebc"]
    assert fused.is_weighted()
    torch.testing.assert_close(fused(features(weighted=True)).values(), expected)


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


# Training, with a rate that changes

EPS = 1e-3


def sgd(weight: torch.Tensor, grad: torch.Tensor, state: torch.Tensor, rate: float) -> None:
    weight -= rate * grad


def adagrad(weight: torch.Tensor, grad: torch.Tensor, state: torch.Tensor, rate: float) -> None:
    state += grad**2
    weight -= rate * grad / (state.sqrt() + EPS)


def rowwise_adagrad(
    weight: torch.Tensor, grad: torch.Tensor, state: torch.Tensor, rate: float
) -> None:
    state += (grad**2).mean(dim=1, keepdim=True)
    weight -= rate * grad / (state.sqrt() + EPS)


ALGORITHMS = {
    "none chosen": ({}, sgd),
    "sgd": ({"sgd": EmbeddingSgdConfig()}, sgd),
    "adagrad": ({"adagrad": EmbeddingAdagradConfig(eps=EPS)}, adagrad),
    "rowwise_adagrad": (
        {"rowwise_adagrad": EmbeddingRowwiseAdagradConfig(eps=EPS)},
        rowwise_adagrad,
    ),
}


@pytest.mark.parametrize(("section", "update"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_training_is_that_of_the_unfused_tables(
    section: dict[str, object], update: Callable[..., None]
) -> None:
    unfused, fused = ranker(), ranker()
    config = EmbeddingOptimizerConfig(learning_rate=constant(1.0), **section)
    fuse_embeddings(fused, config)
    plain = [unfused.get_parameter(name) for name in TABLES]
    states = [
        torch.zeros(len(weight), 1) if update is rowwise_adagrad else torch.zeros_like(weight)
        for weight in plain
    ]
    before = [weight.detach().clone() for weight in plain]
    for step, rate in enumerate((0.5, 0.25, 0.0, 1.0)):
        set_rate(fused, rate)
        for model in (unfused, fused):
            model.zero_grad()
            model(features(step)).square().sum().backward()
        with torch.no_grad():
            for weight, state in zip(plain, states, strict=True):
                update(weight, weight.grad, state, rate)

    for name, weight, start in zip(TABLES, plain, before, strict=True):
        torch.testing.assert_close(fused.get_parameter(name).detach(), weight.detach())
        assert (weight - start).abs().max() > 0.01
    if update is not sgd:
        for name, state in zip(TABLES, states, strict=True):
            (found,) = fused.fused_optimizer.state_dict()["state"][name].values()
            torch.testing.assert_close(found, state.reshape(found.shape))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EmbeddingOptimizerConfig(learning_rate=ramp(0.8, 4), init_learning_rate=0.5), 0.5),
        (EmbeddingOptimizerConfig(init_learning_rate=0.5), 0.5),
        (EmbeddingOptimizerConfig(learning_rate=constant(0.25)), 0.25),
        (EmbeddingOptimizerConfig(learning_rate=ramp(0.8, 4)), 0.0),
    ],
)
def test_rate_to_start_with(config: EmbeddingOptimizerConfig, expected: float) -> None:
    unfused, fused = ranker(), fuse_embeddings(ranker(), config)
    assert [group["lr"] for group in fused.fused_optimizer.param_groups] == [expected]
    for model in (unfused, fused):
        model(features()).sum().backward()
    weight = unfused.get_parameter(TABLES[1])
    torch.testing.assert_close(
        fused.get_parameter(TABLES[1]).detach(), weight.detach() - expected * weight.grad
    )


# What a device supports

FBGEMM_TYPES = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
    "partial_rowwise_lamb": EmbOptimType.PARTIAL_ROWWISE_LAMB,
    "lars_sgd": EmbOptimType.LARS_SGD,
}
SECTIONS = {
    **dict.fromkeys(FBGEMM_TYPES, EmbeddingAdamConfig()),
    "sgd": EmbeddingSgdConfig(),
    "rowwise_adagrad": EmbeddingRowwiseAdagradConfig(),
    "adagrad": EmbeddingAdagradConfig(),
    "lars_sgd": EmbeddingLarsSgdConfig(),
}


def fbgemm_accepts_on_cpu(optimizer: EmbOptimType) -> bool:
    try:
        SplitTableBatchedEmbeddingBagsCodegen(
            [(1, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=optimizer
        )
    except AssertionError as error:
        assert "is not supported in CPU mode" in str(error)
        return False
    return True


@pytest.mark.parametrize("algorithm", FBGEMM_TYPES)
def test_on_cpu_we_accept_what_fbgemm_accepts(algorithm: str) -> None:
    config = EmbeddingOptimizerConfig(
        learning_rate=constant(0.1), **{algorithm: SECTIONS[algorithm]}
    )
    if fbgemm_accepts_on_cpu(FBGEMM_TYPES[algorithm]):
        fuse_embeddings(ranker(), config)
        return
    message = f"no {algorithm} on the CPU, only sgd, adagrad, rowwise_adagrad"
    with pytest.raises(ValueError, match=message):
        fuse_embeddings(ranker(), config)


CUDA_ARGUMENTS = [
    (
        {"adam": EmbeddingAdamConfig(beta_1=0.8, beta_2=0.95, eps=1e-6, weight_decay=0.1)},
        torch.optim.Adam,
        {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "lr": 0.5},
    ),
    (
        {
            "rowwise_adagrad": EmbeddingRowwiseAdagradConfig(
                eps=1e-6, weight_decay=0.1, weight_decay_mode="l2"
            )
        },
        RowWiseAdagrad,
        {"eps": 1e-6, "weight_decay": 0.1, "weight_decay_mode": WeightDecayMode.L2, "lr": 0.5},
    ),
]


@pytest.mark.parametrize(("section", "optimizer_type", "expected"), CUDA_ARGUMENTS)
def test_arguments_on_cuda(
    section: dict[str, object], optimizer_type: type, expected: dict[str, object]
) -> None:
    config = EmbeddingOptimizerConfig(learning_rate=constant(0.5), **section)
    assert _optimizer_arguments(config, torch.device("cuda")) == (optimizer_type, expected)
    known = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.__init__).parameters
    assert expected.keys() - {"lr"} <= known.keys()


def test_algorithms_that_only_model_parallel_has() -> None:
    config = EmbeddingOptimizerConfig(learning_rate=constant(0.5), lamb=EmbeddingAdamConfig())
    with pytest.raises(ValueError, match=r"has no lamb, only sgd.*DistributedModelParallel has it"):
        _optimizer_arguments(config, torch.device("cuda"))


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


def alternating_poolings() -> nn.Module:
    return Pooled(table("a", "user"), table("b", "item", pooling=MEAN), table("c", "last_item"))


REFUSED: dict[str, tuple[Callable[[], nn.Module], EmbeddingOptimizerConfig, str]] = {
    "no collection": (Ranker, SGD, "no EmbeddingBagCollection to fuse"),
    "bare collection": (
        lambda: EmbeddingBagCollection(tables()),
        SGD,
        "itself an EmbeddingBagCollection",
    ),
    "fused already": (lambda: fuse_embeddings(ranker(), SGD), SGD, "has a fused_optimizer already"),
    "wrapped": (lambda: torch.compile(ranker()), SGD, "wrapped in OptimizedModule"),
    "half precision": (
        lambda: Pooled(table("a", "user", data_type=DataType.FP16)),
        SGD,
        "inner.ebc.embedding_bags.a.weight is torch.float16",
    ),
    "width": (
        lambda: Pooled(table("a", "user", dim=6)),
        SGD,
        "inner.ebc.embedding_bags.a.weight has the width 6",
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
    "poolings": (
        alternating_poolings,
        SGD,
        "inner.ebc: table c with SUM pooling comes after tables with MEAN pooling",
    ),
    "no rate": (ranker, EmbeddingOptimizerConfig(), "set learning_rate or init_learning_rate"),
    "weight decay": (
        ranker,
        EmbeddingOptimizerConfig(
            learning_rate=constant(0.1),
            rowwise_adagrad=EmbeddingRowwiseAdagradConfig(weight_decay=0.5, weight_decay_mode="l2"),
        ),
        "rowwise_adagrad.weight_decay is 0.5, but FBGEMM ignores it on the CPU",
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


# find_fused_optimizer


def test_finds_the_fused_optimizer_through_wrappers() -> None:
    model = fuse_embeddings(ranker(), SGD)
    expected = model.fused_optimizer
    assert find_fused_optimizer(model) is expected
    assert find_fused_optimizer(torch.compile(model)) is expected
    assert find_fused_optimizer(nn.DataParallel(model)) is expected
    assert find_fused_optimizer(torch.compile(nn.DataParallel(model))) is expected


def test_an_empty_fused_optimizer_counts_as_none() -> None:
    model = ranker()
    assert find_fused_optimizer(model) is None
    model.fused_optimizer = keyed.CombinedOptimizer([])
    assert find_fused_optimizer(model) is None
    model.fused_optimizer = keyed.KeyedOptimizer({}, {}, [])
    assert find_fused_optimizer(model) is None


def test_a_fused_optimizer_without_tables_on_this_rank_counts() -> None:
    model = ranker()
    model.fused_optimizer = keyed.CombinedOptimizer([("ebc", keyed.CombinedOptimizer([]))])
    assert find_fused_optimizer(model) is model.fused_optimizer


def test_fused_tables_without_a_fused_optimizer_are_refused() -> None:
    inner = fuse_embeddings(ranker(), SGD)
    with pytest.raises(ValueError, match=r"^0\.ebc is a FusedEmbeddingBagCollection, but the mod"):
        find_fused_optimizer(nn.Sequential(inner, nn.Sigmoid()))


def torchrecs_own(model: nn.Module) -> nn.Module:
    model.fused_optimizer = model.ebc.fused_optimizer()
    return model


CHANGED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "copied": (copy.deepcopy, f"{TABLES[0]} is not the table that FBGEMM trains"),
    "cast": (nn.Module.double, f"{TABLES[0]} is not the table that FBGEMM trains"),
    "another optimizer": (torchrecs_own, f"fused_optimizer has no {TABLES[0]}"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_tables_that_the_optimizer_does_not_have_are_refused(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    model = change(fuse_embeddings(ranker(), ADAGRAD))
    with pytest.raises(ValueError, match=re.escape(message)):
        find_fused_optimizer(model)


def test_compiling_a_part_of_a_fused_model_changes_nothing() -> None:
    model = nn.ModuleDict({"ranker": ranker(), "last": nn.Linear(2, 1)})
    fuse_embeddings(model, SGD)
    model["ranker"] = torch.compile(model["ranker"])
    assert find_fused_optimizer(model) is model.fused_optimizer


def test_something_else_called_fused_optimizer_is_refused() -> None:
    model = ranker()
    model.fused_optimizer = math.inf
    with pytest.raises(TypeError, match=r"must be a torchrec.*found float"):
        find_fused_optimizer(model)
