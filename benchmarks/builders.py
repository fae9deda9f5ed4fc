"""Makes the optimizer of each peer over given param groups."""

from __future__ import annotations

import functools
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

TORCH_CLASSES: Final = {
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
OUR_CLASSES: Final = {"adam": FusedAdam, "adagrad": FusedAdagrad, "sgd": FusedSGD}

Groups = list[list[nn.Parameter]]
Stepping = tuple[Callable[[], Any], list[dict[str, Any]]]
"""What takes a step, and the param groups whose `lr` it reads."""


class Unavailable(Exception):
    """The peer cannot run here; the message says why."""


def _learning_rates(groups: int) -> Iterator[float]:
    """Another one for each group, all near 1e-4."""
    return (1e-4 * (1 + index / groups) for index in range(groups))


def with_rates(groups: Groups) -> list[dict[str, Any]]:
    rates = _learning_rates(len(groups))
    return [{"params": params, "lr": lr} for params, lr in zip(groups, rates, strict=True)]


def _one_optimizer(optimizer: torch.optim.Optimizer) -> Stepping:
    return optimizer.step, optimizer.param_groups


def step_each(optimizers: list[torch.optim.Optimizer]) -> Stepping:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step, [group for optimizer in optimizers for group in optimizer.param_groups]


def _keyed(combined: Callable[[list[Any]], Any], inner: type, groups: Groups) -> Stepping:
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


def _combined() -> type:
    """Not imported with this file: it needs torchrec, which the other peers do without."""
    try:  # where older revisions have it, to compare with
        from recap_fast.optim.combined import FusedCombinedOptimizer
    except ImportError:
        from recap_fast import FusedCombinedOptimizer
    return FusedCombinedOptimizer


def _ours(groups: Groups, algorithm: str) -> Stepping:
    return _keyed(_combined(), OUR_CLASSES[algorithm], groups)


def _ours_clipping(groups: Groups, algorithm: str) -> Stepping:
    combined = functools.partial(_combined(), clip_grad_norm=MAX_NORM)
    return _keyed(combined, OUR_CLASSES[algorithm], groups)


def _ours_one(groups: Groups, algorithm: str) -> Stepping:
    return _one_optimizer(OUR_CLASSES[algorithm](with_rates(groups)))


def _reference(groups: Groups, algorithm: str) -> Stepping:
    # Not at the top of this file: revisions without it can still be compared.
    from recap_fast.keyed import CombinedOptimizer

    return _keyed(CombinedOptimizer, TORCH_CLASSES[algorithm], groups)


def _torch_for_loop(groups: Groups, algorithm: str) -> Stepping:
    return _one_optimizer(TORCH_CLASSES[algorithm](with_rates(groups), foreach=False, fused=False))


def _torch_foreach(groups: Groups, algorithm: str) -> Stepping:
    return _one_optimizer(TORCH_CLASSES[algorithm](with_rates(groups), foreach=True))


def _torch_fused(groups: Groups, algorithm: str) -> Stepping:
    return _one_optimizer(TORCH_CLASSES[algorithm](with_rates(groups), fused=True))


def _torch_fused_clipping(groups: Groups, algorithm: str) -> Stepping:
    fused_step, param_groups = _torch_fused(groups, algorithm)
    params = [param for group in groups for param in group]

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        fused_step()

    return step, param_groups


def _torch_fused_per_group(groups: Groups, algorithm: str) -> Stepping:
    return step_each(
        [TORCH_CLASSES[algorithm]([group], fused=True) for group in with_rates(groups)]
    )


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
    return _one_optimizer(optimizer(with_rates(groups), **options))


def _ceiling(groups: Groups, algorithm: str) -> Stepping:
    params = [param for group in groups for param in group]
    states = [[torch.zeros_like(param) for param in params] for _ in range(STATES[algorithm])]
    grads = [param.grad for param in params]
    try:
        run = ceiling.make_step([param.detach() for param in params], grads, states)
    except ceiling.CannotCompile as error:
        raise Unavailable(str(error)) from error
    return run, []


BUILDERS: Final[Mapping[str, Callable[[Groups, str], Stepping]]] = {
    "recap_fast": _ours,
    "recap_fast, one optimizer": _ours_one,
    "reference": _reference,
    "torch for-loop": _torch_for_loop,
    "torch foreach": _torch_foreach,
    "torch fused": _torch_fused,
    "torch fused per group": _torch_fused_per_group,
    "DeepSpeed": _deepspeed,
    "ceiling": _ceiling,
    "recap_fast, clipping": _ours_clipping,
    "torch fused, clipping": _torch_fused_clipping,
}
"""By the name of the peer. Each raises Unavailable where it cannot run."""
