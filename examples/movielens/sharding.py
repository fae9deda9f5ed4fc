"""The demo's model over several processes: torchrec shards the tables, torch shares the rest."""

from __future__ import annotations

import os
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torchrec import EmbeddingBagCollection
from torchrec.distributed import DistributedModelParallel, ShardingEnv
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardedTensor, ShardingPlan

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings import set_table_optimizers

from .model import MultiTaskRanker

SHARDINGS: Final = ("planner", "table_wise", "row_wise", "column_wise", "data_parallel")
"""How to lay out the tables; the first leaves the choice to torchrec's planner, which may cut the
columns of tables whose algorithm then trains them as if they were whole."""

DENSE: Final = ("ddp", "fsdp")
"""What becomes of all other parameters: replicas (DDP), or DTensor shards (FSDP2)."""

# Their update of an element depends on no other element of the row, so columns may be apart.
_BY_ELEMENT: Final = ("sgd", "adagrad", "adam")

# Of the memory of a device, for all that is not a table.
_RESERVED: Final = 0.4


def shard(
    model: MultiTaskRanker,
    emb_optimizer_config: EmbeddingOptimizerConfig,
    *,
    sharding: str = "planner",
    dense: str = "ddp",
    device: torch.device,
) -> DistributedModelParallel:
    """Spreads a model over all processes of the default group; each of them must call it.

    Args:
        model: with equal weights on every process; it is taken apart.
        emb_optimizer_config: how the tables train. `data_parallel` tables are not fused: their
            gradients are dense.
        sharding: one of `SHARDINGS`.
        dense: one of `DENSE`.
        device: where this process computes.

    Returns:
        The model under torchrec's model parallel, with the weights that it had.

    Raises:
        ValueError: an argument is not one of the choices, the tables cannot be sharded like that,
            or they cannot train as configured.
    """
    for name, value, choices in (("sharding", sharding, SHARDINGS), ("dense", dense, DENSE)):
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
    if sharding != "data_parallel":
        set_table_optimizers(model, emb_optimizer_config, device)
    sharder = EmbeddingBagCollectionSharder()
    tables = {
        f"embeddings.{name}": table.detach().clone()
        for name, table in model.embeddings.named_parameters()
    }
    plan = _plan(model, emb_optimizer_config, sharder, sharding, device)
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=plan,
        sharders=[sharder],
        data_parallel_wrapper=FullyShard() if dense == "fsdp" else None,
    )
    _copy_tables(sharded, tables)
    return sharded


class FullyShard(DataParallelWrapper):
    """FSDP2 for everything but the tables."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        model = dmp.module.to(device)
        mesh = init_device_mesh(device.type, (env.world_size,))
        for part in (*model.backbone.blocks, *model.towers.values()):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=set(model.embeddings.parameters()))


def _plan(
    model: MultiTaskRanker,
    emb_optimizer_config: EmbeddingOptimizerConfig,
    sharder: EmbeddingBagCollectionSharder,
    sharding: str,
    device: torch.device,
) -> ShardingPlan:
    processes = dist.get_world_size()
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    names = [config.name for config in model.embeddings.embedding_bag_configs()]
    if sharding == "planner":
        planner = EmbeddingShardingPlanner(
            topology=TopologyFactory.create_topology(
                TrainerConfig(world_size=processes, local_world_size=on_this_machine),
                kernel_config=KernelConfig(compute_device=device.type),
            ),
            storage_reservation=FixedPercentageStorageReservation(_RESERVED),
            # It would not fuse tables on the CPU otherwise. And it would mix row-wise with other
            # tables, of which torchrec 1.8 and 1.9 take the mean twice.
            constraints={
                name: ParameterConstraints(
                    sharding_types=_planned_types(emb_optimizer_config.for_table(name)),
                    compute_kernels=["fused"],
                )
                for name in names
            },
        )
        return planner.collective_plan(model, [sharder], dist.group.WORLD)
    generators = {
        name: _generator(sharding, number, model.embeddings, processes)
        for number, name in enumerate(names)
    }
    module_plan = construct_module_sharding_plan(
        model.embeddings, generators, sharder, on_this_machine, processes, device.type
    )
    return ShardingPlan({"embeddings": module_plan})


def _planned_types(config: EmbeddingOptimizerConfig) -> list[str]:
    """What the planner may choose from for a table of this configuration."""
    algorithm, section = config.algorithm
    counts_rows = getattr(section, "rowwise_bias_correction", False)
    by_element = algorithm in _BY_ELEMENT and not counts_rows
    return ["table_wise", "column_wise"] if by_element else ["table_wise"]


def _generator(
    sharding: str, number: int, embeddings: EmbeddingBagCollection, processes: int
) -> ParameterShardingGenerator:
    """How to lay out table `number` of a collection."""
    if sharding == "table_wise":
        return table_wise(rank=number % processes, compute_kernel="fused")
    if sharding == "data_parallel":
        return data_parallel()
    config = embeddings.embedding_bag_configs()[number]
    if sharding == "row_wise":
        # torchrec deals out blocks of this many rows, and what is left to the last process. With no
        # rows at all there, FBGEMM's CPU kernels read past the end of their list of tables.
        block = -(-config.num_embeddings // processes)
        if block * (processes - 1) >= config.num_embeddings:
            raise ValueError(
                f"sharding='row_wise': the table {config.name!r} has {config.num_embeddings} rows,"
                f" too few for a block of {block} on each of {processes} processes"
            )
        return row_wise(compute_kernel="fused")
    if config.embedding_dim % (4 * processes):
        raise ValueError(
            f"sharding='column_wise': the {config.embedding_dim} columns of the table"
            f" {config.name!r} cannot be divided into {processes} shards of a multiple of 4 columns"
        )
    return column_wise(ranks=list(range(processes)), compute_kernel="fused")


@torch.no_grad()
def _copy_tables(model: DistributedModelParallel, tables: dict[str, torch.Tensor]) -> None:
    """Gives the tables back the weights that torchrec drew anew when it sharded them."""
    state = model.state_dict()
    for name, table in tables.items():
        if not isinstance(state[name], ShardedTensor):
            state[name].copy_(table)
            continue
        for local in state[name].local_shards():
            local.tensor.copy_(table[slices(local.metadata)])


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model with whole tensors; every process must call it.

    Meant for small models: each process gets all of it.
    """
    device = next(model.parameters()).device
    return {name: _whole(value, device) for name, value in model.state_dict().items()}


def local_tensors(model: nn.Module) -> list[torch.Tensor]:
    """What this process holds of the state dict of a model: of tables, its shards."""
    tensors: list[torch.Tensor] = []
    for value in model.state_dict().values():
        if isinstance(value, ShardedTensor):
            tensors += [local.tensor for local in value.local_shards()]
        else:
            tensors.append(value.to_local() if isinstance(value, DTensor) else value)
    return tensors


def _whole(value: Any, device: torch.device) -> torch.Tensor:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if not isinstance(value, ShardedTensor):
        return value.detach()
    whole = torch.zeros(value.size(), dtype=value.dtype, device=device)
    for local in value.local_shards():
        whole[slices(local.metadata)] = local.tensor.detach()
    dist.all_reduce(whole)  # every element is in one shard, and 0 elsewhere
    return whole


def slices(metadata: Any) -> tuple[slice, ...]:
    """Where a shard lies in the whole tensor."""
    return tuple(
        slice(offset, offset + size)
        for offset, size in zip(metadata.shard_offsets, metadata.shard_sizes, strict=True)
    )
