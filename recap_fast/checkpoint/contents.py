"""What goes into a checkpoint: tensors, and a description of them in plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn

from recap_fast.checkpoint.params import TrainedParam
from recap_fast.checkpoint.plain import check_plain, option_to_plain
from recap_fast.names import bare_names, is_table
from recap_fast.state.formats import FORMAT_OPTIONS
from recap_fast.state.options import EXECUTION_OPTIONS

# What says nothing about how parameters are trained, or is the optimizer's to say and not the
# checkpoint's: how they are stored.
NOT_OPTIONS: Final = frozenset({"params", "param_names", *EXECUTION_OPTIONS, *FORMAT_OPTIONS})


@dataclass
class Description:
    """What is trained, and how, in plain values. Of one process, or of all together.

    Attributes:
        groups: for each param group "params", their names; "algorithm"; "state", the names of what
            it keeps for each in whatever format, None if unknown; "options"; and "is_fused".
        entries: by parameter, what state there is; "tensor", or a value that is not one.
        column_shards: by parameter and state, `TrainedParam.column_shards` where it is not None.
        forward_passes: by table, how many its kernel has seen, if that matters; for a table that is
            not fused, its steps.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    column_shards: dict[str, list[list[int]]] = field(default_factory=dict)
    forward_passes: dict[str, int] = field(default_factory=dict)


def describe(trained: Sequence[TrainedParam]) -> Description:
    """Describes what there is on this process.

    Raises:
        TypeError: An option or a state is not a plain value; the message names it.
    """
    found = Description()
    last_group = None
    for item in trained:
        if item.group is not last_group or not item.group:
            last_group = item.group
            found.groups.append(_describe_group(item))
        found.groups[-1]["params"].append(item.name)
        entries: dict[str, Any] = {}
        for name, value in item.state().items():
            if isinstance(value, Tensor):
                entries[name] = "tensor"
                shards = item.column_shards(value)
                if shards is not None:
                    found.column_shards[f"{item.name}.{name}"] = shards
            else:
                check_plain(value, f"the state {name!r} of {item.name!r}")
                entries[name] = {"value": value}
        if entries:
            found.entries[item.name] = entries
        if item.counts_forward_passes:
            found.forward_passes[item.name] = int(item.kernel.iter)
        elif is_table(item.name) and "step" in entries:
            found.forward_passes[item.name] = int(item.state()["step"])
    return found


def _describe_group(item: TrainedParam) -> dict[str, Any]:
    state = item.state_to_be()
    return {
        "params": [],
        "algorithm": item.algorithm,
        "state": None if state is None else sorted(state.keys() - item.added_states),
        "options": {
            name: option_to_plain(value, f"the option {name!r} of the group of {item.name!r}")
            for name, value in item.group.items()
            if name not in NOT_OPTIONS
        },
        "is_fused": item.is_fused,
    }


def merge(parts: Iterable[Description]) -> Description:
    """Returns the description of all processes together, which agree where they have the same."""
    whole = Description()
    seen: set[str] = set()
    for part in parts:
        for group in part.groups:
            new = [name for name in group["params"] if name not in seen]
            if new:
                whole.groups.append({**group, "params": new})
            seen.update(new)
        # As with tensors, the first process that has something decides.
        whole.entries = {**part.entries, **whole.entries}
        whole.column_shards = {**part.column_shards, **whole.column_shards}
        whole.forward_passes = {**part.forward_passes, **whole.forward_passes}
    return whole


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a model by their names without wrappers.

    Raises:
        TypeError: Its state dict has something else.
        ValueError: Two of them have the same name.
    """
    bare = bare_names(model)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} in the model's state_dict is a {type(value).__name__}: a checkpoint "
                "holds its tensors only; pass plain values as `extra`"
            )
        if tensors.setdefault(bare(name), value) is not value:
            raise ValueError(f"the model has two tensors called {bare(name)!r}, without wrappers")
    return tensors


def tensor_tree(
    model: nn.Module, trained: Sequence[TrainedParam], saved: Description | None = None
) -> dict[str, Any]:
    """Returns all tensors of this process, as torch.distributed.checkpoint takes them.

    They are those in use, so that loading into them is all there is to do.

    Args:
        model: whose parameters and buffers they are.
        trained: what has state.
        saved: to load from; without the state that it does not have.
    """
    tree: dict[str, Any] = {"model": model_tensors(model)}
    states = {
        item.name: {
            name: value
            for name, value in item.state().items()
            if isinstance(value, Tensor)
            and (saved is None or name in saved.entries.get(item.name, {}))
        }
        for item in trained
    }
    # An empty dict would be taken for a value, and pickled.
    states = {name: state for name, state in states.items() if state}
    return {**tree, "optimizer": states} if states else tree
