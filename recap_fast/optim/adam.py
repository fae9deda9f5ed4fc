"""FusedAdam and FusedAdamW."""

from __future__ import annotations

from torch import Tensor, optim
from torch.optim.optimizer import ParamsT

from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.state.formats import StateDtype


class FusedAdam(FusedOptimizer, optim.Adam):
    """`torch.optim.Adam`, stepped over all param groups in one native call.

    Arguments, param groups and state (``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``)
    are those of `torch.optim.Adam`, and checkpoints load in both directions. Parameters: dense
    float32, float64, bfloat16 or float16 tensors of any shape; state has the parameter's dtype,
    unless ``state_dtype`` says another; 16-bit elements are updated in float32 and rounded once.
    Gradients of 16-bit parameters may be float32, and those of float32 parameters 16-bit
    (``Parameter.grad_dtype``).

    With ``lazy=True`` (also a key of a param group) a row whose gradient is zero in all elements
    stays as it is, parameter and moments, without decay: a row is an index of the first dimension.
    So an embedding table with a dense gradient trains as on FBGEMM, which updates the rows that
    were looked up; with ``decoupled_weight_decay`` the update is that of FBGEMM's ``adam``. On the
    CPU only. With a sparse gradient these are the rows that it has, whatever their values.

    Without ``lazy``, a sparse gradient updates its rows as `FusedSparseAdam` does.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate, a float or a one-element tensor.
        betas: decay of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the denominator.
        weight_decay: L2 penalty, or with ``decoupled_weight_decay`` AdamW's decay.
        amsgrad: divide by the largest second moment so far (Reddi et al., 2018).
        foreach, fused: accepted as in torch, and without effect: a step is always one native call.
        maximize: ascend instead of descend.
        capturable: safe in CUDA graphs: step counts are kept on the device of the parameters, which
            must be a CUDA device, and a tensor ``lr`` is read there.
        differentiable: False; a step has no backward.
        decoupled_weight_decay: as in AdamW (Loshchilov & Hutter, 2019).
        lazy: leave rows alone whose gradient is zero; torch's class does not have it.
        clip_grad_norm: clip gradients by their global norm, see `FusedOptimizer`; None does not.
        step_supports_amp_scaling: has `torch.amp.GradScaler` hand its scale and ``found_inf`` to
            the step, which divides and skips without waiting for the device, as torch does with
            ``fused=True``. If False, the scaler unscales ``.grad`` before the step and does not
            call a step that is to be skipped, as for torch's other optimizers: so libraries can
            clip in between, and see which steps were taken. None: True if ``capturable`` or
            ``clear_grads`` is.
        unscale_grads: after a step that was given a scale, ``.grad`` is divided by it, as after
            torch's. False leaves it scaled, which saves a pass over the gradients.
        clear_grads: a step leaves zeros in every ``.grad`` that it has read, also if it is skipped:
            in the place of ``zero_grad(set_to_none=False)``, in programs that keep the memory of
            gradients. A sparse gradient has no rows afterwards. A step that a
            `torch.amp.GradScaler` does not call clears nothing, so leave
            ``step_supports_amp_scaling`` at None. torch's class has no such argument.
        state_dtype: how moments and momenta are stored: ``torch.float32``, ``torch.bfloat16``,
            ``torch.float16`` or ``"8bit"``; None: as the parameter, rounded to nearest, as in
            torch. Otherwise those of fewer bits than 32 are rounded stochastically, since an
            average that is rounded to nearest stops moving once it changes by less than its last
            place. ``"8bit"``: uint8 codes, and for each state one such as ``exp_avg_scale``
            (float32, a number for each 128 elements in memory); parameters of less than 4,096
            elements, or that are not contiguous, have float32 states, and DTensors are refused.
            torch's class does not have it, nor the next three. Also keys of a param group.
        master_weights: 16-bit parameters are updated in float32: of bfloat16 the state
            ``param_remainder`` (int16) has the bits that the float has more, of float16 the state
            ``master_param`` (float32) has all of it.
        stochastic_rounding: 16-bit parameters are rounded up or down by chance, so that small
            updates are not lost.
        rounding_seed: of these chances, which also depend on the name of a parameter (its position,
            if it has none), its step count and the index of an element, and on nothing else. In
            checkpoints.

    Raises:
        ValueError: an argument is out of range, or asks for another way of stepping.
    """

    algorithm = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        lazy: bool = False,
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._mark_lazy(lazy)
        self._mark_formats(state_dtype, master_weights, stochastic_rounding, rounding_seed)


class FusedAdamW(FusedOptimizer, optim.AdamW):
    """`torch.optim.AdamW`, stepped over all param groups in one native call.

    Arguments as `FusedAdam`, with decoupled weight decay and torch's default of 0.01 for it.
    """

    algorithm = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        lazy: bool = False,
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            capturable=capturable,
        )
        self._mark_lazy(lazy)
        self._mark_formats(state_dtype, master_weights, stochastic_rounding, rounding_seed)
