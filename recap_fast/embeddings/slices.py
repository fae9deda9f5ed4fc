"""Gradients of unfused tables that torchrec shards."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.composable.table_batched_embedding_slice import (
    TableBatchedEmbeddingSlice,
)


def show_slice_gradients(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Has every step of an optimizer see the gradients of table slices.

    torchrec keeps several unfused tables in one tensor, and its parameters are slices of that. A
    slice computes its `grad` in Python when it is asked for; in C++, where a native step looks, it
    has none.

    Args:
        optimizer: Whatever steps the parameters.
        params: All that it steps; others than such slices do not matter.
    """
    slices = [param for param in params if isinstance(param, TableBatchedEmbeddingSlice)]
    if slices:
        optimizer.register_step_pre_hook(functools.partial(_before_step, slices))


def _before_step(
    slices: list[TableBatchedEmbeddingSlice],
    optimizer: torch.optim.Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    _show(slices)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None

    def evaluate() -> Any:
        loss = closure()
        _show(slices)
        return loss

    return args[:1], {**kwargs, "closure": evaluate}


def _show(slices: list[TableBatchedEmbeddingSlice]) -> None:
    for param in slices:
        torch.Tensor.grad.__set__(param, param.grad)
