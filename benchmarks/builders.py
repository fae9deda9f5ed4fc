"""Makes the optimizer of each peer over given param groups."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

from benchmarks import ceiling
from recap_fast.optim import FusedAdagrad, FusedAdam, FusedSGD

STATES: Final[Mapping[str, int]] = {"adam": 2, "adagrad": 1, "sgd": 0}
"""State tensors of an algorithm, as large as the parameter."""

MAX_NORM: Final = 1.0
"""What the peers that clip do so to; the gradients of every workload are larger."""

_TORCH: Final = {
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
_OURS: Final = {"adam": FusedAdam, "adagrad": FusedAdagrad, "sgd": FusedSGD}
_WARM_UP_STEPS: Final = 3  # before a step is captured

Groups = list[list[nn.Parameter]]
Stepping = tuple[Callable[[], Any], list[dict[str, Any]]]
"""What takes a step, and the param groups whose `lr` it reads."""
Builder = Callable[[Groups, str], Stepping]


class Unavailable(Exception):
    """The peer cannot run here; the message says why."""


def _learning_rates(groups: int) -> Iterator[float]:
    """Another one for each group, all near 1e-4."""
    return (1e-4 * (1 + index / groups) for index in range(groups))


def _with_rates(groups: Groups) -> list[dict[str, Any]]:
    rates = _learning_rates(len(groups))
    return [{"params": params, "lr": lr} for params, lr in zip(groups, rates, strict=True)]


def _one_optimizer(optimizer: torch.optim.Optimizer) -> Stepping:
    return optimizer.step, optimizer.param_groups


# --- on any device -------------------------------------------------------------------------------


def _keyed(
    combined: Callable[[list[Any]], Any], inner: Callable[..., Any], groups: Groups
) -> Stepping:
    """What `build_optimizer` makes: a keyed wrapper for each group, combined."""
    from torchrec.optim.keyed import KeyedOptimizerWrapper

    optimizer = combined(
        [
            KeyedOptimizerWrapper(
                {f"group{index}.{number}": param for number, param in enumerate(group["params"])},
                functools.partial(inner, lr=group["lr"]),
            )
            for index, group in enumerate(_with_rates(groups))
        ]
    )
    return _one_optimizer(optimizer)


def _ours(groups: Groups, algorithm: str, clear_grads: bool = False, **options: Any) -> Stepping:
    # Not at the top of this file: it needs torchrec, which the other peers do without.
    try:  # where older revisions have it, to compare with
        from recap_fast.optim.combined import FusedCombinedOptimizer
    except ImportError:
        from recap_fast import FusedCombinedOptimizer
    combined = functools.partial(FusedCombinedOptimizer, **options)
    inner = _OURS[algorithm]
    if clear_grads:
        inner = functools.partial(inner, clear_grads=True)
    return _keyed(combined, inner, groups)


def _reference(groups: Groups, algorithm: str) -> Stepping:
    # Not at the top of this file: revisions without it can still be compared.
    from recap_fast.keyed import CombinedOptimizer

    return _keyed(CombinedOptimizer, _TORCH[algorithm], groups)


def _ours_one(groups: Groups, algorithm: str) -> Stepping:
    return _one_optimizer(_OURS[algorithm](_with_rates(groups)))


def _torch(groups: Groups, algorithm: str, **options: Any) -> Stepping:
    return _one_optimizer(_TORCH[algorithm](_with_rates(groups), **options))


_torch_fused: Builder = functools.partial(_torch, fused=True)


def _torch_per_group(groups: Groups, algorithm: str, **options: Any) -> Stepping:
    optimizers = [_TORCH[algorithm]([group], **options) for group in _with_rates(groups)]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step, [group for optimizer in optimizers for group in optimizer.param_groups]


def _then_zero_grad(build: Builder, set_to_none: bool, groups: Groups, algorithm: str) -> Stepping:
    own_step, param_groups = build(groups, algorithm)
    optimizer = own_step.__self__  # type: ignore[attr-defined]

    def step() -> None:
        own_step()
        optimizer.zero_grad(set_to_none=set_to_none)

    return step, param_groups


def _torch_fused_clipping(groups: Groups, algorithm: str) -> Stepping:
    fused_step, param_groups = _torch(groups, algorithm, fused=True)
    params = [param for group in groups for param in group]

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        fused_step()

    return step, param_groups


# --- on a CPU ------------------------------------------------------------------------------------


@functools.cache
def _deepspeed_optimizer(algorithm: str) -> type | str:
    """DeepSpeed's class, or why it cannot be had. In a cache: a failed build takes minutes."""
    if algorithm == "sgd":
        return "DeepSpeed has no SGD for the CPU"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        return f"DeepSpeed is not installed ({error})"
    optimizer = {"adam": DeepSpeedCPUAdam, "adagrad": DeepSpeedCPUAdagrad}[algorithm]
    try:
        optimizer([nn.Parameter(torch.zeros(1))])  # compiles it
    except Exception as error:  # whatever its just-in-time build meets
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        return f"DeepSpeed does not build here ({cause})"
    return optimizer


def _deepspeed(groups: Groups, algorithm: str) -> Stepping:
    optimizer = _deepspeed_optimizer(algorithm)
    if isinstance(optimizer, str):
        raise Unavailable(optimizer)
    options = {"adamw_mode": False} if algorithm == "adam" else {}
    return _one_optimizer(optimizer(_with_rates(groups), **options))


def _ceiling(groups: Groups, algorithm: str) -> Stepping:
    params = [param for group in groups for param in group]
    states = [[torch.zeros_like(param) for param in params] for _ in range(STATES[algorithm])]
    grads = [param.grad for param in params]
    try:
        run = ceiling.make_step([param.detach() for param in params], grads, states)
    except ceiling.CannotCompile as error:
        raise Unavailable(str(error)) from error
    return run, []


# --- on a GPU ------------------------------------------------------------------------------------


def _apex(groups: Groups, algorithm: str) -> Stepping:
    try:
        from apex import optimizers
    except ImportError as error:
        raise Unavailable(f"apex is not installed ({error})") from error
    name, options = {
        "adam": ("FusedAdam", {"adam_w_mode": False}),
        "adagrad": ("FusedAdagrad", {}),
        "sgd": ("FusedSGD", {"lr": 1e-4}),
    }[algorithm]
    return _one_optimizer(getattr(optimizers, name)(_with_rates(groups), **options))


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


BUILDERS: Final[Mapping[str, Builder]] = {
    "recap_fast": _ours,
    "recap_fast, one optimizer": _ours_one,
    "reference": _reference,
    "torch for-loop": functools.partial(_torch, foreach=False, fused=False),
    "torch foreach": functools.partial(_torch, foreach=True),
    "torch fused": _torch_fused,
    "torch fused per group": functools.partial(_torch_per_group, fused=True),
    "DeepSpeed": _deepspeed,
    "ceiling": _ceiling,
    "recap_fast, clipping": functools.partial(_ours, clip_grad_norm=MAX_NORM),
    "torch fused, clipping": _torch_fused_clipping,
    "recap_fast, clearing": functools.partial(_ours, clear_grads=True),
    "recap_fast, then zeros": functools.partial(_then_zero_grad, _ours, False),
    "torch fused, then zeros": functools.partial(_then_zero_grad, _torch_fused, False),
    "recap_fast, then None": functools.partial(_then_zero_grad, _ours, True),
    "torch fused, then None": functools.partial(_then_zero_grad, _torch_fused, True),
    "recap_fast, graph replay": _ours_replayed,
    "torch per group": _torch_per_group,
    "torch fused, graph replay": _torch_fused_replayed,
    "apex": _apex,
    "copy": _copy,
}
"""By the name of the peer. Each raises Unavailable where it cannot run."""
