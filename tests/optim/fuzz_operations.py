"""What may happen to an optimizer between its steps, done to ours and to torch's alike.

Left out is what docs/recipes.md tells to differ: sparse gradients, gradients of another dtype,
parameters that share memory, and what the constructors and `_init_group` of torch do besides.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recap_fast._native import native, use_instruction_set
from tests.optim.fuzz_draws import (
    OPTIONS,
    RATES,
    draw_rate,
    draw_shape,
    draw_values,
)
from tests.optim.fuzz_steps import (
    closure_step,
    failing_closure,
    is_writable,
    scaled_step,
    step,
    steps,
)
from tests.support.optimizers import FUSED, LAYOUTS, TORCH, for_loop, laid_out
from tests.support.rounding import double

if TYPE_CHECKING:
    from tests.optim.fuzz_round import Round


@functools.cache
def _adagrad_makes_state() -> bool:
    """Whether torch's Adagrad makes state in a step, as that of 2.11 does not."""
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = for_loop("adagrad", [param])
    optimizer.state.clear()
    param.grad = torch.ones(1)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


def _makes_state(round: Round) -> bool:
    return round.algorithm != "adagrad" or _adagrad_makes_state()


# --- options -------------------------------------------------------------------------------------


def _in_double(value: Any) -> Any:
    return double(value) if isinstance(value, Tensor) else value


def set_rate(round: Round) -> None:
    for mine, other in round.groups:
        if isinstance(mine["lr"], Tensor) and round.draw.random() < 0.5:
            mine["lr"].fill_(round.draw.choice(RATES))
            other["lr"].copy_(mine["lr"])
        elif round.draw.random() < 0.7:
            mine["lr"] = draw_rate(round.draw)
            other["lr"] = _in_double(mine["lr"])


# The state that an option needs.
_ENTRIES = {
    ("adam", "amsgrad"): "max_exp_avg_sq",
    ("adamw", "amsgrad"): "max_exp_avg_sq",
    ("rmsprop", "momentum"): "momentum_buffer",
    ("rmsprop", "centered"): "grad_avg",
}


def edit_options(round: Round) -> None:
    """Of one group. What needs state that there is not is refused, until it ends."""
    mine, other = round.draw.choice(round.groups)
    key = round.draw.choice(list(OPTIONS[round.algorithm]))
    value = OPTIONS[round.algorithm][key](round.draw)
    round.history.append(f"{key}={value}")
    before = mine[key]
    mine[key] = other[key] = value
    if (entry := _ENTRIES.get((round.algorithm, key))) and value and not before:
        step(round)
        for param in mine["params"]:
            if round.ours.state.get(param) and entry not in round.ours.state[param]:
                mine[key] = other[key] = False


def without_option(round: Round) -> None:
    mine, other = round.draw.choice(round.groups)
    # Of these, a checkpoint of an old torch has no `maximize`, and ours goes on without. No step
    # reads an initial value, or torch's `nesterov` without momentum.
    left_out = {"maximize", "initial_accumulator_value", "decoupled_weight_decay"}
    key = round.draw.choice(sorted({"lr", *OPTIONS[round.algorithm]} - left_out))
    round.history.append(f"without {key}")
    held = mine.pop(key), other.pop(key)
    step(round)
    mine[key], other[key] = held


# --- groups and parameters -----------------------------------------------------------------------


def add_param_group(round: Round) -> None:
    if _makes_state(round):
        group = round.draw_group()
        other = round.group_in_double(group)
        round.ours.add_param_group(group)
        round.theirs.add_param_group(other)


def freeze(round: Round) -> None:
    """A parameter that asks for no gradient, and has one all the same, is stepped."""
    param, truth = round.draw.choice(round.pairs)
    if param.is_leaf:
        param.requires_grad_(not param.requires_grad)
        truth.requires_grad_(not truth.requires_grad)


def move_parameter(round: Round) -> None:
    """The same values at another place, with other strides."""
    param, truth = round.draw.choice(round.pairs)
    layout = round.draw.choice(list(LAYOUTS))
    round.has_moved = True
    param.data = laid_out(param.data, layout)
    truth.data = laid_out(truth.data, layout)


def resize_parameter(round: Round) -> None:
    """Starts over: its state is dropped with the old shape."""
    if not _makes_state(round):
        return
    param, truth = round.draw.choice(round.pairs)
    param.grad = truth.grad = None
    round.ours.state.pop(param, None)
    round.theirs.state.pop(truth, None)
    param.data = draw_values(round.draw, draw_shape(round.draw), param.dtype)
    truth.data = double(param.data)


def zero_grad(round: Round) -> None:
    set_to_none = round.draw.random() < 0.5
    if any(p.grad is not None and not is_writable(p.grad) for p, _ in round.pairs):
        set_to_none = True  # torch zeroes no gradient whose elements share memory
    round.ours.zero_grad(set_to_none)
    round.theirs.zero_grad(set_to_none)


# --- state ---------------------------------------------------------------------------------------


def clear_state(round: Round) -> None:
    if _makes_state(round):
        round.ours.state.clear()
        round.theirs.state.clear()


def drop_state(round: Round) -> None:
    if _makes_state(round):
        param, truth = round.draw.choice(round.pairs)
        round.ours.state.pop(param, None)
        round.theirs.state.pop(truth, None)


def replace_state(round: Round) -> None:
    """An entry at another place, or written to where it is."""
    param, truth = round.draw.choice(round.pairs)
    state, true_state = round.ours.state.get(param, {}), round.theirs.state.get(truth, {})
    if not state:
        return
    key = round.draw.choice(list(state))
    if round.draw.random() < 0.5:
        state[key] = state[key].clone()
        true_state[key] = true_state[key].clone()
    else:
        state[key].mul_(2)
        true_state[key].copy_(state[key])


def load_own(round: Round) -> None:
    copied = round.draw.random() < 0.5
    for optimizer in (round.ours, round.theirs):
        saved = optimizer.state_dict()
        optimizer.load_state_dict(copy.deepcopy(saved) if copied else saved)


def _fresh(make: Callable[..., Any], optimizer: Any) -> Any:
    """Over the same parameters, with the options of a default and the state of `optimizer`."""
    fresh = make([{"params": group["params"]} for group in optimizer.param_groups])
    fresh.load_state_dict(optimizer.state_dict())
    return fresh


def load_into_fresh(round: Round) -> None:
    round.ours = _fresh(FUSED[round.algorithm], round.ours)
    round.theirs = _fresh(lambda groups: for_loop(round.algorithm, groups), round.theirs)


def load_across(round: Round) -> None:
    """Into torch's class over the same parameters, and back."""
    across = _fresh(TORCH[round.algorithm], round.ours)
    round.ours = _fresh(FUSED[round.algorithm], across)
    round.theirs = _fresh(lambda groups: for_loop(round.algorithm, groups), round.theirs)


def copied(round: Round) -> None:
    """The optimizer with its parameters, whose gradients neither way to copy takes along."""
    if round.draw.random() < 0.5:
        round.ours = copy.deepcopy(round.ours)
        round.theirs = copy.deepcopy(round.theirs)
    else:
        round.ours = pickle.loads(pickle.dumps(round.ours))
        round.theirs = pickle.loads(pickle.dumps(round.theirs))


# --- how it is computed --------------------------------------------------------------------------


def set_threads(round: Round) -> None:
    torch.set_num_threads(round.draw.choice([1, 2]))


def set_instructions(round: Round) -> None:
    use_instruction_set(round.draw.choice([None, *native.instruction_sets()]))


OPERATIONS: dict[str, Callable[[Round], None]] = {
    "step": step,
    "steps": steps,
    "closure_step": closure_step,
    "failing_closure": failing_closure,
    "scaled_step": scaled_step,
    "set_rate": set_rate,
    "edit_options": edit_options,
    "without_option": without_option,
    "add_param_group": add_param_group,
    "freeze": freeze,
    "move_parameter": move_parameter,
    "resize_parameter": resize_parameter,
    "zero_grad": zero_grad,
    "clear_state": clear_state,
    "drop_state": drop_state,
    "replace_state": replace_state,
    "load_own": load_own,
    "load_into_fresh": load_into_fresh,
    "load_across": load_across,
    "copied": copied,
    "set_threads": set_threads,
    "set_instructions": set_instructions,
}
WEIGHTS = [
    8 if name == "step" else 2 if name in ("steps", "set_rate") else 1 for name in OPERATIONS
]
