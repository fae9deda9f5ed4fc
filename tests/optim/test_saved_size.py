"""What is saved of an optimizer is what torch would save: as large, and nothing else's."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.optimizers import FUSED, TORCH

OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"amsgrad": True},
    "adamw": {},
    "adagrad": {},
    "sgd": {"momentum": 0.9},
    "rmsprop": {"centered": True, "momentum": 0.9},
    "lion": {},
}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _params(count: int, elements: int = 8) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(elements)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(elements)
    return params


def _stepped(make: Make, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = make(params)
    optimizer.step()
    return optimizer


def _of_one(make: Make) -> object:
    return _stepped(make, _params(1)).state_dict()


def _of_480(make: Make) -> object:
    return _stepped(make, _params(480)).state_dict()


def _of_large(make: Make) -> object:
    return _stepped(make, _params(2, 100_000)).state_dict()


def _one_optimizer_each(make: Make) -> object:
    return [_stepped(make, [param]).state_dict() for param in _params(50)]


def _one_after_the_other(make: Make) -> object:
    params = _params(50)
    optimizer = make(params)
    for param in params:
        optimizer.zero_grad()
        param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer.state_dict()


def _loaded(make: Make) -> object:
    optimizer = make(_params(50))
    optimizer.load_state_dict(_stepped(make, _params(50)).state_dict())
    return optimizer.state_dict()


def _one_state(make: Make) -> object:
    optimizer = _stepped(make, params := _params(3))
    return [value for name, value in optimizer.state[params[1]].items() if name != "step"]


def _one_step_count(make: Make) -> object:
    optimizer = _stepped(make, params := _params(3))
    return optimizer.state[params[1]].get("step")


@pytest.mark.parametrize(
    "content",
    [
        _of_one,
        _of_480,
        _of_large,
        _one_optimizer_each,
        _one_after_the_other,
        _loaded,
        _one_state,
        _one_step_count,
    ],
)
@pytest.mark.parametrize("algorithm", FUSED)
def test_files_are_as_large_as_torchs(algorithm: str, content: Callable[[Make], object]) -> None:
    options = OPTIONS[algorithm]
    ours = _saved(content(lambda params: FUSED[algorithm](params, **options)))
    theirs = _saved(content(lambda params: TORCH[algorithm](params, **options)))
    assert len(ours) <= 1.01 * len(theirs)


@pytest.mark.parametrize("algorithm", FUSED)
def test_a_pickle_is_as_large_as_torchs(algorithm: str) -> None:
    options = OPTIONS[algorithm]
    ours, theirs = (
        pickle.dumps(_stepped(lambda p, make=make: make(p, **options), _params(5)))
        for make in (FUSED[algorithm], TORCH[algorithm])
    )
    assert len(ours) <= 1.05 * len(theirs) + 500  # names of classes and arguments


@pytest.mark.parametrize("elements", [8, 30_000])
@pytest.mark.parametrize("algorithm", FUSED)
def test_files_hold_nothing_else_of_the_process(algorithm: str, elements: int) -> None:
    mark = b"a password of somebody else"
    for size in (100, 2_000, 50_000):
        freed = [bytearray(mark * size) for _ in range(30)]
        del freed
    options = OPTIONS[algorithm]
    optimizer = _stepped(lambda p: FUSED[algorithm](p, **options), _params(1, elements))
    assert mark[:8] not in _saved(optimizer.state_dict())
