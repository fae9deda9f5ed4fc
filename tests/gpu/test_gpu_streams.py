"""Steps on several streams and devices, and plans that are replaced while others still run."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmarks import activity
from recap_fast.optim import FusedAdam
from tests.gpu.helpers import Mixed, assert_same_bits, everything, spin
from tests.support.optimizers import laid_out, numbers, parameters, set_grads


def _expected(steps: int) -> Mixed:
    run = Mixed("cpu")
    for step in range(steps):
        run.set_grads(step)
        run.step()
    return run


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_a_step_is_on_the_current_stream(capturable: bool, device: torch.device) -> None:
    """Its gradients are written late on a stream that no other waits for."""
    run = Mixed(device, capturable=capturable)
    run.set_grads(0)
    run.step()
    new = [numbers(p.shape, 2000 + index, p.dtype, device) for index, p in enumerate(run.params)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        spin()
        for param, grad in zip(run.params, new, strict=True):
            param.grad.copy_(grad)
        run.step()
    assert not side.query(), "the step did not go to the stream, or waited for it"
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(run.tensors(), _expected(2).tensors())


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_steps_on_changing_streams(capturable: bool, device: torch.device) -> None:
    run = Mixed(device, capturable=capturable)
    streams = [torch.cuda.Stream() for _ in range(3)]
    last = torch.cuda.current_stream()
    for step, stream in zip(range(12), itertools.cycle(streams), strict=False):
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            run.set_grads(step)
            if step % 4 == 0:
                spin()
            run.step()
        last = stream
    torch.cuda.current_stream().wait_stream(last)
    torch.cuda.synchronize()
    assert_same_bits(run.tensors(), _expected(12).tensors())


@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_a_plan_is_replaced_while_its_last_step_runs(layout: str, device: torch.device) -> None:
    """On another stream: the memory of the old plan must last as long as the step.

    With gaps, that includes dense copies of parameters and gradients.
    """
    run, expected = Mixed(device), Mixed("cpu")
    for param in run.params:
        param.data = laid_out(param.data, layout)
    late = {}
    for each in (run, expected):
        each.set_grads(0)
        each.step()
        late[each] = parameters(2, seed=70, device=each.params[0].device)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        spin()
        run.step()
    run.optimizers[0].add_param_group({"params": late[run]})
    second.wait_stream(first)
    with torch.cuda.stream(second):
        run.step()  # replaces the plan
        # Others, which would take over the memory of the old one if it were free.
        others = [Mixed(device) for _ in range(8)]
        for other in others:
            other.set_grads(0)
            other.step()
    # The same on the stream that made the old plan, and waits for none.
    taken = [torch.full_like(p, 7.0) for p in run.params for _ in range(4)]
    torch.cuda.synchronize()
    assert all(bool((own == 7.0).all()) for own in taken)
    expected.step()
    expected.optimizers[0].add_param_group({"params": late[expected]})
    expected.step()
    assert_same_bits(run.tensors(), expected.tensors())
    assert_same_bits([p.detach() for p in late[run]], [p.detach() for p in late[expected]])


def test_an_optimizer_dies_while_its_last_step_runs(device: torch.device) -> None:
    params, expected = parameters(4, device=device), parameters(4)
    optimizer, twin = FusedAdam(params, lr=0.1), FusedAdam(expected, lr=0.1)
    for each in (optimizer, twin):
        each.step()
    torch.cuda.synchronize()
    spin()
    optimizer.step()
    twin.step()
    del optimizer, each
    gc.collect()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(8):  # would take over its memory if it were free
            FusedAdam(parameters(4, seed=9, device=device)).step()
    torch.cuda.synchronize()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in expected])


def test_many_plans_in_a_row(device: torch.device) -> None:
    params, expected = parameters(4, device=device), parameters(4)
    optimizer, twin = FusedAdam(params, lr=0.1), FusedAdam(expected, lr=0.1)
    for number in range(60):
        for each, own in ((optimizer, params), (twin, expected)):
            set_grads(own, number)
            if number % 2:
                each.load_state_dict(each.state_dict())  # replaces the states, and so the plan
            each.step()
    assert_same_bits(everything(optimizer, params), everything(twin, expected))


# --- devices -------------------------------------------------------------------------------------

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@needs_two
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_one_optimizer_over_two_devices(capturable: bool) -> None:
    devices = [torch.device("cuda", index) for index in range(2)]
    params = [
        nn.Parameter(numbers((101, 7), index, torch.float32, devices[index % 2]))
        for index in range(6)
    ]
    expected = [nn.Parameter(param.detach().cpu()) for param in params]
    optimizer = FusedAdam(params, lr=0.1, capturable=capturable)
    twin = FusedAdam(expected, lr=0.1)
    for step in range(3):
        for each, own in ((optimizer, params), (twin, expected)):
            set_grads(own, step)
            each.step()
    assert torch.cuda.current_device() == 0
    assert_same_bits(everything(optimizer, params), everything(twin, expected))
    seen = activity.of(lambda: (optimizer.step(), torch.cuda.synchronize(1)))
    assert (seen.launches, seen.copies) == (2, 0)


@needs_two
def test_a_device_that_is_not_current() -> None:
    params, expected = parameters(3, device="cuda:1"), parameters(3)
    optimizer, twin = FusedAdam(params), FusedAdam(expected)
    for _ in range(2):
        optimizer.step()
        twin.step()
    assert torch.cuda.current_device() == 0
    assert_same_bits(everything(optimizer, params), everything(twin, expected))


_STEP_IN_A_NEW_THREAD = """
import threading
import torch
from recap_fast.optim import FusedAdam

param = torch.nn.Parameter(torch.ones(3, device="cuda:1"))
param.grad = torch.ones_like(param)
optimizer = FusedAdam([param])
optimizer.step()
print(torch._C._cuda_hasPrimaryContext(0))
thread = threading.Thread(target=optimizer.step)
thread.start()
thread.join()
print(torch._C._cuda_hasPrimaryContext(0), optimizer.state[param]["step"].item())
"""


@needs_two
def test_a_device_that_is_not_used_gets_no_context() -> None:
    """It would take hundreds of MB there. In a new thread the first device is the current one."""
    command = [sys.executable, "-c", _STEP_IN_A_NEW_THREAD]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "2.0"]


def test_parameters_on_the_host_and_on_a_device_in_one_optimizer(device: torch.device) -> None:
    params = [*parameters(3, device=device), *parameters(3, seed=5)]
    expected = [*parameters(3), *parameters(3, seed=5)]
    optimizer, twin = FusedAdam(params, lr=0.1), FusedAdam(expected, lr=0.1)
    for _ in range(3):
        optimizer.step()
        twin.step()
    assert_same_bits(everything(optimizer, params), everything(twin, expected))
