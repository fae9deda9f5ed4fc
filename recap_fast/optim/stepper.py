"""Steps the param groups of one or several fused optimizers as one plan."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recap_fast._native import native
from recap_fast.clipping import NormParts, clip_on_device
from recap_fast.optim.left_to_torch import step_as_torch
from recap_fast.state import new_state, strays
from recap_fast.state_memory import StateMemory

if TYPE_CHECKING:
    from recap_fast.device_rates import DeviceRates
    from recap_fast.optim.fused import FusedOptimizer


logger = logging.getLogger("recap_fast")

Group = dict[str, Any]
_REFUSALS = (RuntimeError, TypeError, ValueError, KeyError)

# For what a step seldom does: `torch.compile` would trace the Python in it, tensor by tensor, and
# compile graphs that run once. (`torch.compiler.disable` would import the compiler here already.)
_not_compiled = torch._disable_dynamo


class Stepper:
    """Owns the plan over all param groups of ``optimizers`` and keeps it up to date.

    In the steady state `step` is one native call. The plan is rebuilt when the call reports that
    something changed since: a tensor moved or replaced, a param group or state added, a state dict
    loaded. Groups that an optimizer leaves to torch take torch's step after the call.

    Args:
        optimizers: stepped together, in this order.
        names: for each optimizer, what errors call its parameters; those without a name are called
            by their position.
        max_norm: clip gradients by their global norm; None leaves them alone.

    Attributes:
        grad_norm: the norm that the last step clipped by, of unscaled gradients and before
            clipping: a float, or if parameters are on a CUDA device a float64 tensor there, shape
            (). None if there was none.
    """

    def __init__(
        self,
        optimizers: Sequence[FusedOptimizer],
        names: Sequence[Mapping[Tensor, str]] | None = None,
        max_norm: float | None = None,
    ) -> None:
        self._max_norm = max_norm
        self._norm_parts: NormParts | None = None
        self._computed_grads: list[Tensor] = []
        self.grad_norm: float | Tensor | None = None
        self._plan: Any = None
        self._simple_plan: Any = None  # the same, if a step is nothing but its call
        self._captured: list[Any] = []
        self._device_values = False
        self._device_rates: Sequence[DeviceRates] = ()
        self._building = threading.RLock()  # to step itself, threads take turns in the plan
        self._groups: list[list[tuple[int, Group]]] = []  # in the plan, by optimizer
        self._left: list[tuple[int, list[Group]]] = []  # left to torch, with the optimizer's number
        self.step_these(optimizers, names)

    def step_these(
        self, optimizers: Sequence[FusedOptimizer], names: Sequence[Mapping[Tensor, str]] | None
    ) -> None:
        """From now on, steps ``optimizers``; see the arguments of the class."""
        # Weak: an optimizer owns its stepper, and a cycle would keep its state until a collection.
        self._references = [weakref.ref(optimizer) for optimizer in optimizers]
        self._names = names or [{} for _ in optimizers]
        # What torch steps has no part in a norm that the native call finds; and schedules on the
        # device are of groups by their position in the plan, in which then all must be.
        self._may_leave = (
            self._max_norm is None
            and not self._device_rates
            and any(optimizer._left_to_torch is not None for optimizer in optimizers)
        )
        self._drop_plan()

    def step(
        self, grad_scale: Tensor | None, found_inf: Tensor | None, unscale_grads: bool = False
    ) -> None:
        """Updates every parameter that has a gradient; threads that call it take turns.

        Args:
            grad_scale: one element; gradients are divided by it. None means 1.
            found_inf: one element; if it is not zero, nothing is written.
            unscale_grads: whether gradients are divided by it in memory, too.

        Raises:
            Exception: naming the parameter or param group that cannot be stepped. Parameters,
                states and step counts are then as they were.
        """
        plan = self._simple_plan
        if (
            plan is not None
            and grad_scale is None
            and found_inf is None
            and plan.step(None, None, None) == native.STEPPED
        ):
            return
        unscale_by = grad_scale if unscale_grads else None
        if not self._may_leave:
            self._step_natively(grad_scale, found_inf, unscale_by)
            return
        with self._building:  # which may change what is left to torch
            while True:
                try:
                    self._step_natively(grad_scale, found_inf, unscale_by)
                    break
                except _REFUSALS as error:
                    if not self._leave_what_is_refused(error):
                        raise
            for number, groups in self._left:
                optimizer = self._references[number]()
                try:
                    step_as_torch(optimizer, groups, grad_scale, found_inf)
                except BaseException:  # torch refuses it, too: once it is mended, all is native
                    optimizer._left_to_torch.take_back(groups)
                    self._drop_plan()
                    raise

    def _step_natively(
        self, grad_scale: Tensor | None, found_inf: Tensor | None, unscale_by: Tensor | None
    ) -> None:
        for plan in self._captured:
            plan.check_captured_rates()
        if self._plan is None:
            with self._building:
                if self._plan is None:  # or another thread would step a plan of its own meanwhile
                    self._build()
        if self._max_norm is not None and self._plan.has_cuda_parts:
            grad_scale, found_inf = self._clip_on_device(grad_scale, found_inf)
        elif grad_scale is not None or found_inf is not None:
            self._avoid_waiting_for(grad_scale, found_inf)
        plan = self._plan
        outcome = self._run(grad_scale, found_inf, unscale_by)
        if outcome == native.STEPPED:
            return
        with self._building:
            if self._plan is None:
                outcome = native.STALE
            elif self._plan is not plan:  # another thread's, which others may be stepping
                outcome = self._run(grad_scale, found_inf, unscale_by)
            if outcome == native.STALE:
                self._build()
                outcome = self._run(grad_scale, found_inf, unscale_by)
            if outcome == native.NEEDS_STATE:
                outcome = self._step_with_new_state(grad_scale, found_inf, unscale_by)
        if outcome not in (native.STEPPED, native.SKIPPED):
            raise RuntimeError("the param groups changed while they were being stepped")
        norm = self.grad_norm
        if outcome == native.SKIPPED and isinstance(norm, float) and not math.isfinite(norm):
            logger.warning("the norm of the gradients is %s: no parameter was updated", norm)

    def _run(
        self, grad_scale: Tensor | None, found_inf: Tensor | None, unscale_by: Tensor | None
    ) -> int:
        if self._computed_grads:
            self._show_grads()
        outcome = self._plan.step(grad_scale, found_inf, unscale_by)
        if self._max_norm is not None and not self._plan.has_cuda_parts:
            self.grad_norm = self._plan.grad_norm
        return outcome

    def _show_grads(self) -> None:
        """Has the native call see gradients that a subclass computes when asked for `grad`.

        So do torchrec's slices of the tensor that several unfused tables are in. In C++, where the
        call looks, they have none.
        """
        for param in self._computed_grads:
            Tensor.grad.__set__(param, param.grad)

    @_not_compiled
    def _clip_on_device(
        self, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._show_grads()
        parts = self._norm_parts
        sums = self._plan.sums_of_squares(parts.part_of_param, parts.count)
        if not sums:
            self._build()
            parts = self._norm_parts
            sums = self._plan.sums_of_squares(parts.part_of_param, parts.count)
        if found_inf is not None:
            # Those that share a part may not have seen it, and must skip the step too.
            skip = found_inf.to(sums[0].device).reshape(()) != 0
            sums = [torch.where(skip, math.inf, own) for own in sums]
        norm = parts.total(sums).sqrt()
        self.grad_norm = norm if grad_scale is None else norm / grad_scale.to(norm).reshape(())
        return clip_on_device(norm, self._max_norm, grad_scale, found_inf)

    def move_with(self, device_rates: Sequence[DeviceRates]) -> None:
        """From now on, every step uses ``device_rates``, and moves them on."""
        self._device_rates = device_rates
        if device_rates:  # of groups by their position in the plan, in which then all must be
            self._may_leave = False
        self._groups_then = [len(each.param_groups) for each in self._optimizers()]
        self._drop_plan()

    def check_captured_rates(self) -> None:
        """Raises RuntimeError if a rate on the host differs from that in a captured CUDA graph."""
        plans = self._captured if self._plan is None else (*self._captured, self._plan)
        for plan in plans:
            plan.check_captured_rates()

    def _avoid_waiting_for(self, *scalars: Tensor | None) -> None:
        """Has values computed on the device from the first step on that would wait for it."""
        if any(self._plan.wants_device_values(scalar) for scalar in scalars):
            self._device_values = True
            self._build()

    def _optimizers(self) -> list[FusedOptimizer]:
        return [reference() for reference in self._references]

    def _drop_plan(self) -> None:
        if self._plan is not None and self._plan.is_captured:
            self._captured.append(self._plan)  # the graph goes on reading its memory
        self._plan = self._simple_plan = None

    @_not_compiled
    def _build(self, first: Sequence[int] = ()) -> None:
        """Puts another plan in the place of the present one, which stays if that fails."""
        self.check_captured_rates()
        if self._device_rates:
            self._check_places()
        sources = []
        params: list[Tensor] = []
        all_names: list[str] = []
        optimizers = self._optimizers()
        self._divide(optimizers)
        for number, optimizer in enumerate(optimizers):
            for index, group in self._groups[number]:
                source, names = self._source(number, optimizer, index, group)
                params += group["params"]
                all_names += names
                sources.append(source)
        # Before the plan, which changes where step counts are.
        parts = None if self._max_norm is None else NormParts(params, all_names)
        plan = native.BoundPlan(sources, optimizers, list(first), self._device_values)
        if parts is not None and plan.has_cuda_parts and not self._device_values:
            self._device_values = True
            return self._build(first)
        if parts is not None and not plan.has_cuda_parts:
            total = None if parts.is_local else parts.total
            plan.set_clipping(self._max_norm, parts.part_of_param, parts.count, total)
        for rates in self._device_rates:
            plan.set_schedules(rates.groups, rates.schedules, rates.rates, rates.epoch)
        self._drop_plan()
        self._plan, self._norm_parts = plan, parts
        self._computed_grads = [each for each in params if type(each).grad is not Tensor.grad]
        if not (parts or self._may_leave or self._captured or self._computed_grads):
            self._simple_plan = plan

    def _name(self, number: int, index: int) -> str:
        """What errors call a param group."""
        where = f" of optimizer {number}" if len(self._references) > 1 else ""
        return f"param group {index}{where}"

    def _source(
        self, number: int, optimizer: FusedOptimizer, index: int, group: Group
    ) -> tuple[Any, list[str]]:
        """A group for a plan, and the names of its parameters."""
        name, names_of = self._name(number, index), self._names[number]
        names = [names_of.get(param) or f"{i} of {name}" for i, param in enumerate(group["params"])]
        own_names = group.get("param_names", ())
        names[: len(own_names)] = own_names[: len(names)]
        source = native.GroupSource(optimizer.algorithm, name, group, optimizer.state, names)
        return source, names

    def _divide(self, optimizers: Sequence[FusedOptimizer]) -> None:
        """Settles which groups the plan is of, and which are left to torch."""
        self._groups, self._left = [], []
        for number, optimizer in enumerate(optimizers):
            left = optimizer._left_to_torch if self._may_leave else None
            if left is not None:
                left.forget_others(optimizer.param_groups)
            of_plan: list[tuple[int, Group]] = []
            of_torch: list[Group] = []
            for index, group in enumerate(optimizer.param_groups):
                reason = None if left is None else left.reason(group)
                if reason is None:
                    of_plan.append((index, group))
                    continue
                of_torch.append(group)
                if left.is_news(index, reason):
                    name = self._name(number, index)
                    logger.info("%s steps in torch's own way from now on: %s", name, reason)
            self._groups.append(of_plan)
            if of_torch:
                self._left.append((number, of_torch))

    def _leave_what_is_refused(self, error: Exception) -> bool:
        """Leaves to torch what the native step refused; whether that makes another attempt."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # what a graph captures is not to change by itself
        candidates = [
            (number, optimizer, index, group)
            for number, optimizer in enumerate(self._optimizers())
            if optimizer._left_to_torch is not None
            for index, group in self._groups[number]
            if not group.get("lazy")  # which torch would step otherwise
        ]
        found = False
        for number, optimizer, index, group in candidates:
            left = optimizer._left_to_torch
            if left.reason(group) is not None:
                found = True
            elif (refused := self._refusal(number, optimizer, index, group)) is not None:
                left.take(group, refused)
                found = True
        if not found and not isinstance(error, RuntimeError):
            # A refusal, not a failure: of what no group is to blame for by itself, such as memory
            # that two parameters share.
            for _, optimizer, _, group in candidates:
                optimizer._left_to_torch.take(group, error)
            found = bool(candidates)
        self._drop_plan()
        return found

    def _refusal(
        self, number: int, optimizer: FusedOptimizer, index: int, group: Group
    ) -> Exception | None:
        """What a plan has against a group by itself."""
        source, _ = self._source(number, optimizer, index, group)
        try:
            native.BoundPlan([source], [optimizer], [], self._device_values)
        except _REFUSALS as error:
            return error
        return None

    def _check_places(self) -> None:
        """Raises if the param groups are at other places than when schedules were given to them."""
        now = [len(each.param_groups) for each in self._optimizers()]
        then = self._groups_then
        if now[: len(then) - 1] != then[:-1] or now[len(then) - 1] < then[-1]:
            raise RuntimeError(
                f"device schedules: the optimizers had {then} param groups, and now have {now}, so "
                "that schedules would drive others; use the combined optimizer's add_param_group, "
                "which adds them at the end"
            )

    @_not_compiled
    def _step_with_new_state(
        self, grad_scale: Tensor | None, found_inf: Tensor | None, unscale_by: Tensor | None
    ) -> Any:
        """Makes the state that is missing and steps; takes it back if the step is not taken."""
        slots = [
            (optimizer, group, param)
            for optimizer, groups in zip(self._optimizers(), self._groups, strict=True)
            for _, group in groups
            for param in group["params"]
        ]
        first = self._plan.slots_without_state
        memory = StateMemory()
        elsewhere = strays(self._optimizers())
        made, moved, brought = [], [], set()
        for index in first:
            optimizer, group, param = slots[index]
            owner = elsewhere.get(param)
            if owner is not None:
                moved.append((owner.state, param))
            if type(owner) is type(optimizer):
                brought.add(index)
                made.append((optimizer.state, param, owner.state[param]))
            else:
                made.append((optimizer.state, param, new_state(optimizer, group, param, memory)))
        before = [dict(states[param]) if param in states else None for states, param, _ in made]
        plan, outcome = self._plan, None
        try:
            for states, param, state in made:
                states.setdefault(param, {}).update(state)
            self._build([index for index in first if index not in brought])
            outcome = self._run(grad_scale, found_inf, unscale_by)
        finally:
            if outcome != native.STEPPED:
                if self._plan is not plan:
                    self._drop_plan()
                for (states, param, _), entries in zip(made, before, strict=True):
                    if entries is None:
                        states.pop(param, None)
                    else:
                        states[param].clear()
                        states[param].update(entries)
        for states, param in moved if outcome == native.STEPPED else ():
            del states[param]
        return outcome
