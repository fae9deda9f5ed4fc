"""Steps captured into CUDA graphs and replayed, against steps taken one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from recap_fast.optim import FusedAdam
from tests.gpu.helpers import Mixed, assert_same_bits, captured, everything
from tests.support.optimizers import FUSED, UPDATES, parameters, set_grads

REPLAYS = 40


def _capture(run: Mixed) -> torch.cuda.CUDAGraph:
    """Takes the first step and captures one, without taking it."""
    run.set_grads(0)
    run.step()
    with captured() as graph:
        run.step()
    return graph


def test_replays_are_steps(device: torch.device) -> None:
    """All algorithms and dtypes in one launch, with other gradients at each replay."""
    replayed, eager = Mixed(device, capturable=True), Mixed("cpu")
    graph = _capture(replayed)
    eager.set_grads(0)
    eager.step()
    for step in range(1, REPLAYS):
        replayed.write_grads(step)
        graph.replay()
        eager.set_grads(step)
        eager.step()
    assert_same_bits(replayed.tensors(), eager.tensors())


@pytest.mark.parametrize("update", UPDATES)
def test_replays_of_every_update(update: str, device: torch.device) -> None:
    algorithm, options = UPDATES[update]
    runs = []
    for where, capturable in ((device, True), ("cpu", False)):
        params = parameters(3, device=where)
        optimizer = FUSED[algorithm](
            params, lr=0.1, **options, **({"capturable": True} if capturable else {})
        )
        runs.append((params, optimizer))
    (params, optimizer), (expected, eager) = runs
    optimizer.step()
    with captured() as graph:
        optimizer.step()
    for _ in range(7):
        graph.replay()
    for _ in range(8):
        eager.step()
    assert_same_bits(everything(optimizer, params), everything(eager, expected))


def test_replays_and_steps_take_turns(device: torch.device) -> None:
    replayed, eager = Mixed(device, capturable=True), Mixed("cpu")
    graph = _capture(replayed)
    eager.set_grads(0)
    eager.step()
    for step in range(1, 12):
        replayed.write_grads(step)
        eager.write_grads(step)
        if step % 3 == 0:
            replayed.step()
        else:
            graph.replay()
        eager.step()
    assert_same_bits(replayed.tensors(), eager.tensors())


def test_replays_without_waiting_follow_each_other(device: torch.device) -> None:
    """Counts are read and moved on by each launch: the next one must find the new ones."""
    replayed, eager = Mixed(device, capturable=True), Mixed("cpu")
    graph = _capture(replayed)
    eager.set_grads(0)
    for _ in range(200):
        graph.replay()
    for _ in range(201):
        eager.step()
    assert_same_bits(replayed.tensors(), eager.tensors())


def test_a_tensor_rate_is_read_at_each_replay(device: torch.device) -> None:
    rate = torch.tensor(0.1, device=device, dtype=torch.float64)
    params, expected = parameters(3, device=device), parameters(3)
    optimizer = FusedAdam(params, lr=rate, capturable=True)
    eager = FusedAdam(expected, lr=0.1)
    optimizer.step()
    eager.step()
    with captured() as graph:
        optimizer.step()
    for step in range(6):
        rate.fill_(0.05 / (step + 1))
        graph.replay()
        eager.param_groups[0]["lr"] = 0.05 / (step + 1)
        eager.step()
    assert_same_bits(everything(optimizer, params), everything(eager, expected))


def test_found_inf_is_read_at_each_replay(device: torch.device) -> None:
    run, eager = Mixed(device, capturable=True), Mixed("cpu")
    scale, found = torch.tensor(4.0, device=device), torch.zeros((), device=device)
    run.set_grads(0, scale=4.0)
    run.step(scale, found)
    with captured() as graph:
        run.step(scale, found)
    for skips in (0.0, 1.0, 1.0, 0.0, 1.0):
        found.fill_(skips)
        graph.replay()
    eager.set_grads(0)
    for _ in range(3):
        eager.step()
    assert_same_bits(run.tensors(), eager.tensors())


def test_gradients_are_unscaled_at_each_replay_that_is_not_skipped(device: torch.device) -> None:
    params = parameters(3, device=device)
    values = [param.grad.clone() for param in params]
    optimizer = FusedAdam(params, capturable=True)
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    with captured() as graph:
        optimizer.step()
    for skips in (0.0, 1.0, 0.0):
        optimizer.found_inf.fill_(skips)
        for param, value in zip(params, values, strict=True):
            param.grad.copy_(value * 4)
        graph.replay()
        expected = [value * 4 if skips else value for value in values]
        assert_same_bits([param.grad for param in params], expected)


def test_a_whole_training_step(device: torch.device) -> None:
    """Forward and backward pass in the graph too, whose gradients lie in the graph's memory."""
    torch.manual_seed(0)
    replayed = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)).to(device)
    eager = copy.deepcopy(replayed)
    inputs, target = torch.randn(64, 16, device=device), torch.randn(64, 1, device=device)
    optimizer = FusedAdam(replayed.parameters(), lr=0.01, capturable=True)
    other = FusedAdam(eager.parameters(), lr=0.01)

    def train(model: nn.Module, own: torch.optim.Optimizer) -> None:
        own.zero_grad()
        (model(inputs) - target).square().mean().backward()
        own.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(replayed, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    with captured() as graph:
        train(replayed, optimizer)
    for _ in range(10):
        graph.replay()
    for _ in range(13):
        train(eager, other)
    for mine, theirs in zip(replayed.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert optimizer.state[replayed[0].weight]["step"].item() == 13


def test_a_graph_outlives_the_plan_it_was_captured_with(device: torch.device) -> None:
    run = Mixed(device, capturable=True)
    graph = _capture(run)
    late = parameters(1, device=device)
    run.optimizers[0].add_param_group({"params": late})
    run.step()  # builds another plan
    before = [param.detach().clone() for param in run.params]
    graph.replay()
    torch.cuda.synchronize()
    for old, param in zip(before, run.params, strict=True):
        assert param.isfinite().all() and not torch.equal(old, param.detach())


# --- captures that are refused -------------------------------------------------------------------


def test_a_capture_without_capturable_is_refused(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params)
    optimizer.step()
    before = [tensor.clone() for tensor in everything(optimizer, params)]
    with captured(), pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert_same_bits(everything(optimizer, params), before)
    optimizer.step()


def test_a_capture_without_a_step_before_is_refused(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, capturable=True)
    with captured(), pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        optimizer.step()
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1]


def test_a_gradient_that_is_missing_during_capture_is_named(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam([("first", params[0]), ("second", params[1])], capturable=True)
    optimizer.step()
    params[1].grad = None
    with captured(), pytest.raises(RuntimeError, match="parameter second has no gradient"):
        optimizer.step()
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 1]


def test_a_rate_changed_on_the_host_after_capture_is_refused(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params, lr=0.1, capturable=True)
    optimizer.step()
    with captured():
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    set_grads(params, 1)
    with pytest.raises(RuntimeError, match=r"param group 0 changed from 0\.1 to 0\.2 after a CUDA"):
        optimizer.step()
