"""Who saves, and who goes on: as many processes, or others, with other shards."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tests.checkpoint.resuming import Setup


class Resumed(NamedTuple):
    """Who saves, and who goes on after some steps of its own, which loading forgets."""

    first: Setup
    then: Setup
    steps_before: int = 0

    def __str__(self) -> str:
        return f"{self.first}->{self.then}" + (f"-after-{self.steps_before}" * bool(self[2]))


ONE = Setup(tables="rowwise_adagrad")
EMA = Setup(tables="ema_rowwise_adagrad")
ADAGRAD = Setup(tables="adagrad")
SGD = Setup(tables="sgd")
MIXED = Setup(tables="mixed")
UNFUSED = Setup(sharding="unfused", tables="rowwise_adagrad")
UNFUSED_ADAM = replace(UNFUSED, tables="adam")
COLUMN_SHARDS = Setup(2, "column_wise", "ddp", "rowwise_adagrad")
SHARDED = [
    Resumed(setup, setup, steps_before=2 * (sharding == "row_wise"))
    for world_size in (1, 2)
    for sharding, tables in (
        ("table_wise", "rowwise_adagrad"),
        ("row_wise", "rowwise_adagrad"),
        ("column_wise", "adagrad"),
        ("data_parallel", "sgd"),
    )
    for dense in ("ddp", "fsdp")
    for setup in [Setup(world_size, sharding, dense, tables)]
]
# Each world size with each sharding and each dense part, and these two with each other.
PAIRWISE = [SHARDED[index] for index in (0, 3, 4, 7, 9, 10, 13, 14)]
SAME = [
    Resumed(ONE, ONE),
    Resumed(ADAGRAD, ADAGRAD, 2),
    Resumed(EMA, EMA),
    Resumed(MIXED, MIXED),
    Resumed(UNFUSED, UNFUSED, 2),
    Resumed(UNFUSED_ADAM, UNFUSED_ADAM),
    *PAIRWISE,
    *(
        Resumed(setup, setup)
        for setup in (
            Setup(2, "data_parallel", "ddp", "rowwise_adagrad"),
            COLUMN_SHARDS,
            Setup(2, "row_wise", "ddp", "ema_rowwise_adagrad"),
        )
    ),
]


def between(one: Setup, other: Setup) -> list[Resumed]:
    return [Resumed(one, other), Resumed(other, one)]


ELSEWHERE = [
    *between(ONE, Setup(2, "table_wise", "fsdp", "rowwise_adagrad")),
    *between(ONE, Setup(2, "row_wise", "ddp", "rowwise_adagrad")),
    *between(ADAGRAD, Setup(2, "column_wise", "fsdp", "adagrad")),
    *between(MIXED, Setup(2, "mixed", "fsdp", "mixed")),
    *between(EMA, Setup(2, "row_wise", "ddp", "ema_rowwise_adagrad")),
    *between(
        Setup(1, "row_wise", "fsdp", "rowwise_adagrad"),
        Setup(2, "first_process", "ddp", "rowwise_adagrad"),
    ),
    # Unfused or data-parallel tables, and others.
    *between(UNFUSED, ONE),
    *between(replace(UNFUSED, tables="adagrad"), ADAGRAD),
    Resumed(ONE, UNFUSED, 2),
    Resumed(UNFUSED, ONE, 2),
    *between(ONE, Setup(2, "data_parallel", "ddp", "rowwise_adagrad")),
    *between(UNFUSED_ADAM, Setup(2, "data_parallel", "ddp", "adam")),
    # The same shards of columns, on other processes.
    *between(COLUMN_SHARDS, Setup(1, "columns_on_00", "ddp", "rowwise_adagrad")),
    Resumed(
        Setup(2, "columns_on_1001", "fsdp", "rowwise_adagrad"),
        Setup(2, "columns_on_0101", "ddp", "rowwise_adagrad"),
    ),
]
# Sums for each row and shard of columns have no meaning for other shards.
REFUSED = [
    *between(COLUMN_SHARDS, ONE),
    Resumed(COLUMN_SHARDS, UNFUSED),
    Resumed(COLUMN_SHARDS, replace(COLUMN_SHARDS, sharding="row_wise")),
]
BUILDERS = [
    *between(ONE, replace(UNFUSED, builder="reference")),
    *between(UNFUSED_ADAM, replace(UNFUSED_ADAM, builder="reference")),
    *between(ONE, replace(ONE, builder="reference")),
    *between(replace(ONE, algorithm="sgd"), replace(ONE, algorithm="sgd", builder="reference")),
    Resumed(
        Setup(2, "table_wise", "fsdp", "rowwise_adagrad"),
        Setup(2, "table_wise", "fsdp", "rowwise_adagrad", builder="reference"),
    ),
    Resumed(
        Setup(2, "row_wise", "ddp", "rowwise_adagrad", builder="reference"),
        Setup(2, "row_wise", "ddp", "rowwise_adagrad"),
    ),
]
FIRST = Setup(2, "first_process", "fsdp", "rowwise_adagrad")
LONG_SAME = [*(case for case in SHARDED if case not in PAIRWISE), Resumed(FIRST, FIRST)]
LONG = [
    resumed
    for few in (
        ONE,
        Setup(1, "row_wise", "fsdp", "rowwise_adagrad"),
        Setup(2, "row_wise", "ddp", "rowwise_adagrad"),
        Setup(2, "table_wise", "fsdp", "rowwise_adagrad"),
    )
    for many in (
        Setup(4, "table_wise", "ddp", "rowwise_adagrad"),
        Setup(4, "row_wise", "fsdp", "rowwise_adagrad"),
    )
    for resumed in between(few, many)
] + [
    *between(ONE, Setup(2, "table_wise", "ddp", "rowwise_adagrad")),
    *between(ONE, Setup(2, "row_wise", "fsdp", "rowwise_adagrad")),
    *between(ADAGRAD, Setup(2, "column_wise", "ddp", "adagrad")),
    Resumed(
        Setup(2, "table_wise", "ddp", "rowwise_adagrad"),
        Setup(2, "table_wise", "ddp", "rowwise_adagrad", builder="reference"),
    ),
    Resumed(
        Setup(2, "row_wise", "fsdp", "rowwise_adagrad", builder="reference"),
        Setup(2, "row_wise", "fsdp", "rowwise_adagrad"),
    ),
    *between(
        Setup(2, "table_wise", "ddp", "rowwise_adagrad"),
        Setup(2, "row_wise", "fsdp", "rowwise_adagrad"),
    ),
    *between(Setup(2, "row_wise", "fsdp", "adagrad"), Setup(2, "column_wise", "ddp", "adagrad")),
    *between(
        Setup(2, "data_parallel", "ddp", "rowwise_adagrad"),
        Setup(2, "table_wise", "fsdp", "rowwise_adagrad"),
    ),
    *between(ADAGRAD, Setup(4, "column_wise", "fsdp", "adagrad")),
    *between(Setup(2, "column_wise", "ddp", "adagrad"), Setup(4, "column_wise", "fsdp", "adagrad")),
    *between(SGD, Setup(2, "data_parallel", "ddp", "sgd")),
    *between(SGD, Setup(4, "data_parallel", "ddp", "sgd")),
    *between(replace(UNFUSED, tables="sgd"), SGD),
    *between(UNFUSED, Setup(2, "row_wise", "fsdp", "rowwise_adagrad")),
    *between(
        Setup(2, "column_wise", "ddp", "adagrad"), Setup(2, "data_parallel", "fsdp", "adagrad")
    ),
    *between(UNFUSED, Setup(4, "row_wise", "ddp", "rowwise_adagrad")),
    *between(ONE, Setup(4, "data_parallel", "fsdp", "rowwise_adagrad")),
    *between(UNFUSED_ADAM, Setup(4, "data_parallel", "ddp", "adam")),
    *between(MIXED, Setup(4, "mixed", "ddp", "mixed")),
    *between(Setup(2, "row_wise", "ddp", "sgd"), Setup(2, "column_wise", "ddp", "sgd")),
    *between(Setup(2, "table_wise", "fsdp", "sgd"), Setup(2, "data_parallel", "ddp", "sgd")),
]
LONG_REFUSED = between(COLUMN_SHARDS, replace(COLUMN_SHARDS, world_size=4))
