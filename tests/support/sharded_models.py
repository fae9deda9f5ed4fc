"""The demo's ranker under torchrec's model parallel, each table laid out as a test wants it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardedTensor, ShardingPlan

from examples.movielens.model import MultiTaskRanker
from examples.movielens.sharding import FullyShard, slices
from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import set_table_optimizers
from tests.support.processes import device


def layout(kind: str, number: int, world_size: int) -> ParameterShardingGenerator:
    """How table `number` is laid out: `kind` is table_wise, row_wise, column_wise, data_parallel.

    Or column_wise_reversed, with the first columns on the last process; first_process, where the
    whole table is; or, for example, columns_on_0110, with a shard of columns for each digit, which
    is the process.
    """
    if kind == "first_process":
        return table_wise(rank=0, compute_kernel="fused")
    if kind == "table_wise":
        return table_wise(rank=number % world_size, compute_kernel="fused")
    if kind == "row_wise":
        return row_wise(compute_kernel="fused")
    if kind == "data_parallel":
        return data_parallel()
    if kind.startswith("columns_on_"):
        ranks = [int(digit) for digit in kind.removeprefix("columns_on_")]
        return column_wise(ranks=ranks, compute_kernel="fused")
    ranks = list(range(world_size))
    if kind == "column_wise_reversed":
        return column_wise(ranks=ranks[::-1], compute_kernel="fused")
    assert kind == "column_wise", kind
    return column_wise(ranks=ranks, compute_kernel="fused")


def shard_tables(
    model: MultiTaskRanker,
    emb_config: EmbeddingOptimizerConfig,
    kinds: str | Mapping[str, str],
    dense: str = "ddp",
) -> DistributedModelParallel:
    """Shards a model over all processes; it keeps its weights.

    Args:
        model: with equal weights on every process.
        emb_config: how the tables train.
        kinds: a `layout` for all tables, or one for each, by name.
        dense: what becomes of the rest: "ddp" or "fsdp".
    """
    names = [config.name for config in model.embeddings.embedding_bag_configs()]
    if isinstance(kinds, str):
        kinds = dict.fromkeys(names, kinds)
    weights = {name: value.clone() for name, value in model.embeddings.state_dict().items()}
    sharder = EmbeddingBagCollectionSharder()
    world_size = dist.get_world_size()
    plan = construct_module_sharding_plan(
        model.embeddings,
        {name: layout(kinds[name], number, world_size) for number, name in enumerate(names)},
        sharder,
        local_size=world_size,
        world_size=world_size,
        device_type=device().type,
    )
    whole_plan = ShardingPlan({"embeddings": plan})
    set_table_optimizers(model, emb_config, device(), whole_plan)
    sharded = DistributedModelParallel(
        model,
        device=device(),
        plan=whole_plan,
        sharders=[sharder],
        data_parallel_wrapper=FullyShard() if dense == "fsdp" else None,
    )
    state = sharded.state_dict()
    for name, weight in weights.items():  # on the CPU, torchrec draws new ones
        for part, place in local_parts(state[f"embeddings.{name}"]):
            part.copy_(weight[place])
    return sharded


def local_parts(value: torch.Tensor) -> list[tuple[torch.Tensor, tuple[slice, ...]]]:
    """What this process holds of a tensor, and where in the whole it is."""
    if not isinstance(value, ShardedTensor):
        return [(value.detach(), ())]
    return [(shard.tensor.detach(), slices(shard.metadata)) for shard in value.local_shards()]
