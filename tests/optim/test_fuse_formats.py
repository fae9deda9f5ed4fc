"""`fuse` with formats: the optimizer of a program stores parameters and states otherwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast import fuse, unfuse
from recap_fast.optim import FusedOptimizer
from tests.support.formats import (
    SHORT,
    UPDATES,
    Formats,
    Stored,
    assert_stored,
    expected_step,
    stored,
)
from tests.support.optimizers import FUSED, TORCH, numbers, parameters, set_grads

KINDS = {
    "short states": Formats(torch.float32, torch.float32, torch.bfloat16),
    "remainder": Formats(torch.bfloat16, torch.bfloat16, torch.float32, "master"),
    "master": Formats(torch.float16, torch.float16, None, "master"),
    "by chance": Formats(torch.bfloat16, torch.bfloat16, torch.float16, "stochastic"),
}
OF_TORCH = [name for name in UPDATES if name != "lion"]


def _of_torch(update: str, dtype: torch.dtype) -> tuple[torch.optim.Optimizer, nn.Parameter, Any]:
    algorithm, options = UPDATES[update]
    options = {"lr": 0.05, **options}
    param = nn.Parameter(numbers((37, 13), 0, dtype))
    return TORCH[algorithm]([("w", param)], **options), param, options


def _convert(before: Stored, formats: Formats) -> Stored:
    """State as torch has it, in these formats, rounded to nearest; as if it had taken no step."""
    state = {
        name: value if name == "step" else value.to(formats.stored_state)
        for name, value in before.state.items()
    }
    if formats.has_master and formats.param == torch.bfloat16:
        state["param_remainder"] = torch.zeros(before.param.shape, dtype=torch.int16)
    elif formats.has_master:
        state["master_param"] = before.param.float()
    return Stored(before.param, state)


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("formats", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("update", OF_TORCH)
def test_training_goes_on_in_the_formats(update: str, formats: Formats, begin: int) -> None:
    optimizer, param, options = _of_torch(update, formats.param)
    for step in range(begin):
        param.grad = numbers(param.shape, step, formats.grad)
        optimizer.step()
    before = Stored(param.detach().clone(), {})
    if optimizer.state.get(param):
        before = _convert(stored(optimizer, param), formats)
    assert fuse(optimizer, rounding_seed=3, **formats.options) is optimizer
    assert type(optimizer) is FUSED[UPDATES[update][0]]
    for name, value in before.state.items():
        assert torch.equal(optimizer.state[param][name], value), name
    counts = update not in ("sgd", "momentum")
    for step in range(1, 3):
        param.grad = numbers(param.shape, 10 + step, formats.grad)
        optimizer.step()
        expected = expected_step(
            UPDATES[update][0],
            options,
            before,
            param.grad,
            formats,
            name="w",
            step=begin + step if counts else step,
            seed=3,
        )
        assert_stored(stored(optimizer, param), expected, formats)
        before = stored(optimizer, param)


def test_groups_that_say_otherwise_and_those_to_come() -> None:
    params = [nn.Parameter(numbers((4,), i, torch.float32)) for i in range(3)]
    optimizer = torch.optim.Adam(
        [{"params": params[0]}, {"params": params[1], "state_dtype": None}], lr=0.1
    )
    fuse(optimizer, state_dtype=torch.bfloat16)
    optimizer.add_param_group({"params": params[2]})
    set_grads(params, 0)
    optimizer.step()
    dtypes = [optimizer.state[param]["exp_avg"].dtype for param in params]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_keys_of_groups_need_no_argument() -> None:
    params = [nn.Parameter(numbers((4,), i, torch.float32)) for i in range(2)]
    optimizer = torch.optim.Adam(
        [{"params": params[0], "state_dtype": torch.bfloat16}, {"params": params[1]}]
    )
    set_grads(params, 0)
    optimizer.step()
    fuse(optimizer)
    dtypes = [optimizer.state[param]["exp_avg"].dtype for param in params]
    assert dtypes == [torch.bfloat16, torch.float32]


def test_what_is_native_already_takes_them_too() -> None:
    params = parameters(2)
    optimizer = FUSED["sgd"](params, lr=0.1, momentum=0.9)
    optimizer.step()
    momentum = optimizer.state[params[0]]["momentum_buffer"].clone()
    fuse(optimizer, state_dtype=torch.bfloat16)
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], momentum.bfloat16())
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    fuse(optimizer, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"param group 0: it has state_dtype=torch\.bfloat16"):
        fuse(optimizer, state_dtype=torch.float16)


def _double() -> Any:
    return torch.optim.Adam([*parameters(1), nn.Parameter(torch.zeros(3, dtype=torch.float64))])


def _complex() -> Any:
    param = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    return torch.optim.Adam([{"params": parameters(1)}, {"params": [param]}])


def _sparse() -> Any:
    table = nn.Parameter(torch.zeros(3, 2))
    table.grad = torch.ones(3, 2).to_sparse(1)
    return torch.optim.SGD([table])


def _with_a_step_of_its_own() -> Any:
    return torch.optim.LBFGS(parameters(1))


def _replaced() -> Any:
    optimizer: Any = torch.optim.SGD(parameters(1))
    optimizer.step = lambda: None
    return optimizer


REFUSED: dict[str, tuple[Any, str]] = {
    "float64": (_double, "param group 0 of optimizer 1: .*float64 alone"),
    "complex": (_complex, "param group 1 of optimizer 1: .*cannot be had with complex64"),
    "sparse": (_sparse, "cannot be had with sparse gradients"),
    "sparse Adam": (lambda: torch.optim.SparseAdam(parameters(1)), "had with FusedSparseAdam"),
    "a step": (_with_a_step_of_its_own, "the LBFGS of optimizer 1 cannot become native: LBFGS has"),
    "a replaced step": (_replaced, "cannot become native: the step of this SGD was replaced"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_have_them_is_refused_before_anything_changes(make: Any, match: str) -> None:
    optimizers = [torch.optim.Adam(parameters(1)), make()]
    kinds = [type(optimizer) for optimizer in optimizers]
    groups = [[dict(group) for group in each.param_groups] for each in optimizers]
    with pytest.raises(ValueError, match=f"fuse: .*{match}"):
        fuse(optimizers, state_dtype=torch.bfloat16)
    assert [type(optimizer) for optimizer in optimizers] == kinds
    for each, before in zip(optimizers, groups, strict=True):
        assert [group.keys() for group in each.param_groups] == [group.keys() for group in before]
        assert "state_dtype" not in each.defaults


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"state_dtype": "bfloat16"}, TypeError, "state_dtype='bfloat16'"),
        ({"state_dtype": torch.int32}, ValueError, r"state_dtype=torch\.int32"),
        ({"state_dtype": torch.float32, "rounding_seed": 1.5}, TypeError, "rounding_seed"),
        ({"master_weights": True, "stochastic_rounding": True}, ValueError, "set one of them"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options: Any, error: Any, match: str) -> None:
    optimizer = torch.optim.Adam(parameters(1))
    with pytest.raises(error, match=f"fuse: param group 0: .*{match}"):
        fuse(optimizer, **options)
    assert type(optimizer) is torch.optim.Adam


@pytest.mark.parametrize("dtype", SHORT)
def test_torch_could_not_go_on_with_them(dtype: torch.dtype) -> None:
    optimizer = fuse(torch.optim.Adam(parameters(1)), state_dtype=dtype)
    with pytest.raises(ValueError, match=rf"unfuse: .*state_dtype={dtype}.*float32_state"):
        unfuse(optimizer)
    assert isinstance(optimizer, FusedOptimizer)


def test_optimizers_of_torchrec_are_given_them_inside() -> None:
    keyed = pytest.importorskip("torchrec.optim.keyed")
    params = [nn.Parameter(numbers((4,), i, torch.bfloat16)) for i in range(2)]
    parts = [
        keyed.KeyedOptimizerWrapper({"a": params[0]}, lambda p: torch.optim.Adam(p, lr=0.1)),
        keyed.KeyedOptimizerWrapper({"b": params[1]}, lambda p: torch.optim.SGD(p, lr=0.1)),
    ]
    optimizer = keyed.CombinedOptimizer(parts)
    set_grads(params, 0)
    optimizer.step()
    fuse(optimizer, state_dtype=torch.float32, master_weights=True)
    set_grads(params, 1)
    optimizer.step()
    states = [dict(optimizer.state[param]) for param in params]
    assert states[0]["exp_avg"].dtype == torch.float32
    assert all(state["param_remainder"].dtype == torch.int16 for state in states)
    other = copy.deepcopy(optimizer)
    for run in (optimizer, other):
        own = [run.params[name] for name in ("a", "b")]
        set_grads(own, 2)
        run.step()
    for name in ("a", "b"):
        mine: Tensor = optimizer.params[name]
        assert torch.equal(mine, other.params[name])
        state = optimizer.state[mine]
        theirs = other.state[other.params[name]]
        assert torch.equal(state["param_remainder"], theirs["param_remainder"])
