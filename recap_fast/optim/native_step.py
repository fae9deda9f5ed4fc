"""What the fused optimizers share: a `torch.optim` class with its step replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from recap_fast._native import native
from recap_fast.clipping import check_max_norm
from recap_fast.closure import evaluate
from recap_fast.optim import table_types
from recap_fast.optim.hooks import observed
from recap_fast.optim.left_to_torch import LeftToTorch
from recap_fast.optim.stepper import Stepper
from recap_fast.state.formats import FORMAT_OPTIONS, SEED, StateDtype, check_formats, format_options
from recap_fast.state.loading import in_own_formats, take_formats
from recap_fast.state.memory import Shares, StateMemory

logger = logging.getLogger("recap_fast")

_logged: set[str] = set()


def _log_without_effect(argument: str, value: object) -> None:
    """Once per argument: who passes it does so for every optimizer."""
    if argument not in _logged:
        _logged.add(argument)
        logger.info("%s=%s has no effect: a step is always one native call", argument, value)


def _keep_formats(group: dict[str, Any], own: dict[str, Any]) -> None:
    """How parameters and states are stored is the optimizer's, not the checkpoint's, to say."""
    for key in FORMAT_OPTIONS:
        if key in own:
            group[key] = own[key]
        else:
            group.pop(key, None)
    if SEED in own:
        group.setdefault(SEED, own[SEED])
    else:
        group.pop(SEED, None)


class FusedOptimizer(torch.optim.Optimizer):
    """Mixin before a `torch.optim` class, whose step becomes one native call.

    Constructor, param groups, state, checkpoints and hooks stay torch's.

    With ``clip_grad_norm`` the call also finds the global 2-norm of the gradients of all param
    groups, over the shards of DTensors on all processes, and scales the gradients as it reads them
    so that the norm is at most that: as `torch.nn.utils.clip_grad_norm_` does, but ``.grad`` is
    not clipped. A norm that is not finite skips the step, on all processes that share a parameter,
    and logs a warning; infinity does only that. On CUDA devices torch finds the norm, in float32,
    and nothing waits for the device.

    With ``clear_grads`` the call leaves zeros in the gradients that it has read, see `FusedAdam`.

    Differences to torch's step, all of them in the error case or below rounding:

    * Results are rounded less often than torch's (see ``csrc/algorithms``) and have the same bits
      for any number of threads, any split into groups and any instruction set.
    * Every gradient and hyperparameter is checked before the first write; if one is refused,
      nothing has changed.
    * CUDA parameters keep their step counts on the CPU, and a step computes bias corrections there,
      unless ``capturable=True`` or a scaler's ``found_inf`` is on the device: then counts are there
      too, a learning rate may be a tensor there, and no step waits for the device.
    * `torch.amp.GradScaler` unscales gradients and skips steps by itself, as with any optimizer;
      with ``step_supports_amp_scaling=True`` the native call does both, and no step waits for
      ``found_inf``, as with torch's ``fused=True``.
    * Of a DTensor the local shard is stepped. Complex parameters and other tensor subclasses
      without memory of their own are refused by name; but an optimizer that `recap_fast.fuse` made
      leaves the param groups that have them to torch's own step.
    * Sparse gradients of whole rows, coalesced or not, update the rows that they have on the CPU.
      Options that would move other rows are refused by name: the momentum and weight decay of SGD,
      the weight decay of Adagrad, and that and amsgrad of Adam without ``lazy``.
    """

    algorithm: ClassVar[str]
    # What torch.amp.GradScaler, Lightning and accelerate look at, under torch's name for it.
    _step_supports_amp_scaling: bool = False
    unscale_grads: bool = True
    _clear_grads: bool = False
    _stepper: Stepper | None = None
    _has_large_state_to_place: bool = False
    _clip_grad_norm: float | None = None
    _left_to_torch: LeftToTorch | None = None  # None: what is not native is refused
    # What torch's class does not have, and a pickle or copy must keep.
    _OWN_OPTIONS = (
        "_clear_grads",
        "_clip_grad_norm",
        "_left_to_torch",
        "_step_supports_amp_scaling",
        "unscale_grads",
    )

    def _take_options(
        self,
        foreach: bool | None,
        fused: bool | None,
        differentiable: bool,
        capturable: bool,
        clip_grad_norm: float | None,
        step_supports_amp_scaling: bool | None,
        unscale_grads: bool,
        clear_grads: bool,
    ) -> None:
        """Checks and keeps the arguments of a constructor that are about the step, not the update.

        Before torch's constructor, so that what is refused has changed nothing. Of torch's own,
        ``foreach`` and ``fused`` have no effect, since there is one way to step.
        """
        if foreach is not None:
            _log_without_effect("foreach", foreach)
        if fused is not None and not fused:
            _log_without_effect("fused", fused)
        if differentiable:
            raise ValueError("differentiable=True: the fused step has no backward; use torch.optim")
        if capturable and not native.has_cuda_engine:
            raise ValueError(
                "capturable=True: this build of recap_fast has no CUDA engine; leave it False, or "
                "install recap_fast where there is a CUDA toolkit"
            )
        if clip_grad_norm is not None:
            self._clip_grad_norm = check_max_norm(clip_grad_norm)
        if step_supports_amp_scaling is None:
            step_supports_amp_scaling = capturable or clear_grads
        self._step_supports_amp_scaling = bool(step_supports_amp_scaling)
        self.unscale_grads = bool(unscale_grads)
        self._clear_grads = bool(clear_grads)
        table_types.register(type(self), self.torch_class())

    @property
    def clip_grad_norm(self) -> float | None:
        """What the global norm of the gradients is clipped to; None: it is not. Read only."""
        return self._clip_grad_norm

    @property
    def clear_grads(self) -> bool:
        """Whether a step leaves zeros in the gradients that it has read. Read only."""
        return self._clear_grads

    @property
    def grad_norm(self) -> float | torch.Tensor | None:
        """The global norm that the last step clipped by: of unscaled gradients, before clipping.

        A float; if parameters are on a CUDA device, a float64 tensor there, shape (). None before
        the first step, and without ``clip_grad_norm``.
        """
        return None if self._stepper is None else self._stepper.grad_norm

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in self._OWN_OPTIONS if name in self.__dict__}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", ())
        super().__setstate__(state)
        # How the optimizer that wrote a checkpoint ran its step says nothing about this one.
        for group, own in zip(self.param_groups, before):  # noqa: B905 - a copy has none before
            for key in ("foreach", "fused"):
                if key in group or key in own:  # not every class of torch's has both
                    group[key] = own.get(key)
            if "lazy" in own:  # of which torch's checkpoints know nothing
                group.setdefault("lazy", own["lazy"])
            if before:
                _keep_formats(group, own)

    @classmethod
    def torch_class(cls) -> type[torch.optim.Optimizer]:
        """The class of `torch.optim`, or one derived from it, whose step this one replaces."""
        classes = cls.__mro__
        return classes[classes.index(FusedOptimizer) + 1]

    def _mark_capturable(self) -> None:
        """For a class of torch's that has no such option, and must go on loading what we save."""
        self.defaults["capturable"] = True
        for group in self.param_groups:
            group.setdefault("capturable", True)

    def _mark_lazy(self, lazy: bool) -> None:
        """For a class of torch's that has no such option: present only where it is asked for."""
        if lazy:
            self.defaults["lazy"] = True
            for group in self.param_groups:
                group.setdefault("lazy", True)

    def _mark_formats(
        self,
        state_dtype: StateDtype | None,
        master_weights: bool,
        stochastic_rounding: bool,
        rounding_seed: int,
    ) -> None:
        """Puts what is asked for into the param groups: torch's checkpoints know nothing of it."""
        self._take_formats(
            format_options(state_dtype, master_weights, stochastic_rounding, rounding_seed)
        )

    def _take_formats(self, options: dict[str, Any]) -> None:
        """Gives all param groups the format options that they lack, and converts what there is."""
        take_formats(self, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            TypeError, ValueError: what torch's raises, or because the parameters cannot be stored
                as the group or the constructor asks for; nothing has been added.
        """
        super().add_param_group(param_group)
        try:
            check_formats(self.param_groups[-1])
        except BaseException:
            del self.param_groups[-1]
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's: large tensors are taken as they are, if dtype and device fit.

        The dtype of states is that which this optimizer's param groups ask for; torch would convert
        them to the parameter's. How parameters and states are stored is this optimizer's too, but
        the ``rounding_seed`` is the saved one. Small ones go where a step reads them fast. So do
        large ones in the next step, if the caller has let go of ``state_dict`` by then.

        Raises:
            Exception: what torch's raises; state and param groups are then as they were.
        """
        state, param_groups = self.state, self.param_groups
        try:
            with in_own_formats(self):
                super().load_state_dict(state_dict)
            self._place_state()
        except BaseException:
            self.state, self.param_groups = state, param_groups
            raise

    def _place_state(self) -> None:
        memory = StateMemory(goes_on=True)
        for param, state in self.state.items():
            # Beside the states of parameters, torch carries along whatever else is in there.
            if isinstance(param, torch.Tensor) and isinstance(state, dict):
                memory.adopt(param, state)
        self._has_large_state_to_place = True

    def _place_large_state(self, shares: Callable[[], Shares]) -> None:
        """Before the first step after `load_state_dict`."""
        if self._has_large_state_to_place:
            memory = StateMemory(shares=shares())
            for param, state in self.state.items():
                if isinstance(param, torch.Tensor) and isinstance(state, dict):
                    memory.adopt_large(param, state)
            self._has_large_state_to_place = False

    @observed
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in one native call.

        Args:
            closure: evaluated once, with gradients enabled, before the update.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError, TypeError, ValueError, KeyError: naming the parameter or param group that
                cannot be stepped; nothing has been changed.
        """
        loss = None if closure is None else evaluate(closure)
        if self._stepper is None:
            self._stepper = Stepper([self], max_norm=self._clip_grad_norm)
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        scaled = grad_scale is not None or found_inf is not None
        if scaled or not self._stepper.step_plainly():
            self._stepper.step(grad_scale, found_inf, self.unscale_grads)
        return loss
