"""Random trainings in random formats: each step stores what the reference does.

Groups, dtypes, layouts, gradients of other dtypes or none, state dicts that go to another format in
mid-training, and copies.
"""

from __future__ import annotations

import copy
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from recap_fast import optim, reference_formats
from tests.support.formats import SHORT, STORED, Formats, Stored, assert_stored, stored

SHAPES: list[tuple[int, ...]] = [(7,), (64, 65), (5000,), (0, 3), (), (33, 200)]
# Ours, the reference's, and arguments.
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adam": (optim.FusedAdam, reference_formats.Adam, {"amsgrad": True}),
    "adamw": (optim.FusedAdamW, reference_formats.AdamW, {}),
    "adagrad": (optim.FusedAdagrad, reference_formats.Adagrad, {}),
    "momentum": (optim.FusedSGD, reference_formats.SGD, {"momentum": 0.9}),
    "sgd": (optim.FusedSGD, reference_formats.SGD, {}),
    "rmsprop": (optim.FusedRMSprop, reference_formats.RMSprop, {"centered": True}),
    "lion": (optim.FusedLion, reference_formats.Lion, {}),
}
_OPTIONS = ({}, {"master_weights": True}, {"stochastic_rounding": True})
_MOST_SEEDS = 600


class _Shape(NamedTuple):
    """Of a parameter, and what its gradients are of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_transposed: bool
    grad_dtype: torch.dtype


class _Side:
    """One of both trainings, which are to be equal."""

    def __init__(self, kind: Any, options: dict[str, Any], shapes: list[_Shape], seed: int) -> None:
        self.kind, self.options, self.shapes = kind, options, shapes
        self.params = [nn.Parameter(_values(each, seed + i)) for i, each in enumerate(shapes)]
        self.take_gradients()
        self.optimizer: Any = None

    def take_gradients(self) -> None:
        for param, shape in zip(self.params, self.shapes, strict=True):
            if shape.grad_dtype != shape.dtype:
                param.grad_dtype = shape.grad_dtype

    def make(self, cut: int, formats: list[dict[str, Any]]) -> None:
        """A new optimizer, which goes on with the state that there is."""
        named = [(f"p{i}", param) for i, param in enumerate(self.params)]
        parts = zip((named[:cut], named[cut:]), formats, strict=True)
        groups = [{"params": part, **own} for part, own in parts if part]
        before, self.optimizer = self.optimizer, self.kind(groups, lr=0.01, **self.options)
        if before is not None:
            self.optimizer.load_state_dict(copy.deepcopy(before.state_dict()))

    def copy_whole(self) -> None:
        self.optimizer, self.params = copy.deepcopy((self.optimizer, self.params))
        self.take_gradients()  # which torch does not copy


def _values(shape: _Shape, seed: int) -> Tensor:
    values = torch.randn(shape.shape, generator=torch.Generator().manual_seed(seed))
    if shape.is_transposed and values.dim() == 2:
        values = values.t().contiguous().t()
    return values.to(shape.dtype)


def _formats(draw: random.Random) -> dict[str, Any]:
    state_dtype = draw.choice([None, *STORED, "8bit"])
    own = {} if state_dtype is None else {"state_dtype": state_dtype}
    return {**own, **draw.choice(_OPTIONS), "rounding_seed": draw.randrange(-(2**62), 2**62)}


def _check(ours: _Side, theirs: _Side) -> None:
    for group in ours.optimizer.param_groups:
        for param in group["params"]:
            other = next(theirs.params[i] for i, each in enumerate(ours.params) if each is param)
            if not ours.optimizer.state.get(param) and not theirs.optimizer.state.get(other):
                continue
            found, wanted = stored(ours.optimizer, param), stored(theirs.optimizer, other)
            assert found.state.get("step") == wanted.state.pop("step", None)
            if param.numel() and not _is_inexact(group, found):
                options = "master" if group.get("master_weights") else "nearest"
                assert_stored(found, wanted, Formats(param.dtype, param.dtype, None, options))


def _is_inexact(group: dict[str, Any], found: Stored) -> bool:
    """Of torch's own step in 16 bits, and where squares in float16 become zero."""
    is_plain = not any(
        group.get(key) for key in ("state_dtype", "master_weights", "stochastic_rounding")
    )
    squares = ("exp_avg_sq", "square_avg", "sum")
    halves = {found.state[key].dtype for key in squares if key in found.state}
    return (is_plain and found.param.dtype in SHORT) or torch.float16 in halves


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has gradients of one dtype only"
)
@pytest.mark.parametrize(
    "seed",
    [s if s < 30 else pytest.param(s, marks=pytest.mark.long) for s in range(_MOST_SEEDS)],
)
def test_random_trainings_are_those_of_the_reference(seed: int) -> None:
    draw = random.Random(seed)
    native, reference, options = KINDS[draw.choice([*KINDS])]
    shapes = []
    for _ in range(draw.randrange(1, 5)):
        dtype = draw.choice(STORED)
        grad_dtype = draw.choice(STORED) if draw.random() < 0.3 else dtype
        shapes.append(_Shape(draw.choice(SHAPES), dtype, draw.random() < 0.2, grad_dtype))
    sides = [_Side(kind, options, shapes, 100 * seed) for kind in (native, reference)]
    ours, theirs = sides
    cut = draw.randrange(len(shapes))
    formats = [_formats(draw) for _ in range(2)]
    for side in sides:
        side.make(cut, formats)
    for step in range(4):
        for i, (param, other) in enumerate(zip(ours.params, theirs.params, strict=True)):
            grad = _values(shapes[i], 1000 * seed + 10 * step + i).to(shapes[i].grad_dtype)
            param.grad = None if draw.random() < 0.15 else grad
            other.grad = None if param.grad is None else grad.clone()
        for side in sides:
            side.optimizer.step()
        _check(ours, theirs)
        happens = draw.random()
        if happens < 0.3:
            formats = [_formats(draw) for _ in range(2)]
            for side in sides:
                side.make(cut, formats)
        elif happens < 0.5:
            ours.copy_whole()
        # What was rounded to another number goes no further.
        with torch.no_grad():
            for param, other in zip(ours.params, theirs.params, strict=True):
                other.copy_(param)
        theirs.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
