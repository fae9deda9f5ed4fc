"""The peers: every way of stepping a workload that is compared, each on tensors of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks import ceiling
from benchmarks.workloads import Workload
from recap_fast.keyed import CombinedOptimizer
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD
from recap_fast.optim.combined import FusedCombinedOptimizer

ALGORITHMS: Final = ("adam", "adagrad", "sgd")

STATES: Final[Mapping[str, int]] = {"adam": 2, "adagrad": 1, "sgd": 0}
"""State tensors of an algorithm, as large as the parameter."""

_TORCH: Final = {
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
_OURS: Final = {"adam": FusedAdam, "adagrad": FusedAdagrad, "sgd": FusedSGD}

Groups = list[list[nn.Parameter]]


class Unavailable(Exception):
    """The peer cannot run here; the message says why."""


@dataclass
class Peer:
    """One optimizer over tensors of its own, all of which have gradients and state.

    Attributes:
        step: takes one step.
        param_groups: those whose `lr` a scheduler would set; empty for the ceiling.
        params: every parameter.
    """

    step: Callable[[], Any]
    param_groups: list[dict[str, Any]]
    params: list[nn.Parameter]

    def set_learning_rates(self) -> None:
        """What a scheduler does between steps: another float object in each group."""
        for group in self.param_groups:
            group["lr"] = group["lr"] * 1.0

    def renew_gradients(self) -> None:
        """What `zero_grad` and a backward pass do: another tensor object for each gradient."""
        for param in self.params:
            assert param.grad is not None
            param.grad = param.grad.detach()


def bytes_per_step(workload: Workload, algorithm: str) -> int:
    """What a step must move: read parameter, gradient and states; write all but the gradient."""
    streams = 3 + 2 * STATES[algorithm]
    return 4 * streams * workload.elements


def _learning_rates(groups: int) -> Iterator[float]:
    """Another one for each group, all near 1e-4."""
    return (1e-4 * (1 + index / groups) for index in range(groups))


def _torch_groups(groups: Groups) -> list[dict[str, Any]]:
    rates = _learning_rates(len(groups))
    return [{"params": params, "lr": lr} for params, lr in zip(groups, rates, strict=True)]


def _one_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Callable[[], Any], list[Any]]:
    return optimizer.step, optimizer.param_groups


def _keyed(combined: type[CombinedOptimizer], inner: type, groups: Groups) -> tuple:
    """What `build_optimizer` makes: a keyed wrapper for each group, combined."""
    from torchrec.optim.keyed import KeyedOptimizerWrapper

    optimizer = combined(
        [
            KeyedOptimizerWrapper(
                {f"group{index}.{number}": param for number, param in enumerate(params)},
                functools.partial(inner, lr=lr),
            )
            for index, (params, lr) in enumerate(
                zip(groups, _learning_rates(len(groups)), strict=True)
            )
        ]
    )
    return _one_optimizer(optimizer)


def _ours(groups: Groups, algorithm: str) -> tuple:
    return _keyed(FusedCombinedOptimizer, _OURS[algorithm], groups)


def _ours_one(groups: Groups, algorithm: str) -> tuple:
    return _one_optimizer(_OURS[algorithm](_torch_groups(groups)))


def _reference(groups: Groups, algorithm: str) -> tuple:
    return _keyed(CombinedOptimizer, _TORCH[algorithm], groups)


def _torch_for_loop(groups: Groups, algorithm: str) -> tuple:
    return _one_optimizer(_TORCH[algorithm](_torch_groups(groups), foreach=False, fused=False))


def _torch_foreach(groups: Groups, algorithm: str) -> tuple:
    return _one_optimizer(_TORCH[algorithm](_torch_groups(groups), foreach=True))


def _torch_fused(groups: Groups, algorithm: str) -> tuple:
    return _one_optimizer(_TORCH[algorithm](_torch_groups(groups), fused=True))


def _torch_fused_per_group(groups: Groups, algorithm: str) -> tuple:
    optimizers = [_TORCH[algorithm]([group], fused=True) for group in _torch_groups(groups)]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step, [group for optimizer in optimizers for group in optimizer.param_groups]


def _deepspeed(groups: Groups, algorithm: str) -> tuple:
    if algorithm == "sgd":
        raise Unavailable("DeepSpeed has no SGD for the CPU")
    try:
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise Unavailable(f"DeepSpeed is not installed ({error})") from error
    try:
        if algorithm == "adam":
            return _one_optimizer(DeepSpeedCPUAdam(_torch_groups(groups), adamw_mode=False))
        return _one_optimizer(DeepSpeedCPUAdagrad(_torch_groups(groups)))
    except Exception as error:  # whatever its just-in-time build meets
        raise Unavailable(f"DeepSpeed does not build here ({error})") from error


def _ceiling(groups: Groups, algorithm: str) -> tuple:
    params = [param for group in groups for param in group]
    states = [[torch.zeros_like(param) for param in params] for _ in range(STATES[algorithm])]
    grads = [param.grad for param in params]
    try:
        run = ceiling.make_step([param.detach() for param in params], grads, states)
    except ceiling.CannotCompile as error:
        raise Unavailable(str(error)) from error
    return run, []


_BUILDERS: Final[Mapping[str, Callable[[Groups, str], tuple]]] = {
    "recap_fast": _ours,
    "recap_fast, one optimizer": _ours_one,
    "reference": _reference,
    "torch for-loop": _torch_for_loop,
    "torch foreach": _torch_foreach,
    "torch fused": _torch_fused,
    "torch fused per group": _torch_fused_per_group,
    "DeepSpeed": _deepspeed,
    "ceiling": _ceiling,
}

PEERS: Final = tuple(_BUILDERS)

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "recap_fast": "`FusedCombinedOptimizer` over one keyed optimizer per group, as "
    "`recap_fast.build_optimizer` makes it",
    "recap_fast, one optimizer": "`recap_fast.optim.FusedAdam` (`FusedAdagrad`, `FusedSGD`) with "
    "param groups",
    "reference": "`CombinedOptimizer` over one default `torch.optim` optimizer per group, as "
    "`recap_fast.reference.build_optimizer` makes it",
    "torch for-loop": "one `torch.optim` optimizer with param groups, `foreach=False, fused=False`",
    "torch foreach": "the same with `foreach=True`",
    "torch fused": "the same with `fused=True`",
    "torch fused per group": "one `torch.optim` optimizer per group, `fused=True`",
    "DeepSpeed": "`DeepSpeedCPUAdam` or `DeepSpeedCPUAdagrad` with param groups",
    "ceiling": "a trivial C++ loop that reads and writes the same memory, `benchmarks/ceiling.cpp`",
}


@dataclass(frozen=True)
class InitialValues:
    """Parameters and gradients that each peer starts from a copy of."""

    params: list[list[Tensor]]
    grads: list[list[Tensor]]


def initial_values(workload: Workload) -> InitialValues:
    """Normally distributed, the same at each call; gradients of size 0.01."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> list[list[Tensor]]:
        return [
            [
                torch.randn(math.prod(shape), generator=generator).mul_(scale).view(shape)
                for shape in group
            ]
            for group in workload.groups
        ]

    return InitialValues(params=draw(1.0), grads=draw(0.01))


def build(name: str, initial: InitialValues, algorithm: str) -> Peer:
    """Makes a peer on copies of `initial`, before its first step.

    Raises:
        Unavailable: it cannot run here.
    """
    groups = [[nn.Parameter(param.clone()) for param in group] for group in initial.params]
    for group, grads in zip(groups, initial.grads, strict=True):
        for param, grad in zip(group, grads, strict=True):
            param.grad = grad.clone()
    step, param_groups = _BUILDERS[name](groups, algorithm)
    return Peer(step, param_groups, [param for group in groups for param in group])
