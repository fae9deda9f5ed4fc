"""The algorithms of FBGEMM's table-batched kernels: one table of what there is to know of each."""

from __future__ import annotations

from dataclasses import dataclass

import fbgemm_gpu
from fbgemm_gpu.split_embedding_configs import EmbOptimType


@dataclass(frozen=True)
class KernelAlgorithm:
    """What FBGEMM has under the name of an algorithm in `EmbeddingOptimizerConfig`.

    Attributes:
        optimizer: FBGEMM's name.
        states: Names of what FBGEMM calls momentum1, momentum2, ..., in its order.
        on_cpu: Whether its CPU kernels have it
            (fbgemm_gpu/split_table_batched_embeddings_ops_training.py, "is not supported in CPU
            mode").
        counts: Whether updates depend on the number of forward passes, whatever the mode of weight
            decay.
    """

    optimizer: EmbOptimType
    states: tuple[str, ...]
    on_cpu: bool = False
    counts: bool = False


_ADAM = ("exp_avg", "exp_avg_sq")
TABLE_ALGORITHMS = {
    "sgd": KernelAlgorithm(EmbOptimType.EXACT_SGD, (), on_cpu=True),
    "adagrad": KernelAlgorithm(EmbOptimType.EXACT_ADAGRAD, ("sum",), on_cpu=True),
    # The last two states with some modes of weight decay only.
    "rowwise_adagrad": KernelAlgorithm(
        EmbOptimType.EXACT_ROWWISE_ADAGRAD, ("sum", "prev_iter", "row_counter"), on_cpu=True
    ),
    "ema_rowwise_adagrad": KernelAlgorithm(
        EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD, ("sum",), on_cpu=True, counts=True
    ),
    "ensemble_rowwise_adagrad": KernelAlgorithm(
        EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD, ("sum", "ema"), counts=True
    ),
    "adam": KernelAlgorithm(EmbOptimType.ADAM, (*_ADAM, "row_counter"), counts=True),
    "partial_rowwise_adam": KernelAlgorithm(EmbOptimType.PARTIAL_ROWWISE_ADAM, _ADAM, counts=True),
    "lamb": KernelAlgorithm(EmbOptimType.LAMB, _ADAM, counts=True),
    "partial_rowwise_lamb": KernelAlgorithm(EmbOptimType.PARTIAL_ROWWISE_LAMB, _ADAM, counts=True),
    "lars_sgd": KernelAlgorithm(EmbOptimType.LARS_SGD, ("momentum_buffer",)),
}
if hasattr(EmbOptimType, "ROWWISE_RMSPROP_AR"):  # from release 1.9 on
    TABLE_ALGORITHMS["rowwise_rmsprop_ar"] = KernelAlgorithm(
        EmbOptimType.ROWWISE_RMSPROP_AR, ("square_avg", "prev_iter"), on_cpu=True, counts=True
    )

_BY_OPTIMIZER = {algorithm.optimizer: algorithm for algorithm in TABLE_ALGORITHMS.values()}


def algorithm_of(optimizer: EmbOptimType) -> KernelAlgorithm:
    """Returns what there is to know of an optimizer; an unknown one has no state."""
    return _BY_OPTIMIZER.get(optimizer, KernelAlgorithm(optimizer, ()))


def on_cpu() -> list[str]:
    """Returns the names of the algorithms that FBGEMM has on the CPU."""
    return [name for name, algorithm in TABLE_ALGORITHMS.items() if algorithm.on_cpu]


def algorithm_named(name: str) -> KernelAlgorithm:
    """Returns what there is to know of an algorithm.

    Raises:
        ValueError: This release of FBGEMM does not have it.
    """
    if name not in TABLE_ALGORITHMS:
        raise ValueError(
            f"emb_optimizer_config chooses {name}, which FBGEMM has from release 1.9 on; this "
            f"is {fbgemm_gpu.__version__}, so choose another, or install a newer torch with the "
            "torchrec and FBGEMM that belong to it (see the README)"
        )
    return TABLE_ALGORITHMS[name]
