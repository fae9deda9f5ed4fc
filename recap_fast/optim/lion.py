"""FusedLion."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.state.formats import StateDtype
from recap_fast.torch_classes import Lion


class FusedLion(FusedOptimizer, Lion):
    """Lion (Chen et al., arXiv:2302.06675), stepped over all param groups in one native call.

    Update, arguments, param groups and state (``exp_avg``) are those of
    `recap_fast.reference.Lion`, which is in pure torch. Parameters as in `FusedAdam`; sparse
    gradients are refused by name.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate, a float or a one-element tensor. Each element moves by it, so it is to be
            three to ten times less than Adam's.
        betas: how much of the average is in the update, and how much the average keeps of itself,
            each in [0, 1).
        weight_decay: decoupled from the gradient, as AdamW's.
        maximize: ascend instead of descend.
        foreach, fused, differentiable, capturable, clip_grad_norm, step_supports_amp_scaling,
            unscale_grads, clear_grads: as in `FusedAdam`.
        state_dtype, master_weights, stochastic_rounding, rounding_seed: as in `FusedAdam`.

    Raises:
        ValueError: an argument is out of range, or asks for another way of stepping.
    """

    algorithm = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        clip_grad_norm: float | None = None,
        step_supports_amp_scaling: bool | None = None,
        unscale_grads: bool = True,
        clear_grads: bool = False,
        state_dtype: StateDtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        self._take_options(
            foreach,
            fused,
            differentiable,
            capturable,
            clip_grad_norm,
            step_supports_amp_scaling,
            unscale_grads,
            clear_grads,
        )
        super().__init__(params, lr, betas, weight_decay, maximize=maximize)
        self._mark_formats(state_dtype, master_weights, stochastic_rounding, rounding_seed)
        if capturable:
            self._mark_capturable()
