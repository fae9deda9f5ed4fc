"""Whether a checkpoint is of the model and optimizer that it is to be loaded into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from recap_fast.checkpoint.contents import Description
from recap_fast.checkpoint.errors import CheckpointMismatchError
from recap_fast.state.fit import misfits
from recap_fast.state.formats import STATE_DTYPES, added_states

Shape = Mapping[str, Any]
"""The "shape" and "dtype" of a tensor, as plain values."""

_STORED: Final = frozenset(str(dtype).removeprefix("torch.") for dtype in STATE_DTYPES)


@dataclass
class Shapes:
    """Of the tensors of a model by name, and of the state that there is or may be by parameter."""

    model: dict[str, Shape]
    states: dict[str, dict[str, Shape]]


@dataclass
class _Differences:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


def shape_of(tensor: Tensor) -> dict[str, Any]:
    """Returns the global shape and the dtype of a tensor, as plain values."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def check_match(
    where: str,
    saved: Description,
    saved_tensors: Mapping[str, Shape],
    own: Description,
    own_shapes: Shapes,
) -> None:
    """Raises if a checkpoint is of another model or optimizer.

    Args:
        where: what errors call the checkpoint.
        saved, own: what is in the checkpoint, and what it is to be loaded into.
        saved_tensors: those in the checkpoint, by key.
        own_shapes: of what it is to be loaded into.

    Raises:
        CheckpointMismatchError: names the parameters.
    """
    found = _Differences()
    _compare_model(found, saved_tensors, own_shapes.model)
    _compare_optimizers(found, saved, saved_tensors, own, own_shapes.states)
    parts = [
        ("it lacks ", found.missing),
        ("only it has ", found.unexpected),
        ("", found.other),
    ]
    said = [what + some(names) for what, names in parts if names]
    if said:
        raise CheckpointMismatchError(
            f"{where} is of another model or optimizer: {'; '.join(said)}; nothing was changed"
        )
    _compare_column_shards(where, saved, own)


def groups_by_param(description: Description) -> dict[str, dict[str, Any]]:
    """Returns the param group of each parameter."""
    return {name: group for group in description.groups for name in group["params"]}


def some(items: Iterable[str], limit: int = 5) -> str:
    """Returns the first items and how many more there are, for a message."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _compare_model(
    found: _Differences, saved_tensors: Mapping[str, Shape], own: Mapping[str, Shape]
) -> None:
    saved = {
        key.removeprefix("model."): shape
        for key, shape in saved_tensors.items()
        if key.startswith("model.")
    }
    found.missing += [repr(name) for name in own if name not in saved]
    found.unexpected += [repr(name) for name in saved if name not in own]
    found.other += [
        f"{name!r} {_change(saved[name], shape)}"
        for name, shape in own.items()
        if name in saved and saved[name] != shape
    ]


def _compare_optimizers(
    found: _Differences,
    saved: Description,
    saved_tensors: Mapping[str, Shape],
    own: Description,
    own_states: Mapping[str, Mapping[str, Shape]],
) -> None:
    saved_groups, own_groups = groups_by_param(saved), groups_by_param(own)
    # Those that the model lacks, too, have been named.
    for names, others, said in (
        (own_groups, saved_groups, found.missing),
        (saved_groups, own_groups, found.unexpected),
    ):
        known = set(said)
        absent = [name for name in names if name not in others and repr(name) not in known]
        said += [f"{name!r} in its optimizer" for name in absent]
    for name, group in own_groups.items():
        if name not in saved_groups:
            continue
        saved_group = saved_groups[name]
        if _meaning(saved_group) != _meaning(group):
            was, now = (_algorithm(each) for each in (saved_group, group))
            found.other.append(f"{name!r} was trained by {was}, but here is by {now}")
            continue
        entries, own_state = saved.entries.get(name, {}), own_states.get(name, {})
        # A fused table counts its steps elsewhere: see `Description.forward_passes`.
        is_fused = saved_group["is_fused"] or group["is_fused"]
        optional = {"step"} if is_fused else _of_formats(group)
        shapes = {
            key: None
            if f"{name}.{key}" in {**saved.column_shards, **own.column_shards}
            else saved_tensors[f"optimizer.{name}.{key}"]
            for key, entry in entries.items()
            if entry == "tensor"
        }
        comparable = _kinds if not is_fused else dict
        state = misfits(comparable(shapes), comparable(own_state), optional)
        # A dense parameter that took no step has no state, and needs none.
        if entries or saved_group["is_fused"]:
            found.missing += [f"{key!r} of {name!r}" for key in state.missing if key not in entries]
        found.unexpected += [f"{key!r} of {name!r}" for key in state.unexpected if shapes[key]]
        for key in state.changed:
            change = _change(saved_tensors[f"optimizer.{name}.{key}"], own_state[key])
            found.other.append(f"{key!r} of {name!r} {change}")


def _of_formats(group: Mapping[str, Any]) -> frozenset[str]:
    """What may be in the state of its parameters for the sake of formats alone."""
    return added_states(group["state"] is None or "step" in group["state"])


def _kinds(shapes: Mapping[str, Shape | None]) -> dict[str, Shape | None]:
    """Shapes and dtypes, of which those are alike that states are converted between."""
    return {
        key: shape and {**shape, "dtype": "short" if shape["dtype"] in _STORED else shape["dtype"]}
        for key, shape in shapes.items()
    }


def _compare_column_shards(where: str, saved: Description, own: Description) -> None:
    for key in {**saved.column_shards, **own.column_shards}:
        layouts = [each.column_shards.get(key) for each in (saved, own)]
        if layouts[0] == layouts[1]:
            continue
        table, _, state = key.rpartition(".")
        raise CheckpointMismatchError(
            f"{where} cannot be resharded: {state!r} of {table!r} has an entry for each row and "
            "column shard, from the gradients of the shard's columns alone, so that other shards "
            f"have no entries in it. It was written {_layout(layouts[0])}, and here the table is "
            f"{_layout(layouts[1])}; resume with the same column shards. (An algorithm that is not "
            "row-wise, or whole rows, could be resharded.) Nothing was changed"
        )


def _change(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    was, now = (f"{tuple(each['shape'])} {each['dtype']}" for each in (saved, own))
    return f"was {was}, but here is {now}"


# What a fused and an unfused table are trained by alike.
_UNFUSED = {
    "exact_adagrad": "Adagrad",
    "exact_row_wise_adagrad": "RowwiseAdagrad",
    "FusedRowwiseAdagrad": "RowwiseAdagrad",
    "adam": "lazy AdamW",
}


def _name(group: Mapping[str, Any]) -> str:
    return f"{'lazy ' * bool(group['options'].get('lazy'))}{group['algorithm']}"


def _meaning(group: Mapping[str, Any]) -> tuple[str, set[str] | None]:
    """Returns what is equal for groups that train alike, fused or not."""
    name, state = _name(group), group["state"]
    return _UNFUSED.get(name, name), None if state is None else {*state} - {"step"}


def _algorithm(group: Mapping[str, Any]) -> str:
    state = group["state"]
    keeps = "" if state is None else f" with {', '.join(state) or 'no state'}"
    return _name(group) + keeps


def _layout(shards: list[list[int]] | None) -> str:
    if shards is None:
        return "with whole rows"
    columns = [f"{first} to {first + width - 1}" for _, first, _, width in shards]
    return f"in {len(shards)} shards of columns {', '.join(columns)}"
