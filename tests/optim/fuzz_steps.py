"""The ways in which a round of the fuzz takes a step, or fails to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.optim.fuzz_draws import draw_gradient
from tests.support.rounding import double

if TYPE_CHECKING:
    from tests.optim.fuzz_round import Round


def _new_gradients(round: Round) -> None:
    """Of each parameter: the one it has, another, other values in the same memory, or none."""
    for param, truth in round.pairs:
        chance = round.draw.random()
        if chance < 0.15 and param.grad is not None:
            continue
        if chance < 0.3:
            param.grad = truth.grad = None
            continue
        grad = draw_gradient(round.draw, param)
        if chance < 0.5 and param.grad is not None and is_writable(param.grad):
            param.grad.copy_(grad)
        else:
            param.grad = grad
        truth.grad = double(param.grad)


def is_writable(grad: Tensor) -> bool:
    return 0 not in grad.stride() and grad.numel() > 0


def step(round: Round) -> None:
    _new_gradients(round)
    round.step(round.ours.step, round.theirs.step)


def steps(round: Round) -> None:
    """With nothing in between but gradients in the same memory: what needs no other plan."""
    step(round)
    for _ in range(round.draw.randint(1, 3)):
        for param, truth in round.pairs:
            if param.grad is not None and is_writable(param.grad):
                param.grad.mul_(0.5)
                truth.grad = double(param.grad)
        round.step(round.ours.step, round.theirs.step)


def closure_step(round: Round) -> None:
    results: list[Any] = []

    def closure() -> object:
        assert torch.is_grad_enabled()
        if not results:
            _new_gradients(round)
        results.append(object())
        return results[-1]

    # Torch's runs first, and so draws the gradients of both.
    def take(optimizer: Any) -> None:
        assert optimizer.step(closure) is results[-1]

    round.step(lambda: take(round.ours), lambda: take(round.theirs))
    assert len(results) == 2


def failing_closure(round: Round) -> None:
    def closure() -> None:
        raise ZeroDivisionError

    round.step(lambda: round.ours.step(closure), lambda: round.theirs.step(closure))


def scaled_step(round: Round) -> None:
    """With what `torch.amp.GradScaler` hands to a step; torch's gets the result of that."""
    _new_gradients(round)
    scale = 8.0  # by which gradients are multiplied and divided exactly
    found_inf = round.draw.random() < 0.3
    for param, _ in round.pairs:
        if param.grad is not None:
            param.grad = param.grad * scale
    round.ours.grad_scale = torch.tensor(scale)
    round.ours.found_inf = torch.tensor(float(found_inf))
    try:
        if found_inf:
            round.ours.step()
        else:
            round.step(round.ours.step, round.theirs.step)
    finally:
        del round.ours.grad_scale, round.ours.found_inf
    if found_inf:  # nobody reads the gradients of a step that was skipped
        for param, truth in round.pairs:
            param.grad = truth.grad = None
