"""Small states lie in blocks, which a step asks if they do still: it notices what has moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recap_fast._native import native
from recap_fast.optim import FusedAdam

Move = Callable[[Tensor], object]


def _train(cls: type[torch.optim.Optimizer], move: Move | None, steps: int) -> list[Tensor]:
    """Parameters and states after some steps, with `move` done to each state after the second."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(5, generator=generator)) for _ in range(4)]
    optimizer = cls(params, lr=0.1)
    for step in range(steps):
        for param in params:
            param.grad = torch.randn(5, generator=generator)
        optimizer.step()
        if step == 1 and move is not None:
            for param in params[1:3]:
                for state in optimizer.state[param].values():
                    move(state)
    states = [state for param in params for state in optimizer.state[param].values()]
    return [tensor.detach().clone() for tensor in [*params, *states]]


def _to_new_storage(state: Tensor) -> None:
    state.set_(state.clone())


def _to_new_storage_where_it_was(state: Tensor) -> None:
    """The old storage is freed first, so that the new one may get its address."""
    values = state.tolist()
    state.set_()
    state.set_(torch.tensor(values, dtype=state.dtype))


MOVES: dict[str, Move] = {
    "shared with other processes": lambda state: state.share_memory_(),
    "another storage": _to_new_storage,
    "another storage after none": _to_new_storage_where_it_was,
    "data": lambda state: setattr(state, "data", state.clone()),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_state_that_has_moved_goes_on_where_it_is(move: Move) -> None:
    moved, stayed = _train(FusedAdam, move, 5), _train(FusedAdam, None, 5)
    for a, b in zip(moved, stayed, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(moved, _train(torch.optim.Adam, None, 5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_block_counts_what_it_has_released() -> None:
    """What another optimizer frees in a block is no reason to build a plan again."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(6)]
    for param in params:
        param.grad = torch.ones(3)
    whole = FusedAdam(params)
    whole.step()
    half = FusedAdam(params[:3])
    for param in params[:3]:
        half.state[param] = dict(whole.state[param])
    half.step()
    plan = half._stepper._plan
    whole.state.clear()
    half.step()
    assert half._stepper._plan is plan
    assert [half.state[param]["step"].item() for param in params[:3]] == [3.0] * 3


def test_a_tensor_must_fit_into_its_block() -> None:
    block = native.StateBlock(64)
    assert block.size == 64
    tensor = block.tensor(16, (2, 3), (1, 2), torch.float64)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == ((2, 3), (1, 2), torch.float64)
    assert tensor.data_ptr() == block.address + 16
    assert not tensor.any()
    for offset, shape in ((24, (6,)), (-8, (1,)), (65, (0,))):
        with pytest.raises(IndexError, match="not in a block of 64"):
            block.tensor(offset, shape, (1,), torch.float64)
    with pytest.raises(TypeError, match="dtype must be"):
        block.tensor(0, (1,), (1,), "float32")
    address = block.address
    del block
    tensor.fill_(7.0)  # which keeps the memory alive
    assert tensor.data_ptr() == address + 16
