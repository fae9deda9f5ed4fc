"""The passes of a table-batched module: what was looked up, and what to update by its gradient."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

_VARIABLE_BATCH = "batch_size_per_feature_per_rank"


@dataclass(slots=True)
class Pass:
    """What a forward pass looked up, and later the gradient that came back.

    With T features and B examples, bags lie feature after feature: bag ``t * B + b``.

    Attributes:
        indices: Rows, shape (L,), of all bags.
        offsets: Where bags begin, shape (T * B + 1,).
        weights: Per-sample weights, shape (L,); or None.
        others: Further arguments of the module, those that were given.
        rate: The learning rate that FBGEMM had.
        frozen: Tables that stay as they are, by their places in the module.
        node: FBGEMM's own node of the autograd graph, if it has made one.
        version: Of the weights, as `LiveKernel.version`, when it made the node.
        gradient: With respect to the output, shape (B, width of all features).
    """

    indices: Tensor
    offsets: Tensor
    weights: Tensor | None
    others: dict[str, Any]
    rate: float
    frozen: frozenset[int]
    node: Any = None
    version: int = 0
    gradient: Tensor | None = None

    @property
    def varies(self) -> bool:
        """Whether features have batches of different sizes."""
        return _VARIABLE_BATCH in self.others

    def copied(self, gradient: Tensor, frozen: frozenset[int]) -> Pass:
        """This pass with its gradient, in memory of its own."""
        weights = None if self.weights is None else self.weights.detach().clone()
        return replace(
            self,
            indices=self.indices.clone(),
            offsets=self.offsets.clone(),
            weights=weights,
            node=None,
            frozen=frozen,
            gradient=gradient.clone(),
        )


def without_tables(one: Pass, features: Sequence[int], frozen: Collection[int]) -> Pass:
    """The pass with empty bags for the features of some tables.

    Args:
        one: The pass; its features have batches of one size.
        features: The table of each feature.
        frozen: The tables.
    """
    if not frozen:
        return one
    device = one.offsets.device
    stays = torch.tensor([table not in frozen for table in features], device=device)
    lengths = one.offsets.diff().view(len(features), -1)
    kept = stays.repeat_interleave(lengths.sum(1))
    lengths = torch.where(stays[:, None], lengths, 0).flatten()
    return replace(
        one,
        indices=one.indices[kept],
        offsets=torch.cat([one.offsets[:1], lengths.cumsum(0)]).to(one.offsets.dtype),
        weights=None if one.weights is None else one.weights[kept],
    )


def joined(passes: Sequence[Pass], features: int) -> Pass:
    """Several passes as one, over the examples of all, whose gradient is the sum of theirs."""
    first, *others = passes
    if not others:
        return first
    lengths = [each.offsets.diff().view(features, -1) for each in passes]
    sizes = [each.sum(1).tolist() for each in lengths]

    def by_feature(values: Sequence[Tensor]) -> Tensor:
        parts = [value.split(size) for value, size in zip(values, sizes, strict=True)]
        return torch.cat([part for of_feature in zip(*parts, strict=True) for part in of_feature])

    bags = torch.cat(lengths, 1).flatten()
    weights = None
    if first.weights is not None:
        weights = by_feature([each.weights for each in passes if each.weights is not None])
    return replace(
        first,
        indices=by_feature([each.indices for each in passes]),
        offsets=torch.cat([bags.new_zeros(1), bags.cumsum(0)]).to(first.offsets.dtype),
        weights=weights,
        gradient=torch.cat([each.gradient for each in passes if each.gradient is not None]),
    )


def gradient_of_weights(
    kernel: SplitTableBatchedEmbeddingBagsCodegen, one: Pass, gradient: Tensor
) -> Tensor:
    """The gradient with respect to the per-sample weights of a pass, shape (L,), as FBGEMM's.

    Args:
        kernel: The module, of sum pooling.
        one: The pass; its features have batches of one size.
        gradient: With respect to its output.
    """
    weights = one.weights
    assert weights is not None, "asked for where there are some"
    kernel.flush()
    tables = kernel.split_embedding_weights()
    features = kernel.feature_table_map
    lengths = one.offsets.diff().view(len(features), -1)
    parts = one.indices.split(lengths.sum(1).tolist())
    widths = [tables[table].shape[1] for table in features]
    wanted = one.others.get("feature_requires_grad", torch.ones(len(features))).tolist()
    found = [
        bool(wants)
        * (of_feature.repeat_interleave(length, 0) * tables[table][indices.long()]).sum(1)
        for table, length, indices, of_feature, wants in zip(
            features, lengths, parts, gradient.split(widths, 1), wanted, strict=True
        )
    ]
    return torch.cat(found).to(weights.dtype)
