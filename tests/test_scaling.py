"""The tables of docs/scaling.md: against a run, against FBGEMM, and against plain counting."""

from __future__ import annotations

import json
import math
import re
from itertools import product

import pytest

pytest.importorskip("torchrec")

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks import scaling, workloads
from benchmarks.documents import ROOT
from benchmarks.table import number
from recap_fast.embeddings.algorithms import TABLE_ALGORITHMS

PAGE = (ROOT / "docs" / "scaling.md").read_text()
SHARDINGS = ("table_wise", "row_wise", "column_wise")
GPUS = (8, 16, 32, 64, 128)


def results() -> dict:
    (name,) = set(re.findall(r"benchmarks/results/[\w-]+\.json", PAGE))
    return json.loads((ROOT / name).read_text())


def test_the_page_shows_what_was_measured() -> None:
    assert scaling.throughput_table(results()) in PAGE
    assert f"at revision {results()['machine']['revision']} on" in PAGE


def tables_by_formula(
    sharding: str, gpus: int, ratings: int, features: int, ids: float, dim: int
) -> tuple[float, float]:
    """Bytes that each GPU sends in a step to look up `ids` of each of its ratings and features.

    Returns:
        Of ids and their counts, 8 bytes each; of pooled embeddings, float32, in one direction.
    """
    others, counts = gpus - 1, 8 * ratings * features
    pooled = 4 * ratings * features * dim
    if sharding == "row_wise":  # an id to the GPU that has it; counts and parts of sums to all
        return counts * ids * others / gpus + counts * others, pooled * others
    shards = {"table_wise": 1, "column_wise": gpus}[sharding]  # ids go to every shard of a table
    return counts * (ids + 1) * shards * others / gpus, pooled * others / gpus


def dense_by_formula(kind: str, elements: int, gpus: int) -> float:
    """Bytes that each GPU sends for float32 parameters in no table, by rings.

    DDP reduces the gradients to all; FSDP2 gathers parameters twice, and reduces gradients once.
    """
    return {"ddp": 2, "fsdp": 3}[kind] * 4 * elements * (gpus - 1) / gpus


def sent_by_all(
    sharding: str, gpus: int, ratings: int, features: int, ids: int, dim: int
) -> tuple[int, int]:
    """Bytes of ids and of pooled embeddings, message by message; a table per feature."""
    of_ids, pooled = 0, 0
    for gpu, rating, feature in product(range(gpus), range(ratings), range(features)):
        owner = feature % gpus  # of a whole table
        for other in range(gpus):
            if other == gpu:
                continue
            if sharding == "table_wise" and other == owner:
                of_ids += 8 + 8 * ids
                pooled += 4 * dim  # comes back
            elif sharding == "column_wise":
                of_ids += 8 + 8 * ids
                pooled += 4 * dim // gpus
            elif sharding == "row_wise":
                of_ids += 8
                pooled += 4 * dim  # a part of the sum, of rows that the other has
        if sharding == "row_wise":
            # Id number i of the rating is in the block of GPU (rating + i) modulo GPUs.
            of_ids += sum(8 for i in range(ids) if (rating + i) % gpus != gpu)
    return of_ids, pooled


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_traffic_of_tables_is_that_of_every_message(sharding: str, gpus: int) -> None:
    ids, pooled = tables_by_formula(sharding, gpus, 8, 12, 3, 16)
    expected = sent_by_all(sharding, gpus, 8, 12, 3, 16)
    assert (ids * gpus, pooled * gpus) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "passes"), [("ddp", 2), ("fsdp", 3)])
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_dense_traffic_is_that_of_rings(kind: str, passes: int, gpus: int) -> None:
    chunk = 100  # elements; in each of gpus - 1 rounds of a pass, every GPU sends one chunk on
    expected = sum(4 * chunk for _ in range(passes) for _ in range(gpus - 1))
    assert dense_by_formula(kind, chunk * gpus, gpus) == pytest.approx(expected)


def test_the_page_shows_what_the_formulas_say() -> None:
    def of_tables(sharding: str, part: int, dim: int = 1) -> list[float]:
        return [tables_by_formula(sharding, n, 4096, 26, 1, dim)[part] for n in GPUS]

    rows = {}
    for sharding in ("table_wise", "row_wise"):
        name = sharding.replace("_", "-")
        rows[f"{name}: ids"] = of_tables(sharding, 0)
        for dim in (64, 128):
            pooled = f"{name}: pooled, {dim} columns, forward; as much backward"
            rows[pooled] = of_tables(sharding, 1, dim)
    for kind, name in (("ddp", "DDP"), ("fsdp", "FSDP2, at most")):
        elements = workloads.RANKER_48M.elements
        rows[f"dense part: {name}"] = [dense_by_formula(kind, elements, n) for n in GPUS]
    for name, sent in rows.items():
        assert f"\n| {name} | {' | '.join(number(bytes_ / 1e6) for bytes_ in sent)} |\n" in PAGE


DTYPES = {"float32": SparseType.FP32, "float16": SparseType.FP16}


def _table(algorithm: str, dtype: str, rows: int, dim: int, device: str):
    where = {
        "meta": (EmbeddingLocation.DEVICE, ComputeDevice.CUDA),  # as for a GPU
        "cpu": (EmbeddingLocation.HOST, ComputeDevice.CPU),
    }[device]
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, *where)],
        optimizer=TABLE_ALGORITHMS[algorithm].optimizer,
        weights_precision=DTYPES[dtype],
        device=torch.device(device),
    )


def bytes_per_row(algorithm: str, dtype: str, dim: int) -> tuple[float, float]:
    """Of weights and of state, as FBGEMM lays them out for a GPU, where nothing is allocated."""
    rows = 4096
    kernel = _table(algorithm, dtype, rows, dim, "meta")
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
    return weights / rows, state / rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "algorithm", ["sgd", "rowwise_adagrad", "partial_rowwise_adam", "adagrad", "adam"]
)
def test_the_page_shows_the_bytes_of_a_row(algorithm: str, dtype: str) -> None:
    cells = []
    for dim in (64, 128):
        weights, state = bytes_per_row(algorithm, dtype, dim)
        gpus = math.ceil(1e9 * (weights + state) / (0.8 * 80e9))
        cells.append(f"{weights:g} + {state:g} | {gpus}")
    assert f"\n| {algorithm}, {dtype} | {' | '.join(cells)} |\n" in PAGE


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ["sgd", "rowwise_adagrad", "adagrad"])
def test_bytes_of_a_row_are_those_of_real_tables(algorithm: str, dtype: str, dim: int) -> None:
    count = 100
    kernel = _table(algorithm, dtype, count, dim, "cpu")
    (weights,) = kernel.split_embedding_weights()
    states = [state for table in kernel.split_optimizer_states() for state in table]
    expected = [
        weights.numel() * weights.element_size(),
        sum(s.numel() * s.element_size() for s in states),
    ]
    assert [each * count for each in bytes_per_row(algorithm, dtype, dim)] == expected


def test_training_sent_what_the_formulas_say() -> None:
    traffic = results()["traffic"]
    assert {(e["processes"], e["sharding"]) for e in traffic} >= set(product((2, 4), SHARDINGS))
    for e in traffic:
        count, sharding, ratings = e["processes"], e["sharding"], scaling.RATINGS // e["processes"]
        each = e["number_of_ids"] / ratings / 6  # features, with 32 columns each
        ids, pooled = tables_by_formula(sharding, count, ratings, 6, each, 32)
        dense = dense_by_formula(e["dense"], e["dense_elements"], count)
        assert e["ids"] == pytest.approx(ids, rel=0.02)  # where a genre goes depends on the batch
        if e["dense"] == "ddp":
            assert (e["floats"], e["ddp"]) == pytest.approx((2 * pooled, dense))
        else:
            assert 0.8 * dense < e["floats"] - 2 * pooled < dense
