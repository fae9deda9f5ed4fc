"""The recipe "torch.compile", and how often torch compiles for it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.recipes.comparing import Training, compare
from tests.recipes.page import SIDES, Recipe
from tests.recipes.regression import make_batches, make_model, params_of
from tests.support.optimizers import FUSED, combined

MAKE, STEP, LOOP = range(3)  # the blocks


@contextmanager
def _counting(backend: str) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs that `torch.compile` makes, which run on one of torch's test backends."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)  # or it tells of the limit it reaches
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=counter)):
        yield counter
    logger.setLevel(level)
    torch._dynamo.reset()


def _train(side: str, first: int, last: int, load: Path | None, save: Path | None) -> Training:
    recipe = Recipe("torch.compile")
    names = {"model": make_model(), "batches": make_batches(first, last), "losses": []}
    recipe.run(MAKE, side, names)
    parts = [names[name] for name in ("model", "optimizer", "scheduler")]
    if load:
        for part, state in zip(parts, torch.load(load), strict=True):
            part.load_state_dict(state)
    recipe.run(STEP, side, names)
    recipe.run(LOOP, side, names)
    if save:
        torch.save([part.state_dict() for part in parts], save)
    return Training(names["losses"], params_of(names["model"]))


def test_torch_compile(tmp_path: Path) -> None:
    with _counting("eager"):
        compare(_train, tmp_path)


def test_a_learning_rate_compiles_nothing_anew() -> None:
    steps, counts = 4, {}
    for side in SIDES:
        with _counting("aot_eager") as counter:
            _train(side, 0, steps, None, None)
        counts[side] = counter.frame_count
    assert counts["ours"] == 1  # forward and loss
    assert counts["torch"] > steps  # what the recipe says of torch's


def _of_one(algorithm: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return functools.partial(FUSED[algorithm], lr=0.1)


@pytest.mark.parametrize("make", [*map(_of_one, FUSED), combined], ids=[*FUSED, "combined"])
def test_only_the_model_is_compiled(make: Callable[..., torch.optim.Optimizer]) -> None:
    """Not what is made in the first step, and once a group was added."""
    model, (features, labels) = make_model(), make_batches(0, 1)[0]
    optimizer = make(list(model.parameters()))
    with _counting("eager") as counter:

        @torch.compile
        def train_step() -> None:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(features), labels).backward()
            optimizer.step()

        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
            if step == 2:
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.5})
            train_step()
    assert counter.frame_count == 1
