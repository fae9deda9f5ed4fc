"""States of a state dict in the dtypes that param groups ask for.

`torch.optim.Optimizer.load_state_dict` converts every state to the dtype of its parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from recap_fast.state.codes import SCALES, decoded, encoded, is_encoded, scale_name
from recap_fast.state.formats import (
    REST,
    added_states,
    check_formats,
    has_formats,
    is_rounded_by_chance,
    new_rest,
    renew,
    rest_name,
    state_dtype_of,
)
from recap_fast.state.memory import StateMemory
from recap_fast.state.new import counts_steps


class _AsSaved:
    """A tensor that torch takes for none."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def in_own_formats(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Has `load_state_dict` bring states to the formats of the param groups of ``optimizer``.

    Tensors are hidden from torch after all hooks that others have registered for before, and are
    there again before those for after. Where nothing is stored in a format of its own, here and in
    the state dict, torch converts them.
    """
    is_formatted = False

    def hide(_: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal is_formatted
        groups = [*optimizer.param_groups, *state_dict["param_groups"]]
        is_formatted = any(map(has_formats, groups))
        if not is_formatted:
            return None
        hidden = {
            key: _with_hidden(entries) if isinstance(entries, Mapping) else entries
            for key, entries in state_dict["state"].items()
        }
        return {**state_dict, "state": hidden}

    def fit(_: Any) -> None:
        fit_formats(optimizer, drop_counts=is_formatted)

    handles = [
        optimizer.register_load_state_dict_pre_hook(hide),
        optimizer.register_load_state_dict_post_hook(fit, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_hidden(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _AsSaved(value) if isinstance(value, Tensor) and key != "step" else value
        for key, value in entries.items()
    }


def with_own_formats(
    saved: Mapping[str, Any], own: Mapping[str, Any], param: Tensor, has_counts: bool
) -> dict[str, Any]:
    """Returns saved state with the entries that formats ask for here, and without others of theirs.

    What was not saved is as before the first step. Of dtypes, only that of codes is changed: states
    are codes where those here are.

    Args:
        saved: of ``param``, by name.
        own: the same of the optimizer, or what it will have.
        param: as it is now.
        has_counts: whether the optimizer counts steps in any case.
    """
    added = added_states(has_counts)
    coded = dict(saved)
    for name, entry in own.items():
        if isinstance(entry, Tensor) and isinstance(coded.get(name), Tensor):
            _code(coded, name, entry.dtype)
    found = {name: value for name, value in coded.items() if name in own or name not in added}
    for name in added & own.keys() - found.keys():
        if isinstance(own[name], Tensor):
            found[name] = renew(name, torch.empty_like(own[name]), param)
    return found


def take_formats(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> None:
    """Gives all param groups the format options that they lack, and converts what there is.

    Raises:
        TypeError, ValueError: parameters cannot be stored so.
    """
    optimizer.defaults.update(options)
    for group in optimizer.param_groups:
        for key, value in options.items():
            group.setdefault(key, value)
        check_formats(group)
    fit_formats(optimizer)


def fit_formats(optimizer: torch.optim.Optimizer, drop_counts: bool = False) -> None:
    """Brings the states of ``optimizer`` to the formats of its param groups.

    Args:
        optimizer: as it was made, or has just loaded.
        drop_counts: whether step counts are dropped that neither formats nor algorithm ask for.
    """
    memory = StateMemory(goes_on=True)
    drops_counts = drop_counts and not counts_steps(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param)
            if isinstance(state, dict) and state:
                _fit(group, param, state, memory, drops_counts)


def _fit(
    group: Mapping[str, Any],
    param: Tensor,
    state: dict[str, Any],
    memory: StateMemory,
    drops_counts: bool,
) -> None:
    own_rest = rest_name(group, param)
    for name in REST.values():
        if name != own_rest:
            state.pop(name, None)
    saved = {name for name, value in state.items() if isinstance(value, _AsSaved)}
    for name in saved:
        state[name] = state[name].tensor
    for name in [*state]:
        value = state.get(name)
        if name == "step" or not isinstance(value, Tensor):
            continue
        is_encoded_here = is_encoded(state, name)
        is_converted = name not in (own_rest, *SCALES) and param.is_floating_point()
        is_converted &= value.is_floating_point() or is_encoded_here
        if name in saved or (is_converted and has_formats(group)):
            dtype = state_dtype_of(group, param) if is_converted else value.dtype
            _code(state, name, dtype)
            state[name] = state[name].to(param.device, dtype)
    states = [name for name in state if name not in ("step", own_rest, *SCALES)]
    if own_rest is not None and own_rest not in state:
        state[own_rest] = new_rest(param, memory, len(states))
    if not is_rounded_by_chance(group, param, bool(states)):
        if drops_counts:
            state.pop("step", None)
    elif "step" not in state:
        state["step"] = memory.step_count(0, torch.float32)


def _code(state: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    """Has the state ``name`` be of codes if that is what ``dtype`` means, and else not."""
    if dtype == torch.uint8 and state[name].is_floating_point():
        state[name], state[scale_name(name)] = encoded(name, state[name])
    elif dtype != torch.uint8 and is_encoded(state, name):
        state[name] = decoded(name, state[name], state.pop(scale_name(name)))
