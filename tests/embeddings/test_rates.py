"""Every step trains tables with the rate that their schedule has for it: exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from recap_fast import build_optimizer, reference
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import fuse_embeddings
from tests.support.processes import run
from tests.support.table_reference import table
from tests.support.table_training import (
    BATCH,
    DENSE,
    FEATURES,
    Tables,
    global_batch,
    train_alone,
    train_sharded,
    whole_tables,
)
from tests.support.tables import config_of

# Powers of 2, so that all sums are exact; another one for each step.
FIRST = [2.0**-1, 2.0**-3, 2.0**-2, 2.0**-5, 2.0**-4, 2.0**-6]
SECOND = [2.0**-6, 2.0**-2, 2.0**-5, 2.0**-1, 2.0**-3, 2.0**-4]
STEPS = range(len(FIRST))
CONFIGS = [table("a", "user", "item"), table("b", "item", "last_item", dim=16, rows=9)]


def schedule(rates: Sequence[float]) -> dict[str, Any]:
    pieces = {
        "learning_rate_boundaries": list(range(1, len(rates))),
        "learning_rate_values": rates,
    }
    return {"learning_rate": {"piecewise_constant": pieces}}


ONE_RATE = config_of(**schedule(FIRST))
TWO_RATES = config_of(**schedule(FIRST), tables={"b": schedule(SECOND)})
# A table must not be trained with the rate that it is made with.
SENTINEL = config_of(**schedule(FIRST), tables={"b": schedule(SECOND)}, init_learning_rate=24601.0)


def ones(configs: Sequence[Any], batch: int, step: int) -> dict[str, list[torch.Tensor]]:
    """The gradient of a row is then how often it is looked up."""
    return {
        config.name: [torch.ones(batch, config.embedding_dim) for _ in config.feature_names]
        for config in configs
    }


def expected_tables(
    optimizer: EmbeddingOptimizerConfig,
    steps: Sequence[int] = STEPS,
) -> dict[str, torch.Tensor]:
    """Worked out from the number of times that each row is looked up at each step."""
    rates = {"a": FIRST, "b": SECOND if "b" in optimizer.tables else FIRST}
    expected = {}
    for config in CONFIGS:
        weight = Tables(CONFIGS).ebc.embedding_bags[config.name].weight.detach().clone()
        for step in steps:
            for name in config.feature_names:
                for row in global_batch(step)[name].values().tolist():
                    weight[row] -= rates[config.name][step]
        expected[config.name] = weight
    return expected


def assert_exactly(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_the_expectation_depends_on_the_rate_of_every_step() -> None:
    """Each step looks up rows of each table, and no two steps have the same rate."""
    assert sorted(FIRST) == sorted(SECOND) == sorted(set(FIRST))
    for upto, beyond in pairwise(range(len(STEPS) + 1)):
        before, after = (expected_tables(TWO_RATES, range(end)) for end in (upto, beyond))
        assert all((before[name] != after[name]).any() for name in before)


@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
@pytest.mark.parametrize("optimizer", [ONE_RATE, TWO_RATES, SENTINEL], ids=["one", "two", "init"])
def test_every_step_has_its_own_rate(
    optimizer: EmbeddingOptimizerConfig, build: Callable[..., Any]
) -> None:
    found = train_alone(CONFIGS, optimizer, STEPS, build=build, gradients=ones)
    assert_exactly(found, expected_tables(optimizer))


@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
@pytest.mark.parametrize("optimizer", [ONE_RATE, TWO_RATES, SENTINEL], ids=["one", "two", "init"])
@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_resumed_run_has_the_rates_of_its_steps(
    first: int, optimizer: EmbeddingOptimizerConfig, build: Callable[..., Any]
) -> None:
    steps = range(first, len(FIRST))
    found = train_alone(CONFIGS, optimizer, steps, build=build, gradients=ones)
    assert_exactly(found, expected_tables(optimizer, steps))


SHARDINGS = {
    "table_wise": {"a": "table_wise", "b": "table_wise on the other"},
    "row_wise and column_wise": {"a": "row_wise", "b": "column_wise"},
    "data_parallel": {"a": "data_parallel", "b": "data_parallel"},
}


def train_all(first: int) -> list[dict[str, Any]]:
    """On every process: each sharding with each configuration."""
    return [
        train_sharded(CONFIGS, optimizer, shardings, range(first, len(FIRST)), gradients=ones)
        for shardings in SHARDINGS.values()
        for optimizer in (ONE_RATE, TWO_RATES, SENTINEL)
    ]


@pytest.mark.parametrize("first", [0, 3], ids=["from the start", "resumed"])
def test_sharded_tables_have_the_rates_of_their_steps(first: int, table_backend: str) -> None:
    steps = range(first, len(FIRST))
    by_case = zip(*run(2, train_all, first, backend=table_backend), strict=True)
    cases = [
        (name, optimizer) for name in SHARDINGS for optimizer in (ONE_RATE, TWO_RATES, SENTINEL)
    ]
    for (_, optimizer), results in zip(cases, by_case, strict=True):
        assert_exactly(whole_tables(CONFIGS, results), expected_tables(optimizer, steps))


def test_a_rate_that_is_set_between_forward_and_backward_is_that_of_the_backward() -> None:
    """Of the backward pass, though FBGEMM keeps the one that it has in the forward pass."""
    model = fuse_embeddings(Tables(CONFIGS), ONE_RATE)
    optimizer, scheduler = build_optimizer(model, DENSE, ONE_RATE)
    for step in STEPS:
        before = optimizer.param_groups[-1]["lr"]
        optimizer.param_groups[-1]["lr"] = 100.0
        pooled, factor = model(global_batch(step))
        optimizer.param_groups[-1]["lr"] = before
        (pooled.values().sum() * factor).backward()
        optimizer.step()
        if step + 1 < len(FIRST):
            scheduler.step()
    found = {name: bag.weight.detach() for name, bag in model.ebc.embedding_bags.items()}
    assert_exactly(found, expected_tables(ONE_RATE))


def test_the_batches_are_shared_out_evenly() -> None:
    whole = global_batch(0)
    halves = [global_batch(0, 0, BATCH // 2), global_batch(0, BATCH // 2, BATCH)]
    for name in FEATURES:
        parts = [half[name] for half in halves]
        assert torch.equal(torch.cat([p.values() for p in parts]), whole[name].values())
        assert torch.equal(torch.cat([p.lengths() for p in parts]), whole[name].lengths())
