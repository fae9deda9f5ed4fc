"""A model whose tables get gradients that are known, trained by one process or by several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recap_fast import build_optimizer
from recap_fast.config import EmbeddingOptimizerConfig, RecapOptimizerConfig
from recap_fast.embeddings import fuse_embeddings, set_table_optimizers
from tests.support.processes import device
from tests.support.table_reference import random_gradients

BATCH = 6  # examples, over all processes
FEATURES = ("user", "item", "last_item")


class Tables(nn.Module):
    """Embedding tables, and a task whose only parameter is a factor of 1.

    Args:
        configs: The tables.
        starts: What tables start with, by name; others start with some whole numbers.
    """

    def __init__(
        self,
        configs: Sequence[EmbeddingBagConfig],
        starts: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(list(configs))
        self.liked = nn.ParameterDict({"factor": torch.ones(())})
        starts = starts or {}
        for index, (name, bag) in enumerate(self.ebc.embedding_bags.items()):
            generator = torch.Generator().manual_seed(index)
            # Whole numbers, of which sums are exact.
            start = torch.randint(-8, 9, bag.weight.shape, generator=generator)
            with torch.no_grad():
                bag.weight.copy_(starts.get(name, start))

    def forward(self, features: KeyedJaggedTensor) -> tuple[KeyedTensor, torch.Tensor]:
        return self.ebc(features), self.liked["factor"]


# The factor stays as it is.
DENSE = RecapOptimizerConfig.model_validate(
    {
        "multi_task_learning_rates": {"tower_learning_rates": {"liked": {"constant": 0.0}}},
        "sgd": {},
    }
)


def global_batch(
    seed: int, begin: int = 0, end: int | None = None, batch: int = BATCH
) -> KeyedJaggedTensor:
    """Examples `begin` to `end` of a batch: bags of 0 to 3 ids below 6, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    end = batch if end is None else end
    lengths = torch.randint(0, 4, (len(FEATURES), batch), generator=generator)
    bags = [
        [torch.randint(0, 6, (int(length),), generator=generator) for length in row]
        for row in lengths
    ]
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(FEATURES),
        values=torch.cat([bag for row in bags for bag in row[begin:end]]),
        lengths=lengths[:, begin:end].flatten(),
    )


def train(
    model: nn.Module,
    configs: Sequence[EmbeddingBagConfig],
    optimizer: EmbeddingOptimizerConfig,
    steps: Sequence[int],
    build: Callable[..., Any] = build_optimizer,
    gradients: Callable[..., Mapping[str, list[torch.Tensor]]] = random_gradients,
    batch: int = BATCH,
) -> Any:
    """Trains on this process's share of the examples; the scheduler starts at the first step.

    Args:
        model: `Tables` with fused or sharded tables.
        configs: its tables.
        optimizer: their optimizers.
        steps: which steps, of which each has another batch.
        build: makes optimizer and scheduler.
        gradients: with respect to the pooled outputs of the whole batch, from tables, number of
            examples and step.
        batch: examples, over all processes, of which each has as many.

    Returns:
        The optimizer.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    begin, end = batch * rank // ranks, batch * (rank + 1) // ranks
    combined, scheduler = build(model, DENSE, optimizer)
    if steps[0]:
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": steps[0]})
    names = [name for of_table in model_names(configs) for name in of_table]
    for step in steps:
        pooled, factor = model(global_batch(step, begin, end, batch).to(device()))
        flat = [grad for of_table in gradients(configs, batch, step).values() for grad in of_table]
        loss = sum(
            (pooled[name] * gradient[begin:end].to(device())).sum()
            for name, gradient in zip(names, flat, strict=True)
        )
        # The gradients are averaged over the processes.
        (loss * factor * ranks).backward()
        combined.step()
        # Between the two: after the scheduler, it would pass the new rates on to the kernels.
        combined.zero_grad()
        scheduler.step()
    return combined


def model_names(configs: Sequence[EmbeddingBagConfig]) -> list[list[str]]:
    """What the pooled outputs of each table are called."""
    all_names = [name for config in configs for name in config.feature_names]
    return [
        [
            f"{name}@{config.name}" if all_names.count(name) > 1 else name
            for name in config.feature_names
        ]
        for config in configs
    ]


def train_alone(
    configs: Sequence[EmbeddingBagConfig],
    optimizer: EmbeddingOptimizerConfig,
    steps: Sequence[int],
    starts: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Returns the tables after training in one process."""
    model = fuse_embeddings(Tables(configs, starts), optimizer)
    train(model, configs, optimizer, steps, **options)
    return {name: bag.weight.detach() for name, bag in model.ebc.embedding_bags.items()}


# Sharded

SHARDINGS: dict[str, Any] = {
    "table_wise": table_wise(rank=1),
    "table_wise on the other": table_wise(rank=0),
    "row_wise": row_wise(),
    "row_wise and fused": row_wise(compute_kernel="fused"),
    "column_wise": column_wise(ranks=[1, 0]),
    "data_parallel": data_parallel(),
}


def plan_of(model: Tables, shardings: Mapping[str, str]) -> ShardingPlan:
    """A plan for all processes that is made by hand."""
    plan = construct_module_sharding_plan(
        model.ebc,
        {name: SHARDINGS[kind] for name, kind in shardings.items()},
        local_size=dist.get_world_size(),
        world_size=dist.get_world_size(),
        device_type=device().type,
    )
    return ShardingPlan({"ebc": plan})


def shard(model: Tables, shardings: Mapping[str, str]) -> DistributedModelParallel:
    """Shards a model over all processes; weights are copied."""
    whole = {name: weight.clone() for name, weight in model.state_dict().items()}
    sharded = DistributedModelParallel(
        model,
        device=device(),
        plan=plan_of(model, shardings),
        sharders=[EmbeddingBagCollectionSharder()],
    )
    for name, value in sharded.state_dict().items():
        for place, part in parts_of(value):
            part.copy_(whole[name][place])
    return sharded


def parts_of(value: torch.Tensor | ShardedTensor) -> list[tuple[Any, torch.Tensor]]:
    """The parts of a tensor on this process, each with its place in the whole."""
    if not isinstance(value, ShardedTensor):
        return [(..., value.detach())]
    return [
        (
            tuple(
                slice(begin, begin + size)
                for begin, size in zip(
                    local.metadata.shard_offsets, local.metadata.shard_sizes, strict=True
                )
            ),
            local.tensor.detach(),
        )
        for local in value.local_shards()
    ]


def table_parts(sharded: nn.Module) -> dict[str, list[tuple[Any, torch.Tensor]]]:
    """The parts of all tables on this process, by table."""
    return {
        name.split(".")[-2]: [(place, part.cpu()) for place, part in parts_of(value)]
        for name, value in sharded.state_dict().items()
        if "embedding_bags" in name
    }


def train_sharded(
    configs: Sequence[EmbeddingBagConfig],
    optimizer: EmbeddingOptimizerConfig,
    shardings: Mapping[str, str],
    steps: Sequence[int],
    **options: Any,
) -> dict[str, Any]:
    """On every process: trains, and returns what there is on this one.

    That is "parts" of the tables, the "rates" of all param groups, and how many of them are
    "fused"; or the "error" that was raised.
    """
    model = Tables(configs)
    set_table_optimizers(model, optimizer, device(), plan_of(model, shardings))
    sharded = shard(model, shardings)
    try:
        combined = train(sharded, configs, optimizer, steps, **options)
    except ValueError as error:
        return {"error": str(error)}
    return {
        "parts": table_parts(sharded),
        "rates": [group["lr"] for group in combined.param_groups],
        "fused": len(sharded.fused_optimizer.param_groups),
    }


def train_all_sharded(
    cases: Mapping[str, tuple[Sequence[EmbeddingBagConfig], Any, Mapping[str, str]]],
    steps: Sequence[int],
    batch: int = BATCH,
) -> dict[str, dict[str, Any]]:
    """On every process: `train_sharded` for each case of tables, options and shardings."""
    return {
        name: train_sharded(
            configs, EmbeddingOptimizerConfig(**options), shardings, steps, batch=batch
        )
        for name, (configs, options, shardings) in cases.items()
    }


def whole_tables(
    configs: Sequence[EmbeddingBagConfig], results: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Puts together what `train_sharded` returned; data-parallel tables must be the same."""
    tables = {}
    for config in configs:
        table = torch.full((config.num_embeddings, config.embedding_dim), torch.nan)
        for result in results:
            for place, part in result["parts"][config.name]:
                assert place is not ... or table.isnan().all() or torch.equal(table, part)
                table[place] = part.float()
        assert not table.isnan().any()
        tables[config.name] = table
    return tables
