"""State dicts for `torch.optim` of optimizers that store parameters and states in other formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.state.codes import decoded, is_encoded, scale_name
from recap_fast.state.formats import FORMAT_OPTIONS, SEED, added_states
from recap_fast.state.new import counts_steps


def float32_state(optimizer: FusedOptimizer) -> dict[str, Any]:
    """Returns a state dict that the class of `torch.optim` loads, whatever formats there are.

        optimizer = FusedAdamW(model.parameters(), state_dtype=torch.bfloat16)
        ...
        other = torch.optim.AdamW(model.parameters())
        other.load_state_dict(float32_state(optimizer))

    Moments and momenta are float32, or float64 as they are, and exactly those of the optimizer; to
    load them, torch rounds them to the dtype of their parameter. There is no ``param_remainder`` or
    ``master_param``, so what a float32 master has more than its 16-bit parameter is lost; no
    ``step`` where torch's class counts none (SGD, Lion); and param groups have none of
    ``state_dtype``, ``master_weights``, ``stochastic_rounding`` and ``rounding_seed``.

    Args:
        optimizer: of `recap_fast.optim`, or one that `recap_fast.fuse` made. It does not change.

    Returns:
        As ``optimizer.state_dict()``, in which tensors that need no change are those in use.

    Raises:
        TypeError: it is of another class, such as one that joins several.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            "float32_state takes an optimizer of recap_fast.optim, found a "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    saved = optimizer.state_dict()
    added = added_states(counts_steps(optimizer))
    state = {
        key: {name: _widened(name, entries) for name in entries if name not in added}
        if isinstance(entries, dict)
        else entries
        for key, entries in saved["state"].items()
    }
    left_out = (*FORMAT_OPTIONS, SEED)
    groups = [
        {key: value for key, value in group.items() if key not in left_out}
        for group in saved["param_groups"]
    ]
    # Of a parameter with nothing else, such as SGD's without momentum, torch has no state.
    return {**saved, "state": {k: v for k, v in state.items() if v != {}}, "param_groups": groups}


def _widened(name: str, entries: Mapping[str, Any]) -> Any:
    value = entries[name]
    if is_encoded(entries, name):
        return decoded(name, value, entries[scale_name(name)])
    is_short = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_short and name != "step" else value
