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
)
from recap_fast.keyed import CombinedOptimizer, leaves
from recap_fast.reference_formats import maker, name_parameters
from recap_fast.scheduler import RecapLRShim
from recap_fast.table_optimizers import LazyAdamW, RowwiseAdagrad
from recap_fast.torch_classes import *  # noqa: F403
from recap_fast.torch_classes import TORCH_CLASSES

__all__ = ["LazyAdamW", "RowwiseAdagrad", "build_optimizer", *torch_classes.__all__]

_CLASSES = OptimizerClasses(
    by_algorithm={
        **{algorithm: maker(algorithm) for algorithm in TORCH_CLASSES},
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

    Parameters and states are stored in the same formats, with the same random bits, by
    `recap_fast.reference_formats`.
    """
    optimizer, scheduler = assemble(
        model, optimizer_config, emb_optimizer_config, _CLASSES, clip_grad_norm=clip_grad_norm
    )
    for inner in leaves(optimizer):
        name_parameters(optimizer.params, inner)
    return optimizer, scheduler
