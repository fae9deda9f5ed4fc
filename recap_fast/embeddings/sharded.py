"""The optimizers of embedding tables under torchrec's `DistributedModelParallel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import ShardingPlan
from torchrec.distributed.utils import emb_opt_type_to_optimizer_class

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.config.convert import as_given_embedding_config
from recap_fast.embeddings.kernel_arguments import table_kernel
from recap_fast.embeddings.sharding_rules import DATA_PARALLEL
from recap_fast.embeddings.tables import (
    check_not_wrapped,
    check_tables,
    find_collections,
    find_tables,
)
from recap_fast.names import check_table_names, tables_in


def set_table_optimizers(
    model: nn.Module,
    emb_optimizer_config: EmbeddingOptimizerConfig | Any,
    device: torch.device | str,
    plan: ShardingPlan | None = None,
) -> nn.Module:
    """Tells torchrec how to train the tables of a model that is about to be sharded.

    Call it on every process, with the same configuration, before
    `torchrec.distributed.DistributedModelParallel` wraps the model; its `fused_optimizer` then has
    a param group for each table-batched module, and `build_optimizer` sets their rates. In plans,
    of `recap_fast.embeddings.plan`, hand-made or torchrec's own, all tables get fused kernels but
    data-parallel ones.

    What sharding changes:

    * A data-parallel table is not fused: it trains in a group of dense embeddings, as configured,
      by sgd, adagrad, rowwise_adagrad or adam; `build_optimizer` refuses other options for it.
    * Column-wise, each shard of a row-wise algorithm has an accumulator of its own, of the mean
      over its columns; so it has counters and norms, in the modes of weight decay that have them,
      and with max_norm. lamb and partial_rowwise_lamb scale the step of a shard by the norms of
      its part of the row. `build_optimizer` refuses ema_rowwise_adagrad, which would mix up halves.
    * Row-wise, mean pooling divides after the kernel, so `gradient_clipping` clips what is already
      divided by the length of the bag. torchrec 1.8 and 1.9 divide the outputs of other
      tables of the collection too, unless they are row-wise as well; `build_optimizer` refuses
      that.
    * On the CPU, torchrec does not copy the model's weights into the shards: they start from new
      random values, unless a state dict is loaded.

    Args:
        model: The model, not wrapped; its tables are float32 or float16, trainable, of a width that
            is a multiple of 4, and used nowhere else. They may be on the meta device.
        emb_optimizer_config: Algorithm, hyperparameters and schedule of each table, as for
            `fuse_embeddings`.
        device: Where the shards will be.
        plan: Where there is one already: what it makes data-parallel need not be what FBGEMM has.

    Returns:
        The model.

    Raises:
        TypeError: `emb_optimizer_config` is None, or of a class that cannot be read.
        ValueError: Something cannot be honoured; the message names it, and nothing was changed.
    """
    emb_optimizer_config = as_given_embedding_config(emb_optimizer_config)
    check_not_wrapped(model)
    tables = find_tables(find_collections(model))
    check_tables(model, tables)
    check_table_names(emb_optimizer_config, tables_in(name for name, _ in model.named_parameters()))
    device = torch.device(device)
    tables = {name: table for name, table in tables.items() if not _is_data_parallel(name, plan)}
    kernels = {}
    for name, table in tables.items():
        if not table.weight.requires_grad:
            raise ValueError(
                f"{name} is frozen (requires_grad=False), which torchrec's model parallel would "
                "forget: thaw it, and freeze it again when the model is sharded"
            )
        algorithm, section = emb_optimizer_config.for_table(table.config.name).algorithm
        if algorithm == "lars_sgd":
            raise ValueError(
                f"emb_optimizer_config chooses lars_sgd for the table {table.config.name}, of "
                "which torchrec's model parallel cannot show the state; choose another"
            )
        counter = getattr(section, "counter", None)
        if counter is not None and counter.reads_max_counter:
            raise ValueError(
                f"emb_optimizer_config: the rates of the table {table.config.name} depend on the "
                "greatest counter of a kernel, which torchrec's model parallel cannot show: choose "
                "the rowwise_adagrad.counter.learning_rate_mode equal or counter_sgd, and no ratio"
            )
        kernels[name] = table_kernel(emb_optimizer_config, table.config, device)

    for name, table in tables.items():
        arguments = dict(kernels[name].arguments)
        # The class is for torchrec's planner, which estimates memory by it; "optimizer" decides.
        weight: Any = table.weight
        weight._optimizer_classes = [emb_opt_type_to_optimizer_class(arguments["optimizer"])]
        # torchrec puts tables into one kernel if all of this is equal; it drops "_batch_key" then.
        key = f"{kernels[name].several_backwards} {kernels[name].schedule}"
        weight._optimizer_kwargs = [{**arguments, "_batch_key": key}]
        # Its presence has torchrec's hand-made plans choose a fused kernel.
        weight._in_backward_optimizers = []
    return model


def _is_data_parallel(name: str, plan: ShardingPlan | None) -> bool:
    """Whether a plan makes the table with this FQN data-parallel."""
    if plan is None:
        return False
    path, _, rest = name.rpartition(".embedding_bags.")
    table = (plan.plan.get(path) or {}).get(rest.removesuffix(".weight"))
    return table is not None and table.sharding_type == DATA_PARALLEL
