"""FBGEMM's table-batched module, whose forward passes need neither count nor move averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from recap_fast.embeddings.passes import Pass
from recap_fast.embeddings.shown import NONE_FROZEN

# Those whose forward pass counts nothing.
_UNCOUNTED: Final = (EmbOptimType.EXACT_SGD, EmbOptimType.LARS_SGD, EmbOptimType.EXACT_ADAGRAD)


class CountedKernel(SplitTableBatchedEmbeddingBagsCodegen):
    """A table-batched module that can be looked up as if it were the pass that was counted last.

    FBGEMM counts every forward pass, and in training every so many move averages of the tables.
    """

    _averages: bool = True
    _frozen: frozenset[int] = NONE_FROZEN
    _hidden: frozenset[int] = NONE_FROZEN

    def look_up(self, used: Pass) -> Tensor:
        """FBGEMM's own forward pass; averages of the tables that it says are frozen stay."""
        self._frozen = used.frozen
        found: Tensor = super().forward(used.indices, used.offsets, used.weights, **used.others)
        return found

    @contextmanager
    def as_counted(self) -> Iterator[None]:
        """Within it, a forward pass is the one that was counted last, and moves no average."""
        counted = int(self.iter_cpu)
        self._averages = False
        try:
            if self.optimizer not in _UNCOUNTED:
                self.iter.sub_(1)
                self.iter_cpu.sub_(1)
            yield
        finally:
            self._averages = True
            missing = counted - int(self.iter_cpu)  # where the pass failed
            self.iter.add_(missing)
            self.iter_cpu.add_(missing)

    def ema_inplace(self, emainplace_mode: dict[str, float]) -> None:
        """As FBGEMM's, of the tables that are not frozen; not where nothing is to be counted."""
        with self._averaging() as moves:
            if moves:
                super().ema_inplace(emainplace_mode)

    def ensemble_and_swap(self, ensemble_mode: dict[str, float]) -> None:
        """As FBGEMM's, of the tables that are not frozen; not where nothing is to be counted."""
        with self._averaging() as moves:
            if moves:
                super().ensemble_and_swap(ensemble_mode)

    @contextmanager
    def _averaging(self) -> Iterator[bool]:
        """Within it, frozen tables seem to have no rows; tells whether averages move at all."""
        self._hidden = self._frozen
        try:
            yield self._averages
        finally:
            self._hidden = NONE_FROZEN

    def split_embedding_weights(self) -> list[Tensor]:
        """As FBGEMM's; while averages move, without the rows of frozen tables."""
        weights: list[Tensor] = super().split_embedding_weights()
        if self._hidden:
            return [each[:0] if i in self._hidden else each for i, each in enumerate(weights)]
        return weights

    def split_optimizer_states(self) -> list[list[Tensor]]:
        """As FBGEMM's; while averages move, without the rows of frozen tables."""
        states: list[list[Tensor]] = super().split_optimizer_states()
        if self._hidden:
            return [
                [each[:0] for each in own] if place in self._hidden else own
                for place, own in enumerate(states)
            ]
        return states
