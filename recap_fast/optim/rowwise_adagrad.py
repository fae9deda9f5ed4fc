"""FusedRowwiseAdagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from recap_fast.optim.native_step import FusedOptimizer

_NOT_NEGATIVE = ("lr", "eps", "weight_decay")


class FusedRowwiseAdagrad(FusedOptimizer, Optimizer):
    """Adagrad with one sum for each row, stepped over all param groups in one native call.

    For embedding tables: a row is an index of the first dimension, and the arithmetic that of
    FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` and torchrec's ``RowWiseAdagrad``::

        sum += mean(grad**2)
        row -= lr / (sqrt(sum) + eps) * grad

    A row whose gradient is zero in all elements stays as it is, without decay, as FBGEMM leaves
    rows that are not looked up.

    State per parameter: ``step``, and ``sum`` of shape (rows,), float32, or float64 for a float64
    parameter. Parameters: float32, float64, bfloat16 or float16, on the CPU; 16-bit elements are
    updated in float32 and rounded once. A DTensor must be sharded along its rows.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate, a float or a one-element tensor.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient before its square is taken; or with
            ``decoupled_weight_decay`` a factor ``1 - lr * weight_decay`` of the row.
        decoupled_weight_decay: see there.
        maximize: ascend instead of descend.
        capturable: False; there is no CUDA kernel for it.
        clip_grad_norm, step_supports_amp_scaling, unscale_grads, clear_grads: as in `FusedAdam`.

    Raises:
        ValueError: an argument is out of range.
    """

    algorithm = "rowwise_adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        clip_grad_norm: float | None = None,
        step_supports_amp_scaling: bool | None = None,
        unscale_grads: bool = True,
        clear_grads: bool = False,
    ) -> None:
        if capturable:
            raise ValueError(
                "capturable=True: row-wise Adagrad has no CUDA kernel; leave it False, or fuse the "
                "table on FBGEMM (recap_fast.embeddings.fuse_embeddings)"
            )
        self._take_options(
            None,
            None,
            False,
            capturable,
            clip_grad_norm,
            step_supports_amp_scaling,
            unscale_grads,
            clear_grads,
        )
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        _check(defaults)
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; ``sum`` keeps its dtype, where torch would round it to the parameter's.

        Raises:
            Exception: what torch's raises; state and param groups are then as they were.
        """
        loaded: list[dict[str, Any]] = []  # other hooks may have put another in its place
        hook = self.register_load_state_dict_pre_hook(lambda _, seen: loaded.append(seen))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        numbers = [number for group in loaded[-1]["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            saved = loaded[-1]["state"].get(number, {}).get("sum")
            own = self.state[param].get("sum") if param in self.state else None
            if saved is not None and own is not None and own.dtype != saved.dtype:
                dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
                self.state[param]["sum"] = saved.to(param.device, dtype, copy=True)


def _check(options: dict[str, Any]) -> None:
    for name in _NOT_NEGATIVE:
        value = options[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} is a tensor of {value.numel()} elements; it must have one")
        if not value >= 0:
            raise ValueError(f"{name} is {value!r}; it must be 0 or more")
