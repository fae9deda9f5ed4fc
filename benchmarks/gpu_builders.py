"""Makes the optimizer of each peer that only a GPU has; those of `builders` suit any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch

from benchmarks.builders import (
    OUR_CLASSES,
    STATES,
    TORCH_CLASSES,
    Groups,
    Stepping,
    Unavailable,
    step_each,
    with_rates,
)

_WARM_UP_STEPS: Final = 3


def _torch_per_group(groups: Groups, algorithm: str) -> Stepping:
    return step_each([TORCH_CLASSES[algorithm]([group]) for group in with_rates(groups)])


def _apex(groups: Groups, algorithm: str) -> Stepping:
    try:
        from apex import optimizers
    except ImportError as error:
        raise Unavailable(f"apex is not installed ({error})") from error
    if algorithm == "adam":
        optimizer = optimizers.FusedAdam(with_rates(groups), adam_w_mode=False)
    elif algorithm == "adagrad":
        optimizer = optimizers.FusedAdagrad(with_rates(groups))
    else:
        optimizer = optimizers.FusedSGD(with_rates(groups), lr=1e-4)
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
    return _capture(OUR_CLASSES[algorithm](with_rates(groups), capturable=True))


def _torch_fused_replayed(groups: Groups, algorithm: str) -> Stepping:
    if algorithm == "adagrad":
        raise Unavailable("torch.optim.Adagrad has no form that a CUDA graph could capture")
    options = {"capturable": True} if algorithm == "adam" else {}  # SGD keeps nothing on the host
    return _capture(TORCH_CLASSES[algorithm](with_rates(groups), fused=True, **options))


def _copy(groups: Groups, algorithm: str) -> Stepping:
    """Copies half the bytes that a step moves: it reads and writes each of them."""
    elements = sum(param.numel() for params in groups for param in params)
    half = elements * (3 + 2 * STATES[algorithm]) / 2
    source = torch.randn(math.ceil(half), device=groups[0][0].device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), []


BUILDERS: Final[Mapping[str, Callable[[Groups, str], Stepping]]] = {
    "recap_fast, graph replay": _ours_replayed,
    "torch per group": _torch_per_group,
    "torch fused, graph replay": _torch_fused_replayed,
    "apex": _apex,
    "copy": _copy,
}
"""By the name of the peer. Each raises Unavailable where it cannot run."""
