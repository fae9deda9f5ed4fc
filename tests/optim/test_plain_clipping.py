"""`clip_grad_norm` of an optimizer that stands alone, against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from recap_fast.optim import FusedSGD
from tests.support.optimizers import (
    EMULATED,
    FUSED,
    assert_same,
    assert_unchanged,
    combine,
    for_loop,
    parameters,
    set_grads,
    snapshot,
    wrapped,
)

# Hyperparameters with which a gradient scaled by another factor trains otherwise.
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.1, "eps": 1.0},
    "adamw": {"lr": 0.1, "eps": 1.0},
    "adagrad": {"lr": 0.1, "eps": 1.0},
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "rmsprop": {"lr": 0.1, "eps": 1.0},
    "lion": {"lr": 0.1},
}


def _norm(params: list[Any]) -> float:
    squares = [p.grad.double().square().sum().item() for p in params if p.grad is not None]
    return math.sqrt(math.fsum(squares))


def _groups(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.03}]


@pytest.mark.parametrize("algorithm", FUSED)
def test_all_groups_are_clipped_by_one_norm_and_gradients_stay(
    device: torch.device, algorithm: str
) -> None:
    ours, theirs = parameters(4, device=device), parameters(4, device=device)
    optimizer = FUSED[algorithm](_groups(ours), clip_grad_norm=0.5, **OPTIONS[algorithm])
    expected = for_loop(algorithm, _groups(theirs), **OPTIONS[algorithm])
    assert optimizer.clip_grad_norm == 0.5 and optimizer.grad_norm is None
    for step in range(4):
        set_grads(ours, step)
        set_grads(theirs, step)
        if step == 2:
            ours[3].grad = theirs[3].grad = None
        norm = _norm(ours)
        assert norm > 1.0
        torch.nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
        before = [None if p.grad is None else p.grad.clone() for p in ours]
        optimizer.step()
        expected.step()
        # On a device the norm is torch's, in float32.
        tolerance = 1e-5 if EMULATED or device.type == "cuda" else 1e-14
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=tolerance)
        for param, grad in zip(ours, before, strict=True):
            assert grad is param.grad is None or torch.equal(param.grad, grad)
    assert_same(optimizer, ours, expected, theirs)


def test_a_limit_that_is_not_reached_changes_no_bit(device: torch.device) -> None:
    ours, theirs = parameters(3, device=device), parameters(3, device=device)
    optimizers = FUSED["adam"](ours, lr=0.1, clip_grad_norm=1e6), FUSED["adam"](theirs, lr=0.1)
    for step in range(3):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_grads(params, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert optimizers[1].clip_grad_norm is None and optimizers[1].grad_norm is None


@pytest.mark.parametrize("started", [True, False], ids=["started", "first step"])
def test_a_norm_that_is_not_finite_skips_the_step(
    device: torch.device, started: bool, caplog: pytest.LogCaptureFixture
) -> None:
    params = parameters(3, device=device)
    optimizer = FUSED["adam"](params, lr=0.1, clip_grad_norm=math.inf)
    if started:
        optimizer.step()
    params[1].grad[0, 0] = math.nan
    before = snapshot(optimizer, params)
    with caplog.at_level(logging.WARNING, "recap_fast"):
        optimizer.step()
    assert math.isnan(float(optimizer.grad_norm))
    assert_unchanged(before, optimizer, params, skipped=True)
    if isinstance(optimizer.grad_norm, float):  # else the device keeps it to itself
        assert "no parameter was updated" in caplog.text


def _pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def _loaded(optimizer: Any) -> Any:
    """A state dict has no such option: the optimizer that it is loaded into keeps its own."""
    optimizer.load_state_dict(FUSED["adam"](optimizer.param_groups[0]["params"]).state_dict())
    return optimizer


@pytest.mark.parametrize("after", [copy.deepcopy, _pickled, _loaded])
@pytest.mark.parametrize("started", [True, False], ids=["started", "new"])
def test_a_copy_clips_too(after: Any, started: bool) -> None:
    params = parameters(2)
    optimizer = FUSED["adam"](params, lr=0.1, clip_grad_norm=0.25)
    if started:
        optimizer.step()
    optimizer = after(optimizer)
    assert optimizer.clip_grad_norm == 0.25
    own: list[Tensor] = optimizer.param_groups[0]["params"]
    set_grads(own, 5)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(_norm(own))


@pytest.mark.parametrize("algorithm", FUSED)
@pytest.mark.parametrize("bad", [0, -1.0, math.nan, True, "1"])
def test_a_limit_that_is_no_positive_number_is_refused(algorithm: str, bad: Any) -> None:
    with pytest.raises(ValueError, match="clip_grad_norm must be None or a number greater than 0"):
        FUSED[algorithm](parameters(1), clip_grad_norm=bad)


def test_the_limit_cannot_be_changed_in_silence() -> None:
    with pytest.raises(AttributeError):
        FusedSGD(parameters(1), clip_grad_norm=1.0).clip_grad_norm = 2.0


def test_inside_a_combined_optimizer_each_clips_by_its_own_norm() -> None:
    ours, theirs = parameters(4), parameters(4)
    optimizer = combine(
        [
            ("a", wrapped({"0": ours[0]}, "sgd", lr=0.1, clip_grad_norm=0.5)),
            ("b", wrapped({"1": ours[1], "2": ours[2]}, "sgd", lr=0.1)),
            ("c", wrapped({"3": ours[3]}, "sgd", lr=0.1, clip_grad_norm=0.25)),
        ]
    )
    torch.nn.utils.clip_grad_norm_(theirs[:1], 0.5)
    torch.nn.utils.clip_grad_norm_(theirs[3:], 0.25)
    optimizer.step()
    torch.optim.SGD(theirs, lr=0.1).step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


def test_two_norms_for_one_gradient_are_refused() -> None:
    module = pytest.importorskip("recap_fast.keyed.fused")
    part = wrapped({"0": parameters(1)[0]}, "sgd", clip_grad_norm=0.5)
    with pytest.raises(ValueError, match=r"under the key 'tower'.*clip_grad_norm of its own"):
        module.FusedCombinedOptimizer([("tower", part)], clip_grad_norm=1.0)
