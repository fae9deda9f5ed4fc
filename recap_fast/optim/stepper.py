"""Steps the param groups of one or several fused optimizers as one plan."""

from __future__ import annotations

import functools
import logging
import math
import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from recap_fast._native import native
from recap_fast.clipping import NormParts, clip_on_device
from recap_fast.optim.left_to_torch import is_native_only
from recap_fast.optim.stepped import Stepped
from recap_fast.optim.torch_step import torch_steps
from recap_fast.state.formats import added_states
from recap_fast.state.memory import Shares, StateMemory, shares_of
from recap_fast.state.new import counts_steps, new_state, strays

if TYPE_CHECKING:
    from recap_fast._C import BoundPlan, NewState
    from recap_fast.schedules.device import DeviceRates


logger = logging.getLogger("recap_fast")

Group = dict[str, Any]
_REFUSALS = (RuntimeError, TypeError, ValueError, KeyError)
# Another thread may load a state dict between building a plan and stepping it, and do so again.
_MAX_ATTEMPTS = 10

# For what a step seldom does: `torch.compile` would trace the Python in it, tensor by tensor, and
# compile graphs that run once. (`torch.compiler.disable` would import the compiler here already.)
_not_compiled = torch._disable_dynamo
_GRAD: Any = Tensor.grad  # the property itself


class _Built(NamedTuple):
    """A plan and what belongs to it: all that another replaces, in one assignment."""

    plan: BoundPlan
    groups: list[list[tuple[int, Group]]]  # in the plan, by optimizer
    left: list[tuple[int, list[Group]]]  # left to torch, with the optimizer's number
    norm_parts: NormParts | None
    computed_grads: list[Tensor]
    is_simple: bool  # a step is nothing but the call of the plan


class Stepper:
    """Owns the plan over all param groups of ``optimizers`` and keeps it up to date.

    In the steady state `step` is one native call. The plan is rebuilt when the call reports that
    something changed since: a tensor moved or replaced, a param group or state added, a state dict
    loaded. Groups that an optimizer leaves to torch take torch's step within the call.

    A step is taken whole or not at all, wherever it is interrupted: the call knows whether it was,
    and puts the state that a first step makes where it belongs. What is assigned here is needed by
    no step: without it, another plan is built.

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
        optimizers: Sequence[Stepped],
        names: Sequence[Mapping[Tensor, str]] | None = None,
        max_norm: float | None = None,
    ) -> None:
        self._max_norm = max_norm
        self.grad_norm: float | Tensor | None = None
        self._built: _Built | None = None
        self._simple_plan: BoundPlan | None = None  # that of `_built`, if it is all of a step
        self._captured: list[BoundPlan] = []
        self._device_values = False
        self._scaled_on_device = False  # grad_scale or found_inf of some step
        self._device_rates: Sequence[DeviceRates] = ()
        self._building = threading.RLock()  # to step itself, threads take turns in the plan
        self._failed_elsewhere = False  # the last step: not the plan, but what is called by it
        self.step_these(optimizers, names)

    def step_these(
        self, optimizers: Sequence[Stepped], names: Sequence[Mapping[Tensor, str]] | None
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

    @property
    def _plan(self) -> BoundPlan | None:
        return None if self._built is None else self._built.plan

    @property
    def _left(self) -> list[tuple[int, list[Group]]]:
        return [] if self._built is None else self._built.left

    def step_plainly(self) -> bool:
        """Takes a step that is one native call and nothing else: with no hooks, scaling or others.

        False if it is more, and was not taken.
        """
        plan = self._simple_plan
        return plan is not None and plan.step_plainly()

    def step(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale_grads: bool = False,
        others: Sequence[Callable[[], Any]] = (),
    ) -> None:
        """Updates every parameter that has a gradient; threads that call it take turns.

        Args:
            grad_scale: one element; gradients are divided by it. None means 1.
            found_inf: one element; if it is not zero, nothing is written.
            unscale_grads: whether gradients are divided by it in memory, too.
            others: steps of other optimizers, to be taken together with this one: they are called
                when nothing stands against it any more, and before anything is written.

        Raises:
            Exception: naming the parameter or param group that cannot be stepped. Parameters,
                states and step counts are then as they were.
        """
        unscale_by = grad_scale if unscale_grads else None
        if self._may_leave:
            with self._building:  # which may change what is left to torch
                outcome = self._step_or_leave(grad_scale, found_inf, unscale_by, others)
        else:
            outcome = self._step_natively(grad_scale, found_inf, unscale_by, others)
        if outcome == native.SKIPPED:
            for other in others:
                other()

    def _step_or_leave(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale_by: Tensor | None,
        others: Sequence[Callable[[], Any]],
    ) -> int:
        while True:
            try:
                return self._step_natively(grad_scale, found_inf, unscale_by, others)
            except _REFUSALS as error:
                if self._failed_elsewhere or not self._leave_what_is_refused(error):
                    raise

    def _step_natively(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale_by: Tensor | None,
        others: Sequence[Callable[[], Any]],
    ) -> int:
        for plan in self._captured:
            plan.check_captured_rates()
        if not self._scaled_on_device and _is_any_on_cuda(grad_scale, found_inf):
            self._scaled_on_device = True
            self._drop_plan()
        built = self._ready()
        if self._max_norm is not None and built.plan.has_device_plans:
            grad_scale, found_inf = self._clip_on_device(self._max_norm, grad_scale, found_inf)
            built = self._ready()
        arguments = (grad_scale, found_inf, unscale_by, others)
        outcome = self._run(built, *arguments)
        if outcome == native.STEPPED:
            return outcome
        with self._building:
            if self._built is None:
                outcome = native.STALE
            elif self._built is not built:  # another thread's, which others may be stepping
                outcome = self._run(self._built, *arguments)
            attempts = 0
            while outcome not in (native.STEPPED, native.SKIPPED) and attempts < _MAX_ATTEMPTS:
                attempts += 1
                if outcome == native.STALE:
                    outcome = self._run(self._keep(self._build()), *arguments)
                if outcome == native.NEEDS_STATE:
                    outcome = self._run_with_new_states(arguments)
        if outcome not in (native.STEPPED, native.SKIPPED):
            raise RuntimeError("the param groups changed while they were being stepped")
        norm = self.grad_norm
        if outcome == native.SKIPPED and isinstance(norm, float) and not math.isfinite(norm):
            logger.warning("the norm of the gradients is %s: no parameter was updated", norm)
        return outcome

    def _run_with_new_states(self, arguments: tuple[Any, ...]) -> int:
        """A step by another plan, with the state that the present one misses."""
        states = [optimizer.state for optimizer in self._optimizers()]
        built = self._build(self._new_states())
        now = [optimizer.state for optimizer in self._optimizers()]
        if not all(map(operator.is_, states, now)):
            return native.STALE  # or what was made would replace what another thread has loaded
        built.plan.adopt()
        outcome = self._run(built, *arguments)
        if outcome == native.STEPPED:
            self._keep(built)
        # New groups need state too, of which the plan before knows nothing.
        return native.STALE if outcome == native.NEEDS_STATE else outcome

    def _ready(self) -> _Built:
        """The plan, built if there is none."""
        built = self._built
        if built is None:
            with self._building:
                built = self._built  # or another thread would step a plan of its own meanwhile
                if built is None:
                    built = self._keep(self._build())
        return built

    def _run(
        self,
        built: _Built,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale_by: Tensor | None,
        others: Sequence[Callable[[], Any]],
    ) -> int:
        self._failed_elsewhere = False
        plan = built.plan
        self._show_grads(built)
        if built.left and (found_inf is None or found_inf.item() == 0):
            others = [*others, *self._steps_of_left(built, grad_scale)]
        try:
            outcome = plan.step(grad_scale, found_inf, unscale_by, others)
        except BaseException:
            if built.left and plan.failed_elsewhere:
                for number, groups in built.left:  # once it is mended, all is native
                    if (left := self._optimizer(number)._left_to_torch) is not None:
                        left.take_back(groups)
                self._drop_plan()
            self._failed_elsewhere = plan.failed_elsewhere
            raise
        if self._max_norm is not None and not plan.has_device_plans:
            self.grad_norm = plan.grad_norm
        return outcome

    def _steps_of_left(self, built: _Built, grad_scale: Tensor | None) -> list[Callable[[], Any]]:
        steps: list[Callable[[], Any]] = []
        for number, groups in built.left:
            steps += torch_steps(self._optimizer(number), groups, grad_scale)
        return steps

    def _show_grads(self, built: _Built) -> None:
        """Has the native call see gradients that a subclass computes when asked for `grad`.

        So do torchrec's slices of the tensor that several unfused tables are in. In C++, where the
        call looks, they have none.
        """
        for param in built.computed_grads:
            _GRAD.__set__(param, param.grad)

    @_not_compiled
    def _clip_on_device(
        self, max_norm: float, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        built = self._ready()
        self._show_grads(built)
        parts, sums = _sums_of_squares(built)
        if not sums:
            parts, sums = _sums_of_squares(self._keep(self._build()))
        if found_inf is not None:
            # Those that share a part may not have seen it, and must skip the step too.
            skip = found_inf.to(sums[0].device).reshape(()) != 0
            sums = [torch.where(skip, math.inf, own) for own in sums]
        norm = parts.total(sums).sqrt()
        self.grad_norm = norm if grad_scale is None else norm / grad_scale.to(norm).reshape(())
        return clip_on_device(norm, max_norm, grad_scale)

    def move_with(self, device_rates: Sequence[DeviceRates]) -> None:
        """From now on, every step uses ``device_rates``, and moves them on."""
        self._device_rates = device_rates
        if device_rates:  # of groups by their position in the plan, in which then all must be
            self._may_leave = False
        self._groups_then = [len(each.param_groups) for each in self._optimizers()]
        self._drop_plan()

    def check_captured_rates(self) -> None:
        """Raises RuntimeError if a rate on the host differs from that in a captured CUDA graph."""
        plans = [*self._captured] if self._built is None else [*self._captured, self._built.plan]
        for plan in plans:
            plan.check_captured_rates()

    def _optimizers(self) -> list[Stepped]:
        return [self._optimizer(number) for number in range(len(self._references))]

    def _optimizer(self, number: int) -> Stepped:
        found = self._references[number]()
        assert found is not None, "an optimizer lives as long as what steps it"
        return found

    def _drop_plan(self) -> None:
        plan = self._plan
        if plan is not None and plan.is_captured and plan not in self._captured:
            self._captured.append(plan)  # the graph goes on reading its memory
        self._simple_plan = None
        self._built = None

    def _keep(self, built: _Built) -> _Built:
        """From now on, steps are those of ``built``."""
        built.plan.adopt()
        self._drop_plan()
        self._built = built
        if built.is_simple and not self._captured:
            self._simple_plan = built.plan
        return built

    @_not_compiled
    def _build(self, new_states: Sequence[NewState] = ()) -> _Built:
        """Builds a plan; the present one stays, and so does all that is the user's."""
        self.check_captured_rates()
        if self._device_rates:
            self._check_places()
        sources = []
        params: list[Tensor] = []
        all_names: list[str] = []
        optimizers = self._optimizers()
        shares = functools.cache(functools.partial(_shares, optimizers))
        for optimizer in optimizers:
            optimizer._place_large_state(shares)
        groups, left = self._divide(optimizers)
        for number, optimizer in enumerate(optimizers):
            for index, group in groups[number]:
                source, names = self._source(number, optimizer, index, group)
                params += group["params"]
                all_names += names
                sources.append(source)
        max_norm = self._max_norm
        parts = None if max_norm is None else NormParts(params, all_names)
        # What scales gradients is on the device, and a step that read it there would wait.
        if (parts is not None or self._scaled_on_device) and native.any_on_cuda(sources):
            self._device_values = True
        plan = native.BoundPlan(sources, optimizers, list(new_states), self._device_values)
        if max_norm is not None and parts is not None and not plan.has_device_plans:
            total = None if parts.is_local else parts.total
            plan.set_clipping(max_norm, parts.part_of_param, parts.count, total)
        for rates in self._device_rates:
            plan.set_schedules(rates.groups, rates.schedules, rates.rates, rates.step)
        computed = [each for each in params if type(each).grad is not Tensor.grad]
        is_simple = not (parts or self._may_leave or computed)
        return _Built(plan, groups, left, parts, computed, is_simple)

    def _name(self, number: int, index: int) -> str:
        """What errors call a param group."""
        where = f" of optimizer {number}" if len(self._references) > 1 else ""
        return f"param group {index}{where}"

    def _source(
        self, number: int, optimizer: Stepped, index: int, group: Group
    ) -> tuple[Any, list[str]]:
        """A group for a plan, and the names of its parameters."""
        name, names_of = self._name(number, index), self._names[number]
        names = [names_of.get(param) or f"{i} of {name}" for i, param in enumerate(group["params"])]
        own_names = group.get("param_names", ())
        names[: len(own_names)] = own_names[: len(names)]
        clears = optimizer._clear_grads
        source = native.GroupSource(
            optimizer.algorithm, name, group, optimizer.state, names, clears
        )
        return source, names

    def _divide(
        self, optimizers: Sequence[Stepped]
    ) -> tuple[list[list[tuple[int, Group]]], list[tuple[int, list[Group]]]]:
        """Settles which groups the plan is of, and which are left to torch."""
        native_groups: list[list[tuple[int, Group]]] = []
        left_groups: list[tuple[int, list[Group]]] = []
        for number, optimizer in enumerate(optimizers):
            left = optimizer._left_to_torch if self._may_leave else None
            if left is not None:
                left.forget_others(optimizer.param_groups)
            of_plan: list[tuple[int, Group]] = []
            of_torch: list[Group] = []
            for index, group in enumerate(optimizer.param_groups):
                if left is None or (reason := left.reason(group)) is None:
                    of_plan.append((index, group))
                    continue
                of_torch.append(group)
                if left.is_news(index, reason):
                    name = self._name(number, index)
                    logger.info("%s steps in torch's own way from now on: %s", name, reason)
            native_groups.append(of_plan)
            if of_torch:
                left_groups.append((number, of_torch))
        return native_groups, left_groups

    def _leave_what_is_refused(self, error: Exception) -> bool:
        """Leaves to torch what the native step refused; whether that makes another attempt."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # what a graph captures is not to change by itself
        optimizers = self._optimizers()
        # Of the plan that refused: to divide them again asks for what gradients they have now.
        groups = self._divide(optimizers)[0] if self._built is None else self._built.groups
        candidates = [
            (number, optimizer, left, index, group)
            for number, optimizer in enumerate(optimizers)
            if (left := optimizer._left_to_torch) is not None
            for index, group in groups[number]
            if not is_native_only(group)
        ]
        found = False
        for number, optimizer, left, index, group in candidates:
            if left.reason(group) is not None:
                found = True
            elif (refused := self._refusal(number, optimizer, index, group)) is not None:
                left.take(group, refused)
                found = True
        if not found and not isinstance(error, RuntimeError):
            # A refusal, not a failure: of what no group is to blame for by itself, such as memory
            # that two parameters share.
            for _, _, left, _, group in candidates:
                left.take(group, error)
            found = bool(candidates)
        self._drop_plan()
        return found

    def _refusal(
        self, number: int, optimizer: Stepped, index: int, group: Group
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
    def _new_states(self) -> list[NewState]:
        """Makes the state that is missing; the step, if it is taken, puts it where it belongs."""
        built, optimizers = self._ready(), self._optimizers()
        slots = [
            (optimizer, group, param)
            for optimizer, groups in zip(optimizers, built.groups, strict=True)
            for _, group in groups
            for param in group["params"]
        ]
        memory = StateMemory(shares=_shares(optimizers))
        elsewhere = strays(optimizers)
        made = []
        for index in built.plan.slots_without_state:
            optimizer, group, param = slots[index]
            owner = elsewhere.get(param)
            is_new = owner is None or type(owner) is not type(optimizer)
            if owner is None or is_new:
                entries = new_state(optimizer, group, param, memory)
                # Beside a momentum buffer that is yet to come.
                present = optimizer.state.get(param) or {}
                kept = added_states(counts_steps(optimizer)) & entries.keys() & present.keys()
                entries |= {name: present[name] for name in kept}
            else:
                entries = dict(owner.state[param])
            left_behind = None if owner is None else owner.state
            made.append(native.NewState(index, entries, is_new, left_behind))
        return made


def _shares(optimizers: Sequence[Stepped]) -> Shares:
    """Which part of a step each parameter has a part in."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return shares_of(param for group in groups for param in group["params"])


def _is_any_on_cuda(*scalars: Tensor | None) -> bool:
    return any(native.is_on_cuda(scalar) for scalar in scalars if scalar is not None)


def _sums_of_squares(built: _Built) -> tuple[NormParts, list[Tensor]]:
    """How the norm that is clipped by is divided, and the sums over the parts, on the device."""
    parts = built.norm_parts
    assert parts is not None, "a plan of a stepper that clips has them"
    return parts, built.plan.sums_of_squares(parts.part_of_param, parts.count)
