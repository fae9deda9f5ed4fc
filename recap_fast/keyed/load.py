"""What loading a state dict into a combined optimizer takes: new state, checks, options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrec.optim.warmup import WarmupOptimizer

from recap_fast.keyed.new_state import new_state_of
from recap_fast.keyed.parts import Combined
from recap_fast.keyed.walk import is_dense, walk
from recap_fast.names import TABLES
from recap_fast.state.fit import misfits
from recap_fast.state.formats import FORMAT_OPTIONS, SEED, added_states
from recap_fast.state.loading import with_own_formats
from recap_fast.state.memory import StateMemory
from recap_fast.state.new import counts_steps, has_state
from recap_fast.state.options import EXECUTION_OPTIONS, option_like


class NewState(NamedTuple):
    """A parameter without state, and the state to give it."""

    states: MutableMapping[Tensor, Any]  # the optimizer's, in which it belongs
    group: Mapping[str, Any]
    param: Tensor
    entries: dict[str, Tensor]


def new_states(optimizer: Combined, wanted: Callable[[Tensor], bool]) -> list[NewState]:
    """The state to give to each wanted dense parameter that has none; nothing is changed.

    Raises:
        TypeError: An optimizer inside is of a class whose state is not known.
    """
    memory = StateMemory()
    return [
        NewState(owner.state, group, param, new_state_of(owner, group, param, memory))
        for owner, group, param in _stepped(optimizer)
        if wanted(param) and not has_state(owner.state.get(param))
    ]


def _stepped(optimizer: Combined) -> Iterator[tuple[Any, Mapping[str, Any], Tensor]]:
    """Each parameter that `step` changes, with its optimizer and param group; warm-ups first."""
    for wrapper in (each for _, part in optimizer.optimizers for each in walk(part)):
        if isinstance(wrapper, WarmupOptimizer):
            yield wrapper, {}, wrapper._warmup_param
    for leaf in filter(is_dense, optimizer.leaves):
        for group in leaf.param_groups:
            for param in group["params"]:
                yield leaf, group, param


def as_tables_have_it(
    saved: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Returns saved state with the step counts that tables have here, fused or not.

    Otherwise the state of a table is the same. A fused table that counts forward passes has a
    `step` of one element; one that does not has none, and an unfused table a scalar.

    Args:
        saved: state to be loaded, by parameter name.
        state: what there is here, by parameter name.
    """
    found = dict(saved)
    for name, own in state.items():
        entries = saved.get(name)
        if not isinstance(entries, Mapping) or not entries or TABLES not in name.split("."):
            continue
        steps = {
            key: step
            for key, each in (("own", own), ("saved", entries))
            if isinstance(step := each.get("step"), torch.Tensor)
        }
        rest = {key: value for key, value in entries.items() if key != "step"}
        if "own" in steps and "saved" in steps and steps["own"].numel() == steps["saved"].numel():
            found[name] = {**entries, "step": steps["saved"].reshape(steps["own"].shape)}
        elif "own" in steps and "step" not in entries and own.keys() - {"step"} == rest.keys():
            found[name] = {**entries, "step": torch.zeros_like(steps["own"])}
        elif "saved" in steps and "step" not in own and own.keys() == rest.keys():
            found[name] = rest
    return found


def as_formats_have_it(
    optimizer: Combined,
    names: Mapping[int, str],
    saved: Mapping[str, Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """Returns saved state with the entries that the formats of the param groups here ask for.

    Args:
        optimizer: to load into.
        names: of its parameters, by id.
        saved: state to be loaded, by parameter name.
        state: what there is here, or will be.
    """
    found = dict(saved)
    for owner, _, param in _stepped(optimizer):
        if isinstance(owner, WarmupOptimizer):
            continue
        own, entries = state.get(param, {}), saved.get(names[id(param)])
        counted = counts_steps(owner)
        if entries is None and own and own.keys() <= added_states(counted):
            entries = {}  # of one that keeps nothing else
        if isinstance(entries, Mapping):
            found[names[id(param)]] = with_own_formats(entries, own, param, counted)
    return found


def check_state(
    params: Mapping[str, Tensor],
    state: Mapping[Tensor, Mapping[str, Any]],
    saved: Mapping[str, Mapping[str, Any]],
    new: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Raises ValueError if saved and own state differ in names, entries or shapes.

    Args:
        params: all parameters, by name.
        state: what they have.
        saved: what is to be loaded, by name.
        new: what those without state are to have.
    """
    unknown = [name for name in saved if name not in params]
    if unknown and all(isinstance(name, int) for name in saved):
        raise ValueError(
            "the state dict is of a torch.optim optimizer: its keys are numbers, not names. Load "
            "it into a torch.optim optimizer of this model, made as the one that it is from, and "
            "pass what get_optimizer_state_dict(model, that_optimizer) of "
            "torch.distributed.checkpoint.state_dict returns to set_optimizer_state_dict(model, "
            "this_optimizer, ...) of the same module"
        )
    if unknown:
        raise ValueError(
            f"the state dict has state of {len(unknown)} parameter(s) that this optimizer does "
            f"not have, such as {unknown[0]!r}; is it of another model?"
        )
    for name, entries in saved.items():
        if not isinstance(entries, Mapping):
            raise ValueError(
                f"the state of {name!r} is a {type(entries).__name__} in the state dict, but must "
                "be a mapping"
            )
    names = {param: name for name, param in params.items()}
    absent = [names[param] for param, own in state.items() if own and names[param] not in saved]
    if absent:
        raise ValueError(
            f"the state dict has no state of {len(absent)} parameter(s) that this optimizer "
            f"has state of, such as {absent[0]!r}; is it of another model?"
        )
    for name, entries in saved.items():
        _check_entries(name, entries, {**state.get(params[name], {}), **new.get(params[name], {})})


def _check_entries(name: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    found = misfits(_shapes(saved), _shapes(own))
    if found.missing or found.unexpected:
        missing = ", ".join(found.missing) or "none"
        surplus = ", ".join(found.unexpected) or "none"
        raise ValueError(
            f"the state dict has other entries for {name!r} than this optimizer: missing "
            f"{missing}, unknown {surplus}; is it of another algorithm or option?"
        )
    for key, value in saved.items():
        if not isinstance(own[key], Tensor) or (value is None and key == "momentum_buffer"):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{key!r} of {name!r} is a {type(value).__name__} in the state dict, but a "
                "tensor here"
            )
        if key in found.changed and type(own[key]) is Tensor:
            raise ValueError(
                f"{key!r} of {name!r} has shape {tuple(value.shape)} in the state dict, "
                f"but {tuple(own[key].shape)} here; is it of another model?"
            )


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of each entry: the shape of plain tensors, which are whole."""
    return {key: value.shape if type(value) is Tensor else None for key, value in state.items()}


def match_param_groups(
    groups: Sequence[dict[str, Any]],
    saved: Iterable[Mapping[str, Any]],
    names: Mapping[int, str],
) -> list[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Returns groups with the saved ones of the same parameters.

    Args:
        groups: all own param groups.
        saved: those to be loaded, of names.
        names: of the own parameters, by id.

    Raises:
        ValueError: They are of other parameters, or have other options; but for how their state is
            stored.
    """
    own = [(tuple(sorted(names[id(p)] for p in group["params"])), group) for group in groups]
    found = [(tuple(sorted(group["params"])), group) for group in saved]
    own_options = {params: _options(group) for params, group in own}
    saved_options = {params: _options(group) for params, group in found}
    for params in {**own_options, **saved_options}:
        here, there = own_options.get(params), saved_options.get(params)
        if here != there:
            raise ValueError(
                f"the param group of {', '.join(params)} has the options {there} in the state "
                f"dict, but {here} here; is it of another model or algorithm?"
            )
    if len(own) != len(found):
        raise ValueError(
            f"the state dict has {len(found)} param groups, but this optimizer {len(own)}"
        )
    left = list(found)
    pairs = []
    for params, group in own:
        place = next(i for i, (others, _) in enumerate(left) if others == params)
        pairs.append((group, left.pop(place)[1]))
    return pairs


def _options(group: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in group if name not in (*FORMAT_OPTIONS, SEED))


def load_options(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Sets the options of a param group to saved ones.

    But for how its step is executed, and how parameters and states are stored.
    """
    kept = {"params", "param_names", *EXECUTION_OPTIONS, *FORMAT_OPTIONS}
    if SEED not in group:
        kept.add(SEED)
    for name, value in saved.items():
        if name not in kept:
            group[name] = option_like(group.get(name), value)
