"""Optimizers on a device and their twins on the CPU, compared bit by bit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recap_fast.optim import FusedOptimizer
from recap_fast.optim.stepper import Stepper
from tests.support.optimizers import FUSED, numbers, same_bits

ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", {}),
    "adagrad": ("adagrad", {}),
    "momentum": ("sgd", {"momentum": 0.9, "dampening": 0.1}),
    "sgd": ("sgd", {}),
}
"""One optimizer of each kind, to be stepped together."""

_SPIN_CYCLES = 100_000_000  # at the 1 to 2 GHz of a device at work, 50 to 100 ms


def spin() -> None:
    """Keeps the current stream busy for longer than the host needs for anything here."""
    torch.cuda._sleep(_SPIN_CYCLES)


@contextlib.contextmanager
def captured() -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what its body does, and does not do it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        yield graph


class Mixed:
    """All of `ALGORITHMS` in one step, as `FusedCombinedOptimizer` takes it, without torchrec.

    Args:
        device: where the parameters are.
        tensors: how many each of the optimizers has, in groups of three.
        options: for every optimizer, such as ``capturable``.
    """

    def __init__(self, device: torch.device | str, tensors: int = 6, **options: Any) -> None:
        self.params: list[nn.Parameter] = []
        self.optimizers: list[FusedOptimizer] = []
        for number, (name, own) in enumerate(ALGORITHMS.values()):
            params = [
                nn.Parameter(numbers((37 * i + 11, number + 2), 10 * number + i, dtype, device))
                for i, dtype in zip(range(tensors), _dtypes(), strict=False)
            ]
            groups = [
                {"params": params[begin : begin + 3], "lr": 0.01 * (begin + 1)}
                for begin in range(0, tensors, 3)
            ]
            self.params += params
            self.optimizers.append(FUSED[name](groups, lr=0.1, **own, **options))
        self.stepper = Stepper(self.optimizers)

    def set_grads(self, seed: int, scale: float = 1.0) -> None:
        for index, param in enumerate(self.params):
            grad = numbers(param.shape, 1000 * (seed + 1) + index, param.dtype, param.device)
            param.grad = grad.mul_(scale)

    def write_grads(self, seed: int) -> None:
        """As `set_grads`, into the memory of the gradients there are."""
        for index, param in enumerate(self.params):
            grad = numbers(param.shape, 1000 * (seed + 1) + index, param.dtype, param.device)
            param.grad.copy_(grad)

    def step(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        self.stepper.step(grad_scale, found_inf)

    def tensors(self) -> list[Tensor]:
        """The parameters and all of their states."""
        return [
            tensor
            for optimizer in self.optimizers
            for tensor in everything(
                optimizer, [param for group in optimizer.param_groups for param in group["params"]]
            )
        ]


def _dtypes() -> Any:
    while True:
        yield from (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def everything(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters and all of their states, those in the order of their names."""
    out = [param.detach() for param in params]
    for param in params:
        state = optimizer.state.get(param, {})
        out += [state[key] for key in sorted(state)]
    return out


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Up to the sign and payload of NaN, and wherever the tensors are."""
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        mine, theirs = one.cpu(), other.cpu()
        nan = mine.isnan()
        what = f"tensor {index}: {tuple(mine.shape)} {mine.dtype}"
        assert torch.equal(nan, theirs.isnan()), what
        if not same_bits(mine.masked_fill(nan, 0), theirs.masked_fill(nan, 0)):
            differing = int((mine != theirs).logical_and(~nan).sum())
            raise AssertionError(f"{what}: {differing} of {mine.numel()} elements differ")


def host_seconds(call: Any) -> float:
    """The time that a call takes while the device has nothing to do."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
