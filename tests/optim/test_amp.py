"""Steps under torch.amp.GradScaler, on the fused optimizers and on several of them combined.

Either the scaler unscales gradients and skips steps, or, where `native`, the step does.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recap_fast.optim import FusedAdam, FusedSGD
from tests.support.optimizers import (
    FUSED,
    SCALE,
    UPDATES,
    assert_same,
    assert_unchanged,
    combined,
    for_loop,
    grad_scaler,
    parameters,
    same_bits,
    set_grads,
    set_scaled_grads,
    snapshot,
)


@pytest.fixture(params=[False, True], ids=["scaler", "native"])
def native(request: pytest.FixtureRequest) -> bool:
    """Whether the scaler hands its scale to the step."""
    return request.param


def _optimizer(update: str, params: list[nn.Parameter], native: bool) -> torch.optim.Optimizer:
    if update == "combined":
        return combined(params, step_supports_amp_scaling=native)
    algorithm, options = UPDATES[update]
    return FUSED[algorithm](params, lr=0.1, step_supports_amp_scaling=native, **options)


@pytest.mark.parametrize("update", UPDATES)
def test_finite_gradients_are_divided_by_the_scale(
    update: str, native: bool, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    params = [parameters(3, device=device) for _ in range(2)]
    ours = _optimizer(update, params[0], native)
    theirs = for_loop(algorithm, params[1], lr=0.1, **options)
    scaler, their_scaler = grad_scaler(device), grad_scaler(device)
    for step in range(3):
        for group in params:
            set_scaled_grads(group, step)
        scaler.step(ours)
        their_scaler.step(theirs)
        for mine, other in zip(*params, strict=True):
            assert same_bits(mine.grad, other.grad)
        scaler.update()
        their_scaler.update()
    assert scaler.get_scale() == their_scaler.get_scale() == SCALE
    assert_same(ours, params[0], theirs, params[1])
    # The attributes that GradScaler puts on an optimizer are gone, and the next step is unscaled.
    assert not hasattr(ours, "grad_scale") and not hasattr(ours, "found_inf")


@pytest.mark.parametrize("scale", [2.0**16, 3.0, 1e-3, 1e30])
def test_the_scale_is_inverted_as_gradscaler_inverts_it(
    scale: float, native: bool, device: torch.device
) -> None:
    params = [parameters(1, device=device) for _ in range(2)]
    ours = FusedSGD(params[0], lr=1.0, step_supports_amp_scaling=native)
    theirs = for_loop("sgd", params[1], lr=1.0)
    for optimizer, group in ((ours, params[0]), (theirs, params[1])):
        scaler = grad_scaler(device, scale)
        set_scaled_grads(group, 0, scale)
        scaler.step(optimizer)
    # One product and one sum, rounded once in ours and twice in torch.
    torch.testing.assert_close(params[0][0], params[1][0], rtol=2**-22, atol=2**-22)
    assert same_bits(params[0][0].grad, params[1][0].grad)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("started", [True, False], ids=["started", "first step"])
@pytest.mark.parametrize("update", ["adam", "amsgrad", "adagrad", "sgd", "momentum", "combined"])
def test_an_infinite_gradient_leaves_everything_as_it_was(
    update: str, started: bool, value: float, native: bool, device: torch.device
) -> None:
    params = parameters(4, device=device)
    optimizer = _optimizer(update, params, native)
    scaler = grad_scaler(device)
    if started:
        set_scaled_grads(params, 0)
        scaler.step(optimizer)
        scaler.update()
    set_scaled_grads(params, 1)
    params[-1].grad[-1, -1] = value
    before = snapshot(optimizer, params)
    scaler.step(optimizer)
    scaler.update()
    assert_unchanged(before, optimizer, params, skipped=native)
    assert scaler.get_scale() == SCALE * scaler.get_backoff_factor()
    # The next one is an ordinary step; for momentum the first, if nothing came before.
    set_scaled_grads(params, 2, scaler.get_scale())
    scaler.step(optimizer)
    after = snapshot(optimizer, params)
    assert all(not torch.equal(old, new) for old, new in zip(before[0], after[0], strict=True))
    if update == "momentum" and not started:
        assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)


@pytest.mark.parametrize("update", ["adam", "adagrad", "momentum", "combined"])
def test_unscale_and_clip_before_a_step(update: str, native: bool, device: torch.device) -> None:
    scaled, plain = parameters(4, device=device), parameters(4, device=device)
    optimizers = [_optimizer(update, params, native) for params in (scaled, plain)]
    scaler = grad_scaler(device)
    for step in range(2):
        set_scaled_grads(scaled, step)
        set_grads(plain, step)
        scaler.unscale_(optimizers[0])
        for params in (scaled, plain):
            nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        for mine, other in zip(scaled, plain, strict=True):
            assert same_bits(mine.grad, other.grad)
    assert_same(optimizers[0], scaled, optimizers[1], plain)


def test_an_infinite_gradient_found_by_unscale_skips_the_step(
    native: bool, device: torch.device
) -> None:
    params = parameters(4, device=device)
    optimizer = combined(params, step_supports_amp_scaling=native)
    scaler = grad_scaler(device)
    set_scaled_grads(params, 0)
    params[3].grad[0, 0] = float("inf")
    before = snapshot(optimizer, params)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_unchanged(before, optimizer, params, skipped=native)
    assert scaler.get_scale() < SCALE


def test_combined_optimizers_match_those_of_torch(native: bool, device: torch.device) -> None:
    ours, theirs = parameters(4, device=device), parameters(4, device=device)
    optimizer = combined(ours, step_supports_amp_scaling=native)
    separate = [
        for_loop("adam", theirs[:1], lr=0.1),
        for_loop("adagrad", theirs[1:2], lr=0.1),
        for_loop("sgd", theirs[2:], lr=0.1, momentum=0.9),
    ]
    scaler, their_scaler = grad_scaler(device), grad_scaler(device)
    for step in range(3):
        for params in (ours, theirs):
            set_scaled_grads(params, step)
        scaler.step(optimizer)
        for other in separate:
            their_scaler.step(other)
        scaler.update()
        their_scaler.update()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
        assert same_bits(mine.grad, other.grad)


def test_a_gradient_missing_here_and_there(native: bool, device: torch.device) -> None:
    params = parameters(3, device=device)
    optimizer = FusedAdam(params, step_supports_amp_scaling=native)
    scaler = grad_scaler(device)
    set_scaled_grads(params, 0)
    params[1].grad = None
    scaler.step(optimizer)
    assert params[1] not in optimizer.state and len(optimizer.state) == 2


def test_a_step_without_any_gradient(device: torch.device) -> None:
    params = parameters(2, device=device, grads=False)
    optimizer = FusedAdam(params, step_supports_amp_scaling=True)
    scaler = grad_scaler(device)
    before = snapshot(optimizer, params)
    scaler.step(optimizer)
    assert_unchanged(before, optimizer, params, skipped=True)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_a_scale_that_is_no_tensor_is_refused_or_read(name: str, device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedSGD(params, lr=1.0)
    setattr(optimizer, name, "x")
    before = snapshot(optimizer, params)
    with pytest.raises(TypeError, match=name):
        optimizer.step()
    assert_unchanged(before, optimizer, params, skipped=True)


def test_grad_scale_is_read_from_the_optimizer(device: torch.device) -> None:
    params = parameters(1, device=device)
    unscaled = params[0].grad / 4
    expected = params[0].detach() - unscaled
    optimizer = FusedSGD(params, lr=1.0)
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), expected)
    assert same_bits(params[0].grad, unscaled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_unscaled_before_they_are_rounded(
    dtype: torch.dtype, device: torch.device
) -> None:
    param = nn.Parameter(torch.ones(3, device=device, dtype=dtype))
    param.grad = torch.full_like(param, 48.0)
    optimizer = FusedSGD([param], lr=1.0)
    optimizer.grad_scale = torch.tensor(3.0 * 2**8, device=device)  # of 1/16
    optimizer.step()
    assert torch.equal(param.detach(), torch.full_like(param, 1 - 1 / 16))


def test_autocast_and_a_scaler_together(native: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).to(device)
    optimizer = FusedAdam(model.parameters(), lr=0.01, step_supports_amp_scaling=native)
    scaler = grad_scaler(device, 2.0**16)
    inputs = torch.randn(16, 4, device=device)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = (model(inputs) - inputs[:, :1]).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
