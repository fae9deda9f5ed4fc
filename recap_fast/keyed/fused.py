"""FusedCombinedOptimizer: the dense optimizers of a model stepped as one plan."""

from __future__ import annotations

from recap_fast import torchrec_checked  # noqa: F401 - first: says if torchrec is missing

# isort: split
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torchrec.optim import keyed

from recap_fast.closure import evaluate
from recap_fast.config import LearningRate
from recap_fast.keyed import CombinedOptimizer
from recap_fast.keyed.scaled_tables import held_by, step_is_skipped, warn_of_scaled_tables
from recap_fast.optim.hooks import observed, steps_as_its_class, unhooked
from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.optim.stepper import Stepper
from recap_fast.schedules.device import DeviceRates


def _has_native_step(part: keyed.KeyedOptimizer) -> bool:
    """Whether a step of `part` is that of a `recap_fast.optim` optimizer and nothing else.

    One that clips by a norm of its own must step by itself.
    """
    if type(part) is not keyed.KeyedOptimizerWrapper:
        return False
    if getattr(part._optimizer, "clip_grad_norm", None) is not None:
        return False
    step = type(part._optimizer).step
    return unhooked(step) is unhooked(FusedOptimizer.step) and steps_as_its_class(part._optimizer)


class FusedCombinedOptimizer(CombinedOptimizer):
    """A `CombinedOptimizer` that steps all its dense param groups in one native call.

    In place of torchrec's, as torchrec's DLRM makes it::

        dense_optimizer = KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(model.named_parameters())),
            lambda params: FusedAdagrad(params, lr=args.learning_rate, eps=args.eps),
        )
        optimizer = FusedCombinedOptimizer([model.fused_optimizer, dense_optimizer])

    `recap_fast.fuse` makes one of a torchrec ``CombinedOptimizer`` that exists already.

    Groups, state, checkpoints and hooks are those of the optimizers inside. The call covers every
    `keyed.KeyedOptimizerWrapper` around a `recap_fast.optim` optimizer in ``optims``; all else
    takes a step of its own: wrappers such as torchrec's for clipping, combined optimizers, other
    optimizers, and classes derived from those named that have another ``step``.

    With `torch.amp.GradScaler` the tables of fused embedding optimizers learn from gradients that
    are scaled, and from infinite ones, too: they train in the backward pass, before a scaler looks.
    That is warned of once. With ``several_backwards="accumulate"`` in their configuration they
    train in the step, from unscaled gradients, and are skipped as dense parameters are.

    With ``clip_grad_norm`` the call also finds the global norm of the gradients, and scales them as
    it reads them: ``.grad`` is not clipped. On CUDA devices torch finds the norm, in float32,
    and nothing waits for the device. A step whose norm is not finite is skipped as a whole, on all
    processes that share a parameter.

    Args:
        optims: as for `keyed.CombinedOptimizer`: keyed optimizers, or pairs of a key and one.
        clip_grad_norm: as for `recap_fast.keyed.CombinedOptimizer`; all dense optimizers must then
            be those of the native call.
        step_supports_amp_scaling: as in `recap_fast.optim.FusedAdam`: the native call then divides
            by the scale of a `GradScaler` and skips as a whole, without waiting for the device; all
            dense optimizers must be those of the native call. None: whether they are, and all of
            them were made with it.
        unscale_grads: as in `recap_fast.optim.FusedAdam`, for the parameters of the native call.
    """

    _step_supports_amp_scaling: bool = False
    _wants_amp_scaling: bool | None = None
    unscale_grads: bool = True
    # What other combined optimizers do not have.
    _OWN_OPTIONS = ("_wants_amp_scaling", "unscale_grads")

    def __init__(
        self,
        optims: Sequence[keyed.KeyedOptimizer | tuple[str, keyed.KeyedOptimizer]],
        clip_grad_norm: float | None = None,
        *,
        step_supports_amp_scaling: bool | None = None,
        unscale_grads: bool = True,
    ) -> None:
        super().__init__(optims, clip_grad_norm)
        self._wants_amp_scaling = step_supports_amp_scaling
        self.unscale_grads = bool(unscale_grads)
        self._device_rates: Sequence[DeviceRates] = ()
        self._stepper: Stepper | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Sorts the optimizers by who steps them; again when there are others than before."""
        count = len(self._optims)
        fused = [(key, part) for key, part in self._optims if _has_native_step(part)]
        names = [
            {param: self.prepend_opt_key(name, key) for name, param in part.params.items()}
            for key, part in fused
        ]
        self._native = [part._optimizer for _, part in fused]
        if not fused:
            self._stepper = None
        elif self._stepper is not None:
            self._stepper.step_these(self._native, names)
        else:
            self._stepper = Stepper(self._native, names, self.clip_grad_norm)
            self._stepper.move_with(self._device_rates)
        self._others = [part for _, part in self._optims if not _has_native_step(part)]
        self._unscaled = [item for item in self.dense_optimizers() if item[1] in self._others]
        # Steps of dense parameters that are not native are taken together with those that are.
        self._together = [part for _, part in self._unscaled] if fused else []
        self._after = [part for part in self._others if part not in self._together]
        if self.clip_grad_norm is not None and self._unscaled:
            raise ValueError(
                f"clip_grad_norm: the optimizer under the key {self._unscaled[0][0]!r} is not one "
                "of recap_fast.optim in a plain KeyedOptimizerWrapper, without a clip_grad_norm of "
                "its own, and would not be clipped with the others; replace it, or use "
                "recap_fast.keyed.CombinedOptimizer"
            )
        supports_amp_scaling = self._wants_amp_scaling
        if supports_amp_scaling is None and not self._unscaled:
            flags = [optimizer._step_supports_amp_scaling for optimizer in self._native]
            supports_amp_scaling = bool(flags) and all(flags)
        self._step_supports_amp_scaling = bool(supports_amp_scaling)
        # Empty dicts as long as nobody registers a hook on an optimizer inside.
        self._inner_hooks = tuple(
            hooks
            for optimizer in self._native
            for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        )
        self._warned_of_scaled_tables = False
        self._schedulers_know = False
        self._prepared = count  # last: what is interrupted before is done again

    def init_state(
        self, sparse_grad_parameter_names: set[str] | None = None, count_step: bool = True
    ) -> None:
        """As `CombinedOptimizer.init_state`, but that the native step always takes dense gradients.

        So the gradients of zero of its parameters are dense, whatever their names, but for those of
        `FusedSparseAdam`.
        """
        native = {
            id(param)
            for optimizer in self._native
            if optimizer.algorithm != "sparse_adam"
            for group in optimizer.param_groups
            for param in group["params"]
        }
        others = {name for name, param in self.params.items() if id(param) not in native}
        # The schedules are still at their step, and not at the next.
        steps = [int(rates.step) for rates in self._device_rates]
        super().init_state(others & (sparse_grad_parameter_names or set()), count_step)
        for rates, step in zip(self._device_rates, steps, strict=True):
            rates.move_to(step)

    def check_groups_may_go(self) -> None:
        """Raises ValueError if there are rates on the device, which go by the place of a group."""
        if self._device_rates:
            raise ValueError(
                "param_groups: rates on the device go by the place of their param group, so that "
                "none can be taken away or replaced; create RecapLRShim without device_schedule"
            )

    @observed
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every dense parameter that has a gradient.

        Args:
            closure: evaluated once, with gradients enabled, before the update.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError, TypeError, ValueError, KeyError: naming the parameter or param group that
                cannot be stepped; no parameter of the native call has been changed.
        """
        loss = None if closure is None else evaluate(closure)
        if len(self._optims) != self._prepared:
            self._prepare()
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        scaled = grad_scale is not None or found_inf is not None
        hooked = bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
        stepper = self._stepper
        alone = self._schedulers_know and not (self._others or scaled or hooked)
        if alone and stepper is not None and stepper.step_plainly():
            return loss
        fused_leaves = self.fused_leaves
        if fused_leaves:
            self.check_tables()
        if scaled:
            self._check_scaling(grad_scale)
        if stepper is not None:
            others = [part.step for part in self._together] if self._together else ()
            if hooked or any(self._inner_hooks):
                self._step_with_hooks(stepper, grad_scale, found_inf, others)
            elif alone or scaled or others or not stepper.step_plainly():
                stepper.step(grad_scale, found_inf, self.unscale_grads, others)
            if not self._schedulers_know:
                self._tell_schedulers()
        if fused_leaves and step_is_skipped(fused_leaves, grad_scale, found_inf, self.grad_norm):
            if any(optimizer.clear_grads for optimizer in self._native):
                for leaf in fused_leaves:
                    leaf.zero_grad()  # nobody else would drop what tables hold for a step
            self.sync_fused_learning_rates()
        else:
            for part in self._after:
                part.step()
        return loss

    @property
    def grad_norm(self) -> float | torch.Tensor | None:
        """The global norm that the last step clipped by: of unscaled gradients, before clipping.

        A float; if parameters are on a CUDA device, a float64 tensor there, shape (). None before
        the first step, and without ``clip_grad_norm``.
        """
        return None if self._stepper is None else self._stepper.grad_norm

    def follow_on_device(self, schedules: Sequence[LearningRate]) -> None:
        """From now on, the step itself moves the rates of all dense param groups on.

        A step reads the rates in the memory of its parameters' device, whatever the groups' `lr`
        says, and then sets them to those of the next step.

        Args:
            schedules: one per dense param group, in order, from step 0 on.

        Raises:
            ValueError: naming a param group that is not of a `recap_fast.optim` optimizer with
                ``capturable=True``, or whose parameters are not all on one device.
        """
        if self._unscaled:
            raise ValueError(
                f"device schedules: the optimizer under the key {self._unscaled[0][0]!r} is not "
                "one of recap_fast.optim in a plain KeyedOptimizerWrapper, and so has a step of "
                "its own; replace it, or leave the schedules to the host"
            )
        groups = [group for optimizer in self._native for group in optimizer.param_groups]
        by_device: dict[torch.device, dict[int, LearningRate]] = {}
        for index, (group, schedule) in enumerate(zip(groups, schedules, strict=True)):
            if not group.get("capturable"):
                raise ValueError(
                    f"device schedules: param group {index} is not capturable; create the "
                    "optimizers with capturable=True"
                )
            devices = {param.device for param in group["params"]}
            if len(devices) != 1:
                raise ValueError(
                    f"device schedules: param group {index} has parameters on "
                    f"{', '.join(sorted(map(str, devices))) or 'no device'}; make a group for each"
                )
            by_device.setdefault(devices.pop(), {})[index] = schedule
        self._device_rates = [DeviceRates(own, device) for device, own in by_device.items()]
        if self._stepper is not None:
            self._stepper.move_with(self._device_rates)

    def move_device_rates(self, step: int) -> None:
        """Sets the rates of `follow_on_device` to those of ``step``."""
        for rates in self._device_rates:
            rates.move_to(step)

    def check_captured_rates(self) -> None:
        """Checks that no rate on the host was changed since a CUDA graph captured it.

        Raises:
            RuntimeError: naming the param group; the graph goes on with the rate it captured.
        """
        if self._stepper is not None:
            self._stepper.check_captured_rates()

    def _check_scaling(self, grad_scale: torch.Tensor | None) -> None:
        if self._unscaled:
            key, part = self._unscaled[0]
            wrapped = type(part) is keyed.KeyedOptimizerWrapper
            raise RuntimeError(
                "GradScaler: FusedCombinedOptimizer scales the steps of recap_fast.optim "
                f"optimizers only, but under the key {key!r} holds a "
                f"{type(part._optimizer if wrapped else part).__name__}; replace it, or leave "
                "step_supports_amp_scaling False: GradScaler then unscales all gradients itself"
            )
        if grad_scale is None or self._warned_of_scaled_tables:
            return
        if any(leaf.params and held_by(leaf) is None for leaf in self.fused_leaves):
            self._warned_of_scaled_tables = True
            warn_of_scaled_tables(stacklevel=5)

    def _tell_schedulers(self) -> None:
        """Lets schedulers that are attached to optimizers inside know that these took a step.

        torch's look for it in their first step, and warn if there was none.
        """
        for optimizer in self._native:
            optimizer._opt_called = True
        self._schedulers_know = True

    def _step_with_hooks(
        self,
        stepper: Stepper,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        others: Sequence[Callable[[], Any]],
    ) -> None:
        """Runs the hooks of the optimizers inside around the one call, as if each had its step."""
        for optimizer in self._native:
            hooks = itertools.chain(
                _global_optimizer_pre_hooks.values(), optimizer._optimizer_step_pre_hooks.values()
            )
            for hook in list(hooks):
                if hook(optimizer, (optimizer,), {}) is not None:
                    raise RuntimeError(
                        "a step pre hook of an optimizer inside FusedCombinedOptimizer must return "
                        "None: its step has no arguments to change"
                    )
        stepper.step(grad_scale, found_inf, self.unscale_grads, others)
        for optimizer in self._native:
            hooks = itertools.chain(
                optimizer._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()
            )
            for hook in list(hooks):
                hook(optimizer, (optimizer,), {})

    def __getstate__(self) -> dict[str, Any]:
        derived = {
            "_native",
            "_stepper",
            "_others",
            "_unscaled",
            "_together",
            "_after",
            "_inner_hooks",
            "_step_supports_amp_scaling",
        }
        return {key: value for key, value in super().__getstate__().items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stepper = None
        self._patch_step_function()  # or hooks are not called where none was made before
        self._prepare()
