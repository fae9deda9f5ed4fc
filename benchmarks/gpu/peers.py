"""The peers on a CUDA device. Most are those of `benchmarks.builders`, which suit any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks import builders, peers
from benchmarks.builders import STATES, Groups, Stepping, Unavailable
from benchmarks.peers import InitialValues, Peer
from benchmarks.workloads import Workload
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD

OURS: Final = "recap_fast, one optimizer"
OURS_REPLAYED: Final = "recap_fast, graph replay"
REFERENCE: Final = "torch per group"
COPY: Final = "copy"

_OURS: Final = {"adam": FusedAdam, "adagrad": FusedAdagrad, "sgd": FusedSGD}
_TORCH: Final = {
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
_WARM_UP_STEPS: Final = 3


def _with_rates(groups: Groups) -> list[dict[str, Any]]:
    """Another rate for each group, all near 1e-4."""
    return [
        {"params": params, "lr": 1e-4 * (1 + index / len(groups))}
        for index, params in enumerate(groups)
    ]


def _combined(groups: Groups, algorithm: str) -> Stepping:
    try:
        return builders.BUILDERS["recap_fast"](groups, algorithm)
    except ImportError as error:
        raise Unavailable(f"needs torchrec and pydantic ({error})") from error


def _torch_per_group(groups: Groups, algorithm: str) -> Stepping:
    optimizers = [_TORCH[algorithm]([group]) for group in _with_rates(groups)]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step, [group for optimizer in optimizers for group in optimizer.param_groups]


def _apex(groups: Groups, algorithm: str) -> Stepping:
    try:
        from apex import optimizers
    except ImportError as error:
        raise Unavailable(f"apex is not installed ({error})") from error
    if algorithm == "adam":
        optimizer = optimizers.FusedAdam(_with_rates(groups), adam_w_mode=False)
    elif algorithm == "adagrad":
        optimizer = optimizers.FusedAdagrad(_with_rates(groups))
    else:
        optimizer = optimizers.FusedSGD(_with_rates(groups), lr=1e-4)
    return optimizer.step, optimizer.param_groups


def _capture(optimizer: torch.optim.Optimizer) -> Stepping:
    """Replays of a graph of one step. Its rates are those of the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay(owner: torch.optim.Optimizer = optimizer) -> None:  # keeps what the graph uses
        graph.replay()

    return replay, []


def _ours_replayed(groups: Groups, algorithm: str) -> Stepping:
    return _capture(_OURS[algorithm](_with_rates(groups), capturable=True))


def _torch_fused_replayed(groups: Groups, algorithm: str) -> Stepping:
    if algorithm == "adagrad":
        raise Unavailable("torch.optim.Adagrad has no form that a CUDA graph could capture")
    options = {"capturable": True} if algorithm == "adam" else {}  # SGD keeps nothing on the host
    return _capture(_TORCH[algorithm](_with_rates(groups), fused=True, **options))


def _copy(groups: Groups, algorithm: str) -> Stepping:
    """Copies half the bytes that a step moves: it reads and writes each of them."""
    elements = sum(param.numel() for params in groups for param in params)
    half = elements * (3 + 2 * STATES[algorithm]) / 2
    source = torch.randn(math.ceil(half), device=groups[0][0].device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), []


BUILDERS: Final[Mapping[str, Callable[[Groups, str], Stepping]]] = {
    OURS: builders.BUILDERS["recap_fast, one optimizer"],
    "recap_fast": _combined,
    OURS_REPLAYED: _ours_replayed,
    REFERENCE: _torch_per_group,
    "torch for-loop": builders.BUILDERS["torch for-loop"],
    "torch foreach": builders.BUILDERS["torch foreach"],
    "torch fused": builders.BUILDERS["torch fused"],
    "torch fused per group": builders.BUILDERS["torch fused per group"],
    "torch fused, graph replay": _torch_fused_replayed,
    "apex": _apex,
    COPY: _copy,
}
"""By the name of the peer. Each raises Unavailable where it cannot run."""

DESCRIPTIONS: Final[Mapping[str, str]] = {
    OURS: "`recap_fast.optim.FusedAdam` (`FusedAdagrad`, `FusedSGD`) with param groups",
    "recap_fast": peers.DESCRIPTIONS["recap_fast"],
    OURS_REPLAYED: "a CUDA graph of one step of the same with `capturable=True`, replayed",
    REFERENCE: "the reference: one default `torch.optim` optimizer per group",
    "torch for-loop": peers.DESCRIPTIONS["torch for-loop"],
    "torch foreach": peers.DESCRIPTIONS["torch foreach"],
    "torch fused": peers.DESCRIPTIONS["torch fused"],
    "torch fused per group": peers.DESCRIPTIONS["torch fused per group"],
    "torch fused, graph replay": "a CUDA graph of one step with `fused=True`, replayed",
    "apex": "`apex.optimizers.FusedAdam` (`FusedAdagrad`, `FusedSGD`) with param groups",
    COPY: "the ceiling: one copy on the device that moves as many bytes as the step",
}

SLOW_PEERS: Final = (REFERENCE, "torch for-loop", "torch foreach")
"""Several times slower than the others: they sit out most rounds, and have no rotating copies."""


def initial_values(workload: Workload, device: torch.device | str) -> InitialValues:
    """As `peers.initial_values`, on a device."""
    values = peers.initial_values(workload)

    def move(groups: list[list[Tensor]]) -> list[list[Tensor]]:
        return [[tensor.to(device) for tensor in group] for group in groups]

    return InitialValues(params=move(values.params), grads=move(values.grads))


def build(name: str, initial: InitialValues, algorithm: str) -> Peer:
    """Makes a peer on copies of `initial` and takes two steps, which make states and plans.

    Raises:
        Unavailable: it cannot run here; for a peer other than ours, a refused step counts too.
    """
    groups = [[nn.Parameter(param.clone()) for param in group] for group in initial.params]
    for group, grads in zip(groups, initial.grads, strict=True):
        for param, grad in zip(group, grads, strict=True):
            param.grad = grad.clone()
    try:
        step, param_groups = BUILDERS[name](groups, algorithm)
        step()
        step()
    except RuntimeError as error:
        if name in (OURS, OURS_REPLAYED, "recap_fast"):
            raise
        raise Unavailable(str(error).strip().split("\n")[0]) from error
    return Peer(step, param_groups, [param for group in groups for param in group])
