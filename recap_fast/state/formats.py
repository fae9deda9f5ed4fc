"""How a param group says that parameters and their states are stored, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from recap_fast.state.codes import EIGHT_BITS, SCALES, takes_codes
from recap_fast.state.memory import StateMemory

StateDtype: TypeAlias = torch.dtype | Literal["8bit"]

FORMAT_OPTIONS: Final = ("state_dtype", "master_weights", "stochastic_rounding")
"""Keys of a param group; one that is not there is None or False."""

SEED: Final = "rounding_seed"

STATE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What `state_dtype` may be for parameters of each of these."""

REST: Final = {torch.bfloat16: "param_remainder", torch.float16: "master_param"}
"""What a 16-bit parameter with master weights has in its state, by its dtype."""


def format_options(
    state_dtype: StateDtype | None,
    master_weights: bool,
    stochastic_rounding: bool,
    rounding_seed: int,
) -> dict[str, Any]:
    """What arguments put into param groups: nothing of what is left at its default.

    The seed is there if any of the others is, and then goes into checkpoints.
    """
    options: dict[str, Any] = {}
    if state_dtype is not None:
        options["state_dtype"] = state_dtype
    if master_weights:
        options["master_weights"] = True
    if stochastic_rounding:
        options["stochastic_rounding"] = True
    if options or rounding_seed:
        options[SEED] = rounding_seed
    return options


def has_formats(group: Mapping[str, Any]) -> bool:
    """Whether a param group asks for another format than torch's."""
    return any(group.get(option) for option in FORMAT_OPTIONS)


def check_formats(group: Mapping[str, Any]) -> None:
    """Checks a param group.

    Raises:
        TypeError: ``state_dtype`` or ``rounding_seed`` is of another type.
        ValueError: a parameter cannot have the formats that are asked for, or they exclude each
            other.
    """
    state_dtype, seed = group.get("state_dtype"), group.get(SEED, 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise TypeError(f"rounding_seed={seed!r}: it must be a whole number of 64 bits")
    if not has_formats(group):
        return
    known = state_dtype is None or isinstance(state_dtype, torch.dtype) or state_dtype == EIGHT_BITS
    if not known:
        raise TypeError(f"state_dtype={state_dtype!r}: it must be {_ALL}")
    if group.get("master_weights") and group.get("stochastic_rounding"):
        raise ValueError(
            "master_weights=True and stochastic_rounding=True: a parameter with a master is "
            "rounded to nearest; set one of them"
        )
    if group.get("lazy"):
        raise ValueError(f"lazy=True: it takes none of {', '.join(FORMAT_OPTIONS)}; leave them out")
    if state_dtype is None:
        return
    if state_dtype not in (*STATE_DTYPES, torch.float64, EIGHT_BITS):
        raise ValueError(f"state_dtype={state_dtype}: it must be {_ALL}")
    for param in group["params"]:
        is_double = param.dtype == torch.float64
        if is_double != (state_dtype == torch.float64):
            takes = "float64 alone" if is_double else _TAKEN
            raise ValueError(
                f"state_dtype={state_dtype}: states of {param.dtype} parameters take {takes}; put "
                "the parameters into groups by their dtype, or leave state_dtype at None"
            )
        if state_dtype == EIGHT_BITS and hasattr(param, "placements"):
            raise ValueError(
                "state_dtype='8bit': a parameter is a DTensor, and blocks of 128 elements do not "
                "end where its shards do; set state_dtype to torch.bfloat16"
            )


_TAKEN: Final = ", ".join(map(str, STATE_DTYPES)) + f" or {EIGHT_BITS!r}"
_ALL: Final = f"None, {_TAKEN}"


def state_dtype_of(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """The dtype of the states of ``param``, but for its step count and what `rest_name` names.

    torch.uint8: they are codes, see `recap_fast.state.codes`.
    """
    dtype: StateDtype | None = group.get("state_dtype")
    if dtype == EIGHT_BITS:
        return torch.uint8 if takes_codes(param) else torch.float32
    return param.dtype if dtype is None else dtype


def is_rounded_by_chance(group: Mapping[str, Any], param: Tensor, has_states: bool) -> bool:
    """Whether something of ``param`` is rounded stochastically, so that its steps are counted."""
    if param.dtype not in STATE_DTYPES:
        return False
    is_stored_in_two = rest_name(group, param) is not None
    by_chance = bool(group.get("stochastic_rounding")) and param.dtype != torch.float32
    asked_for = group.get("state_dtype") is not None or by_chance or is_stored_in_two
    short_states = has_states and state_dtype_of(group, param) != torch.float32
    return (by_chance and not is_stored_in_two) or (asked_for and short_states)


def rest_name(group: Mapping[str, Any], param: Tensor) -> str | None:
    """The state with what the float32 master of ``param`` has more; None: there is no master."""
    return REST.get(param.dtype) if group.get("master_weights") else None


def new_rest(param: Tensor, memory: StateMemory, index: int) -> Tensor:
    """What the master of a 16-bit ``param`` has more before the first step.

    Of bfloat16, int16 zeros: the distance of the master from the parameter, in units of the last
    place of a float32. Of float16, a float32 copy.
    """
    if param.dtype == torch.bfloat16:
        return memory.full_like(param, 0, index, torch.int16)
    return renew(REST[param.dtype], memory.empty_like(param, index, torch.float32), param)


def renew(name: str, entry: Tensor, param: Tensor) -> Tensor:
    """Makes one of `added_states` in place what it is before the first step, and returns it.

    Args:
        name: of the entry.
        entry: what there is of it.
        param: as it is now.
    """
    return entry.copy_(param.detach()) if name == "master_param" else entry.zero_()


def added_states(counts_steps: bool) -> frozenset[str]:
    """Names of what a parameter may have in its state for the sake of formats alone.

    Args:
        counts_steps: whether its optimizer counts steps in any case.
    """
    return SCALES | frozenset(REST.values()) | (frozenset() if counts_steps else {"step"})
