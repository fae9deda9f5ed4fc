"""Writes `docs/scaling.md` from the results of a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.documents import ROOT
from benchmarks.interleave import quartiles
from benchmarks.scaling.arithmetic import (
    Lookups,
    dense_bytes,
    dense_traffic,
    id_traffic,
    pooled_traffic,
    table_bytes,
)
from benchmarks.table import number, plural, table, with_quartiles

PAGE: Final = ROOT / "docs" / "scaling.md"

GPUS: Final = (8, 16, 32, 64, 128)
TABLE_ROWS: Final = 1_000_000_000
GPU_BYTES: Final = 80e9
FOR_TABLES: Final = 0.8
RATINGS: Final = 4096
FEATURES: Final = 26

_WATCH: Final = """\
* Read pooled embeddings by name (`pooled["user"]`): under sharding they come in the order of the
  shards.
* Where a row-wise table has mean pooling, torchrec 1.8 and 1.9 divide the outputs of tables sharded
  otherwise too, which `build_optimizer` refuses: give such tables an `EmbeddingBagCollection` of
  their own.
* FBGEMM's CPU kernels read past the end of their list of tables if the last table of a process has
  no rows: a row-wise table needs more than `ceil(rows / processes) * (processes - 1)` rows.
* Data-parallel tables are not fused. Their gradients are dense, and count for the gradients' norm.
* Row-wise Adagrad over column-wise shards keeps an accumulator for each shard of a row, and LAMB
  takes norms of each shard: neither trains like one process.
* Tables train in the backward pass: a bad batch must be refused before it, by all processes alike.
"""

_REPRODUCE: Final = """\
    python -m benchmarks.scaling --repeats {repeats}         # all of this page, in 15 minutes
    python -m benchmarks.scaling --page-from FILE    # the page alone, from a results file
"""


def _machine(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['processor']}, {plural(facts['cores'], 'core')}, {facts['memory_gb']} GB, torch"
        f" {facts['torch']}, gloo over the loopback device; {facts['date']}, load per core before"
        f" the run {facts['busy']}.\n"
    )


def _others(entries: Iterable[Mapping[str, Any]]) -> str:
    most = max(cores for e in entries for cores in e["others_cores"])
    return "an unknown part of the machine" if most < 0 else f"{most:.2f} cores at most"


def _throughput(entries: Sequence[Mapping[str, Any]], cores: int) -> str:
    names = {"-": "none", "ddp": "DDP", "fsdp": "FSDP2"}
    (alone,) = (e for e in entries if e["processes"] == 1)
    alone_speed = quartiles(alone["ratings_per_second"]).median
    return table(
        ["processes", "dense part", "ratings/s", "of one process", "step, ms", "optimizer, ms"],
        (
            [
                f"{e['processes']}" + (" (they share the cores)" if e["processes"] > cores else ""),
                names[e["dense"]],
                with_quartiles(quartiles(e["ratings_per_second"])),
                f"{quartiles(e['ratings_per_second']).median / alone_speed:.2f}x",
                with_quartiles(quartiles(e["step_ms"])),
                with_quartiles(quartiles(e["optimizer_ms"])),
            ]
            for e in entries
        ),
    )


def _memory(entries: Iterable[Mapping[str, Any]]) -> str:
    def line(e: Mapping[str, Any]) -> list[str]:
        each = e["weights"] + e["state"]
        fits = math.ceil(table_bytes(TABLE_ROWS, each, 1) / (GPU_BYTES * FOR_TABLES))
        return [
            f"{e['algorithm']}, {e['dtype']}, {e['dim']} columns",
            f"{e['weights']:g} + {e['state']:g}",
            *(number(table_bytes(TABLE_ROWS, each, gpus) / 1e9) for gpus in GPUS),
            str(fits),
        ]

    header = ["GB on each of N GPUs", "bytes per row", *(f"N = {n}" for n in GPUS), "least N"]
    return table(header, map(line, entries))


def _megabytes(figures: Iterable[float]) -> list[str]:
    return [number(figure / 1e6) for figure in figures]


def _traffic(dims: Sequence[int], elements: int) -> str:
    rows = []
    for sharding in ("table_wise", "row_wise"):
        name = sharding.replace("_", "-")
        lookups = [Lookups(RATINGS, FEATURES, 1, dim) for dim in dims]
        ids = (id_traffic(sharding, lookups[0], gpus) for gpus in GPUS)
        rows.append([f"{name}: ids", *_megabytes(ids)])
        for each in lookups:
            pooled = (pooled_traffic(sharding, each, gpus) for gpus in GPUS)
            rows.append(
                [
                    f"{name}: pooled, {each.dim} columns, forward; as much backward",
                    *_megabytes(pooled),
                ]
            )
    for kind, name in (("ddp", "DDP"), ("fsdp", "FSDP2, at most")):
        sent = (dense_traffic(kind, elements, gpus) for gpus in GPUS)
        rows.append([f"dense part: {name}", *_megabytes(sent)])
    return table(["MB that each of N GPUs sends in a step", *(f"N = {n}" for n in GPUS)], rows)


def _checks(entries: Iterable[Mapping[str, Any]], ratings: int, features: int, dim: int) -> str:
    """What was counted, and what the formulas say of the same."""
    rows = []
    pooled_of: dict[int, float] = {}
    for e in entries:
        processes, sharding = e["processes"], e["sharding"]
        each = ratings // processes
        lookups = Lookups(each, features, e["number_of_ids"] / each / features, dim)
        pooled = 2 * pooled_traffic(sharding, lookups, processes)
        dense = dense_traffic(e["dense"], e["dense_elements"], processes)
        if e["dense"] == "ddp":
            if sharding == "table_wise":
                pooled_of[processes] = e["floats"]
            parts = (
                ("ids", e["ids"], id_traffic(sharding, lookups, processes)),
                ("pooled, both ways", e["floats"], pooled),
                ("dense", e["ddp"], dense),
            )
        else:  # it sends through the same calls as torchrec
            parts = (("dense, FSDP2", e["floats"] - pooled_of[processes], dense),)
        for name, counted, formula in parts:
            rows.append(
                [
                    f"{processes} processes, {sharding}: {name}",
                    f"{counted / 1e3:,.1f}",
                    f"{formula / 1e3:,.1f}",
                ]
            )
    return table(
        ["kB that a process sends in a step", "counted", "by formula"],
        dict.fromkeys(map(tuple, rows)),
    )


def render(results: Mapping[str, Any], source: str) -> str:
    """The page.

    Args:
        results: as `python -m benchmarks.scaling` writes them.
        source: the file they are in.
    """
    facts = results["machine"]
    (original,) = (e["elements"] for e in results["dense"] if e["model"] == "original")
    dims = sorted({e["dim"] for e in results["rows"]})
    repeats = len(results["throughput"][0]["step_ms"])
    dense_gb = [dense_bytes(kind, original, GPUS[-1]) / 1e9 for kind in ("ddp", "fsdp")]
    return "\n".join(
        [
            "# Scaling",
            "",
            f"Written by `python -m benchmarks.scaling` from `{source}`; do not edit.",
            "",
            "What is measured here is the demo's model on several processes of one machine without"
            " a GPU, and what FBGEMM allocates for a row. **Nothing on this page was measured on a"
            " GPU, on NCCL or between machines**: what it says of N GPUs is arithmetic. It says how"
            " many bytes there are, not how long they take.",
            "",
            "## The demo's model on several processes",
            "",
            _machine(facts),
            "Whole tables in turn on the processes, one thread in each, 512 ratings per step of all"
            " processes together: more processes do the same work. Medians, in brackets the"
            f" quartiles, over {repeats} runs, in which the cases"
            f" take turns; others used {_others(results['throughput'])} meanwhile. Four"
            f" processes share {plural(facts['cores'], 'core')}, and every exchange is a copy"
            " through the kernel: this shows what the processes cost, not how a cluster scales."
            " Under DDP each process steps all dense parameters, under FSDP2 its part of them.",
            "",
            _throughput(results["throughput"], facts["cores"]),
            "## Memory of a billion rows",
            "",
            f"{TABLE_ROWS:,} rows in all tables together, spread evenly. Bytes per row are weights"
            " and optimizer state, as FBGEMM lays them out for a GPU (counted, with nothing"
            " allocated); state is float32 for float16 weights too. The last column is the least"
            f" number of GPUs with {GPU_BYTES / 1e9:g} GB that hold the tables in"
            f" {FOR_TABLES:.0%} of it.",
            "",
            _memory(results["rows"]),
            f"The original's shipped model has {original / 1e6:.1f} M parameters that are in no"
            " table. With gradients and Adam's two moments, in float32, they are"
            f" {dense_gb[0]:.2f} GB on every GPU under DDP, and {dense_gb[1] * 1e3:.0f} MB on each"
            f" of {GPUS[-1]} under FSDP2.",
            "",
            "## Traffic of a step",
            "",
            f"{RATINGS:,} ratings on each GPU, {FEATURES} features with one id each; ids and counts"
            " are 8 bytes, pooled embeddings and gradients float32; the dense part is the"
            " original's. With B ratings per GPU, F features of L ids, D columns and P dense"
            " parameters, each GPU sends, in bytes:",
            "",
            "* ids, table-wise: `8 B F (L + 1) (N - 1) / N`; row-wise:"
            " `8 B F (L (N - 1) / N + N - 1)`;",
            "* pooled embeddings forward, and gradients backward, table-wise or column-wise:"
            " `4 B F D (N - 1) / N` each; row-wise `4 B F D (N - 1)` each, since every GPU has a"
            " part of every sum;",
            "* dense gradients: DDP `8 P (N - 1) / N`; FSDP2 at most `12 P (N - 1) / N`, less what"
            " stays gathered from the forward to the backward pass.",
            "",
            _traffic(dims, original),
            "So traffic per GPU hardly grows with N as long as tables stay whole. Cut by columns,"
            " their ids go to every shard. Row-wise it grows with N: that is for tables that no GPU"
            " can hold, and better within a machine than across (torchrec's `table_row_wise`)."
            " Duplicate ids, uneven tables and skewed ids are not in these figures.",
            "",
            "The formulas against what the demo's training passes to torch.distributed here"
            " (the mean over the processes; the ids of a batch are drawn, so they are not even):",
            "",
            _checks(results["traffic"], 512, 6, 32),
            "## What to watch",
            "",
            _WATCH,
            "## Reproduce",
            "",
            _REPRODUCE.format(repeats=repeats),
        ]
    )


def page_of(path: Path) -> str:
    """The page for the results in `path`."""
    return render(json.loads(path.read_text()), os.path.relpath(path, ROOT))
