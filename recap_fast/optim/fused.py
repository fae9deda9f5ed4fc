"""What the fused optimizers share: a `torch.optim` class with its step replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from recap_fast._native import native
from recap_fast.closure import evaluate
from recap_fast.optim.observed import observed
from recap_fast.optim.stepper import Stepper
from recap_fast.state_memory import StateMemory


class FusedOptimizer(torch.optim.Optimizer):
    """Mixin before a `torch.optim` class, whose step becomes one native call.

    Constructor, param groups, state, checkpoints and hooks stay torch's.

    Differences to torch's step, all of them in the error case or below rounding:

    * Results are rounded less often than torch's (see ``csrc/algorithms``) and have the same bits
      for any number of threads, any split into groups and any instruction set.
    * Every gradient and hyperparameter is checked before the first write; if one is refused,
      nothing has changed.
    * CUDA parameters keep their step counts on the CPU, and a step computes bias corrections there,
      unless ``capturable=True`` or `torch.amp.GradScaler` is used: then counts are on the device, a
      learning rate may be a tensor there, and no step waits for the device.
    * With `torch.amp.GradScaler` gradients are divided by the scale on the fly; ``.grad`` keeps its
      scaled values.
    * Of a DTensor the local shard is stepped. Sparse gradients, complex parameters and other tensor
      subclasses without memory of their own are refused by name.
    """

    algorithm: ClassVar[str]
    _step_supports_amp_scaling = True
    _stepper: Stepper | None = None

    @staticmethod
    def _check_execution(
        foreach: bool | None, fused: bool | None, differentiable: bool, capturable: bool = False
    ) -> None:
        """torch's arguments that choose how a step is executed: here there is one way."""
        if foreach:
            raise ValueError("foreach=True: the fused step has no foreach form; leave it None")
        if fused is not None and not fused:
            raise ValueError("fused=False: use the torch.optim class, or leave fused None")
        if differentiable:
            raise ValueError("differentiable=True: the fused step has no backward; use torch.optim")
        if capturable and not native.has_cuda_engine:
            raise ValueError(
                "capturable=True: this build of recap_fast has no CUDA engine; leave it False, or "
                "install recap_fast where there is a CUDA toolkit"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # How the optimizer that wrote a checkpoint ran its step says nothing about this one.
            group["foreach"] = group["fused"] = None

    def _mark_capturable(self) -> None:
        """For a class of torch's that has no such option, and must go on loading what we save."""
        self.defaults["capturable"] = True
        for group in self.param_groups:
            group.setdefault("capturable", True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the state goes where a step reads it fast, which is a copy in any case."""
        super().load_state_dict(state_dict)
        self._place_state()

    def _place_state(self) -> None:
        memory = StateMemory()
        for state in self.state.values():
            memory.adopt(state)

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
        loss = evaluate(closure)
        if self._stepper is None:
            self._stepper = Stepper([self])
        self._stepper.step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss
