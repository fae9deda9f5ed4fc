"""Steps the param groups of one or several fused optimizers as one plan."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recap_fast._native import native
from recap_fast.state import new_state

if TYPE_CHECKING:
    from recap_fast.optim.fused import FusedOptimizer

_Outcome = native.Outcome


class Stepper:
    """Owns the plan over all param groups of ``optimizers`` and keeps it up to date.

    In the steady state `step` is one native call. The plan is rebuilt when the call reports that
    something changed since: a tensor moved or replaced, a param group or state added, a state dict
    loaded.

    Args:
        optimizers: stepped together, in this order.
        names: what errors call a parameter; those without a name are called by their position.
    """

    def __init__(
        self, optimizers: Sequence[FusedOptimizer], names: Mapping[Tensor, str] | None = None
    ) -> None:
        # Weak: an optimizer owns its stepper, and a cycle would keep its state until a collection.
        self._optimizers = tuple(weakref.ref(optimizer) for optimizer in optimizers)
        self._names = names or {}
        self._plan: Any = None
        self._sources: list[tuple[weakref.ref[FusedOptimizer], Any, Any]] = []

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Updates every parameter that has a gradient.

        Args:
            grad_scale: one element; gradients are divided by it. None means 1.
            found_inf: one element; if it is not zero, nothing is written.

        Raises:
            Exception: naming the parameter or param group that cannot be stepped. Parameters,
                states and step counts are then as they were.
        """
        if self._rebound():
            self._build()
        outcome = self._plan.step(grad_scale, found_inf)
        if outcome == _Outcome.stale:
            self._build()
            outcome = self._plan.step(grad_scale, found_inf)
        if outcome == _Outcome.needs_state:
            self._step_with_new_state(grad_scale, found_inf)
        elif outcome == _Outcome.stale:
            raise RuntimeError("the param groups changed while they were being stepped")

    def _rebound(self) -> bool:
        """Whether an optimizer's `state` or `param_groups` is another object than the plan's."""
        if self._plan is None:
            return True
        for reference, state, groups in self._sources:
            optimizer = reference()
            if optimizer.state is not state or optimizer.param_groups is not groups:
                return True
        return False

    def _alive(self) -> list[FusedOptimizer]:
        return [optimizer for reference in self._optimizers if (optimizer := reference())]

    def _slots(self) -> list[tuple[FusedOptimizer, dict[str, Any], Tensor]]:
        return [
            (optimizer, group, param)
            for optimizer in self._alive()
            for group in optimizer.param_groups
            for param in group["params"]
        ]

    def _build(self, first: Sequence[int] = ()) -> None:
        self._plan = None
        sources = []
        optimizers = self._alive()
        for number, optimizer in enumerate(optimizers):
            where = f" of optimizer {number}" if len(optimizers) > 1 else ""
            for index, group in enumerate(optimizer.param_groups):
                name = f"param group {index}{where}"
                names = [
                    self._names.get(param) or f"{i} of {name}"
                    for i, param in enumerate(group["params"])
                ]
                own_names = group.get("param_names", ())
                names[: len(own_names)] = own_names[: len(names)]
                sources.append(
                    native.GroupSource(optimizer.algorithm, name, group, optimizer.state, names)
                )
        lists = [optimizer.param_groups for optimizer in optimizers]
        self._plan = native.BoundPlan(sources, lists, list(first))
        self._sources = [(weakref.ref(o), o.state, o.param_groups) for o in optimizers]

    def _step_with_new_state(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        indices = self._plan.slots_without_state
        slots = self._slots()
        made = [(slots[i], new_state(*slots[i])) for i in indices]
        try:
            for (optimizer, _, param), state in made:
                optimizer.state[param].update(state)
            self._build(first=indices)
            self._plan.step(grad_scale, found_inf)
        except BaseException:
            for (optimizer, _, param), state in made:
                for key in state:
                    optimizer.state[param].pop(key, None)
            raise
