"""Who unscales gradients and skips steps under torch.amp.GradScaler: the scaler, or the step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from recap_fast import unfuse
from recap_fast.optim import FusedAdam, FusedOptimizer, FusedSGD
from tests.support.optimizers import (
    DTYPES,
    EMULATED,
    FUSED,
    SCALE,
    TORCH,
    UPDATES,
    WAYS,
    combine,
    combined,
    for_loop,
    grad_scaler,
    numbers,
    parameter,
    parameters,
    same_bits,
    set_scaled_grads,
    wrapped,
)

_CONSTRUCTED = ["adam", "adamw", "adagrad", "sgd"]


def _by_step(optimizer: torch.optim.Optimizer) -> bool:
    """As GradScaler, Lightning and accelerate ask."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("algorithm", _CONSTRUCTED)
def test_the_scaler_by_default_and_the_step_if_asked_to(algorithm: str) -> None:
    params = parameters(1)
    assert _by_step(FUSED[algorithm](params)) is False
    assert _by_step(FUSED[algorithm](params, step_supports_amp_scaling=True)) is True
    assert _by_step(FUSED[algorithm](params, step_supports_amp_scaling=False)) is False


@pytest.mark.parametrize("algorithm", _CONSTRUCTED)
def test_capturable_means_the_step(algorithm: str, device: torch.device) -> None:
    if not (device.type == "cuda" or EMULATED):
        pytest.skip("capturable is for CUDA devices")
    params = parameters(1, device=device)
    assert _by_step(FUSED[algorithm](params, capturable=True)) is True
    host = FUSED[algorithm](params, capturable=True, step_supports_amp_scaling=False)
    assert _by_step(host) is False


def test_combined_by_step_if_all_are(device: torch.device) -> None:
    params = parameters(4, device=device)
    assert _by_step(combined(params)) is False
    assert _by_step(combined(params, step_supports_amp_scaling=True)) is True
    parts = [
        ("a", wrapped({"a": params[0]}, "adam", step_supports_amp_scaling=True)),
        ("b", wrapped({"b": params[1]}, "sgd")),
    ]
    assert _by_step(combine(parts)) is False
    kind = type(combine(parts))
    assert _by_step(kind(parts, step_supports_amp_scaling=True)) is True
    assert _by_step(kind(parts[:1])) is True
    assert _by_step(kind(parts[:1], step_supports_amp_scaling=False)) is False


def test_combined_by_the_scaler_if_one_inside_has_a_step_of_its_own() -> None:
    keyed = pytest.importorskip("torchrec.optim.keyed")
    params = parameters(2)
    native = wrapped({"a": params[0]}, "sgd", lr=1.0, step_supports_amp_scaling=True)
    other = keyed.KeyedOptimizerWrapper({"b": params[1]}, lambda p: torch.optim.SGD(p, lr=1.0))
    optimizer = combine([("a", native), ("b", other)])
    assert _by_step(optimizer) is False
    before = [param.detach().clone() for param in params]
    unscaled = [param.grad.clone() for param in params]
    scaler = grad_scaler("cpu")
    for param in params:
        param.grad.mul_(SCALE)
    scaler.step(optimizer)
    for param, old, grad in zip(params, before, unscaled, strict=True):
        assert same_bits(param.grad, grad)
        torch.testing.assert_close(param.detach(), old - grad)


def _loaded(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def _set(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if isinstance(optimizer, FusedOptimizer):
        optimizer.__setstate__({"param_groups": optimizer.param_groups})
    return optimizer


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o)), _loaded, _set],
    ids=["deepcopy", "copy", "pickle", "load_state_dict", "__setstate__"],
)
@pytest.mark.parametrize("kind", ["adam", "adamw", "adagrad", "sgd", "combined"])
@pytest.mark.parametrize("by_step", [False, True])
def test_the_choice_stays(
    kind: str, by_step: bool, through: Callable[[Any], Any], device: torch.device
) -> None:
    params = parameters(3, device=device)
    if kind == "combined":
        optimizer = combined(params, step_supports_amp_scaling=by_step)
        optimizer.unscale_grads = not by_step
    else:
        options = {"step_supports_amp_scaling": by_step, "unscale_grads": not by_step}
        optimizer = FUSED[kind](params, **options)
    optimizer.step()
    result = through(optimizer)
    assert _by_step(result) is by_step and result.unscale_grads is not by_step


@pytest.mark.parametrize("kind", ["adam", "sgd", "combined"])
def test_what_goes_back_to_torch_is_not_handed_a_scale(kind: str) -> None:
    """Its step would not look at it, and take gradients of a thousand times the size."""
    params = parameters(3)
    if kind == "combined":
        optimizer = combined(params, step_supports_amp_scaling=True)
    else:
        optimizer = FUSED[kind](params, lr=1.0, step_supports_amp_scaling=True)
    unfuse(optimizer)
    assert not _by_step(optimizer) and not hasattr(optimizer, "unscale_grads")
    scaler = grad_scaler("cpu")
    grads = [param.grad.clone() for param in params]
    set_scaled_grads(params, 0)
    scaler.step(optimizer)
    assert all(same_bits(param.grad, grad) for param, grad in zip(params, grads, strict=True))


def test_a_class_derived_from_another_library_has_torchs_default() -> None:
    class Converted(FusedAdam):
        def __init__(self, params: Any) -> None:
            torch.optim.Adam.__init__(self, params)

    optimizer = Converted(parameters(1))
    assert _by_step(optimizer) is False and optimizer.unscale_grads is True
    optimizer.step()


# --- against torch's optimizers ------------------------------------------------------------------

# What a step is given: gradients of this seed, and an infinite one where it is negative.
_TRAINING = [1, 2, -3, 4, 5, 6, -7, 8]
_TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    # torch rounds at each of a dozen operations of a step, of which there are six here.
    torch.bfloat16: {"rtol": 2**-5, "atol": 2**-5},
    torch.float16: {"rtol": 2**-8, "atol": 2**-8},
}


def _train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Any]:
    """Trains under a scaler that grows every two steps; returns what could be seen in between."""
    device = params[0].device
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2)
    scaler.scale(torch.ones((), device=device))
    seen: list[Any] = []
    for seed in _TRAINING:
        for index, param in enumerate(params):
            grad = numbers(param.shape, 1000 * abs(seed) + index, param.dtype, device)
            param.grad = grad * scaler.get_scale()
        if seed < 0:
            params[-1].grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        seen += [scaler.get_scale(), [param.grad.clone() for param in params]]
    return seen


def _assert_same_training(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, dtype: torch.dtype
) -> None:
    all_params = [
        [param for group in optimizer.param_groups for param in group["params"]]
        for optimizer in (ours, theirs)
    ]
    mine, others = (
        _train(optimizer, params)
        for optimizer, params in zip((ours, theirs), all_params, strict=True)
    )
    for step, (own, other) in enumerate(zip(mine, others, strict=True)):
        if isinstance(own, float):
            assert own == other, f"the scale after step {step // 2}"
            continue
        for one, two in zip(own, other, strict=True):
            assert same_bits(one.nan_to_num(), two.nan_to_num()), f"gradients, step {step // 2}"
    scales = [scale for scale in mine if isinstance(scale, float)]
    assert sorted(set(scales)) == [2.0**10, 2.0**11] and scales[0] == scales[2]  # up and down
    for one, two in zip(*all_params, strict=True):
        torch.testing.assert_close(one, two, **_TOLERANCE[dtype])
        for key, value in theirs.state[two].items():
            if key == "step":
                steps = sum(seed > 0 for seed in _TRAINING)
                assert ours.state[one][key].item() == value.item() == steps


def _params(dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    return [parameter(shape, i, dtype, device) for i, shape in enumerate([(5, 3), (7,), (2, 2)])]


# GradScaler itself refuses to unscale float16 gradients, whatever the optimizer.
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("update", UPDATES)
def test_by_the_scaler_as_with_torchs_for_loop(
    update: str, dtype: torch.dtype, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    ours = FUSED[algorithm](_params(dtype, device), lr=0.01, **options)
    theirs = for_loop(algorithm, _params(dtype, device), lr=0.01, **options)
    _assert_same_training(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("update", UPDATES)
def test_by_the_step_as_with_torchs_fused_step(
    update: str, dtype: torch.dtype, device: torch.device
) -> None:
    algorithm, options = UPDATES[update]
    if "fused" not in WAYS[algorithm]:
        pytest.skip(f"torch has no fused step of {algorithm}")
    ours = FUSED[algorithm](
        _params(dtype, device), lr=0.01, step_supports_amp_scaling=True, **options
    )
    theirs = TORCH[algorithm](_params(dtype, device), lr=0.01, fused=True, **options)
    if not getattr(theirs, "_step_supports_amp_scaling", False):  # torch 2.11's Adagrad
        pytest.skip(f"the fused step of this torch's {algorithm} leaves scaling to GradScaler")
    _assert_same_training(ours, theirs, dtype)


def test_float16_gradients_are_refused_by_the_scaler_as_with_torch(device: torch.device) -> None:
    for make in (FusedSGD, torch.optim.SGD):
        params = _params(torch.float16, device)
        optimizer, scaler = make(params, lr=0.1), grad_scaler(device)
        set_scaled_grads(params, 0)
        with pytest.raises(ValueError, match="FP16"):
            scaler.step(optimizer)


def test_several_optimizers_under_one_scaler(device: torch.device) -> None:
    """An infinite gradient of one skips the step of that one, and lowers the scale for all."""
    all_params = [parameters(2, seed=10 * i, device=device) for i in range(3)]
    optimizers = [
        FusedSGD(all_params[0], lr=1.0),
        FusedSGD(all_params[1], lr=1.0, step_supports_amp_scaling=True),
        torch.optim.SGD(all_params[2], lr=1.0, foreach=False),
    ]
    scaler = grad_scaler(device)
    for bad in range(3):
        before = [[param.detach().clone() for param in params] for params in all_params]
        scale = scaler.get_scale()
        for params in all_params:
            set_scaled_grads(params, bad, scale)
        all_params[bad][0].grad[0, 0] = float("inf")
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale * scaler.get_backoff_factor()
        for number, (params, old) in enumerate(zip(all_params, before, strict=True)):
            for param, value in zip(params, old, strict=True):
                if number == bad:
                    assert same_bits(param, value)
                else:
                    torch.testing.assert_close(param.detach(), value - param.grad)


@pytest.mark.parametrize("kind", ["adam", "combined"])
def test_a_skipped_step_is_not_called_by_default(kind: str, device: torch.device) -> None:
    """accelerate tells by this that a step was skipped, so that its scheduler waits."""
    params = parameters(3, device=device)
    optimizer = FusedAdam(params) if kind == "adam" else combined(params)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("stepped"))
    scaler = grad_scaler(device)
    for infinite in (False, True):
        set_scaled_grads(params, 0)
        if infinite:
            params[1].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert calls == ["stepped"]


def test_clip_grad_norm_between_unscaling_and_step(device: torch.device) -> None:
    """As Lightning's mixed precision does it for optimizers that do not scale by themselves."""
    ours, theirs = parameters(3, device=device), parameters(3, device=device)
    optimizers = [FusedAdam(ours, lr=0.1), for_loop("adam", theirs, lr=0.1)]
    for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
        scaler = grad_scaler(device)
        for step in range(3):
            set_scaled_grads(params, step)
            assert not _by_step(optimizer)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 0.3)
            scaler.step(optimizer)
            scaler.update()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        assert same_bits(one.grad, two.grad)
