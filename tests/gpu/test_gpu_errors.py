"""What goes wrong on a device is an error that says so, at the step that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from recap_fast.optim import FusedAdam
from tests.gpu.helpers import assert_same_bits, everything
from tests.support.optimizers import parameters

ROOT = Path(__file__).parent.parent.parent

# A context that has met an error answers every later call with it: this takes its own process.
_BROKEN_CONTEXT = """
import torch
from recap_fast.optim import FusedAdam

param = torch.nn.Parameter(torch.ones(3, device="cuda"))
param.grad = torch.ones(3, device="cuda")
optimizer = FusedAdam([param])
optimizer.step()
optimizer.step()
try:
    torch.ones(3, device="cuda")[torch.tensor([7], device="cuda")]  # an assertion of the device
    torch.cuda.synchronize()
except RuntimeError:
    print("broken")
try:
    optimizer.step()
except RuntimeError as error:
    print(str(error).replace(chr(10), " "))
print("count", int(optimizer.state[param]["step"]))
"""


def test_a_launch_that_fails_is_an_error_of_that_step(device: torch.device) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BROKEN_CONTEXT], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.strip().split("\n")
    assert lines[0] == "broken", done.stdout + done.stderr
    assert lines[1].startswith("CUDA device 0: cannot "), done.stdout + done.stderr
    assert "cudaErrorAssert" in lines[1]
    assert lines[2] == "count 2"  # not counted: nothing was launched


def test_a_gradient_on_the_cpu_of_a_parameter_on_the_device(device: torch.device) -> None:
    params = parameters(2)
    params[0].data = params[0].data.to(device)
    params[1] = nn.Parameter(params[1].detach().to(device))
    params[1].grad = torch.ones_like(params[1])
    optimizer = FusedAdam(params)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"the gradient of parameter .* on cpu, the parameter"):
        optimizer.step()
    assert_same_bits([param.detach() for param in params], before)
    assert not optimizer.state


def test_a_state_on_the_cpu_of_a_parameter_on_the_device(device: torch.device) -> None:
    params = parameters(2, device=device)
    optimizer = FusedAdam(params)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    state = optimizer.state[params[1]]
    state["exp_avg"] = state["exp_avg"].cpu()
    with pytest.raises(RuntimeError, match=r"the state 'exp_avg' of parameter .* they must agree"):
        optimizer.step()
    assert_same_bits([param.detach() for param in params], before)


def test_a_model_moved_to_the_device_goes_on(device: torch.device) -> None:
    """Parameters, gradients and states are moved after the plan was built."""
    runs = [parameters(3), parameters(3)]
    moved, twin = (FusedAdam(params, lr=0.1) for params in runs)
    for optimizer in (moved, twin):
        optimizer.step()
    for param in runs[0]:
        grad, param.grad = param.grad, None
        param.data = param.data.to(device)
        param.grad = grad.to(device)
        for key in ("exp_avg", "exp_avg_sq"):
            moved.state[param][key] = moved.state[param][key].to(device)
    for optimizer in (moved, twin):
        optimizer.step()
    assert_same_bits(everything(moved, runs[0]), everything(twin, runs[1]))
