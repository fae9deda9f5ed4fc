"""Puts groups, optimizers and scheduler together, for whichever optimizer classes are given."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn

from recap_fast.clipping import check_norm_is_global
from recap_fast.config import (
    BaseConfig,
    EmbeddingOptimizerConfig,
    OptimizerConfig,
    RecapOptimizerConfig,
)
from recap_fast.embeddings import find_fused_optimizer  # first: says so if torchrec is missing
from recap_fast.embeddings.built import check_built_kernels, check_mean_pooling
from recap_fast.embeddings.slices import show_slice_gradients
from recap_fast.grouping import group_parameters
from recap_fast.shim import RecapLRShim

if TYPE_CHECKING:
    from torchrec.optim import keyed

logger = logging.getLogger("recap_fast")

# The rate of every group until a schedule sets it: training with it blows up at once.
DEFAULT_LR: Final = 24601.0


class OptimizerClasses(NamedTuple):
    """What an optimizer is made of; the algorithms take the arguments of torch.optim's."""

    adam: Callable[..., torch.optim.Optimizer]
    adagrad: Callable[..., torch.optim.Optimizer]
    sgd: Callable[..., torch.optim.Optimizer]
    combined: type[keyed.CombinedOptimizer]


def assemble(
    model: nn.Module,
    optimizer_config: RecapOptimizerConfig | OptimizerConfig,
    emb_optimizer_config: EmbeddingOptimizerConfig | None,
    classes: OptimizerClasses,
    device_schedule: bool = False,
    clip_grad_norm: float | None = None,
) -> tuple[Any, RecapLRShim]:
    """Makes optimizer and scheduler of the given classes; the rest is as in `build_optimizer`."""
    from torchrec.optim import keyed

    fused = find_fused_optimizer(model)
    fused_params = None if fused is None else fused.params
    groups = group_parameters(model, optimizer_config, emb_optimizer_config, fused_params)

    check_mean_pooling(model)
    if clip_grad_norm is not None:
        check_norm_is_global(model)

    optimizers: list[keyed.KeyedOptimizer] = []
    for group in groups:
        if group.role == "dense_embeddings":
            # Like the original, which knows no other way to train a table.
            algorithm, hyperparameters = "sgd", {}
        else:
            algorithm, section = optimizer_config.algorithm
            hyperparameters = _hyperparameters(section)
        factory = functools.partial(getattr(classes, algorithm), lr=DEFAULT_LR, **hyperparameters)
        optimizers.append(keyed.KeyedOptimizerWrapper(group.params, factory))
        _log_group(group.name, group.params, algorithm)

    emb_learning_rate, table_learning_rates = None, {}
    # A fused optimizer for which there is no rate has no tables: group_parameters has checked.
    if fused is not None and emb_optimizer_config is not None:
        check_built_kernels(model, fused, emb_optimizer_config)
        optimizers.append(fused)
        emb_learning_rate = emb_optimizer_config.learning_rate
        table_learning_rates = emb_optimizer_config.table_learning_rates
        _log_group("fused embeddings", fused.params, "updated in the backward pass")

    optimizer = classes.combined(optimizers, clip_grad_norm)
    show_slice_gradients(optimizer, (param for group in groups for param in group.params.values()))
    lr_dict = {group.name: group.learning_rate for group in groups}
    scheduler = RecapLRShim(
        optimizer,
        lr_dict,
        emb_learning_rate,
        device_schedule=device_schedule,
        table_learning_rates=table_learning_rates,
    )
    return optimizer, scheduler


def _hyperparameters(section: BaseConfig) -> dict[str, Any]:
    """Returns a section's fields, but for `lr`, under torch.optim's names."""
    fields = section.model_dump(exclude={"lr"})
    if "beta_1" in fields:
        fields["betas"] = (fields.pop("beta_1"), fields.pop("beta_2"))
    if "epsilon" in fields:
        fields["eps"] = fields.pop("epsilon")
    return fields


def _log_group(name: str, params: Mapping[str, torch.Tensor], how: str) -> None:
    elements = sum(math.prod(param.shape) for param in params.values())  # shards have no numel()
    logger.info("%s: %d tensors, %d elements, %s", name, len(params), elements, how)
