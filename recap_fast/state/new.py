"""The state that `torch.optim` keeps for a parameter, made without taking a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from recap_fast.state.codes import new_code, scale_count, scale_name
from recap_fast.state.formats import is_rounded_by_chance, new_rest, rest_name, state_dtype_of
from recap_fast.state.memory import StateMemory


class HasState(Protocol):
    """What of an optimizer is looked at here; a `torch.optim.Optimizer` has it."""

    state: defaultdict[Tensor, Any]
    param_groups: list[dict[str, Any]]


T = TypeVar("T", bound=HasState)


def row_sums(param: Tensor, memory: StateMemory) -> Tensor:
    """The ``sum`` of row-wise Adagrad before the first step: zeros, one for each row of ``param``.

    Of float32, or float64 for a float64 parameter, on its device; of a DTensor that is sharded
    along its rows, a DTensor that is sharded alike.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    sharded: Any = param
    local = sharded.to_local() if hasattr(param, "to_local") else param
    rows = local.detach().new_empty(local.shape[:1] or (1,), dtype=dtype)
    sums = memory.full_like(rows, 0.0, 0)
    if local is param:
        return sums
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        sums,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=param.shape[:1] or torch.Size([1]),
        stride=(1,),
    )


def _step_dtype() -> torch.dtype:
    """The dtype torch.optim counts steps in, which follows from the default dtype."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def has_state(state: Mapping[str, Any] | None) -> bool:
    """Whether ``state``, an optimizer's entry for a parameter, holds anything.

    A momentum buffer of None does not count: torch fills it with the first gradient.
    """
    return state is not None and any(value is not None for value in state.values())


def counts_steps(optimizer: object) -> bool:
    """Whether an optimizer has a step count of each parameter, in whatever format states are."""
    return not isinstance(optimizer, torch.optim.SGD) and not hasattr(optimizer, "state_names")


def new_state(
    optimizer: HasState,
    group: Mapping[str, Any],
    param: Tensor,
    memory: StateMemory,
) -> dict[str, Tensor]:
    """Returns the state of ``param`` before its first step, under torch's names.

    Args:
        optimizer: a `torch.optim.Adam` (or AdamW), `SparseAdam`, `Adagrad`, `RMSprop` or `SGD`, or
            a subclass; one whose ``state_names`` says what state it has; or one whose
            ``algorithm`` is ``rowwise_adagrad``.
        group: the param group of ``param``.
        param: a dense floating point tensor of any shape.
        memory: where the state goes; one for all parameters whose state is made together.

    Returns:
        Tensors of the shape, device and memory layout of ``param``, all zero (Adagrad's ``sum``:
        its initial accumulator value), and for Adam, Adagrad and RMSprop a 0-dim ``step`` of zero.
        Their dtype is that of ``param``, unless the group has a ``state_dtype``; of those of 8 bits
        there are scales besides. Empty for SGD
        without momentum. For row-wise Adagrad `row_sums` and such a ``step``. What the formats of
        the group ask for besides: see `recap_fast.state.formats`.

    Raises:
        TypeError: for any other class of optimizer.
    """
    state = _algorithm_state(optimizer, group, param, memory)
    names = [name for name in state if name != "step"]
    states = len(names)
    if is_rounded_by_chance(group, param, states > 0) and "step" not in state:
        state["step"] = memory.step_count(0, _step_dtype())
    if (name := rest_name(group, param)) is not None:
        state[name] = new_rest(param, memory, states)
    if state_dtype_of(group, param) == torch.uint8:
        scales = param.detach().new_empty(scale_count(param), dtype=torch.float32)
        start = new_code(_start(optimizer))[1]
        state |= {
            scale_name(name): memory.full_like(scales, start, index)
            for index, name in enumerate(names)
        }
    return state


def _start(optimizer: HasState) -> float:
    """What states are before the first step.

    Adagrad's are the constructor's value, as in torch, whatever a group says: of state made there
    and here.
    """
    if not isinstance(optimizer, torch.optim.Adagrad):
        return 0.0
    return float(optimizer.defaults["initial_accumulator_value"])


def _algorithm_state(
    optimizer: HasState, group: Mapping[str, Any], param: Tensor, memory: StateMemory
) -> dict[str, Tensor]:
    dtype = state_dtype_of(group, param)

    def full(value: float, index: int) -> Tensor:
        filled = new_code(value)[0] if dtype == torch.uint8 else value
        return memory.full_like(param, filled, index, dtype)

    if isinstance(optimizer, (torch.optim.Adam, torch.optim.SparseAdam)):
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group.get("amsgrad", False)
        moments = {name: full(0.0, i) for i, name in enumerate(names)}
        return {"step": memory.step_count(0, _step_dtype()), **moments}
    if isinstance(optimizer, torch.optim.Adagrad):
        step = memory.step_count(0, _step_dtype())
        return {"step": step, "sum": full(_start(optimizer), 0)}
    if isinstance(optimizer, torch.optim.RMSprop):
        names = ["square_avg"] + ["momentum_buffer"] * (group["momentum"] > 0)
        names += ["grad_avg"] * group["centered"]
        averages = {name: full(0.0, i) for i, name in enumerate(names)}
        return {"step": memory.step_count(0, _step_dtype()), **averages}
    if names_of := getattr(optimizer, "state_names", None):
        return {name: full(0.0, i) for i, name in enumerate(names_of(group))}
    if getattr(optimizer, "algorithm", None) == "rowwise_adagrad":
        return {"step": memory.step_count(0, _step_dtype()), "sum": row_sums(param, memory)}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": full(0.0, 0)} if group["momentum"] else {}
    raise TypeError(
        f"cannot make state for {type(optimizer).__name__}; it must be Adam, AdamW, Adagrad, "
        "RMSprop or SGD of torch, or have `state_names`"
    )


def strays(optimizers: Sequence[T]) -> dict[Tensor, T]:
    """Finds state that was left behind when a parameter went to a param group elsewhere.

    One torch optimizer has one state for all its groups; several that are stepped as one should do
    alike.

    Returns:
        By parameter, the optimizer that has state of it, but no param group with it.
    """
    found = {}
    for optimizer in optimizers:
        if optimizer.state:
            grouped = {id(param) for group in optimizer.param_groups for param in group["params"]}
            for param, entries in optimizer.state.items():
                if id(param) not in grouped and isinstance(entries, Mapping) and has_state(entries):
                    found[param] = optimizer
    return found
