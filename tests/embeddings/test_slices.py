"""Tables that torchrec keeps as slices of one tensor: their gradients are elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.composable.table_batched_embedding_slice import (
    TableBatchedEmbeddingSlice,
)
from torchrec.optim import keyed

from recap_fast import build_optimizer, fuse, reference
from recap_fast.optim import FusedSGD
from tests.support.models import multi_task_config
from tests.support.tables import config_of


class Sliced(nn.Module):
    """Two tables in one tensor, as torchrec has them under data parallelism, and a task."""

    def __init__(self) -> None:
        super().__init__()
        memory = nn.Parameter(torch.arange(20.0))
        self.memory = [memory]  # not a parameter of the model
        self.embedding_bags = nn.ModuleDict()
        for name, begin, rows in (("a", 0, 2), ("b", 8, 3)):
            self.embedding_bags[name] = nn.Module()
            part = TableBatchedEmbeddingSlice(memory, begin, begin + 4 * rows, rows, 4)
            self.embedding_bags[name].register_parameter("weight", part)
        self.liked = nn.Linear(20, 1, bias=False)

    def loss(self, factor: float) -> torch.Tensor:
        (memory,) = self.memory
        return factor * memory.sum() + 0.0 * self.liked(memory).sum()


@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("with_closure", [False, True])
def test_slices_are_trained(
    build: Callable[..., Any], set_to_none: bool, with_closure: bool
) -> None:
    model = Sliced()
    config = config_of(
        learning_rate={"constant": 0.5}, tables={"b": {"learning_rate": {"constant": 2.0}}}
    )
    optimizer, scheduler = build(model, multi_task_config(("liked",), backbone=False), config)
    expected = torch.arange(20.0)
    for factor in (1.0, 0.25, 4.0):

        def closure(factor: float = factor) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = model.loss(factor)
            loss.backward()
            return loss

        if with_closure:
            assert optimizer.step(closure) == factor * expected.sum()
        else:
            closure()
            optimizer.step()
        scheduler.step()
        expected[:8] -= 0.5 * factor
        expected[8:] -= 2.0 * factor
        assert torch.equal(model.memory[0].detach(), expected)


def test_a_slice_without_a_gradient_stays() -> None:
    model = Sliced()
    optimizer, _ = build_optimizer(
        model, multi_task_config(("liked",), backbone=False), config_of()
    )
    model.loss(1.0).backward()
    optimizer.step()
    after = model.memory[0].detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model.memory[0], after)


def test_other_optimizers_have_no_hook() -> None:
    model = nn.ModuleDict({"liked": nn.Linear(2, 1)})
    optimizer, _ = build_optimizer(model, multi_task_config(("liked",), backbone=False))
    assert not optimizer._optimizer_step_pre_hooks
    copy.deepcopy(optimizer)


def _named(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return FusedSGD(params, lr=0.5)


def _fused(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return fuse(torch.optim.SGD(params, lr=0.5))


def _combined(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    wrapper = keyed.KeyedOptimizerWrapper(
        {str(index): param for index, param in enumerate(params)},
        lambda given: torch.optim.SGD(given, lr=0.5),
    )
    return fuse(keyed.CombinedOptimizer([wrapper]))


@pytest.mark.parametrize("make", [_named, _fused, _combined])
@pytest.mark.parametrize("clip_grad_norm", [None, 1e9])
def test_every_way_to_a_native_step_trains_slices(
    make: Callable[..., torch.optim.Optimizer], clip_grad_norm: float | None
) -> None:
    model = Sliced()
    slices = [part.weight for part in model.embedding_bags.values()]
    if clip_grad_norm is None:
        optimizer = make(slices)
    else:
        optimizer = FusedSGD(slices, lr=0.5, clip_grad_norm=clip_grad_norm)
    expected = torch.arange(20.0)
    for factor in (1.0, 0.25):
        optimizer.zero_grad()
        model.loss(factor).backward()
        optimizer.step()
        expected -= 0.5 * factor
        assert torch.equal(model.memory[0].detach(), expected)
    optimizer.zero_grad()
    optimizer.step()  # of a gradient that is not there any more
    assert torch.equal(model.memory[0].detach(), expected)
