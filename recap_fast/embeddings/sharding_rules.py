"""Which ways of sharding a table train it as it is configured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.groups.unfused_tables import is_configured, lacks

DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
ADDS_UP_ROWS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
SPLITS_ROWS = (
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
)

# Each shard of columns would have an accumulator or a norm of its own.
_OF_WHOLE_ROWS = (
    "rowwise_adagrad",
    "ensemble_rowwise_adagrad",
    "rowwise_rmsprop_ar",
    "partial_rowwise_adam",
    "lamb",
    "partial_rowwise_lamb",
)


def check_sharding(config: EmbeddingOptimizerConfig, table: str, kind: str) -> None:
    """Raises if a table cannot be trained as configured when it is sharded so.

    Args:
        config: What holds for the table (`EmbeddingOptimizerConfig.for_table`).
        table: Its name.
        kind: A value of torchrec's `ShardingType`.
    """
    algorithm, _ = config.algorithm
    if algorithm == "ema_rowwise_adagrad" and kind in SPLITS_ROWS:
        raise ValueError(
            f"emb_optimizer_config chooses {algorithm} for the table {table}, which is "
            f"sharded {kind}: each shard would have a fast and a slow half of its own; shard it "
            "table_wise or row_wise"
        )
    # Of another dtype, `build_optimizer` may refuse it all the same.
    if kind == DATA_PARALLEL and (what := lacks(config, torch.float32)):
        raise ValueError(
            f"emb_optimizer_config chooses {what} for the table {table}, which is sharded {kind}: "
            "such a table is not fused, and cannot train so; shard it table_wise"
        )


def trains_as_if_whole(
    emb_optimizer_config: EmbeddingOptimizerConfig,
    table: EmbeddingBagConfig,
    kind: str,
    collection: Sequence[EmbeddingBagConfig],
) -> bool:
    """Returns whether a table that is sharded so trains like a whole one in one process.

    What torchrec shards otherwise is not always wrong: `build_optimizer` takes column shards with
    an accumulator each, for example. But no plan should choose that unasked.

    Args:
        emb_optimizer_config: The configuration of all tables.
        table: The table.
        kind: A value of torchrec's `ShardingType`.
        collection: All tables of its `EmbeddingBagCollection`.
    """
    config = emb_optimizer_config.for_table(table.name)
    algorithm, section = config.algorithm
    if kind == DATA_PARALLEL:
        # In a dense group: that of a tower, if nothing is chosen for it. Gradients of 16 bits would
        # be rounded before they are added up.
        is_ours = is_configured(emb_optimizer_config, table.name)
        return is_ours and table.data_type == DataType.FP32 and not lacks(config, torch.float32)
    if kind in SPLITS_ROWS:
        counts_rows = getattr(section, "rowwise_bias_correction", False)
        return not counts_rows and algorithm not in (*_OF_WHOLE_ROWS, "ema_rowwise_adagrad")
    if kind in ADDS_UP_ROWS and table.pooling == PoolingType.MEAN:
        # Outputs are divided after the kernel: see `check_pooling`.
        return len(collection) == 1 and config.gradient_clipping is None
    return True


def check_pooling(collection: Sequence[EmbeddingBagConfig], kinds: Mapping[str, str]) -> None:
    """Raises if torchrec divides pooled outputs that it should not.

    Where a row-wise table has mean pooling, torchrec 1.8 and 1.9 divide the outputs of all
    tables of the collection by the lengths of their bags, but for the features of row-wise tables
    of sums: those of other shardings are then means of means, or means in place of sums.

    Args:
        collection: The tables of an `EmbeddingBagCollection`.
        kinds: By table, a value of torchrec's `ShardingType`.

    Raises:
        ValueError: The message names two tables that must not be in one collection.
    """
    row_wise = [table for table in collection if kinds[table.name] in ADDS_UP_ROWS]
    means = [table for table in row_wise if table.pooling == PoolingType.MEAN]
    for mean, other in itertools.product(means, collection):
        shared = sorted({*mean.feature_names} & {*other.feature_names})
        if other not in row_wise:
            why = f"but the table {other.name} {kinds[other.name]}"
        elif other not in means and shared:
            why = f"as is the table {other.name} of sums, of the same feature {shared[0]}"
        else:
            continue
        raise ValueError(
            f"the table {mean.name}, of mean pooling, is sharded {kinds[mean.name]}, {why}: "
            "torchrec would divide outputs by the lengths of their bags that are not its own; put "
            "the two into an EmbeddingBagCollection each"
        )
