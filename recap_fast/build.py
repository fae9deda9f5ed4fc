"""`build_optimizer`: the optimizer of a model and its learning-rate scheduler."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from recap_fast.assembly import OptimizerClasses, assemble
from recap_fast.config import EmbeddingOptimizerConfig, OptimizerConfig, RecapOptimizerConfig
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import DENSE, FusedAdamW, FusedRowwiseAdagrad
from recap_fast.scheduler import RecapLRShim
from recap_fast.schedules.compute import DEFAULT_LR
from recap_fast.table_optimizers import LazyAdamW, RowwiseAdagrad

__all__ = ["DEFAULT_LR", "build_optimizer"]


def build_optimizer(
    model: nn.Module,
    optimizer_config: RecapOptimizerConfig | OptimizerConfig | Any,
    emb_optimizer_config: EmbeddingOptimizerConfig | Any | None = None,
    *,
    capturable: bool = False,
    device_schedule: bool = False,
    clip_grad_norm: float | None = None,
    step_supports_amp_scaling: bool | None = None,
    unscale_grads: bool = True,
    clear_grads: bool = False,
) -> tuple[FusedCombinedOptimizer, RecapLRShim]:
    """Makes the optimizer of a model and its learning-rate scheduler.

    The same as `recap_fast.reference.build_optimizer`, but `optimizer.step()` updates all dense
    groups in one native call. Call `scheduler.step()` after it.

    Args:
        model: The model, wrapped or not (DDP, torch.compile, torchrec's model parallel). If it has
            a `fused_optimizer` (see `recap_fast.embeddings`), that becomes part of the optimizer.
        optimizer_config: Algorithms and learning rates; `recap_fast.groups.assign.group_parameters`
            tells which parameters each rate is for. A mapping, a dataclass or a pydantic model with
            the same fields is taken too, such as the recap recommender's own configuration.
        emb_optimizer_config: The learning rates of the embedding tables, and what is different for
            some: of the fused optimizer, and of tables that are not fused, which train as
            configured too, by sgd, adagrad, rowwise_adagrad or adam. Other objects as above.
        capturable: Makes a step safe in CUDA graphs; all dense parameters must be on CUDA devices.
        device_schedule: Has the step itself move the dense rates on, so that a captured graph
            follows the schedules (see `RecapLRShim`); implies `capturable`.
        clip_grad_norm: Scales the gradients of all dense groups down so that their global norm is
            at most this, within the call; see `FusedCombinedOptimizer`. It overrides the
            configuration's `clip_grad_norm`; None leaves that in force. Fused tables, which have no
            gradients, are clipped by `emb_optimizer_config` alone.
        step_supports_amp_scaling: Whether a `torch.amp.GradScaler` leaves unscaling and skipping to
            the step, which then never waits for the device, or does both itself, as for most
            optimizers; see `recap_fast.optim.FusedAdam`. None: whether `capturable` or
            `clear_grads` is set.
        unscale_grads: If the step is given a scale, `.grad` is divided by it, too.
        clear_grads: A step leaves zeros in the gradients of all dense groups, in the place of
            `zero_grad(set_to_none=False)`; see `recap_fast.optim.FusedAdam`.

    Returns:
        The optimizer, with a param group for each group in the order of `group_parameters` and then
        those of the fused optimizer, and its scheduler. All rates are those of step 0.

    Raises:
        TypeError: The model is no `nn.Module`, or a configuration is of a class that cannot be
            read.
        ValueError: A configuration is not valid, or the model does not fit it; the message names
            what was found.
    """
    execution: dict[str, Any] = {
        "capturable": capturable or device_schedule,
        "step_supports_amp_scaling": step_supports_amp_scaling,
        "unscale_grads": unscale_grads,
        "clear_grads": clear_grads,
    }
    classes = OptimizerClasses(
        by_algorithm={
            **{name: functools.partial(kind, **execution) for name, kind in DENSE.items()},
            "rowwise_adagrad": functools.partial(
                _by_rows, functools.partial(FusedRowwiseAdagrad, **execution), RowwiseAdagrad
            ),
            "lazy_adamw": functools.partial(
                _by_rows, functools.partial(FusedAdamW, lazy=True, **execution), LazyAdamW
            ),
        },
        combined=functools.partial(FusedCombinedOptimizer, unscale_grads=unscale_grads),
    )
    return assemble(
        model,
        optimizer_config,
        emb_optimizer_config,
        classes,
        device_schedule=device_schedule,
        clip_grad_norm=clip_grad_norm,
    )


def _by_rows(
    native: functools.partial[Any],
    pure_torch: type[Optimizer],
    params: Sequence[Tensor],
    **hyperparameters: Any,
) -> Optimizer:
    """Makes an optimizer of whole rows: of the native call, which has none for CUDA devices yet."""
    on_cpu = all(param.device.type == "cpu" for param in params)
    capturable = native.keywords["capturable"]
    if capturable and not on_cpu:
        raise ValueError(
            "capturable=True, but emb_optimizer_config chooses rowwise_adagrad or adam for tables "
            "on a GPU that are not fused, which cannot be captured: fuse them, or choose sgd or "
            "adagrad"
        )
    if native.keywords["clear_grads"] and not on_cpu:
        raise ValueError(
            "clear_grads=True, but emb_optimizer_config chooses rowwise_adagrad or adam for tables "
            "on a GPU that are not fused, which torch steps, and does not clear: fuse them, or "
            "choose sgd or adagrad"
        )
    return (native if on_cpu else pure_torch)(params, **hyperparameters)
