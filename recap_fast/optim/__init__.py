"""Fused optimizers: `torch.optim` classes whose step is one native call over all param groups.

Importable without torchrec. `recap_fast.keyed.fused`, which joins several of them under
torchrec's `keyed.CombinedOptimizer`, needs it.
"""

from recap_fast.optim.adagrad import FusedAdagrad
from recap_fast.optim.adam import FusedAdam, FusedAdamW
from recap_fast.optim.native_step import FusedOptimizer
from recap_fast.optim.rowwise_adagrad import FusedRowwiseAdagrad
from recap_fast.optim.sgd import FusedSGD
from recap_fast.optim.sparse_adam import FusedSparseAdam

__all__ = [
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedOptimizer",
    "FusedRowwiseAdagrad",
    "FusedSGD",
    "FusedSparseAdam",
]
