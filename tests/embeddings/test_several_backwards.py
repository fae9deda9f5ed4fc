"""Several backward passes before a step: an update at each, one of their sum, or an error."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recap_fast import build_optimizer, checkpoint, reference
from recap_fast.embeddings import fuse_embeddings
from tests.support.live_tables import (
    ALGORITHMS,
    FEATURES,
    TABLES,
    Towers,
    assert_same,
    batch,
    fused,
    loss_of,
    state_of,
    weight,
    weights,
)
from tests.support.table_reference import table
from tests.support.tables import config_of

DENSE = {"sgd": {"lr": 0.1}}
TORCH = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.5, eps=1e-8),
}


def accumulating(**options: Any) -> Any:
    return config_of(several_backwards="accumulate", **options)


def two_losses(model: nn.Module, step: int, **options: Any) -> None:
    output = model(batch(step, **options))
    output.square().sum().backward(retain_graph=True)
    (2 * output).sum().backward()


def accumulation(model: nn.Module, step: int, **options: Any) -> None:
    for part, size in enumerate((4, 2, 7)):
        loss_of(model, batch(10 * step + part, size, **options), part).backward()


def two_lookups(model: nn.Module, step: int, **options: Any) -> None:
    first, second = (batch(10 * step + part, **options) for part in (0, 1))
    (loss_of(model, first, 0) + loss_of(model, second, 1)).backward()


def one_lookup(model: nn.Module, step: int, **options: Any) -> None:
    loss_of(model, batch(step, **options), step).backward()


RUNS = {each.__name__: each for each in (two_losses, accumulation, two_lookups, one_lookup)}
MEANS = tuple(
    table(config.name, *config.feature_names, pooling=PoolingType.MEAN) for config in TABLES
)


@pytest.mark.parametrize("algorithm", TORCH)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
def test_one_update_of_the_sum_as_with_torchs_optimizers(
    kind: str, run: Callable[..., None], algorithm: str
) -> None:
    """Including those of dense parameters, and with a batch of nothing in between."""
    config = accumulating(**ALGORITHMS[algorithm])
    options = {"configs": MEANS if kind == "mean" else TABLES, "is_weighted": kind == "weighted"}
    plain, model = Towers(**options), fused(config, **options)
    tables = TORCH[algorithm](plain.ebc.parameters())
    dense = torch.optim.SGD([plain.bias], lr=0.1)
    optimizer, scheduler = build_optimizer(model, DENSE, config)
    for step in range(3):
        for each in (plain, model):
            run(each, step, is_weighted=kind == "weighted")
        for each in (tables, dense, optimizer):
            each.step()
            each.zero_grad()
        scheduler.step()
        optimizer.step()  # of which none is left
    # Sums are taken in another order.
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bias, plain.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16])
def test_with_one_backward_to_a_step_it_is_fbgemms_update(
    algorithm: str, data_type: DataType
) -> None:
    """To the bit, with all state and counts."""
    configs = [table(config.name, *config.feature_names, data_type=data_type) for config in TABLES]
    found = []
    for mode in ("update", "accumulate"):
        config = config_of(several_backwards=mode, gradient_clipping=0.5, **ALGORITHMS[algorithm])
        model = fused(config, configs=configs)
        optimizer, scheduler = build_optimizer(model, DENSE, config)
        for step in range(6):
            one_lookup(model, step)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if step == 3:
                with torch.no_grad():
                    model(batch(step))
        counts = [kernel.iter.item() for kernel in model.ebc._kernels]
        found.append((weights(model), state_of(model), counts))
    assert_same(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])
    assert found[1][2] == found[0][2]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
def test_parts_of_a_batch_are_the_batch(algorithm: str, build: Callable[..., Any]) -> None:
    """What FBGEMM makes of a batch, it makes of its parts."""
    config = accumulating(**ALGORITHMS[algorithm])
    whole, parts = (fused(config, configs=MEANS) for _ in range(2))
    optimizers = [build(model, DENSE, config)[0] for model in (whole, parts)]
    for step in range(4):
        features = batch(step, 6)
        halves = [
            [features[name].to_dense()[begin:end] for name in FEATURES]
            for begin, end in ((0, 2), (2, 6))
        ]
        output = whole(features)
        factors = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        (output * factors).sum().backward()
        for bags, own in zip(halves, factors.split([2, 4]), strict=True):
            lengths = torch.tensor([len(bag) for bags_of in bags for bag in bags_of])
            values = torch.cat([bag for bags_of in bags for bag in bags_of])
            part = features.__class__(keys=list(FEATURES), values=values.long(), lengths=lengths)
            (parts(part) * own).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state_of(parts), state_of(whole), rtol=1e-5, atol=1e-6)


def test_the_step_takes_the_rate_that_there_is_then() -> None:
    config = accumulating(sgd={})
    model, expected = fused(config), fused(config)
    optimizers = [build_optimizer(each, DENSE, config)[0] for each in (model, expected)]
    one_lookup(model, 0)
    optimizers[0].param_groups[-1]["lr"] = 0.25
    optimizers[1].param_groups[-1]["lr"] = 0.25
    one_lookup(expected, 0)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(weights(model), weights(expected))


def test_a_scheduler_between_backward_and_step_updates_nothing() -> None:
    config = accumulating(sgd={})
    model = fused(config)
    optimizer, scheduler = build_optimizer(model, DENSE, config)
    before = weights(model)
    one_lookup(model, 0)
    optimizer._opt_called = True
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.sync_fused_learning_rates()
    assert_same(weights(model), before)
    model.fused_optimizer.step()
    assert not weights(model)["a"].equal(before["a"])


def test_zero_grad_drops_what_is_held() -> None:
    config = accumulating(adagrad={})
    model = fused(config)
    optimizer, _ = build_optimizer(model, DENSE, config)
    before, state = weights(model), state_of(model)
    accumulation(model, 0)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(weights(model), before)
    assert_same(state_of(model), state)


def test_batches_that_are_overwritten_after_the_backward_pass() -> None:
    """As where all are copied into the same memory."""
    config = accumulating(sgd={})
    model, expected = fused(config), fused(config)
    optimizers = [build_optimizer(each, DENSE, config)[0] for each in (model, expected)]
    features = batch(0)
    loss_of(model, features, 0).backward()
    features.values().fill_(0)
    loss_of(expected, batch(0), 0).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(weights(model), weights(expected))


def test_tables_that_are_frozen_in_part_of_the_accumulation() -> None:
    config = accumulating(adagrad={})
    model, plain = fused(config), Towers()
    optimizer, _ = build_optimizer(model, DENSE, config)
    tables = TORCH["adagrad"](plain.ebc.parameters())
    for part in range(3):
        for each in (model, plain):
            weight(each, "a").requires_grad_(part == 1)
            loss_of(each, batch(part), part).backward()
    weight(model, "a").requires_grad_(True)
    optimizer.step()
    tables.step()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", [two_losses, accumulation, two_lookups])
def test_the_second_is_refused_before_it_updates(run: Callable[..., None]) -> None:
    config = config_of(sgd={}, several_backwards="refuse")
    model = fused(config)
    optimizer, _ = build_optimizer(model, DENSE, config)
    for step in range(3):
        one_lookup(model, step)
        optimizer.step()
        optimizer.zero_grad()
    message = "'a', 'b', 'c' are looked up or propagated through more than once before a step"
    with pytest.raises(RuntimeError, match=message):
        run(model, 0)
    optimizer.step()
    one_lookup(model, 1)
    before = weights(model)
    with pytest.raises(RuntimeError, match="which several_backwards refuses"):
        one_lookup(model, 2)
    assert_same(weights(model), before)


def test_fbgemms_default_is_warned_of_once(caplog) -> None:
    model = fused(config_of(sgd={}))
    optimizer, _ = build_optimizer(model, DENSE, config_of(sgd={}))
    with caplog.at_level(logging.WARNING, "recap_fast"):
        for step in range(2):
            one_lookup(model, step)
            optimizer.step()
        for step in range(2):  # without a step, but after it was dropped
            one_lookup(model, step)
            optimizer.zero_grad()
        assert not caplog.records
        for _ in range(2):
            accumulation(model, 0)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 1
    assert "tables 'a', 'b', 'c' are looked up or propagated through more than once" in texts[0]


def test_tables_that_differ_in_it_do_not_share_a_module() -> None:
    config = config_of(sgd={}, tables={"b": {"several_backwards": "accumulate"}})
    model = fused(config)
    optimizer, _ = build_optimizer(model, DENSE, config)
    assert [kernel.table_names for kernel in model.ebc._kernels] == [["a", "c"], ["b"]]
    before = weights(model)
    one_lookup(model, 0)
    assert weights(model)["b"].equal(before["b"])
    assert not weights(model)["a"].equal(before["a"])
    optimizer.step()
    assert not weights(model)["b"].equal(before["b"])


def test_a_module_cannot_do_two_things() -> None:
    model = fuse_embeddings(Towers(), config_of(sgd={}))
    other = config_of(sgd={}, tables={"b": {"several_backwards": "accumulate"}})
    with pytest.raises(ValueError, match=re.escape("None for a, accumulate for b")):
        build_optimizer(model, DENSE, other)


def test_what_is_held_is_not_copied_and_not_saved(tmp_path) -> None:
    config = accumulating(sgd={})
    model = fused(config)
    optimizer, scheduler = build_optimizer(model, DENSE, config)
    one_lookup(model, 0)
    before = weights(model)
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    its_optimizer.step()
    assert_same(weights(copied), before)
    one_lookup(copied, 0)
    assert_same(weights(copied), before)  # the copy accumulates too
    its_optimizer.step()
    checkpoint.save(tmp_path, 1, model, optimizer, scheduler)
    optimizer.step()
    assert_same(weights(copied), weights(model))


# GradScaler


def scaled_training(model: nn.Module, config: Any, **options: Any) -> tuple[Any, Any]:
    optimizer, _ = build_optimizer(model, DENSE, config, **options)
    return optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)


SCALED = {
    "by the scaler": {},
    "by the step": {"step_supports_amp_scaling": True},
    "by a step that clears": {"clear_grads": True},
}


@pytest.mark.parametrize("options", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("unscales_first", [False, True])
def test_gradients_that_are_held_are_unscaled(
    options: dict[str, Any], unscales_first: bool, recwarn: pytest.WarningsRecorder
) -> None:
    config = accumulating(adagrad={})
    model, plain = fused(config), fused(config)
    optimizer, scaler = scaled_training(model, config, **options)
    expected, _ = build_optimizer(plain, DENSE, config)
    for step in range(3):
        for part in (0, 1):
            scaler.scale(loss_of(model, batch(10 * step + part), part)).backward()
            loss_of(plain, batch(10 * step + part), part).backward()
        if unscales_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        expected.step()
        for each in (optimizer, expected):
            each.zero_grad()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias, plain.bias)
    assert not [each for each in recwarn if "GradScaler" in str(each.message)]


@pytest.mark.parametrize("options", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("where", ["tables", "all"])
def test_gradients_that_are_not_finite_skip_the_step(options: dict[str, Any], where: str) -> None:
    """Those of tables alone, too: all parameters stand still, and the scale goes down."""
    config = accumulating(adagrad={})
    model = fused(config)
    optimizer, scaler = scaled_training(model, config, **options)
    before, state, bias = weights(model), state_of(model), model.bias.detach().clone()
    output = model.ebc(batch(0)).values()
    if where == "tables":
        output.register_hook(lambda gradient: gradient * torch.inf)
    scaler.scale((output + model.bias).sum() * (1 if where == "tables" else torch.inf)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(weights(model), before)
    assert_same(state_of(model), state)
    assert model.bias.equal(bias)
    if "clear_grads" not in options:
        optimizer.zero_grad()
    one_lookup(model, 1)
    optimizer.step()
    assert all(value.isfinite().all() for value in weights(model).values())


@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
def test_a_scaler_over_tables_that_do_not_wait_is_warned_of_once(
    build: Callable[..., Any],
) -> None:
    model = fused(config_of(sgd={}))
    optimizer, _ = build(model, DENSE, config_of(sgd={}))
    for scale, warns in ((1.0, False), (1024.0, True), (1024.0, False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss_of(model, batch(0), 0)).backward()
        with pytest.WarningsRecorder(_ispytest=True) as record:
            scaler.step(optimizer)
        found = [each for each in record if "GradScaler scales the loss" in str(each.message)]
        assert bool(found) == warns
        assert not found or found[0].filename == __file__
        optimizer.zero_grad()


@pytest.mark.parametrize("clear_grads", [False, True])
def test_a_step_that_clipping_skips_leaves_tables_as_they_are(clear_grads: bool) -> None:
    config = accumulating(sgd={})
    model = fused(config)
    options = {"clip_grad_norm": 1.0, "clear_grads": clear_grads}
    optimizer, _ = build_optimizer(model, DENSE, config, **options)
    before = weights(model)
    (model(batch(0)).sum() * torch.inf).backward()
    optimizer.step()
    assert_same(weights(model), before)
    if not clear_grads:
        optimizer.zero_grad()
    loss_of(model, batch(1), 1).backward()
    optimizer.step()
    assert all(value.isfinite().all() for value in weights(model).values())


@pytest.mark.parametrize("build", [build_optimizer, reference.build_optimizer])
def test_a_step_that_is_refused_holds_the_gradients_still(build: Callable[..., Any]) -> None:
    config = config_of(sgd={}, several_backwards="accumulate")
    model, expected = fused(config), fused(config)
    for each in (model, expected):
        optimizer, _ = build(each, DENSE, config)
        loss_of(each, batch(0), 0).backward()
        if each is model:
            before = model.bias.detach().clone()
            model.ebc.double()
            with pytest.raises(RuntimeError, match=r"the weight of the fused table \w is of"):
                optimizer.step()
            assert torch.equal(model.bias, before)
            model.ebc.float()
        optimizer.step()
    assert_same(weights(model), weights(expected))
    assert torch.equal(model.bias, expected.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["update", "accumulate"])
def test_per_sample_weights_of_another_dtype_get_their_gradient(
    dtype: torch.dtype, mode: str
) -> None:
    model = fused(config_of(sgd={}, several_backwards=mode), is_weighted=True)
    features = batch(0, is_weighted=True)
    found = []
    for kind in (dtype, torch.float32):
        given = features.weights().to(dtype).to(kind).requires_grad_()
        twin = copy.deepcopy(model)
        loss_of(twin, _with_weights(features, given), 0).backward()
        assert given.grad.dtype == kind
        found.append(given.grad.float())
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)


def _with_weights(features: KeyedJaggedTensor, given: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        features.keys(), features.values(), weights=given, lengths=features.lengths()
    )
