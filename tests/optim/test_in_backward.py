"""Optimizers that step in the backward pass (`apply_optimizer_in_backward`): one per parameter."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers

from recap_fast.optim import FusedOptimizer
from tests.support.optimizers import FUSED, TORCH


def _train(kind: type[torch.optim.Optimizer], steps: int = 4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    _apply_optimizer_in_backward(kind, model.parameters(), {"lr": 0.1, **options})
    for step in range(steps):
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        assert all(param.grad is None for param in model.parameters())
    return model


@pytest.mark.parametrize("algorithm", FUSED)
def test_each_parameter_trains_as_with_torchs_class(algorithm: str) -> None:
    # RMSprop's first step is of ten times the rate.
    options = {"sgd": {"momentum": 0.9}, "rmsprop": {"lr": 1e-3}}.get(algorithm, {})
    ours, theirs = (_train(kind[algorithm], **options) for kind in (FUSED, TORCH))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    optimizers = [_get_in_backward_optimizers(model) for model in (ours, theirs)]
    assert len(optimizers[0]) == 6
    assert all(isinstance(optimizer, FusedOptimizer) for optimizer in optimizers[0])
    for mine, other in zip(*optimizers, strict=True):
        mine.load_state_dict(other.state_dict())
        other.load_state_dict(mine.state_dict())


@pytest.mark.parametrize("algorithm", FUSED)
def test_their_checkpoints_are_as_small_as_torchs(algorithm: str) -> None:
    sizes = []
    for kind in (FUSED, TORCH):
        file = io.BytesIO()
        optimizers = _get_in_backward_optimizers(_train(kind[algorithm], steps=1))
        torch.save([optimizer.state_dict() for optimizer in optimizers], file)
        sizes.append(len(file.getvalue()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


# --- tables that torchrec fuses ------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", FUSED)
def test_torchrec_maps_our_classes_as_torchs(algorithm: str) -> None:
    """To FBGEMM's algorithm, if it has one, or with its own error."""
    utils = pytest.importorskip("torchrec.distributed.utils")
    _train(FUSED[algorithm], steps=1)  # it is enough that one was made
    outcomes = []
    for kind in (FUSED, TORCH):
        try:
            outcomes.append(utils.optimizer_type_to_emb_opt_type(kind[algorithm]))
        except ValueError as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    assert (outcomes[0] is ValueError) == (algorithm in ("adamw", "rmsprop", "lion"))


def test_torchs_own_entries_stay() -> None:
    utils = pytest.importorskip("torchrec.distributed.utils")
    types = utils._OPTIMIZER_CLASS_TO_EMB_OPT_TYPE
    before = {kind: value for kind, value in types.items() if not issubclass(kind, FusedOptimizer)}
    for kind in FUSED.values():
        kind([nn.Parameter(torch.ones(2))])
    assert {kind: types[kind] for kind in before} == before
    assert {kind for kind in types if kind.__module__.startswith("recap_fast")} == {
        FUSED[name] for name in ("adam", "adagrad", "sgd")
    }
