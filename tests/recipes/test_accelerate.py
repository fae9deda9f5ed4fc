"""The recipe "accelerate"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="needs accelerate: make test-all")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState

from recap_fast.optim import FusedAdamW
from tests.recipes.comparing import Training, compare
from tests.recipes.page import Recipe
from tests.recipes.regression import RecordingLoss, make_batches, make_model, params_of

MAKE, LOOP = range(2)  # the blocks


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """accelerate keeps the precision of the first `Accelerator` for the whole process."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate(tmp_path: Path) -> None:
    recipe = Recipe("accelerate")

    def train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
        _forget()
        loss_fn = RecordingLoss()
        names = {"model": make_model(), "loss_fn": loss_fn, "batches": make_batches(first, last)}
        recipe.run(MAKE, side, names)
        if load:
            names["accelerator"].load_state(load)
        recipe.run(LOOP, side, names)
        if save:
            names["accelerator"].save_state(save)
        return Training(loss_fn.losses, params_of(names["model"]))

    # The model runs in bfloat16; see the test of Lightning.
    compare(train, tmp_path, rtol=1e-3, atol=1e-4)


def test_a_skipped_step_shows() -> None:
    """So that accelerate's scheduler waits for it, as with the torch optimizer of that name."""
    Accelerator(cpu=True)
    param = nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes the scale's tensor
    optimizer = AcceleratedOptimizer(
        FusedAdamW([param], lr=1.0), device_placement=False, scaler=scaler
    )
    for gradient, skipped in ((float("inf"), True), (1.0, False)):
        param.grad = torch.full((3,), gradient)
        optimizer.step()
        assert optimizer.step_was_skipped == skipped
        assert torch.equal(param.detach(), torch.ones(3)) == skipped
