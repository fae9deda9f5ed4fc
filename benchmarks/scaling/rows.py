"""What FBGEMM allocates for a row of a table: weights and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from recap_fast.embeddings.algorithms import TABLE_ALGORITHMS

ALGORITHMS: Final = {
    name: TABLE_ALGORITHMS[name].optimizer
    for name in ("sgd", "rowwise_adagrad", "partial_rowwise_adam", "adagrad", "adam")
}
DTYPES: Final = {"float32": SparseType.FP32, "float16": SparseType.FP16}
_ROWS: Final = 4096


@dataclass(frozen=True)
class RowBytes:
    """Bytes for each row of a table.

    Attributes:
        algorithm: of `ALGORITHMS`.
        dtype: of the weights.
        dim: columns.
        weights, state: bytes.
    """

    algorithm: str
    dtype: str
    dim: int
    weights: float
    state: float


def measure(algorithm: str, dtype: str, dim: int) -> RowBytes:
    """Has FBGEMM lay out a table as for a GPU, on the meta device, where nothing is allocated."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(_ROWS, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=ALGORITHMS[algorithm],
        weights_precision=DTYPES[dtype],
        device=torch.device("meta"),
    )
    tensors = dict([*kernel.named_parameters(), *kernel.named_buffers()])
    weights, state = (
        sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in tensors.items()
            # Beside these there are a few integers for each table, not for each row.
            if name.startswith(prefix) and name.endswith("_dev") and tensor.is_floating_point()
        )
        for prefix in ("weights", "momentum")
    )
    return RowBytes(algorithm, dtype, dim, weights / _ROWS, state / _ROWS)
