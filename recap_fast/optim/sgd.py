"""FusedSGD."""

from __future__ import annotations

from torch import Tensor, optim
from torch.optim.optimizer import ParamsT

from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.state.formats import StateDtype


class FusedSGD(FusedOptimizer, optim.SGD):
    """`torch.optim.SGD`, stepped over all param groups in one native call.

    Arguments, param groups and state (``momentum_buffer``) are those of `torch.optim.SGD`, and
    checkpoints load in both directions. Parameters as in `FusedAdam`; see
    `FusedOptimizer` for sparse gradients.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate, a float or a one-element tensor.
        momentum: decay of the momentum buffer; 0 keeps none.
        dampening: a gradient enters the buffer by ``1 - dampening``, the first one whole.
        weight_decay: L2 penalty.
        nesterov: look ahead by the momentum (Sutskever et al., 2013).
        maximize: ascend instead of descend.
        foreach, fused: accepted as in torch, and without effect: a step is always one native call.
        differentiable: False; a step has no backward.
        capturable, step_supports_amp_scaling, unscale_grads, clear_grads: as in `FusedAdam`;
            torch's class does not have them.
        clip_grad_norm: clip gradients by their global norm, see `FusedOptimizer`; None does not.
        state_dtype, master_weights, stochastic_rounding, rounding_seed: as in `FusedAdam`.

    Raises:
        ValueError: an argument is out of range, or asks for another way of stepping.
    """

    algorithm = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
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
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._mark_formats(state_dtype, master_weights, stochastic_rounding, rounding_seed)
        if capturable:
            self._mark_capturable()
