"""Memory and traffic per GPU, of tables that are spread evenly and a model that is not in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ID_BYTES: Final = 8  # an id, and the number of ids of a feature of a rating: int64
FLOAT_BYTES: Final = 4  # what is exchanged between GPUs, whatever the dtype of the tables


@dataclass(frozen=True)
class Lookups:
    """What each GPU looks up in a step.

    Attributes:
        ratings: on each GPU.
        features: each with a table of its own.
        ids: per feature and rating.
        dim: columns of each table.
    """

    ratings: int
    features: int
    ids: float
    dim: int


def table_bytes(rows: int, bytes_per_row: float, gpus: int) -> float:
    """Weights and optimizer state on each GPU."""
    return rows * bytes_per_row / gpus


def id_traffic(sharding: str, lookups: Lookups, gpus: int) -> float:
    """Bytes that each GPU sends in a step to have its ids looked up.

    Args:
        sharding: `table_wise`; `column_wise`, each table cut into a shard per GPU; `row_wise`.
        lookups: of each GPU.
        gpus: how many.
    """
    features = lookups.ratings * lookups.features
    ids, counts = features * lookups.ids * ID_BYTES, features * ID_BYTES
    to_others = (gpus - 1) / gpus
    if sharding == "table_wise":
        return (ids + counts) * to_others
    if sharding == "column_wise":  # all of it to every GPU
        return (ids + counts) * (gpus - 1)
    if sharding == "row_wise":  # an id to the GPU that has it, the counts to every GPU
        return ids * to_others + counts * (gpus - 1)
    raise ValueError(f"sharding={sharding!r} must be table_wise, column_wise or row_wise")


def pooled_traffic(sharding: str, lookups: Lookups, gpus: int) -> float:
    """Bytes of pooled embeddings that each GPU sends forward; of gradients, as many backward."""
    pooled = lookups.ratings * lookups.features * lookups.dim * FLOAT_BYTES
    if sharding in ("table_wise", "column_wise"):  # all-to-all
        return pooled * (gpus - 1) / gpus
    if sharding == "row_wise":  # every GPU has a part of every sum: reduce-scatter, all-gather
        return pooled * (gpus - 1)
    raise ValueError(f"sharding={sharding!r} must be table_wise, column_wise or row_wise")


def dense_traffic(kind: str, elements: int, gpus: int) -> float:
    """Bytes that each GPU sends in a step for the parameters that are in no table.

    Args:
        kind: `ddp`, an all-reduce of the gradients; `fsdp`, an all-gather of the parameters for the
            forward pass and one for the backward pass, and a reduce-scatter of the gradients.
        elements: parameters, float32.
        gpus: how many; rings.
    """
    passes = {"ddp": 2, "fsdp": 3}
    if kind not in passes:
        raise ValueError(f"kind={kind!r} must be ddp or fsdp")
    return passes[kind] * elements * FLOAT_BYTES * (gpus - 1) / gpus


def dense_bytes(kind: str, elements: int, gpus: int) -> float:
    """Parameters, gradients and Adam's two moments on each GPU, float32, between two steps."""
    whole = 4 * elements * FLOAT_BYTES
    return whole if kind == "ddp" else whole / gpus
