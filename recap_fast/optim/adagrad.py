"""FusedAdagrad."""

from __future__ import annotations

from torch import Tensor, optim
from torch.optim.optimizer import ParamsT

from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.state.formats import StateDtype


class FusedAdagrad(FusedOptimizer, optim.Adagrad):
    """`torch.optim.Adagrad`, stepped over all param groups in one native call.

    Arguments, param groups and state (``step``, ``sum``) are those of `torch.optim.Adagrad`, and
    checkpoints load in both directions. Parameters as in `FusedAdam`; see
    `FusedOptimizer` for sparse gradients.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate, a float or a one-element tensor.
        lr_decay: the rate of step t is ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: L2 penalty.
        initial_accumulator_value: what ``sum`` starts from.
        eps: added to the denominator.
        foreach, fused: accepted as in torch, and without effect: a step is always one native call.
        maximize: ascend instead of descend.
        differentiable: False; a step has no backward.
        capturable, step_supports_amp_scaling, unscale_grads, clear_grads: as in `FusedAdam`;
            torch's class does not have them.
        clip_grad_norm: clip gradients by their global norm, see `FusedOptimizer`; None does not.
        state_dtype, master_weights, stochastic_rounding, rounding_seed: as in `FusedAdam`.

    Raises:
        ValueError: an argument is out of range, or asks for another way of stepping.
    """

    algorithm = "adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
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
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            maximize=maximize,
        )
        self._mark_formats(state_dtype, master_weights, stochastic_rounding, rounding_seed)
        self._place_state()
        if capturable:
            self._mark_capturable()
