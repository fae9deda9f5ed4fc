"""Trains a program with torch's optimizer and with ours, and resumes each from the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from recap_fast.optim.stepper import Stepper
from tests.recipes.page import SIDES

STEPS, HALF = 8, 4


@dataclass
class Training:
    """What a training is known by: the loss of every step, and the parameters at its end."""

    losses: list[float]
    params: Mapping[str, Tensor]


# Trains from step `first` up to, without, `last`. Starts from the checkpoint at `load`, and writes
# one to `save`, both in the format that the program has for it.
Program = Callable[[str, int, int, Path | None, Path | None], Training]


def compare(program: Program, folder: Path, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Checks that a program trains with ours as with torch's, and resumes either's checkpoint.

    Args:
        program: takes a side of a recipe, the steps, and the checkpoints to load and to write.
        folder: for checkpoints.
        rtol, atol: of losses and parameters. The two round differently by some units in the last
            place per step, and nothing in the programs amplifies that.
    """
    expected = program("torch", 0, STEPS, None, None)
    with native_steps() as steps:
        ours = program("ours", 0, STEPS, None, None)
    assert steps, "no step was native"
    _assert_same(ours, expected, 0, rtol, atol)
    for before, after in (SIDES, SIDES[::-1]):
        checkpoint = folder / f"{before}-to-{after}"
        interrupted = program(before, 0, HALF, None, checkpoint)
        assert _differ(interrupted, expected), "the second half of the steps changes nothing"
        resumed = program(after, HALF, STEPS, checkpoint, None)
        _assert_same(resumed, expected, HALF, rtol, atol)


@contextmanager
def native_steps() -> Iterator[list[Stepper]]:
    """Collects who takes native steps meanwhile."""
    steps: list[Stepper] = []
    step = Stepper.step

    def noted(self: Stepper, *scaling: Tensor | None) -> None:
        steps.append(self)
        step(self, *scaling)

    with mock.patch.object(Stepper, "step", noted):
        yield steps


def _assert_same(found: Training, expected: Training, first: int, rtol: float, atol: float) -> None:
    losses = expected.losses[first:]
    assert len(found.losses) == len(losses) == STEPS - first
    torch.testing.assert_close(
        torch.tensor(found.losses), torch.tensor(losses), rtol=rtol, atol=atol
    )
    torch.testing.assert_close(dict(found.params), dict(expected.params), rtol=rtol, atol=atol)


def _differ(one: Training, other: Training) -> bool:
    return any(not torch.equal(one.params[name], value) for name, value in other.params.items())
