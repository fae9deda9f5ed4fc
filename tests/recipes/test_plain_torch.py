"""The recipe "Plain torch"."""

from __future__ import annotations

from pathlib import Path

from tests.recipes.comparing import Training, compare
from tests.recipes.page import Recipe
from tests.recipes.regression import RecordingLoss, make_batches, make_model, params_of

MAKE, LOOP, SAVE, LOAD = range(4)  # the blocks


def test_plain_torch(tmp_path: Path) -> None:
    recipe = Recipe("Plain torch")

    def train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
        loss_fn = RecordingLoss()
        names = {"model": make_model(), "loss_fn": loss_fn, "batches": make_batches(first, last)}
        recipe.run(MAKE, side, names)
        if load:
            recipe.run(LOAD, side, names | {"path": load})
        recipe.run(LOOP, side, names)
        if save:
            recipe.run(SAVE, side, names | {"path": save})
        return Training(loss_fn.losses, params_of(names["model"]))

    compare(train, tmp_path)
