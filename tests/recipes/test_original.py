"""The recipe "the-algorithm-ml"."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torchrec", reason="needs torchrec")

import torch

from tests.recipes.comparing import Training, compare
from tests.recipes.page import Recipe
from tests.recipes.regression import params_of
from tests.support.original_configs import CLASSES
from tests.support.original_program import ModelAndLoss, batch, original, read

MODULE = "tml.projects.home.recap.optimizer"


@pytest.fixture
def original_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the stand-in importable under the name of the program's own module."""
    name = MODULE
    while name:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        name = name.rpartition(".")[0]
    monkeypatch.setattr(
        sys.modules[MODULE], "build_optimizer", original.build_optimizer, raising=False
    )


@pytest.mark.usefixtures("original_module")
def test_the_algorithm_ml(tmp_path: Path) -> None:
    recipe = Recipe("the-algorithm-ml")
    config = read(CLASSES["pydantic 1"].recap_optimizer)

    def train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
        torch.manual_seed(0)
        model = ModelAndLoss()
        made = recipe.run(0, side, {"model": model, "config": config})
        optimizer, scheduler = made["optimizer"], made["scheduler"]
        parts = (model, optimizer, scheduler)
        optimizer.init_state()  # as the program does, and then restores a checkpoint into it
        if load:
            for part, state in zip(parts, torch.load(load), strict=True):
                part.load_state_dict(state)
            for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
                group["lr"] = rate  # the program's scheduler sets it at its next step only
        losses = []
        for step in range(first, last):
            optimizer.zero_grad()
            loss = model(batch(step))
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        if save:
            epoch = {"last_epoch": scheduler.last_epoch}
            torch.save([model.state_dict(), optimizer.state_dict(), epoch], save)
        return Training(losses, params_of(model))

    compare(train, tmp_path)
