"""Optimizers of embedding tables in pure torch, with the arithmetic of FBGEMM's kernels.

FBGEMM updates the rows that were looked up, and no others: there is neither decay nor a step from
an earlier momentum in a row without a gradient. The rows of a sparse gradient are those that were
looked up. A dense one does not tell, so a row counts as not looked up if its whole gradient is
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recap_fast.state.memory import StateMemory
from recap_fast.state.new import new_state

_Dict = dict[str, Any]


class _RowsOnly(torch.optim.Optimizer):
    """Steps the rows of each parameter that were looked up."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not self.state[param]:
                    self.state[param].update(new_state(self, group, param, StateMemory()))
                self.state[param]["step"] += 1
                rows, grad = _looked_up(param.grad)
                self._update(group, self.state[param], param, rows, grad)
        return loss

    def _update(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        param: Tensor,
        rows: Tensor,
        grad: Tensor,
    ) -> None:
        raise NotImplementedError


def _looked_up(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that were looked up, once each, and their gradients, at least in float32.

    Args:
        grad: Dense, or sparse along the first dimension.
    """
    if grad.is_sparse:
        summed = _widened(grad).coalesce()
        return summed.indices()[0], summed.values()
    rows = grad.flatten(1).ne(0).any(dim=1).nonzero().flatten()
    return rows, _widened(grad[rows])


def _widened(values: Tensor) -> Tensor:
    """In the dtype in which an update is computed."""
    return values if values.dtype == torch.float64 else values.float()


class RowwiseAdagrad(_RowsOnly):
    """Adagrad with one accumulator per row, of the mean of its squared gradients.

    What FBGEMM's `EXACT_ROWWISE_ADAGRAD` does to a row with the gradient g::

        sum += mean(g**2)
        row -= lr * g / (sqrt(sum) + eps)

    State per parameter: `step`, and `sum` of shape (rows,), float32, or float64 for a float64
    parameter.

    Args:
        params: Parameters of two dimensions or more, or param groups; with dense or sparse
            gradients.
        lr: Learning rate.
        eps: Added to the denominator.
        weight_decay: Added to g as `weight_decay * row`; or with `decoupled_weight_decay` the row
            is first multiplied by `1 - lr * weight_decay`.
        decoupled_weight_decay: See there.
    """

    algorithm = "rowwise_adagrad"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def _update(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        param: Tensor,
        rows: Tensor,
        grad: Tensor,
    ) -> None:
        lr, decay, weight = group["lr"], group["weight_decay"], _widened(param[rows])
        if group["decoupled_weight_decay"]:
            weight = weight * (1 - lr * decay)
        else:
            grad = grad + decay * weight
        sums = state["sum"][rows] + grad.square().flatten(1).mean(dim=1)
        steps = lr / (sums.sqrt() + group["eps"])
        state["sum"][rows] = sums
        param[rows] = (weight - steps.view(-1, *[1] * (grad.dim() - 1)) * grad).to(param.dtype)


class LazyAdamW(_RowsOnly, torch.optim.AdamW):
    """`torch.optim.AdamW` of the rows that were looked up; others keep their moments too.

    FBGEMM's `ADAM`, which corrects the bias by the steps of the table, not of the row.

    Args:
        params: Parameters of two dimensions or more, or param groups; with dense or sparse
            gradients.
        lr, betas, eps, weight_decay: As in torch's class, but with FBGEMM's defaults.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["lazy"] = True
        for group in self.param_groups:
            group.setdefault("lazy", True)

    def _update(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        param: Tensor,
        rows: Tensor,
        grad: Tensor,
    ) -> None:
        (beta1, beta2), lr, steps = group["betas"], group["lr"], float(state["step"])
        weight = _widened(param[rows]) * (1 - lr * group["weight_decay"])
        mean = _widened(state["exp_avg"][rows]).lerp(grad, 1 - beta1)
        square = _widened(state["exp_avg_sq"][rows]).lerp(grad.square(), 1 - beta2)
        deviation = (square / (1 - beta2**steps)).sqrt() + group["eps"]
        param[rows] = (weight - lr * (mean / (1 - beta1**steps)) / deviation).to(param.dtype)
        state["exp_avg"][rows] = mean.to(param.dtype)
        state["exp_avg_sq"][rows] = square.to(param.dtype)
