"""The native step on parameters that are DTensors: the local shards step in the one call."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from recap_fast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedRowwiseAdagrad, FusedSGD
from tests.support.processes import device, mesh, run

CASES = {
    "adam": (FusedAdam, torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True}),
    "adamw": (FusedAdamW, torch.optim.AdamW, {"lr": 0.02}),
    "adagrad": (FusedAdagrad, torch.optim.Adagrad, {"lr": 0.05}),
    "sgd": (FusedSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "plain sgd": (FusedSGD, torch.optim.SGD, {"lr": 0.05}),
}


def make_model():
    """Layers that two ranks cannot share evenly; of the last one, the second rank gets nothing."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3), nn.SiLU(), nn.Linear(3, 1)]
    return nn.Sequential(*layers).to(device())


def backward(model, step):
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    model(inputs.to(device())).square().mean().backward()


def full_values(model):
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def sharded_and_whole():
    """Parameters of a sharded model, one like it that is not sharded, and its parameters."""
    model, whole = make_model(), make_model()
    for layer in model:
        fully_shard(layer, mesh=mesh())
    return list(model.parameters()), whole, list(whole.parameters())


def compare_with_torch(case):
    """Both on sharded models with equal gradients; every rank has the whole batch."""
    fused, oracle, options = CASES[case]
    models = [make_model() for _ in range(2)]
    for model in models:
        for layer in model:
            fully_shard(layer, mesh=mesh())
        fully_shard(model, mesh=mesh())
    ours = fused(models[0].parameters(), **options)
    theirs = oracle(models[1].parameters(), foreach=False, **options)
    shard_sizes = [p.to_local().numel() for p in models[0].parameters()]
    for step in range(6):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            backward(model, step)
        for first, second in zip(*(model.parameters() for model in models), strict=True):
            first.grad.to_local().copy_(second.grad.to_local())
        ours.step()
        theirs.step()
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        # A few roundings of float32 per step, of values around one.
        torch.testing.assert_close(first.to_local(), second.to_local(), rtol=2e-6, atol=5e-7)
        for key, value in theirs.state[second].items():
            state = ours.state[first][key]
            assert type(state) is type(value), key
            if isinstance(value, DTensor):
                assert state.placements == value.placements, key
                torch.testing.assert_close(state.to_local(), value.to_local(), rtol=2e-6, atol=1e-7)
            else:
                assert state.item() == value.item() == 6
    return shard_sizes


@pytest.mark.parametrize("case", CASES)
def test_fully_sharded_params_step_as_with_torch(case, backend):
    sizes = run(2, compare_with_torch, case, backend=backend)
    assert min(sizes[1]) == 0 < min(sizes[0])  # an empty shard was among them


def python_calls(function):
    """How many functions of Python run in a call."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event == "call"))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(calls)


def steps_by_specs():
    """Gradients sharded by another object of the same kind, and in between otherwise."""
    params, whole, whole_params = sharded_and_whole()
    plain = [nn.Parameter(param.detach().clone()) for param in whole_params]
    ours, theirs = FusedAdam(params, lr=0.02), torch.optim.Adam(whole_params, lr=0.02)
    local = FusedAdam(plain, lr=0.02)
    calls = []
    for step, otherwise in enumerate([False, False, False, True, False, False]):
        theirs.zero_grad()
        backward(whole, step)
        for own, other, each in zip(params, whole_params, plain, strict=True):
            each.grad = other.grad.clone()
            placements = [Replicate()] if otherwise else [Shard(0)]
            own.grad = distribute_tensor(other.grad.clone(), own.device_mesh, placements)
            assert own.grad._spec is not own._spec
        calls.append((python_calls(ours.step), python_calls(local.step)))
        theirs.step()
    for own, other in zip(params, whole_params, strict=True):
        # A few roundings of float32 per step, of values around one.
        torch.testing.assert_close(own.full_tensor(), other, rtol=2e-6, atol=5e-7)
    return calls


def test_a_step_of_gradients_that_are_sharded_alike_runs_no_python(backend):
    for calls in run(2, steps_by_specs, backend=backend):
        assert [ours == plain for ours, plain in calls[2:]] == [True, False, True, True]


def cleared_steps():
    """Gradients that are added up in buffers that the step clears; whole ones of torch beside."""
    params, whole, whole_params = sharded_and_whole()
    ours = FusedAdam(params, lr=0.02, clear_grads=True)
    theirs = torch.optim.Adam(whole_params, lr=0.02, foreach=False)
    for step in range(3):
        theirs.zero_grad()
        backward(whole, step)
        for own, other in zip(params, whole_params, strict=True):
            grad = distribute_tensor(other.grad.clone(), own.device_mesh, own.placements)
            own.grad = grad if own.grad is None else own.grad.add_(grad)
        versions = [param.grad._version for param in params]
        ours.step()
        theirs.step()
        for param, version in zip(params, versions, strict=True):
            assert not param.grad.to_local().count_nonzero()
            assert param.grad._version > version or not param.grad.to_local().numel()
    for own, other in zip(params, whole_params, strict=True):
        # A few roundings of float32 per step, of values around one.
        torch.testing.assert_close(own.full_tensor(), other, rtol=2e-6, atol=5e-7)


def test_local_shards_of_gradients_are_cleared(backend):
    run(2, cleared_steps, backend=backend)


def scaled_steps(by_step):
    """Under a GradScaler: ours on the shards, torch's for loop on the whole parameters."""
    params, whole, whole_params = sharded_and_whole()
    ours = FusedAdam(params, lr=0.02, step_supports_amp_scaling=by_step)
    theirs = torch.optim.Adam(whole_params, lr=0.02, foreach=False)
    scalers = [torch.amp.GradScaler(device().type, init_scale=3.0) for _ in range(2)]
    for step in range(3):
        theirs.zero_grad()
        backward(whole, step)
        for own, other in zip(params, whole_params, strict=True):
            other.grad.mul_(3.0)
            own.grad = distribute_tensor(other.grad.clone(), own.device_mesh, own.placements)
        if step == 1 and by_step:  # one that the step redistributes
            params[0].grad = sharded(whole_params[0].grad.clone(), Replicate())
        grads = [param.grad for param in params]
        versions = [grad._version for grad in grads]
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scaler.scale(torch.ones((), device=device()))
            scaler.step(optimizer)
            scaler.update(3.0)
        for own, other in zip(params, whole_params, strict=True):
            assert torch.equal(own.grad.full_tensor(), other.grad)
        for own, grad, version in zip(params, grads, versions, strict=True):
            assert own.grad is not grad or not by_step or grad._version > version
    for own, other in zip(params, whole_params, strict=True):
        # A few roundings of float32 per step, of values around one.
        torch.testing.assert_close(own.full_tensor(), other, rtol=2e-6, atol=5e-7)


def scaled_by_both():
    scaled_steps(by_step=False)
    scaled_steps(by_step=True)


def test_sharded_gradients_are_unscaled(backend):
    run(2, scaled_by_both, backend=backend)


def count_native_calls():
    model = fully_shard(make_model(), mesh=mesh())
    optimizer = FusedAdam(model.parameters())
    for step in range(2):  # state, then the plan
        backward(model, step)
        optimizer.step()
    plan = optimizer._stepper._plan
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return optimizer._stepper._plan is plan


def test_the_plan_outlives_new_gradients(backend):
    assert run(2, count_native_calls, backend=backend) == [True, True]


def sharded(tensor, placement):
    """On the device of this rank, wherever the tensor is."""
    return distribute_tensor(tensor, mesh(), [placement])


def step_with(make_gradient):
    """A step with another gradient than one's own kind; returns what came of it, or the error."""
    param = nn.Parameter(sharded(torch.ones(4, 4), Shard(0)))
    other = nn.Parameter(torch.ones(3, device=device()))
    optimizer = FusedSGD([other, param], lr=1.0)
    other.grad = torch.ones_like(other)
    param.grad = make_gradient()
    try:
        optimizer.step()
    except TypeError as error:
        assert torch.equal(other, torch.ones_like(other))
        return str(error)
    return param.full_tensor().tolist()


def rows():
    return torch.arange(16.0).reshape(4, 4)


def replicated_gradient():
    return sharded(rows(), Replicate())


def gradient_of_other_rows():
    return sharded(rows(), Shard(1))


@pytest.mark.parametrize("make_gradient", [replicated_gradient, gradient_of_other_rows])
def test_a_gradient_that_is_sharded_otherwise_is_redistributed(make_gradient, backend):
    """As with torch: the backward of a sum gives a replicated one, for example."""
    results = run(2, step_with, make_gradient, backend=backend)
    assert results == [(1.0 - rows()).tolist()] * 2


def rebuild_the_plan_on_one_rank():
    """Its plan turns out to be old after it has redistributed a gradient."""
    param = nn.Parameter(sharded(torch.ones(4, 4), Shard(0)))
    other = nn.Parameter(torch.ones(3, device=device()))
    optimizer = FusedAdagrad([param, other], lr=1.0)
    for step in range(3):
        param.grad, other.grad = gradient_of_other_rows(), torch.ones_like(other)
        if step == 1 and dist.get_rank() == 0:
            optimizer.state[other]["sum"] = optimizer.state[other]["sum"].clone()
        optimizer.step()
    return param.full_tensor().tolist(), other.tolist()


def test_a_gradient_is_redistributed_once_for_a_step(backend):
    """Or one process would wait in a second exchange, which the others never join."""
    param, other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adagrad([param, other], lr=1.0)
    param.grad, other.grad = rows(), torch.ones(3)
    for _ in range(3):
        optimizer.step()
    for found in run(2, rebuild_the_plan_on_one_rank, backend=backend):
        for ours, expected in zip(found, (param, other), strict=True):
            torch.testing.assert_close(torch.tensor(ours), expected.detach())


def step_pending_sums():
    """A parameter of which each process has a part of every element; returns the errors."""
    plain = nn.Parameter(torch.ones(3, device=device()))
    own = torch.ones(3, device=device())
    sums = nn.Parameter(DTensor.from_local(own, mesh(), [Partial()]))
    optimizer = FusedAdam([("plain", plain), ("sums", sums)], lr=0.1)
    messages = []
    for param in (plain, sums):
        param.grad = torch.ones_like(param)
        try:
            optimizer.step()
        except RuntimeError as error:
            messages.append(str(error))
    assert sums.to_local().tolist() == [1.0] * 3
    assert optimizer.state[plain]["step"].item() == 1
    return messages


def test_a_param_of_pending_sums_is_refused_by_name(backend):
    """The update of a part is not a part of the update."""
    for messages in run(2, step_pending_sums, backend=backend):
        (message,) = messages
        assert "parameter sums is a DTensor of pending sums (Partial)" in message


def step_with_plain_state():
    param = nn.Parameter(sharded(torch.ones(4), Shard(0)))
    optimizer = FusedAdam([param])
    param.sum().backward()
    optimizer.step()
    before = param.to_local().clone(), optimizer.state[param]["step"].clone()
    optimizer.state[param]["exp_avg"] = torch.zeros(2, device=device())
    message = ""
    try:
        optimizer.step()
    except TypeError as error:
        message = str(error)
    assert torch.equal(param.to_local(), before[0])
    assert torch.equal(optimizer.state[param]["step"], before[1])
    return message


def test_a_plain_state_of_a_sharded_param_is_refused_by_name(backend):
    for message in run(2, step_with_plain_state, backend=backend):
        assert "'exp_avg' of parameter 0 of param group 0 is not a DTensor" in message


def swap_shard():
    """A shard replaced, as `model.to()` and `load_state_dict(assign=True)` do, is a new plan."""
    param = nn.Parameter(sharded(torch.ones(4), Shard(0)))
    optimizer = FusedSGD([param], lr=1.0)
    param.grad = sharded(torch.ones(4), Shard(0))
    optimizer.step()
    param._local_tensor = torch.full((2,), 5.0, device=device())
    optimizer.step()
    return param.to_local().tolist()


def test_a_replaced_shard_is_noticed(backend):
    assert run(2, swap_shard, backend=backend) == [[4.0, 4.0]] * 2


def replicated_beside_plain():
    """Two DTensors of one plan, one of them replicated, and a plain tensor."""
    params = [
        nn.Parameter(sharded(torch.arange(6.0), Shard(0))),
        nn.Parameter(sharded(torch.arange(6.0), Replicate())),
        nn.Parameter(torch.arange(6.0, device=device())),
    ]
    optimizer = FusedSGD([{"params": params[:1]}, {"params": params[1:]}], lr=1.0)
    for param in params:
        param.sum().backward()
    optimizer.step()
    return [p.full_tensor().tolist() if isinstance(p, DTensor) else p.tolist() for p in params]


def test_shards_replicas_and_plain_tensors_step_together(backend):
    expected = [[i - 1.0 for i in range(6)]] * 3
    assert run(2, replicated_beside_plain, backend=backend) == [expected] * 2


ROWS = {
    "rowwise": (FusedRowwiseAdagrad, {"lr": 0.1, "weight_decay": 0.1}),
    "lazy": (FusedAdamW, {"lr": 0.1, "lazy": True}),
}


def step_rows(case):
    """A table sharded along its rows, and the same in one piece; every other row has a gradient."""
    make, options = ROWS[case]
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    whole, table = nn.Parameter(weight.clone()), nn.Parameter(sharded(weight, Shard(0)))
    ours, expected = make([table], **options), make([whole], **options)
    for step in range(3):
        grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        grad[step % 2 :: 2] = 0
        table.grad, whole.grad = sharded(grad, Shard(0)), grad
        ours.step()
        expected.step()
    assert torch.equal(table.full_tensor(), whole)
    for key, value in expected.state[whole].items():
        found = ours.state[table][key]
        assert torch.equal(found.full_tensor() if key != "step" else found, value), key
    columns = nn.Parameter(sharded(torch.ones(4, 6), Shard(1)))
    columns.grad = sharded(torch.ones(4, 6), Shard(1))
    with pytest.raises(RuntimeError, match="need whole rows: shard it along dimension 0"):
        make([columns], **options).step()
    return True


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_updated_in_shards_of_rows(case):
    assert run(2, step_rows, case) == [True, True]  # a CUDA device has no such update
