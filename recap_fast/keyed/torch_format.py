"""State dicts as torch's optimizers have them, for `torch.distributed.checkpoint.state_dict`.

Its `get_optimizer_state_dict` and `set_optimizer_state_dict` number parameters by their place in
`param_groups`, and give them the names of the model themselves. A keyed optimizer's own state dict
has names, which they would take for such numbers. They cannot ask for a format; so an optimizer
looks at who calls.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor

_CALLER = "torch.distributed.checkpoint.state_dict"


def asked_to_make_state() -> bool:
    """Whether torch's helper asks, two calls up, if there is state; else it would take a step."""
    return _is_in(sys._getframe(2), "_init_optim_state")


def asked_for_torch_format() -> bool:
    """Whether torch's helper gets or sets a state dict, perhaps through a wrapper's method."""
    frame: FrameType | None = sys._getframe(2)
    depth = 0
    while frame is not None and depth < 4:
        if _is_in(frame, "_get_optim_state_dict", "_load_optim_state_dict"):
            return True
        frame, depth = frame.f_back, depth + 1
    return False


def _is_in(frame: Any, *functions: str) -> bool:
    return frame.f_code.co_name in functions and frame.f_globals.get("__name__") == _CALLER


def to_torch_format(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]
) -> dict[str, Any]:
    """Returns what `torch.optim.Optimizer.state_dict` would.

    Args:
        groups: all param groups, in order.
        state: by parameter; of parameters that are in a group.
    """
    numbers: dict[int, int] = {}
    for group in groups:
        for param in group["params"]:
            numbers.setdefault(id(param), len(numbers))
    return {
        "state": {numbers[id(param)]: dict(entries) for param, entries in state.items()},
        "param_groups": [
            {**group, "params": [numbers[id(param)] for param in group["params"]]}
            for group in groups
        ],
    }


def from_torch_format(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> dict[str, Any]:
    """Returns a state dict with the names of this optimizer for one with numbers, or other names.

    Args:
        state_dict: in which groups and their parameters are in the order of those here.
        groups: all param groups here, in order.
        names: of the parameters here, by id.

    Raises:
        ValueError: It has other groups.
    """
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the state dict has param groups of {saved_sizes} parameters, but this optimizer of "
            f"{sizes}; is it of another model?"
        )
    own = {
        number: names[id(param)]
        for saved, group in zip(saved_groups, groups, strict=True)
        for number, param in zip(saved["params"], group["params"], strict=True)
    }
    unknown = [number for number in state_dict["state"] if number not in own]
    if unknown:
        raise ValueError(
            f"the state dict has state of {unknown[0]!r}, which is in none of its param groups"
        )
    return {
        "state": {own[number]: entries for number, entries in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": [own[number] for number in group["params"]]}
            for group in saved_groups
        ],
    }
