"""The pure-torch class of each algorithm: torch's own, and Lion, which torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from recap_fast.closure import evaluate

# Those that torch does not have; `recap_fast.reference` has them too.
__all__ = ["Lion"]


class Lion(Optimizer):
    """Moves each element by the sign of a blend of momentum and gradient.

    Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), Algorithm 2::

        update = sign(beta1 * exp_avg + (1 - beta1) * grad)
        exp_avg = beta2 * exp_avg + (1 - beta2) * grad
        param = param * (1 - lr * weight_decay) - lr * update

    The sign of NaN is NaN, so that it shows; `torch.sign` makes 0 of it.

    State per parameter: ``exp_avg``, of its shape and dtype. `recap_fast.optim.FusedLion` has the
    same arguments, groups and state.

    Args:
        params: parameters, named parameters or param groups: dense floating point tensors.
        lr: learning rate, a float or a one-element tensor.
        betas: how much of the average is in the update, and how much the average keeps of itself,
            each in [0, 1).
        weight_decay: decoupled from the gradient, as AdamW's.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr is a tensor of {lr.numel()} elements; it must have one")
        for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name} is {value!r}; it must be 0 or more")
        for index, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{index}] is {beta!r}; it must be at least 0 and below 1")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @staticmethod
    def state_names(group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state of a parameter in ``group``: tensors that are zero at first."""
        return ("exp_avg",)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluated once, with gradients enabled, before the update.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = evaluate(closure)
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            if isinstance(lr, Tensor):
                lr = lr.reshape(())
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = -param.grad if group["maximize"] else param.grad
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                average = state["exp_avg"]
                blend = average.lerp(grad, 1 - beta1)
                # torch.sign makes 0 of NaN, and the element would stand still from then on.
                update = torch.where(blend.isnan(), blend, blend.sign())
                average.lerp_(grad, 1 - beta2)
                param.mul_(1 - lr * decay)
                param.sub_(lr * update)
        return loss


# By the name of an algorithm in a configuration.
TORCH_CLASSES: Final[Mapping[str, type[Optimizer]]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "lion": Lion,
}
