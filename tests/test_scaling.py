"""The arithmetic of docs/scaling.md against plain counting, and the page against its results."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest

pytest.importorskip("torchrec")

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.documents import ROOT
from benchmarks.scaling import arithmetic, page, rows
from benchmarks.scaling.arithmetic import Lookups

SHARDINGS = ("table_wise", "column_wise", "row_wise")


def sent_by_all(sharding: str, lookups: Lookups, gpus: int) -> tuple[int, int]:
    """Bytes of ids and of pooled embeddings, message by message; a table per feature."""
    ids, pooled = 0, 0
    for gpu, rating, feature in product(
        range(gpus), range(lookups.ratings), range(lookups.features)
    ):
        owner = feature % gpus  # of a whole table
        for other in range(gpus):
            if other == gpu:
                continue
            if sharding == "table_wise" and other == owner:
                ids += 8 + 8 * lookups.ids
                pooled += 4 * lookups.dim  # comes back
            elif sharding == "column_wise":
                ids += 8 + 8 * lookups.ids
                pooled += 4 * lookups.dim // gpus
            elif sharding == "row_wise":
                ids += 8
                pooled += 4 * lookups.dim  # a part of the sum, of rows that the other has
        if sharding == "row_wise":
            # Id number i of the rating is in the block of GPU (rating + i) modulo GPUs.
            ids += sum(8 for i in range(lookups.ids) if (rating + i) % gpus != gpu)
    return ids, pooled


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_traffic_of_tables_is_that_of_every_message(sharding: str, gpus: int) -> None:
    lookups = Lookups(ratings=8, features=12, ids=3, dim=16)
    ids, pooled = sent_by_all(sharding, lookups, gpus)
    assert arithmetic.id_traffic(sharding, lookups, gpus) * gpus == pytest.approx(ids)
    assert arithmetic.pooled_traffic(sharding, lookups, gpus) * gpus == pytest.approx(pooled)


@pytest.mark.parametrize(("kind", "passes"), [("ddp", 2), ("fsdp", 3)])
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_dense_traffic_is_that_of_rings(kind: str, passes: int, gpus: int) -> None:
    chunk = 100  # elements; in each of gpus - 1 rounds of a pass, every GPU sends one chunk on
    expected = sum(4 * chunk for _ in range(passes) for _ in range(gpus - 1))
    assert arithmetic.dense_traffic(kind, chunk * gpus, gpus) == pytest.approx(expected)


def test_unknown_ways_are_refused() -> None:
    lookups = Lookups(1, 1, 1, 4)
    for traffic in (arithmetic.id_traffic, arithmetic.pooled_traffic):
        with pytest.raises(ValueError, match="sharding='diagonal' must be"):
            traffic("diagonal", lookups, 2)
    with pytest.raises(ValueError, match="kind='copied' must be ddp or fsdp"):
        arithmetic.dense_traffic("copied", 1, 2)


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("dtype", list(rows.DTYPES))
@pytest.mark.parametrize("algorithm", ["sgd", "rowwise_adagrad", "adagrad"])
def test_bytes_of_a_row_are_those_of_real_tables(algorithm: str, dtype: str, dim: int) -> None:
    count = 100
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(count, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=rows.ALGORITHMS[algorithm],
        weights_precision=rows.DTYPES[dtype],
        device=torch.device("cpu"),
    )
    (weights,) = kernel.split_embedding_weights()
    states = [state for table in kernel.split_optimizer_states() for state in table]
    measured = rows.measure(algorithm, dtype, dim)
    assert measured.weights * count == weights.numel() * weights.element_size()
    assert measured.state * count == sum(s.numel() * s.element_size() for s in states)


def results_path():
    (name,) = set(re.findall(r"benchmarks/results/[\w-]+\.json", page.PAGE.read_text()))
    return ROOT / name


def test_the_page_shows_the_results() -> None:
    assert page.page_of(results_path()) == page.PAGE.read_text()


def test_what_was_counted_is_what_the_formulas_say() -> None:
    traffic = json.loads(results_path().read_text())["traffic"]
    assert {(e["processes"], e["sharding"]) for e in traffic} >= set(product((2, 4), SHARDINGS))
    for e in traffic:
        if e["dense"] != "ddp":
            continue
        ratings = 512 // e["processes"]
        lookups = Lookups(ratings, 6, e["number_of_ids"] / ratings / 6, 32)
        # Where a genre's ids go depends on the batch.
        assert e["ids"] == pytest.approx(
            arithmetic.id_traffic(e["sharding"], lookups, e["processes"]), rel=0.02
        )
        both_ways = 2 * arithmetic.pooled_traffic(e["sharding"], lookups, e["processes"])
        assert e["floats"] == pytest.approx(both_ways)
        dense = arithmetic.dense_traffic("ddp", e["dense_elements"], e["processes"])
        assert e["ddp"] == pytest.approx(dense)
