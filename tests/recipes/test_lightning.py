"""The recipe "Lightning"."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="needs lightning: make test-all")

from tests.recipes.comparing import HALF, Training, compare
from tests.recipes.page import Recipe
from tests.recipes.regression import RecordingLoss, make_loader, make_model, params_of

MODULE, TRAINER = range(2)  # the blocks


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where Lightning logs
    recipe = Recipe("Lightning")

    def train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
        names = {
            "model": make_model(),
            "loss_fn": RecordingLoss(),
            "loader": make_loader(HALF),
            "epochs": last // HALF,
            "checkpoint": load,
        }
        recipe.run(MODULE, side, names)
        recipe.run(TRAINER, side, names)
        if save:
            shutil.copy(names["trainer"].checkpoint_callback.best_model_path, save)
        return Training(names["loss_fn"].losses, params_of(names["model"]))

    # The model runs in bfloat16, of which a unit in the last place is 0.8 %: a last bit of a
    # parameter may flip a few of its roundings.
    compare(train, tmp_path, rtol=1e-3, atol=1e-4)
