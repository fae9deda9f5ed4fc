"""torch's own step over some param groups of a fused optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recap_fast.optim.hooks import unhooked
from recap_fast.optim.left_to_torch import Group
from recap_fast.optim.stepped import Stepped
from recap_fast.state.new import HasState


def torch_steps(
    optimizer: Stepped, groups: Sequence[Group], grad_scale: Tensor | None
) -> list[Callable[[], Any]]:
    """What to call, in this order, to take the step of the optimizer's torch class.

    Args:
        optimizer: whose state it is.
        groups: some of its param groups.
        grad_scale: as from `torch.amp.GradScaler`. torch's step knows nothing of it: gradients are
            divided by it in place.
    """
    make_counts_torchs(optimizer, groups)
    # An object of its own, which shares everything but the list of groups: no other thread, hook or
    # error can find the optimizer without the rest of them.
    view = object.__new__(type(optimizer))
    view.__dict__.update(optimizer.__dict__, param_groups=list(groups))
    for name in ("grad_scale", "found_inf"):
        view.__dict__.pop(name, None)
    step = functools.partial(unhooked(optimizer.torch_class().step), view)
    if grad_scale is None:
        return [step]
    return [functools.partial(_unscale, groups, grad_scale), step]


def make_counts_torchs(optimizer: HasState, groups: Sequence[Group]) -> None:
    """Puts step counts where torch's fused and capturable steps want them: on the device.

    `torch.optim.SparseAdam` counts in an int.
    """
    if isinstance(optimizer, torch.optim.SparseAdam):
        for param in (param for group in groups for param in group["params"]):
            state = optimizer.state.get(param)
            if isinstance(state, dict) and isinstance(state.get("step"), Tensor):
                state["step"] = int(state["step"])
        return
    for group in groups:
        if not (group.get("fused") or group.get("capturable")):
            continue
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if isinstance(state, dict) and isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(param.device, torch.float32)


def _unscale(groups: Sequence[Group], grad_scale: Tensor) -> None:
    for group in groups:
        for param in group["params"]:
            grad = param.grad
            if grad is not None:
                values = (grad._values() if grad.is_sparse else grad).detach()
                # As GradScaler.unscale_ does, to the same bits.
                inverse = grad_scale.to(values.device).reshape(()).double().reciprocal().float()
                ignored = torch.zeros((), device=values.device)
                torch._amp_foreach_non_finite_check_and_unscale_([values], ignored, inverse)
