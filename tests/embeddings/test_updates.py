"""Every optimizer of the CPU against its slow float64 counterpart."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from recap_fast.embeddings.algorithms import TABLE_ALGORITHMS
from tests.support.models import features
from tests.support.table_reference import (
    ReferenceTable,
    loss_with_gradients,
    random_gradients,
    table,
)
from tests.support.tables import Pooled, config_of, fqn, set_rate

MEAN, SUM = PoolingType.MEAN, PoolingType.SUM
RATES = (0.5, 0.25, 0.0, 1.0, 0.125)

ALGORITHMS: dict[str, dict[str, Any]] = {
    "no algorithm chosen": {},
    "sgd": {"sgd": {}},
    "sgd clipped": {"sgd": {}, "gradient_clipping": 0.5},
    "adagrad": {"adagrad": {}},
    "adagrad eps": {"adagrad": {"eps": 0.5}},
    "adagrad clipped": {"adagrad": {}, "gradient_clipping": 0.5},
    "rowwise_adagrad": {"rowwise_adagrad": {}},
    "rowwise_adagrad eps": {"rowwise_adagrad": {"eps": 0.5}},
    "rowwise_adagrad clipped": {"rowwise_adagrad": {}, "gradient_clipping": 0.5},
    "ema": {"ema_rowwise_adagrad": {"step_ema": 2}},
    "ema coef": {"ema_rowwise_adagrad": {"step_ema": 1, "step_ema_coef": 0.25}},
    "ema start": {"ema_rowwise_adagrad": {"step_ema": 1, "step_start": 3}},
    "ema eps": {"ema_rowwise_adagrad": {"step_ema": 3, "eps": 0.5}},
    "ema clipped": {"ema_rowwise_adagrad": {"step_ema": 2}, "gradient_clipping": 0.5},
}
if "rowwise_rmsprop_ar" in TABLE_ALGORITHMS:  # FBGEMM 1.9
    ALGORITHMS |= {
        "rmsprop": {"rowwise_rmsprop_ar": {}},
        "rmsprop beta eps": {"rowwise_rmsprop_ar": {"ema_beta": 0.5, "eps": 0.5}},
        "rmsprop decay": {"rowwise_rmsprop_ar": {"ar_alpha": 0.25, "eps": 0.5}},
        "rmsprop floor": {"rowwise_rmsprop_ar": {"ar_alpha": 2.0, "min_shrinkage": 0.75}},
        "rmsprop clipped": {"rowwise_rmsprop_ar": {}, "gradient_clipping": 0.5},
    }
# The CPU kernels honour these for float16 tables, and for tables of several features.
DECAYS: dict[str, dict[str, Any]] = {
    "l2": {"rowwise_adagrad": {"weight_decay": 0.125, "weight_decay_mode": "l2"}},
    "decouple": {"rowwise_adagrad": {"weight_decay": 0.125, "weight_decay_mode": "decouple"}},
    "ema l2": {
        "ema_rowwise_adagrad": {"step_ema": 2, "weight_decay": 0.125, "weight_decay_mode": "l2"}
    },
}

# Of one and of several features, and of widths that fill vector registers and that do not.
COLLECTIONS: dict[str, list[EmbeddingBagConfig]] = {
    "sum": [table("a", "user", dim=4), table("b", "item", "last_item", dim=20)],
    "mean": [
        table("a", "user", dim=20, pooling=MEAN),
        table("b", "item", "last_item", dim=4, pooling=MEAN),
    ],
    "mixed": [
        table("a", "user", dim=8),
        table("b", "item", dim=8, pooling=MEAN),
        table("c", "last_item", "user", dim=16),
        table("d", "item", dim=4, pooling=MEAN),
    ],
}
SHARED = [
    table("a", "user", "item", dim=4),
    table("b", "item", "last_item", dim=20, pooling=MEAN),
]


def train(
    configs: list[EmbeddingBagConfig],
    optimizer: EmbeddingOptimizerConfig,
    is_weighted: bool = False,
) -> tuple[nn.Module, list[ReferenceTable], list[torch.Tensor]]:
    """Fused tables, their reference, and where they started, after a few steps of training."""
    model = Pooled(*configs, is_weighted=is_weighted)
    start = [bag.weight.detach().clone() for bag in model.inner["ebc"].embedding_bags.values()]
    fuse_embeddings(model, optimizer)
    expected = [
        ReferenceTable(config, weight, optimizer)
        for config, weight in zip(configs, start, strict=True)
    ]
    for step, rate in enumerate(RATES):
        set_rate(model, rate)
        batch = features(step, weighted=is_weighted)
        gradients = random_gradients(configs, batch.stride(), step)
        loss_with_gradients(model.inner["ebc"](batch), gradients).backward()
        for reference in expected:
            reference.forward()
            reference.update(batch, gradients[reference.config.name], rate)
    return model, expected, start


def state_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return model.fused_optimizer.state_dict()["state"][fqn(name)]


def assert_as_expected(
    model: nn.Module, expected: list[ReferenceTable], rtol: float, sum_rtol: float = 2e-6
) -> None:
    for reference in expected:
        name = reference.config.name
        found = model.inner["ebc"].embedding_bags[name].weight
        # Relative to the greatest value of the table, which the sums on the way are as great as.
        scale = float(reference.weight.abs().max())
        torch.testing.assert_close(
            found.detach().double(), reference.weight, rtol=0, atol=rtol * scale
        )
        state = state_of(model, name)
        for key in {"sum", "square_avg"} & state.keys():
            torch.testing.assert_close(state[key].double(), reference.sum, rtol=sum_rtol, atol=0)
        if "square_avg" in state:
            assert torch.equal(state["prev_iter"].double(), reference.prev_iter)


@pytest.mark.parametrize("configs", COLLECTIONS.values(), ids=COLLECTIONS)
@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_updates(options: dict[str, Any], configs: list[EmbeddingBagConfig]) -> None:
    optimizer = config_of(**options)
    model, expected, start = train(configs, optimizer)
    # Five steps of some ten float32 operations each: 50 roundings of 2^-24 at most.
    assert_as_expected(model, expected, rtol=3e-6)
    for reference, weight in zip(expected, start, strict=True):
        assert (reference.weight - weight).abs().max() > 0.1
    has_state = optimizer.algorithm[0] != "sgd"
    names = {"sum", "square_avg"}
    assert all(bool(names & state_of(model, config.name).keys()) == has_state for config in configs)


def in_half(configs: list[EmbeddingBagConfig]) -> list[EmbeddingBagConfig]:
    return [dataclasses.replace(config, data_type=DataType.FP16) for config in configs]


@pytest.mark.parametrize("options", {**ALGORITHMS, **DECAYS}.values(), ids={**ALGORITHMS, **DECAYS})
def test_updates_of_float16_tables(options: dict[str, Any]) -> None:
    optimizer = config_of(**options)
    model, expected, _ = train(in_half(COLLECTIONS["mixed"]), optimizer)
    assert model.inner["ebc"].embedding_bags["a"].weight.dtype == torch.float16
    # At a step, float32 and float64 may round to neighbours, 2^-10 apart for the greatest values;
    # here they do at two steps.
    assert_as_expected(model, expected, rtol=2**-9)


@pytest.mark.parametrize("options", DECAYS.values(), ids=DECAYS)
def test_weight_decay_of_tables_of_several_features(options: dict[str, Any]) -> None:
    optimizer = config_of(**options)
    model, expected, _ = train(SHARED, optimizer)
    assert_as_expected(model, expected, rtol=3e-6)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_updates_with_weighted_features(options: dict[str, Any]) -> None:
    optimizer = config_of(**options)
    model, expected, _ = train(COLLECTIONS["sum"], optimizer, is_weighted=True)
    assert_as_expected(model, expected, rtol=3e-6)


def test_the_batches_have_what_is_hard() -> None:
    """Empty bags, an id twice in a bag, and in several bags; rows that no batch has."""
    bags = [
        jagged.values()[begin:end].tolist()
        for seed in range(len(RATES))
        for jagged in features(seed).to_dict().values()
        for begin, end in pairwise(jagged.offsets().tolist())
    ]
    assert any(not bag for bag in bags)
    assert any(len(set(bag)) < len(bag) for bag in bags)
    assert len({row for bag in bags for row in bag}) < sum(map(len, bags)) / 10


def test_evaluation_moves_no_averages() -> None:
    config = config_of(ema_rowwise_adagrad={"step_ema": 1})
    model = fuse_embeddings(Pooled(*COLLECTIONS["sum"]), config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.eval()
    model.inner["ebc"](features())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    model.train()
    model.inner["ebc"](features())
    for name, weight in model.state_dict().items():
        half = weight.shape[1] // 2
        fast, slow = before[name][:, :half], before[name][:, half:]
        assert torch.equal(weight[:, :half], fast)
        torch.testing.assert_close(weight[:, half:], slow + 0.6 * (fast - slow))
