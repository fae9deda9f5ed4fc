"""FusedRMSprop."""

from __future__ import annotations

from torch import Tensor, optim
from torch.optim.optimizer import ParamsT

from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.state.formats import StateDtype


class FusedRMSprop(FusedOptimizer, optim.RMSprop):
    """`torch.optim.RMSprop`, stepped over all param groups in one native call.

    Arguments, param groups and state (``step``, ``square_avg``, ``momentum_buffer``, ``grad_avg``)
    are those of `torch.optim.RMSprop`, and checkpoints load in both directions. Parameters as in
    `FusedAdam`; sparse gradients are refused by name, as torch does.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate, a float or a one-element tensor.
        alpha: decay of the averages of the gradient and of its square, in [0, 1).
        eps: added to the denominator.
        weight_decay: L2 penalty.
        momentum: decay of the momentum buffer; 0 keeps none.
        centered: divide by an estimate of the standard deviation (Graves, 2013). Where rounding
            takes the variance below zero it is zero, where torch's step gives NaN.
        capturable, step_supports_amp_scaling, unscale_grads, clear_grads: as in `FusedAdam`.
        foreach: accepted as in torch, and without effect: a step is always one native call.
        maximize: ascend instead of descend.
        differentiable: False; a step has no backward.
        clip_grad_norm: clip gradients by their global norm, see `FusedOptimizer`; None does not.
        state_dtype, master_weights, stochastic_rounding, rounding_seed: as in `FusedAdam`.

    Raises:
        ValueError: an argument is out of range, or asks for another way of stepping.
    """

    algorithm = "rmsprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
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
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable=capturable,
            maximize=maximize,
        )
        self._mark_formats(state_dtype, master_weights, stochastic_rounding, rounding_seed)
