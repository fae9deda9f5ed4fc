"""The state of a combined optimizer as one mapping that can be edited."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import Any

from torch import Tensor
from torchrec.optim.fused import FusedOptimizer

from recap_fast.keyed.parts import Combined
from recap_fast.keyed.torch_format import asked_to_make_state
from recap_fast.keyed.walk import leaves
from recap_fast.state.new import has_state


class _Items(ItemsView[Tensor, Any]):
    _mapping: StateView

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        return self._mapping.entries()


class _Values(ValuesView[Any]):
    _mapping: StateView

    def __iter__(self) -> Iterator[Any]:
        return (entries for _, entries in self._mapping.entries())


def _holds(entries: Any) -> bool:
    return not isinstance(entries, Mapping) or has_state(entries)


def _can_reset(leaf: FusedOptimizer) -> bool:
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    return isinstance(getattr(leaf, "_emb_module", None), SplitTableBatchedEmbeddingBagsCodegen)


def _reset(leaf: FusedOptimizer) -> None:
    from recap_fast.embeddings.fused_optimizer import reset_state  # which imports this package

    reset_state(leaf._emb_module)


class StateView(MutableMapping[Tensor, Any]):
    """The state of every parameter that has any; editing it edits the optimizers inside.

    It behaves as the `state` of a torch optimizer does: a parameter without state reads as a new,
    empty dict, and what is taken away is made anew by the next step.

    The state of fused tables is memory of FBGEMM's kernels. `clear` resets it; it cannot be taken
    from a single table, or replaced, which raises ValueError. Fill its tensors instead.
    """

    def __init__(self, optimizer: Combined) -> None:
        self._optimizer = optimizer

    def _sources(self) -> list[MutableMapping[Tensor, Any]]:
        """All mappings that hold state, those of leaves first."""
        found: dict[int, MutableMapping[Tensor, Any]] = {}
        for owner in self._optimizer.state_owners:
            states = owner.state
            if not isinstance(states, StateView):  # of what is inside a wrapper, which is walked
                found.setdefault(id(states), states)
        return list(found.values())

    def _fused(self) -> list[FusedOptimizer]:
        """Fused embedding optimizers that keep anything."""
        return [leaf for leaf in self._optimizer.fused_leaves if any(leaf.state.values())]

    def _holder(self, param: Tensor) -> MutableMapping[Tensor, Any] | None:
        """The mapping that has the state of a parameter; None if there is none.

        Where the parameter went to a group of another optimizer, a dict of nothing may be left.
        """
        found = [states for states in self._sources() if param in states]
        return next((each for each in found if _holds(each[param])), found[0] if found else None)

    def _home(self, param: Tensor) -> MutableMapping[Tensor, Any]:
        """The mapping that has, or is to have, the state of a parameter."""
        states = self._holder(param)
        if states is not None:
            return states
        for leaf in self._optimizer.leaves:
            if any(param is other for group in leaf.param_groups for other in group["params"]):
                return leaf.state
        # One that is in no group now, or never, as that of torchrec's warm-up; or a user's name.
        parts = (part for _, part in self._optimizer.optimizers)
        names = (part for part in parts if any(param is p for p in part.params.values()))
        for leaf in (*(leaf for part in names for leaf in leaves(part)), *self._optimizer.leaves):
            if not isinstance(leaf, FusedOptimizer):
                return leaf.state
        raise KeyError("the optimizer has no param group for this parameter")

    def entries(self) -> Iterator[tuple[Tensor, Any]]:
        """Parameters and their state."""
        found: dict[Tensor, Any] = {}
        for states in self._sources():
            for param, entries in states.items():
                if param not in found or (_holds(entries) and not _holds(found[param])):
                    found[param] = entries
        return iter(found.items())

    def items(self) -> ItemsView[Tensor, Any]:
        """As of a dict; the entries are looked up once, not for each parameter."""
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """As of a dict; see `items`."""
        return _Values(self)

    def __iter__(self) -> Iterator[Tensor]:
        return (param for param, _ in self.entries())

    def __len__(self) -> int:
        return sum(1 for _ in self.entries())

    def __bool__(self) -> bool:
        if asked_to_make_state():
            self._optimizer.prepare_for_torch_format()
            return True
        return any(self._sources())

    def __contains__(self, param: object) -> bool:
        return any(param in states for states in self._sources())

    def get(self, param: Tensor, default: Any = None) -> Any:
        """As of a dict: a parameter without state reads as `default`, and gets no dict."""
        states = self._holder(param)
        return default if states is None else states[param]

    def __getitem__(self, param: Tensor) -> Any:
        return self._home(param)[param]

    def __setitem__(self, param: Tensor, entries: Any) -> None:
        self._check_unfused(param, entries)
        self._home(param)[param] = entries

    def __delitem__(self, param: Tensor) -> None:
        self._check_unfused(param, None)
        found = [states for states in self._sources() if param in states]
        if not found:
            raise KeyError(param)
        for states in found:
            del states[param]

    def clear(self) -> None:
        """Takes the state of all parameters away, and resets that of fused tables.

        Raises:
            ValueError: A fused optimizer is of a class that cannot be reset; nothing has changed.
        """
        self.replace({})

    def replace(self, state: Mapping[Tensor, Any]) -> None:
        """Gives every parameter the state that it has in `state`, and takes away all other.

        Raises:
            ValueError: It has another state for a fused table; nothing has changed.
        """
        new = dict(state.items())
        fused = self._fused()
        resets = [leaf for leaf in fused if not any(param in new for param in leaf.state)]
        for leaf in fused:
            if leaf not in resets:
                for param in leaf.state:
                    self._check_unfused(param, new.pop(param, None))
            elif not _can_reset(leaf):
                name = self._optimizer.name_of(next(iter(leaf.state)))
                raise ValueError(
                    f"{type(leaf).__name__} cannot reset the state of {name}, which is memory of "
                    "FBGEMM's kernel: fill its tensors instead, as with zeros, and delete the "
                    "state of other parameters one by one"
                )
        for param in new:
            self._home(param)  # or it raises before anything has changed
        untouched = {id(leaf.state) for leaf in fused}
        for states in self._sources():
            if id(states) not in untouched:
                states.clear()
        for leaf in resets:
            _reset(leaf)
        for param, entries in new.items():
            self[param] = entries

    def _check_unfused(self, param: Tensor, entries: Mapping[str, Any] | None) -> None:
        """Raises if this is a fused table, unless `entries` are those that it has."""
        for leaf in self._fused():
            if param not in leaf.state:
                continue
            own = leaf.state[param]
            if (
                isinstance(entries, Mapping)
                and entries.keys() == own.keys()
                and all(entries[key] is value for key, value in own.items())
            ):
                return
            raise ValueError(
                f"the state of {self._optimizer.name_of(param)} is memory of FBGEMM's kernel, and "
                "cannot be replaced or deleted: fill its tensors instead, as with zeros; "
                "state.clear() resets all state"
            )

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)  # a copy is no view
