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
from recap_fast.config import as_embedding_config, as_optimizer_config
from recap_fast.config.convert import kind_of
from recap_fast.embeddings import find_fused_optimizer
from recap_fast.embeddings.check_kernels import check_built_kernels, check_mean_pooling
from recap_fast.groups.assign import group_parameters
from recap_fast.keyed import is_dense
from recap_fast.scheduler import RecapLRShim
from recap_fast.schedules.compute import DEFAULT_LR
from recap_fast.state.codes import EIGHT_BITS

if TYPE_CHECKING:
    from torchrec.optim import keyed

logger = logging.getLogger("recap_fast")

# What the names of fused tables begin with in a state dict, if one would be there twice without.
_FUSED_KEY: Final = "fused_optimizer"


class OptimizerClasses(NamedTuple):
    """What an optimizer is made of.

    Attributes:
        by_algorithm: For each of `torch_classes.TORCH_CLASSES` one with the same arguments; for
            tables also "rowwise_adagrad" and "lazy_adamw", as in `recap_fast.table_optimizers`.
        combined: Joins them.
    """

    by_algorithm: Mapping[str, Callable[..., torch.optim.Optimizer]]
    combined: Callable[..., keyed.CombinedOptimizer]


def assemble(
    model: nn.Module,
    optimizer_config: Any,
    emb_optimizer_config: Any,
    classes: OptimizerClasses,
    device_schedule: bool = False,
    clip_grad_norm: float | None = None,
) -> tuple[Any, RecapLRShim]:
    """Makes optimizer and scheduler of the given classes; the rest is as in `build_optimizer`."""
    from torchrec.optim import keyed

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, with all parameters to train, found {kind_of(model)}"
        )
    optimizer_config = as_optimizer_config(optimizer_config)
    emb_optimizer_config = as_embedding_config(emb_optimizer_config)
    if clip_grad_norm is None:
        clip_grad_norm = optimizer_config.clip_grad_norm
    fused = find_fused_optimizer(model)
    fused_params = None if fused is None else fused.params
    groups = group_parameters(model, optimizer_config, emb_optimizer_config, fused_params)

    check_mean_pooling(model)
    if clip_grad_norm is not None:
        check_norm_is_global(model)

    optimizers: list[Any] = []
    for group in groups:
        factory = functools.partial(
            classes.by_algorithm[group.algorithm],
            lr=DEFAULT_LR,
            **group.hyperparameters,
            **_format_arguments(group.formats),
        )
        try:
            optimizers.append(keyed.KeyedOptimizerWrapper(group.params, factory))
        except ValueError as error:
            if not group.formats:
                raise
            raise ValueError(f"optimizer_config, group {group.name!r}: {error}") from error
        _log_group(group.name, group.params, group.algorithm)

    emb_learning_rate, table_learning_rates = None, {}
    # A fused optimizer for which there is no rate has no tables: group_parameters has checked.
    if fused is not None and emb_optimizer_config is not None:
        check_built_kernels(model, fused, emb_optimizer_config)
        for wrapper in optimizers:  # torchrec combines only such as agree in it
            wrapper.save_param_groups(fused.defaults["_save_param_groups"])
        # Its names need not be FQNs, so one of them may be that of another parameter.
        dense_names = {name for group in groups for name in group.params}
        key = _FUSED_KEY if dense_names & fused.params.keys() else ""
        optimizers.append((key, fused))
        emb_learning_rate = emb_optimizer_config.learning_rate
        table_learning_rates = emb_optimizer_config.table_learning_rates
        how = "its own optimizer" if is_dense(fused) else "updated in the backward pass"
        _log_group("fused embeddings", fused.params, how)

    optimizer = classes.combined(optimizers, clip_grad_norm)
    lr_dict = {group.name: group.learning_rate for group in groups}
    scheduler = RecapLRShim(
        optimizer,
        lr_dict,
        emb_learning_rate,
        device_schedule=device_schedule,
        table_learning_rates=table_learning_rates,
        fused_optimizer=fused,
    )
    return optimizer, scheduler


def _format_arguments(formats: Mapping[str, Any]) -> dict[str, Any]:
    """As the classes of `recap_fast.optim` take them."""
    arguments = dict(formats)
    name = arguments.get("state_dtype")
    if name is not None and name != EIGHT_BITS:
        arguments["state_dtype"] = getattr(torch, name)
    return arguments


def _log_group(name: str, params: Mapping[str, torch.Tensor], how: str) -> None:
    elements = sum(math.prod(param.shape) for param in params.values())  # shards have no numel()
    logger.info("%s: %d tensors, %d elements, %s", name, len(params), elements, how)
