"""Clipping by the global norm inside the step, against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest

pytest.importorskip("torchrec")

import torch
from torch import nn
from torchrec.optim import keyed
from torchrec.optim.clipping import GradientClippingOptimizer

from recap_fast._native import native
from recap_fast.keyed import CombinedOptimizer
from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD
from tests.support.optimizers import EMULATED, parameter, set_grads

SHAPES = [(), (3,), (0,), (7, 5), (1,), (300, 41), (20000,)]
ORACLES = {
    "adam": (FusedAdam, torch.optim.Adam, {"lr": 0.1}),
    "adagrad": (FusedAdagrad, torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-3}),
    "sgd": (FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


def make_params(device="cpu", dtype=torch.float32, layout="contiguous"):
    return [parameter(shape, i, dtype, device, layout) for i, shape in enumerate(SHAPES)]


def combine(params, fused, options, groups=1, **arguments):
    """A combined optimizer with the parameters dealt out to ``groups`` optimizers in turn."""
    parts = []
    for number in range(groups):
        own = {str(i): p for i, p in enumerate(params) if i % groups == number}
        parts.append(keyed.KeyedOptimizerWrapper(own, lambda p: fused(p, **options)))
    kind = arguments.pop("kind", FusedCombinedOptimizer)
    return kind(parts, **arguments)


def exact_norm(params):
    squares = [p.grad.double().square().sum().item() for p in params if p.grad is not None]
    return math.sqrt(math.fsum(squares))


def bits(params):
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ORACLES)
def test_steps_follow_torch_clipping_and_gradients_stay(device, algorithm, dtype, layout):
    fused, oracle, options = ORACLES[algorithm]
    ours = make_params(device, dtype, layout)
    theirs = [nn.Parameter(p.detach().to("cpu", torch.float64, copy=True)) for p in ours]
    optimizer = combine(ours, fused, options, groups=2, clip_grad_norm=100.0)
    expected = oracle(theirs, foreach=False, **options)
    for step in range(3):
        set_grads(ours, step)
        if step == 1:
            ours[1].grad = None
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.to("cpu", torch.float64, copy=True)
        before = [None if p.grad is None else p.grad.clone() for p in ours]
        norm = exact_norm(ours)
        assert norm > 200.0
        torch.nn.utils.clip_grad_norm_(theirs, 100.0, foreach=False)
        optimizer.step()
        expected.step()
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=norm_tolerance(device))
        for p, gradient in zip(ours, before, strict=True):
            assert (p.grad is None and gradient is None) or torch.equal(p.grad, gradient)
    # Three steps' roundings of values around one, against float64; on a device the norm itself is
    # of float32.
    ulp = max(torch.finfo(dtype).eps, norm_tolerance(device) / 100)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            p.detach().cpu().double(), q.detach(), rtol=8 * ulp, atol=8 * ulp
        )


def norm_tolerance(device):
    """The CPU engine sums in double; torch's norm on devices is in float32."""
    return 1e-5 if EMULATED or device.type == "cuda" else 1e-14


def test_a_norm_below_the_limit_changes_no_bit(device):
    clipped, plain = make_params(device), make_params(device)
    first = combine(clipped, FusedAdam, {"lr": 0.1}, clip_grad_norm=1e6)
    second = combine(plain, FusedAdam, {"lr": 0.1})
    for step in range(3):
        for params, optimizer in ((clipped, first), (plain, second)):
            set_grads(params, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(clipped, plain, strict=True))
    assert second.grad_norm is None


@pytest.mark.cpu_engine
def test_the_same_bits_for_any_threads_groups_and_instruction_set():
    outcomes = []
    used = native.instruction_set_in_use()
    threads = torch.get_num_threads()
    try:
        for name in native.instruction_sets():
            for count in (1, 2):
                for groups in (1, 3):
                    native.use_instruction_set(name)
                    torch.set_num_threads(count)
                    params = make_params()
                    optimizer = combine(
                        params, FusedAdam, {"lr": 0.1}, groups=groups, clip_grad_norm=0.37
                    )
                    set_grads(params, 5)
                    optimizer.step()
                    outcomes.append((optimizer.grad_norm, bits(params)))
    finally:
        native.use_instruction_set(used)
        torch.set_num_threads(threads)
    norm, values = outcomes[0]
    for other_norm, other_values in outcomes[1:]:
        assert other_norm == norm
        assert all(torch.equal(a, b) for a, b in zip(values, other_values, strict=True))


@pytest.mark.parametrize("kind", [FusedCombinedOptimizer, CombinedOptimizer])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("new_state", [True, False])
def test_a_norm_that_is_not_finite_skips_the_step_and_says_so(device, kind, bad, new_state, caplog):
    params = make_params(device)
    optimizer = combine(params, FusedAdam, {"lr": 0.1}, kind=kind, clip_grad_norm=math.inf)
    set_grads(params, 0)
    if not new_state:
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(exact_norm(params), rel=1e-6)
    params[3].grad.view(-1)[4] = bad
    before, state = bits(params), copy.deepcopy(optimizer.state_dict())
    with caplog.at_level(logging.WARNING, "recap_fast"):
        optimizer.step()
    assert not math.isfinite(float(optimizer.grad_norm))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    after = optimizer.state_dict()["state"]
    if isinstance(optimizer.grad_norm, float):  # else the device keeps it to itself
        assert "no parameter was updated" in caplog.text
        assert after.keys() == state["state"].keys()
    for name, entries in state["state"].items():
        for key, value in entries.items():
            assert torch.equal(after[name][key], value), (name, key)
    set_grads(params, 1)
    optimizer.step()
    assert not torch.equal(params[3], before[3])


@pytest.mark.parametrize("by_step", [False, True], ids=["scaler", "step"])
def test_a_grad_scaler_and_clipping_work_together(by_step, device):
    params, plain = make_params(device), make_params(device)
    options = {"lr": 0.1, "step_supports_amp_scaling": by_step}
    optimizer = combine(params, FusedAdam, options, clip_grad_norm=2.0)
    expected = torch.optim.Adam(plain, lr=0.1, foreach=False)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for step in range(4):
        set_grads(plain, step)
        norm = exact_norm(plain)
        for p, q in zip(params, plain, strict=True):
            p.grad = q.grad * 1024
        if step == 2:
            params[5].grad[0, 0] = math.inf
        scaler.scale(torch.ones((), device=device))  # the scaler wants to have been used
        scaler.step(optimizer)
        if step == 2:
            scaler.update(1024.0)
            continue
        scaler.update(1024.0)
        for p, q in zip(params, plain, strict=True):
            assert torch.equal(p.grad, q.grad)  # unscaled, and not clipped
        torch.nn.utils.clip_grad_norm_(plain, 2.0, foreach=False)
        expected.step()
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
    for p, q in zip(params, plain, strict=True):
        # A square and a root, of gradients scaled in one rounding here and two there.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=2e-6)


def test_params_that_come_and_go_are_counted():
    params = make_params()
    optimizer = combine(params[:3], FusedSGD, {"lr": 0.1}, clip_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(exact_norm(params[:3]), rel=1e-6)
    optimizer.optimizers[0][1]._optimizer.add_param_group({"params": params[3:]})
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(exact_norm(params), rel=1e-6)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_clips_too(duplicate):
    params = make_params()
    optimizer = FusedCombinedOptimizer(
        [keyed.KeyedOptimizerWrapper({"p": params[3]}, FusedSGD)], clip_grad_norm=1.0
    )
    set_grads(params, 0)
    optimizer.step()
    twin = duplicate(optimizer)
    param = twin.param_groups[0]["params"][0]
    param.grad = torch.full_like(param, 3.0)
    twin.step()
    assert float(twin.grad_norm) == pytest.approx(3.0 * math.sqrt(35), rel=1e-6)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, True, "1"])
@pytest.mark.parametrize("kind", [FusedCombinedOptimizer, CombinedOptimizer])
def test_a_limit_that_is_no_positive_number_is_refused(kind, bad):
    with pytest.raises(ValueError, match="clip_grad_norm must be None or a number greater than 0"):
        combine(make_params(), FusedSGD, {}, kind=kind, clip_grad_norm=bad)


def test_an_optimizer_that_would_not_be_clipped_is_refused_by_its_key():
    params = make_params()
    clipped = GradientClippingOptimizer(
        keyed.KeyedOptimizerWrapper({"p": params[0]}, lambda p: FusedSGD(p, lr=0.1))
    )
    with pytest.raises(ValueError, match="clip_grad_norm: the optimizer under the key 'tower'"):
        FusedCombinedOptimizer([("tower", clipped)], clip_grad_norm=1.0)
