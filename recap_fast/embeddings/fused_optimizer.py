"""The optimizer inside a table-batched module, as an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from fbgemm_gpu.tbe.config.optimizer_config import LearningRateMode
from torch import Tensor
from torchrec.modules.fused_embedding_modules import EmbeddingFusedOptimizer
from torchrec.optim.fused import FusedOptimizer

from recap_fast.embeddings.algorithms import algorithm_of
from recap_fast.embeddings.live_step import LiveStep, follow_kernel


def counts_forward_passes(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Returns whether the updates of a kernel depend on how many forward passes it has seen."""
    return algorithm_of(kernel.optimizer).counts or any(
        getattr(kernel, f"_used_rowwise_adagrad_with_{mode}", False)  # which SSD kernels lack
        for mode in ("counter", "global_weight_decay")
    )


def set_forward_passes(kernel: SplitTableBatchedEmbeddingBagsCodegen, count: int) -> None:
    """Sets how many forward passes a kernel has seen; FBGEMM keeps the number twice."""
    kernel.iter.fill_(count)
    kernel.iter_cpu.fill_(count)


def reset_state(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Makes the state of a kernel that of a new one; its tables stay as they are."""
    for states in kernel.split_optimizer_states():
        for value in states:
            value.zero_()
    if hasattr(kernel, "max_counter"):
        kernel.max_counter.fill_(1)
    set_forward_passes(kernel, 0)


def reads_max_counter(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Returns whether the updates of a kernel depend on the greatest counter of its rows."""
    mode = LearningRateMode(kernel.optimizer_args.learning_rate_mode)
    return kernel._used_rowwise_adagrad_with_counter and (
        mode in (LearningRateMode.TAIL_ID_LR_INCREASE, LearningRateMode.TAIL_ID_LR_DECREASE)
        or bool(kernel.optimizer_args.is_tail_id_thresh_ratio)
    )


class KernelOptimizer(LiveStep, EmbeddingFusedOptimizer):
    """Shows parameters and state of a table-batched module, which follows its learning rate.

    The state has torch's names where torch has the algorithm: "sum", "exp_avg", "exp_avg_sq",
    "square_avg", "momentum_buffer"; row-wise ones have a value per row. "ema" is the average of an
    ensemble, "row_counter" the number of updates of each row, of which some may be forgotten, and
    "prev_iter" the forward pass of the last one. "step" is the number of forward passes, and
    "max_counter" the greatest "row_counter" when it was last looked for, plus 1: one tensor each
    for all tables of the module.

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
            state.update(zip(algorithm_of(kernel.optimizer).states, values, strict=False))
        for state in states:
            if counts_forward_passes(kernel):
                state["step"] = kernel.iter
            if reads_max_counter(kernel):
                state["max_counter"] = kernel.max_counter
        group = {"params": list(weights), "lr": kernel.get_learning_rate()}
        # torchrec's own constructor would name the state itself, and leave tables without one out.
        FusedOptimizer.__init__(
            self,
            dict(zip(names, weights, strict=True)),
            dict(zip(weights, states, strict=True)),
            [group],
        )
        follow_kernel(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelOptimizer:
        """Another optimizer, of a copy of the module."""
        kernel = copy.deepcopy(self._emb_module, memo)
        for old, new in (
            (self._emb_module.split_embedding_weights(), kernel.split_embedding_weights()),
            *zip(
                self._emb_module.split_optimizer_states(),
                kernel.split_optimizer_states(),
                strict=True,
            ),
        ):
            shown = {view.data_ptr(): view for view in self._views()}
            for before, after in zip(old, new, strict=True):
                memo[id(shown.get(before.data_ptr(), before))] = after
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        follow_kernel(made)
        return made

    def _views(self) -> Iterator[Tensor]:
        """The tensors by which it shows memory of the module."""
        for param, entries in self.state.items():
            yield param
            yield from (value for value in entries.values() if isinstance(value, Tensor))

    def post_load_state_dict(self) -> None:
        """Has the module go on from a loaded step and learning rate."""
        self._emb_module.iter_cpu.copy_(self._emb_module.iter)
        self.pass_rate()

    def set_optimizer_step(self, step: int) -> None:
        """Sets the number of forward passes that the module has counted."""
        set_forward_passes(self._emb_module, step)
