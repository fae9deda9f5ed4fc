"""The optimizer inside a table-batched module, as an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.modules.fused_embedding_modules import EmbeddingFusedOptimizer
from torchrec.optim.fused import FusedOptimizer

_ADAM = ("exp_avg", "exp_avg_sq")
# What FBGEMM calls momentum1, momentum2, ..., in its order.
STATES = {
    EmbOptimType.EXACT_SGD: (),
    EmbOptimType.EXACT_ADAGRAD: ("sum",),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: ("sum",),
    EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD: ("sum",),
    EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD: ("sum", "ema"),
    EmbOptimType.ADAM: (*_ADAM, "row_counter"),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: _ADAM,
    EmbOptimType.LAMB: _ADAM,
    EmbOptimType.PARTIAL_ROWWISE_LAMB: _ADAM,
    EmbOptimType.LARS_SGD: ("momentum_buffer",),
}
# Those whose update depends on the number of forward passes.
COUNTING = (
    EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD,
    EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD,
    EmbOptimType.ADAM,
    EmbOptimType.PARTIAL_ROWWISE_ADAM,
    EmbOptimType.LAMB,
    EmbOptimType.PARTIAL_ROWWISE_LAMB,
)


class KernelOptimizer(EmbeddingFusedOptimizer):
    """Shows parameters and state of a table-batched module; a step passes on its learning rate.

    The state has torch's names where torch has the algorithm: "sum", "exp_avg", "exp_avg_sq",
    "momentum_buffer"; row-wise ones have a value per row. "ema" is the average of an ensemble,
    "row_counter" the number of updates of each row, and "step" the number of forward passes, one
    tensor for all tables of the module.

    Args:
        names: What to call the tables, in the order of the module.
        kernel: The module.
    """

    def __init__(self, names: Iterable[str], kernel: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        self._emb_module = kernel
        weights = kernel.split_embedding_weights()
        states: list[dict[str, Any]] = [{} for _ in weights]
        # Empty for SGD, which has no state.
        for state, values in zip(states, kernel.split_optimizer_states(), strict=False):
            state.update(zip(STATES[kernel.optimizer], values, strict=False))
        if kernel.optimizer in COUNTING:
            for state in states:
                state["step"] = kernel.iter
        group = {"params": list(weights), "lr": kernel.get_learning_rate()}
        # torchrec's own constructor would name the state itself, and leave tables without one out.
        FusedOptimizer.__init__(
            self,
            dict(zip(names, weights, strict=True)),
            dict(zip(weights, states, strict=True)),
            [group],
        )

    def post_load_state_dict(self) -> None:
        """Has the module go on from a loaded step and learning rate."""
        self._emb_module.iter_cpu.copy_(self._emb_module.iter)
        self.step()

    def set_optimizer_step(self, step: int) -> None:
        """Sets the number of forward passes that the module has counted."""
        self._emb_module.iter.fill_(step)
        self._emb_module.iter_cpu.fill_(step)
