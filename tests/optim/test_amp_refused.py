"""What a step that is given the scale of a torch.amp.GradScaler cannot do with others combined."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchrec")

import torch
from torch import Tensor
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClippingOptimizer
from torchrec.optim.fused import EmptyFusedOptimizer
from torchrec.optim.warmup import WarmupOptimizer

from recap_fast.embeddings import fuse_embeddings
from recap_fast.keyed.fused import CombinedOptimizer, FusedCombinedOptimizer
from tests.support.models import EMBEDDING_RATE, EmbeddingRanker, features
from tests.support.optimizers import (
    SCALE,
    assert_unchanged,
    grad_scaler,
    parameters,
    set_scaled_grads,
    snapshot,
    wrapped,
)


def _table_model(native: bool) -> tuple[EmbeddingRanker, FusedCombinedOptimizer]:
    torch.manual_seed(0)
    model = fuse_embeddings(EmbeddingRanker(), EMBEDDING_RATE)
    dense = {name: p for name, p in model.named_parameters() if name.startswith("ranker.")}
    tables = next(m.fused_optimizer for m in model.modules() if hasattr(m, "fused_optimizer"))
    parts = [("tables", tables), ("", wrapped(dense, "adam"))]
    return model, FusedCombinedOptimizer(parts, step_supports_amp_scaling=native)


def test_scaled_updates_of_fused_tables_are_warned_of_once() -> None:
    model, optimizer = _table_model(native=True)
    scaler = grad_scaler(torch.device("cpu"))
    seen: list[Any] = []
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(model(features()).sum()).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler.step(optimizer)
        scaler.update()
        seen += [str(w.message) for w in caught if "GradScaler" in str(w.message)]
    assert len(seen) == 1 and "fused embedding tables" in seen[0]


@pytest.mark.parametrize("native", [False, True])
def test_fused_tables_are_not_warned_of_without_a_scale(native: bool) -> None:
    model, optimizer = _table_model(native)
    model(features()).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("native", [False, True])
def test_dense_groups_beside_fused_tables(native: bool) -> None:
    """They step as without tables; an infinite gradient skips them, but not the tables."""
    model, optimizer = _table_model(native)
    dense = [param for name, param in model.named_parameters() if name.startswith("ranker.")]
    table = next(param for name, param in model.named_parameters() if name.startswith("ebc."))
    expected = [torch.nn.Parameter(param.detach().clone()) for param in dense]
    theirs = torch.optim.Adam(expected, foreach=False)
    for group in dict(optimizer.optimizers)["tables"].param_groups:
        group["lr"] = 0.1
    optimizer.sync_fused_learning_rates()
    scaler = grad_scaler("cpu")
    for step in range(3):
        optimizer.zero_grad()
        before = table.detach().clone()
        scaler.scale(model(features(step)).sum()).backward()
        assert not torch.equal(table, before)
        for param, other in zip(dense, expected, strict=True):
            other.grad = param.grad / scaler.get_scale()
        if step == 1:
            dense[0].grad[0, 0] = float("inf")
        else:
            theirs.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scaler.step(optimizer)
        scaler.update()
        for param, other in zip(dense, expected, strict=True):
            torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


def test_a_torch_optimizer_inside_is_refused_under_a_scaler() -> None:
    params = parameters(2)
    optimizer = FusedCombinedOptimizer(
        [
            ("a", wrapped({"x": params[0]}, "adam")),
            ("b", keyed.KeyedOptimizerWrapper({"y": params[1]}, torch.optim.Adam)),
        ],
        step_supports_amp_scaling=True,
    )
    scaler = grad_scaler(torch.device("cpu"))
    set_scaled_grads(params, 0)
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"holds an? Adam"):
        scaler.step(optimizer)
    assert_unchanged(before, optimizer, params, skipped=True)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda part: GradientClippingOptimizer(part), "GradientClippingOptimizer"),
        (lambda part: WarmupOptimizer(part, []), "WarmupOptimizer"),
        (lambda part: keyed.CombinedOptimizer([part]), "CombinedOptimizer"),
        (lambda part: FusedCombinedOptimizer([part]), "FusedCombinedOptimizer"),
        (lambda part: FusedCombinedOptimizer([EmptyFusedOptimizer(), part]), "FusedCombined"),
    ],
)
def test_a_dense_optimizer_that_is_wrapped_or_nested_is_refused_under_a_scaler(
    wrap: Callable[[keyed.KeyedOptimizer], keyed.KeyedOptimizer], name: str
) -> None:
    params = parameters(2)
    part = wrap(wrapped({"x": params[0]}, "sgd", lr=1.0))
    parts = [("a", part), ("b", wrapped({"y": params[1]}, "sgd"))]
    optimizer = FusedCombinedOptimizer(parts, step_supports_amp_scaling=True)
    scaler = grad_scaler(torch.device("cpu"))
    set_scaled_grads(params, 0)
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=f"'a' holds a {name}"):
        scaler.step(optimizer)
    assert_unchanged(before, optimizer, params, skipped=True)
    unscaled = params[0].detach() - params[0].grad / SCALE
    advised = FusedCombinedOptimizer(parts, step_supports_amp_scaling=False)
    if name != "WarmupOptimizer":  # sets a rate of its own
        advised.param_groups[0]["lr"] = 1.0
        grad_scaler(torch.device("cpu")).step(advised)
        torch.testing.assert_close(params[0].detach(), unscaled)


def test_the_reference_has_no_scaling_of_its_own() -> None:
    """GradScaler then unscales the gradients itself, and skips the step."""
    params = parameters(1)
    optimizer = CombinedOptimizer([keyed.KeyedOptimizerWrapper({"x": params[0]}, torch.optim.Adam)])
    scaler = grad_scaler(torch.device("cpu"))
    set_scaled_grads(params, 0)
    params[0].grad[0, 0] = float("inf")
    before = snapshot(optimizer, params)
    scaler.step(optimizer)
    assert_unchanged(before, optimizer, params, skipped=True)
    grads: list[Tensor] = [param.grad for param in params]
    assert grads[0][0, 1].abs() < 3  # unscaled in place
