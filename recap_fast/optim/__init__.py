"""Fused optimizers: `torch.optim` classes whose step is one native call over all param groups.

Importable without torchrec. `recap_fast.keyed.fused`, which joins several of them under
torchrec's `keyed.CombinedOptimizer`, needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch.optim import Optimizer

from recap_fast.optim.adagrad import FusedAdagrad
from recap_fast.optim.adam import FusedAdam, FusedAdamW
from recap_fast.optim.export import float32_state
from recap_fast.optim.lion import FusedLion
from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.optim.rmsprop import FusedRMSprop
from recap_fast.optim.rowwise_adagrad import FusedRowwiseAdagrad
from recap_fast.optim.sgd import FusedSGD
from recap_fast.optim.sparse_adam import FusedSparseAdam

# By the name of an algorithm in a configuration, and by the class whose step each replaces.
DENSE: Final[Mapping[str, type[FusedOptimizer]]] = {
    "adam": FusedAdam,
    "adamw": FusedAdamW,
    "adagrad": FusedAdagrad,
    "sgd": FusedSGD,
    "rmsprop": FusedRMSprop,
    "lion": FusedLion,
}
_NATIVE: tuple[type[FusedOptimizer], ...] = (*DENSE.values(), FusedSparseAdam)
BY_TORCH_CLASS: Final[Mapping[type[Optimizer], type[FusedOptimizer]]] = {
    kind.torch_class(): kind for kind in _NATIVE
}

__all__ = [
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedLion",
    "FusedOptimizer",
    "FusedRMSprop",
    "FusedRowwiseAdagrad",
    "FusedSGD",
    "FusedSparseAdam",
    "float32_state",
]
