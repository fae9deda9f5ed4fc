"""State made without a step is what torch's own first step makes, before it is updated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_fast.optim import FusedAdam
from recap_fast.state.memory import StateMemory
from recap_fast.state.new import has_state, new_state
from recap_fast.torch_classes import Lion

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
    "fused adam": (FusedAdam, {}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "lion": (Lion, {}),
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


def _state_of_torch(name: str, param: nn.Parameter) -> dict[str, Tensor]:
    """After a step of torch with a gradient of zero, which leaves zero state zero."""
    optimizer_class, options = OPTIMIZERS[name]
    optimizer = optimizer_class([param], **options)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    return dict(optimizer.state.get(param, {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "gaps", "scalar", "empty"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_that_of_torch(name: str, layout: str, dtype: torch.dtype) -> None:
    data = {
        "contiguous": torch.ones(2, 3, dtype=dtype),
        "channels last": torch.ones(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
        "gaps": torch.ones(4, 6, dtype=dtype)[:, ::2],
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.ones(0, 3, dtype=dtype),
    }[layout]
    expected = _state_of_torch(name, nn.Parameter(data.clone(memory_format=torch.preserve_format)))
    optimizer_class, options = OPTIMIZERS[name]
    param = nn.Parameter(data)
    optimizer = optimizer_class([param], **options)
    state = new_state(optimizer, optimizer.param_groups[0], param, StateMemory())
    assert list(state) == list(expected)
    for key, value in expected.items():
        made = state[key]
        assert (made.shape, made.dtype, made.device) == (value.shape, value.dtype, value.device)
        assert not made.requires_grad
        if key == "step":
            assert made.item() == 0
        else:
            assert made.stride() == value.stride()
            assert torch.equal(made, value)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_are_counted_in_torchs_dtype(default: torch.dtype) -> None:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        param = nn.Parameter(torch.ones(3))
        expected = _state_of_torch("adam", param)["step"].dtype
        optimizer = torch.optim.Adam([param])
        state = new_state(optimizer, optimizer.param_groups[0], param, StateMemory())
    finally:
        torch.set_default_dtype(previous)
    assert state["step"].dtype == expected


def test_entries_do_not_share_memory() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([param], amsgrad=True)
    state = new_state(optimizer, optimizer.param_groups[0], param, StateMemory())
    addresses = {value.data_ptr() for value in state.values()} | {param.data_ptr()}
    assert len(addresses) == 5


def test_another_optimizer_is_refused_by_name() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adadelta([param])
    with pytest.raises(TypeError, match="Adadelta"):
        new_state(optimizer, optimizer.param_groups[0], param, StateMemory())


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (None, False),
        ({}, False),
        ({"momentum_buffer": None}, False),
        ({"momentum_buffer": torch.zeros(3)}, True),
        ({"step": torch.zeros(())}, True),
    ],
)
def test_a_buffer_of_none_is_no_state(state: dict[str, Any] | None, expected: bool) -> None:
    assert has_state(state) is expected
