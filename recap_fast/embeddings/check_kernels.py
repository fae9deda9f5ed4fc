"""Whether the kernels of a model are those that its configuration asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from fbgemm_gpu.tbe.config.optimizer_config import (
    CounterBasedRegularizationDefinition,
    CounterWeightDecayMode,
    CowClipDefinition,
    EmainplaceModeDefinition,
    EnsembleModeDefinition,
    GlobalWeightDecayDefinition,
    LearningRateMode,
    TailIdThreshold,
    UserEnabledConfigDefinition,
)
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.optim import keyed

from recap_fast.config import EmbeddingOptimizerConfig
from recap_fast.embeddings.kernel_arguments import kernel_arguments
from recap_fast.embeddings.live import LiveKernel
from recap_fast.embeddings.live_step import follow_kernel
from recap_fast.embeddings.sharding_rules import check_pooling, check_sharding
from recap_fast.keyed import leaves
from recap_fast.names import some, table_name

logger = logging.getLogger("recap_fast")


def check_built_kernels(
    model: nn.Module,
    fused_optimizer: keyed.KeyedOptimizer,
    emb_optimizer_config: EmbeddingOptimizerConfig,
) -> None:
    """Raises if fused tables are not trained as configured.

    Tables for which no algorithm is chosen pass: only their rate is then configured here. So do
    those of kernels that cannot be read, which is logged.

    Args:
        model: The model, wrapped or not.
        fused_optimizer: Its fused optimizer.
        emb_optimizer_config: The configuration.

    Raises:
        ValueError: The message names a table, what was configured and what was found.
    """
    read: set[int] = set()
    leaf: Any
    for leaf in leaves(fused_optimizer):
        follow_kernel(leaf)
        kernel = getattr(leaf, "_emb_module", None)
        if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen):
            _choose_several_backwards(leaf.params, kernel, emb_optimizer_config)
            for name, param in leaf.params.items():
                read.add(id(param))
                _check_kernel(table_name(name), kernel, emb_optimizer_config)
    trusted = [name for name, param in fused_optimizer.params.items() if id(param) not in read]
    if trusted:
        logger.info(
            "%s: not of a kernel that can be read, so taken as made; only learning rates are set",
            some(trusted),
        )
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for name, sharding in module.module_sharding_plan.items():
                check_sharding(emb_optimizer_config.for_table(name), name, sharding.sharding_type)


def check_mean_pooling(model: nn.Module) -> None:
    """Raises if torchrec divides pooled outputs that it should not; see `check_pooling`."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            plan = module.module_sharding_plan
            kinds = {name: sharding.sharding_type for name, sharding in plan.items()}
            check_pooling(module._embedding_bag_configs, kinds)


def _check_kernel(
    table: str,
    kernel: SplitTableBatchedEmbeddingBagsCodegen,
    emb_optimizer_config: EmbeddingOptimizerConfig,
) -> None:
    config = emb_optimizer_config.for_table(table)
    wanted = kernel_arguments(config)
    if config.algorithm_is_default:
        del wanted["optimizer"]
    else:
        for name, value in _defaults(config).items():
            wanted.setdefault(name, value)
    for name, value in wanted.items():
        found = _argument(kernel, name)
        if found != value:
            raise ValueError(
                f"emb_optimizer_config asks for {name}={value!s} for the table {table}, but it was "
                f"made with {found!s}: call fuse_embeddings, or set_table_optimizers before "
                "torchrec's model parallel, with the same configuration"
            )


def _choose_several_backwards(
    names: Iterable[str],
    kernel: SplitTableBatchedEmbeddingBagsCodegen,
    emb_optimizer_config: EmbeddingOptimizerConfig,
) -> None:
    """Tells a kernel what to do in several backward passes, where the configuration says so."""
    tables = list(map(table_name, names))
    modes = {name: emb_optimizer_config.for_table(name).several_backwards for name in tables}
    if len(set(modes.values())) > 1:
        raise ValueError(
            "emb_optimizer_config has several values of several_backwards for tables of one FBGEMM "
            f"module: {', '.join(f'{mode} for {name}' for name, mode in modes.items())}; call "
            "fuse_embeddings, or set_table_optimizers before torchrec's model parallel, with the "
            "same configuration"
        )
    mode = next(iter(modes.values()), None)
    if mode is None:
        return
    if isinstance(kernel, LiveKernel):
        kernel.several_backwards.mode = mode
    elif mode != "update":
        raise ValueError(
            f"emb_optimizer_config chooses several_backwards: {mode} for {some(tables)}, which a "
            f"{type(kernel).__name__} does not have: leave it out"
        )


def _defaults(config: EmbeddingOptimizerConfig) -> dict[str, Any]:
    """Returns FBGEMM's values of what `kernel_arguments` leaves out where it is not given."""
    _, section = config.algorithm
    defaults: dict[str, Any] = {}
    if hasattr(section, "weight_decay_mode"):
        defaults |= {"weight_decay_mode": WeightDecayMode.NONE, "max_norm": 0.0}
    if hasattr(section, "rowwise_bias_correction"):
        defaults["extra_optimizer_config"] = UserEnabledConfigDefinition()
    return {**defaults, "gradient_clipping": False, "stochastic_rounding": True}


def _argument(kernel: SplitTableBatchedEmbeddingBagsCodegen, name: str) -> Any:
    """Returns what a kernel was made with under this name."""
    if name == "optimizer":
        return kernel.optimizer
    if name == "emainplace_mode":
        return EmainplaceModeDefinition(**kernel._emainplace_mode)
    if name == "ensemble_mode":
        return EnsembleModeDefinition(**kernel._ensemble_mode)
    if name == "weight_decay_mode":
        return kernel.weight_decay_mode
    if name == "counter_based_regularization":
        return _counter_definition(kernel)
    if name == "cowclip_regularization":
        return _cowclip_definition(kernel)
    if name == "global_weight_decay":
        return GlobalWeightDecayDefinition(kernel.gwd_start_iter, kernel.gwd_lower_bound)
    if name == "extra_optimizer_config":
        return UserEnabledConfigDefinition(
            use_rowwise_bias_correction=kernel.use_rowwise_bias_correction
        )
    return getattr(kernel.optimizer_args, name)


def _counter_definition(
    kernel: SplitTableBatchedEmbeddingBagsCodegen,
) -> CounterBasedRegularizationDefinition:
    found = kernel.optimizer_args
    return CounterBasedRegularizationDefinition(
        counter_weight_decay_mode=CounterWeightDecayMode(found.weight_decay_mode),
        counter_halflife=found.counter_halflife,
        adjustment_iter=found.adjustment_iter,
        adjustment_ub=found.adjustment_ub,
        learning_rate_mode=LearningRateMode(found.learning_rate_mode),
        tail_id_threshold=TailIdThreshold(
            found.tail_id_threshold, bool(found.is_tail_id_thresh_ratio)
        ),
        max_counter_update_freq=kernel._max_counter_update_freq,
    )


def _cowclip_definition(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> CowClipDefinition:
    found = kernel.optimizer_args
    return CowClipDefinition(
        counter_weight_decay_mode=CounterWeightDecayMode(found.weight_decay_mode),
        counter_halflife=found.counter_halflife,
        weight_norm_coefficient=found.weight_norm_coefficient,
        lower_bound=found.lower_bound,
    )
