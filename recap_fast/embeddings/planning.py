"""A plan for torchrec's `DistributedModelParallel` by which tables train as they are configured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.distributed.utils import emb_opt_type_to_optimizer_class
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.config.convert import as_given_embedding_config
from recap_fast.embeddings.algorithms import algorithm_named
from recap_fast.embeddings.kernel_arguments import table_kernel
from recap_fast.embeddings.sharding_rules import (
    DATA_PARALLEL,
    check_pooling,
    check_sharding,
    trains_as_if_whole,
)
from recap_fast.embeddings.tables import check_not_wrapped, find_collections, find_tables
from recap_fast.names import check_table_names, some, tables_in


def plan(
    model: nn.Module,
    emb_optimizer_config: EmbeddingOptimizerConfig | Any,
    world_size: int,
    device: torch.device | str,
    *,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    topology: Topology | None = None,
    batch_size: int = BATCH_SIZE,
) -> ShardingPlan:
    """Plans on which processes the tables of a model go, whole or in shards.

    It is torchrec's `EmbeddingShardingPlanner` that chooses, but only from what trains a table as
    it is configured, like a whole table in one process:

    * a table is data-parallel only if it is float32, and the configuration chooses an algorithm
      for it that tables have which are not fused;
    * a table with a row-wise algorithm is not split by columns, where each shard would have an
      accumulator of its own;
    * a table of mean pooling is not split by rows, unless it is alone in its collection.

    Call it before `DistributedModelParallel` wraps the model, and give the plan to
    `set_table_optimizers` too. Where a process group of `world_size` processes is initialised, all
    of them call it together, and get the plan of the first. Else one process can do so alone.

    Args:
        model: The model, not wrapped; its tables may be on the meta device.
        emb_optimizer_config: Algorithm and hyperparameters of each table, as for
            `set_table_optimizers`.
        world_size: The number of processes.
        device: Where the shards will be. If it is a GPU of this machine, all have its memory.
        constraints: By table, torchrec's `ParameterConstraints`. If they have `sharding_types`, the
            table is sharded in one of these ways, even where it trains otherwise then.
        topology: What the processes have, if `device` does not tell; of `world_size` processes.
        batch_size: Examples per process and step, by which torchrec weighs its choices.

    Returns:
        The plan of all `EmbeddingBagCollection`s, for `DistributedModelParallel(plan=...)`.

    Raises:
        TypeError: `emb_optimizer_config` is None, or of a class that cannot be read.
        ValueError: `build_optimizer` would refuse what the constraints ask for, or they name a
            table that the model does not have; a table cannot be trained as configured on the
            device; or torchrec finds no plan. The message says which.
    """
    emb_optimizer_config = as_given_embedding_config(emb_optimizer_config)
    constraints = dict(constraints or {})
    check_not_wrapped(model)
    configs = {path: m.embedding_bag_configs() for path, m in find_collections(model).items()}
    tables = [table.name for collection in configs.values() for table in collection]
    check_table_names(emb_optimizer_config, tables_in(name for name, _ in model.named_parameters()))
    for name, constraint in constraints.items():
        if name not in tables:
            raise ValueError(f"constraints: there is no table {name!r}; there are {some(tables)}")
        for kind in constraint.sharding_types or ():
            check_sharding(emb_optimizer_config.for_table(name), name, kind)
    device = torch.device(device)
    if topology is None:
        topology = _topology(world_size, device)
    elif (topology.world_size, topology.compute_device) != (world_size, device.type):
        raise ValueError(
            f"topology has {topology.world_size} processes on {topology.compute_device}, but "
            f"world_size is {world_size} and device {device.type}"
        )
    options = _Options(emb_optimizer_config, topology, device, batch_size, constraints)
    planner = EmbeddingShardingPlanner(
        topology, batch_size, enumerator=options, constraints=constraints, debug=False
    )

    def make() -> ShardingPlan:
        with _optimizers_known(model, emb_optimizer_config):
            try:
                return planner.plan(model, [EmbeddingBagCollectionSharder()])
            except (PlannerError, RuntimeError) as error:
                raise ValueError(f"torchrec's planner found no plan: {error}") from error

    made = _on_first_process(make, world_size)
    for path, collection in configs.items():
        kinds = {name: each.sharding_type for name, each in made.plan[path].items()}
        check_pooling(collection, kinds)
    return made


class _Options(EmbeddingEnumerator):
    """The ways of sharding each table from which torchrec's planner chooses."""

    def __init__(
        self,
        emb_optimizer_config: EmbeddingOptimizerConfig,
        topology: Topology,
        device: torch.device,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
    ) -> None:
        super().__init__(topology, batch_size, constraints)
        self._config = emb_optimizer_config
        self._device = device
        self._given = {name for name, each in constraints.items() if each.sharding_types}

    def enumerate(self, *args: Any, **kwargs: Any) -> list[ShardingOption]:
        options = super().enumerate(*args, **kwargs)
        found = [option for option in options if self._is_fine(option)]
        kept = {(option.path, option.name) for option in found}
        for option in options:  # where none is left: why FBGEMM does not train the table
            if (option.path, option.name) not in kept:
                table_kernel(self._config, _table(option), self._device)
        return found

    def _is_fine(self, option: ShardingOption) -> bool:
        table = _table(option)
        if option.sharding_type != DATA_PARALLEL:
            try:
                table_kernel(self._config, table, self._device)
            except ValueError:
                return False
        if option.name in self._given:
            return True
        collection = option.module[1].embedding_bag_configs()
        return trains_as_if_whole(self._config, table, option.sharding_type, collection)


def _table(option: ShardingOption) -> EmbeddingBagConfig:
    collection = option.module[1].embedding_bag_configs()
    (table,) = (each for each in collection if each.name == option.name)
    return table


def _topology(world_size: int, device: torch.device) -> Topology:
    memory = None  # torchrec's guess
    if device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % on_this_machine:
        on_this_machine = world_size
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=on_this_machine),
        HardwareConfig(hbm_cap_bytes=memory),
        KernelConfig(compute_device=device.type),
    )


@contextlib.contextmanager
def _optimizers_known(model: nn.Module, config: EmbeddingOptimizerConfig) -> Iterator[None]:
    """Has torchrec count the state of tables too that `set_table_optimizers` has not seen yet."""
    marked = []
    for table in find_tables(find_collections(model)).values():
        if not hasattr(table.weight, "_optimizer_classes"):
            algorithm, _ = config.for_table(table.config.name).algorithm
            kind = emb_opt_type_to_optimizer_class(algorithm_named(algorithm).optimizer)
            weight: Any = table.weight
            weight._optimizer_classes = [kind]
            marked.append(weight)
    try:
        yield
    finally:
        for weight in marked:
            del weight._optimizer_classes


def _on_first_process(make: Callable[[], ShardingPlan], world_size: int) -> ShardingPlan:
    """Makes a plan once for all processes, since torchrec's choices depend on the order of sets."""
    if world_size == 1 or not dist.is_initialized() or dist.get_world_size() != world_size:
        return make()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [make()]
        except ValueError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return outcome[0]
