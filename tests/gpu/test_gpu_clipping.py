"""Clipping by the global norm without a host that waits for the device, also in a CUDA graph."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torchrec")

import torch
from torchrec.optim import keyed

from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdam
from tests.gpu.helpers import captured
from tests.support.optimizers import parameters, set_grads

MAX_NORM = 0.5


def combine(params: list[torch.nn.Parameter], **options: object) -> FusedCombinedOptimizer:
    named = {str(i): param for i, param in enumerate(params)}
    part = keyed.KeyedOptimizerWrapper(named, lambda p: FusedAdam(p, lr=0.1, **options))
    return FusedCombinedOptimizer([part], clip_grad_norm=MAX_NORM)


def test_a_clipped_step_does_not_wait(device: torch.device, request: pytest.FixtureRequest) -> None:
    params = parameters(6, device=device)
    optimizer = combine(params)
    for _ in range(2):  # the first makes the state
        optimizer.step()
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    for _ in range(3):
        optimizer.step()
        assert isinstance(optimizer.grad_norm, torch.Tensor)


def test_a_replayed_graph_clips_by_the_norm_of_its_own_gradients(device: torch.device) -> None:
    params, eager = parameters(6, device=device), parameters(6, device=device)
    replayed, expected = combine(params, capturable=True), combine(eager, capturable=True)
    for optimizer in (replayed, expected):
        for _ in range(3):
            optimizer.step()
    with captured() as graph:
        replayed.step()
    norms = []
    for seed in range(1, 4):
        before = [param.grad for param in params]
        set_grads(eager, seed)
        for grad, new in zip(before, eager, strict=True):
            grad.copy_(new.grad)
        graph.replay()
        expected.step()
        norms.append((float(replayed.grad_norm), float(expected.grad_norm)))
    for found, wanted in norms:
        assert found == wanted > MAX_NORM
        assert math.isfinite(found)
    for param, other in zip(params, eager, strict=True):
        assert torch.equal(param, other)
