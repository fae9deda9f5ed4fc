"""Counts the allocations of steady-state steps; run by test_allocations.py as a process of its own.

With count_allocations.c preloaded, prints JSON: for each number of threads and case, how often a
step calls malloc and its like. Python takes small objects from pools of its own, not seen here.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchrec.optim import keyed

from recap_fast.keyed.fused import FusedCombinedOptimizer
from recap_fast.optim import FusedAdam

_counter = ctypes.CDLL(None).recap_allocations
_counter.restype = ctypes.c_long


class _Nothing(torch.optim.Optimizer):
    """What torch itself does around the step of any optimizer."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        return None


def _allocations(
    optimizer: torch.optim.Optimizer, prepare: Callable[[torch.optim.Optimizer], None]
) -> int:
    for _ in range(4):
        prepare(optimizer)
        before = _counter()
        optimizer.step()
        after = _counter()
    return after - before


def _groups(groups: int, tensors: int, elements: int) -> list[dict[str, Any]]:
    made = []
    for _ in range(groups):
        params = [nn.Parameter(torch.ones(elements)) for _ in range(tensors)]
        for param in params:
            param.grad = torch.ones(elements)
        made.append({"params": params, "lr": 1e-3})
    return made


def _as_it_is(optimizer: torch.optim.Optimizer) -> None:
    pass


def _as_in_training(optimizer: torch.optim.Optimizer) -> None:
    """New gradients, as after a backward pass, and new learning rates."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.999
        for param in group["params"]:
            param.grad = param.grad.detach()


def _clipped(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    parts = [
        keyed.KeyedOptimizerWrapper(
            {f"{number}.{i}": param for i, param in enumerate(group["params"])}, FusedAdam
        )
        for number, group in enumerate(groups)
    ]
    return FusedCombinedOptimizer(parts, clip_grad_norm=1.0)


def _measure() -> dict[str, int]:
    return {
        "torch": _allocations(_Nothing(_groups(1, 1, 10), {}), _as_it_is),
        "small": _allocations(FusedAdam(_groups(1, 1, 10)), _as_it_is),
        "tensors": _allocations(FusedAdam(_groups(1, 200, 10)), _as_it_is),
        "groups": _allocations(FusedAdam(_groups(100, 2, 10)), _as_it_is),
        "training": _allocations(FusedAdam(_groups(100, 2, 10)), _as_in_training),
        "large": _allocations(FusedAdam(_groups(1, 2, 500_000)), _as_it_is),
        "clipped": _allocations(_clipped(_groups(100, 2, 10)), _as_in_training),
        "larger": _allocations(FusedAdam(_groups(10, 4, 100_000)), _as_it_is),
    }


def main() -> None:
    counts = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        counts[threads] = _measure()
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
