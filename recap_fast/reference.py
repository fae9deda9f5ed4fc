"""What `recap_fast.build_optimizer` means, in pure torch.

The same groups, in the same order, with the same schedules, each updated by an optimizer of
`torch.optim`, one after the other; tables by those of `recap_fast.table_optimizers`, which have
FBGEMM's arithmetic where torch does not. `recap_fast.build_optimizer` follows the trajectory of
this one, and a checkpoint of either loads into the other.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from recap_fast import torch_classes
from recap_fast.assembly import OptimizerClasses, assemble
from recap_fast.config import (
    EmbeddingOptimizerConfig,
    OptimizerConfig,
    RecapOptimizerConfig,
    as_optimizer_config,
)
from recap_fast.keyed import CombinedOptimizer
from recap_fast.scheduler import RecapLRShim
from recap_fast.table_optimizers import LazyAdamW, RowwiseAdagrad
from recap_fast.torch_classes import *  # noqa: F403
from recap_fast.torch_classes import TORCH_CLASSES

__all__ = ["LazyAdamW", "RowwiseAdagrad", "build_optimizer", *torch_classes.__all__]

_CLASSES = OptimizerClasses(
    by_algorithm={
        **TORCH_CLASSES,
        "rowwise_adagrad": RowwiseAdagrad,
        "lazy_adamw": LazyAdamW,
    },
    combined=CombinedOptimizer,
)


def build_optimizer(
    model: nn.Module,
    optimizer_config: RecapOptimizerConfig | OptimizerConfig | Any,
    emb_optimizer_config: EmbeddingOptimizerConfig | Any | None = None,
    *,
    clip_grad_norm: float | None = None,
) -> tuple[CombinedOptimizer, RecapLRShim]:
    """Makes the optimizer of a model and its learning-rate scheduler.

    Arguments, results and errors are those of `recap_fast.build_optimizer`, but that clipping
    rewrites the gradients:

    1. `recap_fast.groups.assign.group_parameters` sorts the parameters into groups;
    2. each group gets an optimizer of the configured algorithm;
    3. a `CombinedOptimizer` holds these and the model's fused optimizer, if it has one;
    4. a `RecapLRShim` sets the rate of every param group, at step 0 and after each step.

    The classes of torch have no `state_dtype`, `master_weights`, `stochastic_rounding` and
    `rounding_seed`: a section that sets one is a ValueError too, which names it.
    """
    optimizer_config = as_optimizer_config(optimizer_config)
    _check_formats(optimizer_config)
    return assemble(
        model, optimizer_config, emb_optimizer_config, _CLASSES, clip_grad_norm=clip_grad_norm
    )


def _check_formats(optimizer_config: RecapOptimizerConfig | OptimizerConfig) -> None:
    """Raises ValueError if a section asks for what the classes of torch do not have."""
    chosen = {"optimizer_config": optimizer_config.algorithm}
    for key, entry in optimizer_config.groups.items():
        if entry.algorithm is not None:
            chosen[f"optimizer_config.groups[{key!r}]"] = entry.algorithm
    for where, (algorithm, section) in chosen.items():
        for field, value in section.formats.items():
            raise ValueError(
                f"{where}.{algorithm}.{field} is {value!r}, which recap_fast.reference does not "
                "have: leave it out, or use recap_fast.build_optimizer"
            )
