"""Several processes train like one: the same losses and parameters, dense and embedded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints

from examples.movielens import sharding
from examples.movielens.model import MOVIELENS_TABLE_SIZES, build_model
from examples.movielens.sharding import DENSE, SHARDINGS, shard
from recap_fast.embeddings import fuse_embeddings
from tests.support import small_training
from tests.support.processes import device, run
from tests.support.small_training import (
    SIZES,
    configs,
    largest_difference,
    train,
    train_sharded,
)

# Adam and Adagrad hide gradients that are wrong by a factor, SGD does not. Row-wise Adagrad, the
# demo's own, keeps a mean over the columns of a row, so shards of columns would differ.
ADAPTIVE_TABLES = {
    "planner": "rowwise_adagrad",
    "table_wise": "rowwise_adagrad",
    "row_wise": "rowwise_adagrad",
    "column_wise": "adagrad",
    "data_parallel": "rowwise_adagrad",
}
CASES = [
    (sharding, part, dense, "sgd" if dense == "sgd" else ADAPTIVE_TABLES[sharding])
    for sharding in SHARDINGS
    for part in DENSE
    for dense in ("sgd", "adam")
]
# A float32 sum in another order differs by 1e-7 or so of the sum of magnitudes, which is up to some
# hundred times a gradient, and the next steps start from there. A factor, a share that is missing
# or a table in another's place would be off by 0.1 and more.
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def on_one_process(
    dense: str, tables: str, clip_grad_norm: float | None, fused: bool
) -> dict[str, Any]:
    place = fuse_embeddings if fused else lambda model, config: model
    return train(dense, tables, clip_grad_norm=clip_grad_norm, place=place)


def check(
    world_size: int,
    case: tuple[str, ...],
    clip_grad_norm: float | None,
    backend: str,
    train_together: Callable[..., dict[str, Any]] = train_sharded,
) -> list[dict[str, Any]]:
    """Compares with one process; returns what came of it, by rank."""
    sharding, part, dense, tables = case
    # Tables that are not fused are dense parameters: their gradients count for the norm.
    expected = on_one_process(dense, tables, clip_grad_norm, sharding != "data_parallel")
    ranks = run(
        world_size,
        functools.partial(train_together, clip_grad_norm=clip_grad_norm),
        sharding,
        part,
        dense,
        tables,
        backend=backend,
    )
    ours = ranks[0]
    for name, weights in expected["before"].items():
        assert torch.equal(ours["before"][name], weights), name
    difference, name = largest_difference(ours["after"], expected["after"], expected["before"])
    assert difference < TOLERANCE, name
    assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    # 100 test ratings: one pair of them in another order is less than 1e-3.
    assert ours["auc"] == pytest.approx(expected["auc"], abs=2e-3)
    if clip_grad_norm is not None:
        assert ours["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert min(expected["norms"]) > clip_grad_norm  # every step was clipped
    for other in ranks[1:]:
        assert other["auc"] == ours["auc"] and other["norms"] == ours["norms"]
        for name, weights in ours["after"].items():
            assert torch.equal(other["after"][name], weights), name
    return ranks


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "sgd"], ids="-".join)
def test_two_processes_train_like_one(case: tuple[str, ...], table_backend: str) -> None:
    check(2, case, None, table_backend)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case[0] == "table_wise" else pytest.mark.long)
        for case in CASES
        if case[2] == "adam"
    ],
    ids="-".join,
)
def test_two_processes_adapt_like_one(case: tuple[str, ...], table_backend: str) -> None:
    check(2, case, None, table_backend)


class ColumnPlanner(EmbeddingShardingPlanner):
    """Cuts columns wherever it may: only the costs keep torchrec's from it."""

    def __init__(self, *, constraints: dict[str, ParameterConstraints], **options: Any) -> None:
        cut = {
            name: ParameterConstraints(
                sharding_types=each.sharding_types[-1:], compute_kernels=["fused"], min_partition=8
            )
            for name, each in constraints.items()
        }
        super().__init__(constraints=cut, **options)


def train_planned(*arguments: str, **options: Any) -> dict[str, Any]:
    """`train_sharded` with the `ColumnPlanner`; also how many shards of columns it made."""
    sharding.EmbeddingShardingPlanner = ColumnPlanner
    place, shards = sharding.shard, []

    def shard_and_count(*args: Any, **how: Any) -> nn.Module:
        model = place(*args, **how)
        plan = model.plan.plan["embeddings"]
        shards.extend(len(each.ranks) for each in plan.values())
        return model

    small_training.shard = shard_and_count
    return {**train_sharded(*arguments, **options), "shards": shards}


@pytest.mark.parametrize(("tables", "count"), [("rowwise_adagrad", 1), ("adagrad", 2)])
def test_the_planner_cuts_no_rows_that_train_as_a_whole(
    tables: str, count: int, table_backend: str
) -> None:
    ranks = check(2, ("planner", "ddp", "adam", tables), None, table_backend, train_planned)
    assert ranks[0]["shards"] == [count] * len(MOVIELENS_TABLE_SIZES)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_four_processes_train_like_one(case: tuple[str, ...], table_backend: str) -> None:
    check(4, case, None, table_backend)


@pytest.mark.parametrize("part", DENSE)
@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel"])
def test_clipping_is_by_the_norm_over_all_processes(
    sharding: str, part: str, table_backend: str
) -> None:
    check(2, (sharding, part, "sgd", "sgd"), 0.1, table_backend)


@pytest.mark.long
@pytest.mark.parametrize("part", DENSE)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_four_processes_clip_like_one(sharding: str, part: str, table_backend: str) -> None:
    check(4, (sharding, part, "sgd", "sgd"), 0.1, table_backend)


def refusals() -> list[str]:
    """What `shard` says to what it cannot do, on each of the processes."""

    said = []
    for tables, dim, options in [
        ("sgd", 16, {"sharding": "diagonal"}),
        ("sgd", 16, {"dense": "copied"}),
        ("sgd", 4, {"sharding": "column_wise"}),
        ("sgd", 16, {"sharding": "row_wise"}),
    ]:
        rows = {**MOVIELENS_TABLE_SIZES, "gender": 1}
        model = build_model(0, table_sizes=rows, **{**SIZES, "embedding_dim": dim})
        with pytest.raises(ValueError) as caught:
            shard(model, configs("sgd", tables)[1], device=device(), **options)
        said.append(str(caught.value))
    return said


def test_what_cannot_be_sharded_is_refused_by_name(table_backend: str) -> None:
    for said in run(2, refusals, backend=table_backend):
        assert said == [
            "sharding='diagonal' must be one of planner, table_wise, row_wise, column_wise,"
            " data_parallel",
            "dense='copied' must be one of ddp, fsdp",
            "sharding='column_wise': the 4 columns of the table 'user' cannot be divided into 2"
            " shards of a multiple of 4 columns",
            "sharding='row_wise': the table 'gender' has 1 rows, too few for a block of 1 on each"
            " of 2 processes",
        ]
