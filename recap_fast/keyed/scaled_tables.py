"""What `torch.amp.GradScaler` means for fused tables, whose gradients it does not see."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torchrec.optim import keyed

_UNSCALES = "_unscale_grads_"


def unscale_tables(leaves: Iterable[keyed.KeyedOptimizer], caller: Any, warned: bool) -> bool:
    """Has a `GradScaler` that is about to unscale gradients unscale those held for tables, too.

    It reads the param groups of an optimizer for that, and asks for nothing else.

    Args:
        leaves: Optimizers of fused tables.
        caller: The frame that reads the param groups.
        warned: Whether the user knows that tables learn from scaled gradients.

    Returns:
        Whether the user knows now.
    """
    if caller.f_code.co_name != _UNSCALES:
        return warned
    scaler: Mapping[str, Any] = caller.f_locals
    inverse, found_inf = scaler["inv_scale"], scaler["found_inf"]
    for leaf in leaves:
        held = held_by(leaf)
        if held is not None:
            held.unscale(inverse, found_inf)
        elif not warned and leaf.params and (inverse.is_cuda or inverse.item() != 1):
            warn_of_scaled_tables(stacklevel=7)
            warned = True
    return warned


def warn_of_scaled_tables(stacklevel: int) -> None:
    """Warns that tables which are updated in the backward pass learn from scaled gradients."""
    warnings.warn(
        "GradScaler scales the loss, and with it the update that fused embedding tables take in "
        "the backward pass: sgd then learns at the scale times its rate. Choose "
        "several_backwards: accumulate in emb_optimizer_config, which has them updated in the "
        "step; or use bfloat16 autocast without a GradScaler, or leave the tables unfused",
        stacklevel=stacklevel,
    )


def held_by(leaf: Optimizer) -> Any:
    """What is held for tables until the step; None if they do not wait for it."""
    from recap_fast.embeddings.live_step import LiveStep  # which imports this package

    if isinstance(leaf, LiveStep) and leaf._emb_module.several_backwards.accumulates:
        return leaf._emb_module.several_backwards
    return None


def step_is_skipped(
    leaves: Iterable[Optimizer],
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    grad_norm: Any,
) -> bool:
    """Whether the tables are to stand still too, as the dense parameters do; else unscales.

    It waits for the device only where gradients are held for tables.

    Args:
        leaves: Optimizers of fused tables.
        grad_scale, found_inf: What a `GradScaler` has handed to the step.
        grad_norm: That the step has clipped by; None if it does not clip.
    """
    waiting = [held for held in map(held_by, leaves) if held is not None and held.held]
    if not waiting:
        return False
    if found_inf is not None and bool(found_inf):
        return True
    if grad_norm is not None and not math.isfinite(float(grad_norm)):
        return True
    if grad_scale is not None:
        for held in waiting:
            held.unscale(grad_scale.double().reciprocal().float(), torch.zeros_like(grad_scale))
    return False
