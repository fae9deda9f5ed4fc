"""The demo from end to end: data, training, table, picture."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import recap_fast
from recap_fast import reference
from recap_fast.embeddings import fuse_embeddings

from . import data, picture, processes, report
from .errors import DemoError
from .launch import launch
from .quiet import quiet_libraries
from .sharding import shard
from .signals import raising_on_sigterm
from .train import train

_MOST_PROCESSES_PER_CORE = 4
_MOST_THREADS_PER_CORE = 16


def run(
    *,
    steps: int,
    batch_size: int,
    seed: int,
    out: Path,
    data_dir: Path | None = None,
    threads: int | None = None,
    nproc: int = 1,
) -> None:
    """Trains with `recap_fast` and with the reference, prints the table, writes the files.

    Args:
        steps, batch_size, seed: see `train.train`.
        out: folder for `demo.png` and `results.json`, made if need be.
        data_dir: folder of the MovieLens files; None means the user's cache, filled if need be.
        threads: torch's intra-op threads in each process; None leaves them as they are, and divides
            the cores between several processes.
        nproc: how many processes divide each batch and the tables. They are new ones, on the CPU.

    Raises:
        DemoError: something that the user can mend is missing or wrong.
    """
    _check_nproc(nproc, batch_size)
    _check_threads(threads, nproc)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # better now than after the training
            pass
    except OSError as error:
        raise DemoError(f"cannot write to the folder {out} (--out): {error}") from error
    with raising_on_sigterm():  # ends pip, if it downloads
        dataset = data.load(data_dir)
    if batch_size > dataset.num_train:
        raise DemoError(f"--batch-size {batch_size} is more than {dataset.num_train} ratings")
    settings = {"steps": steps, "batch_size": batch_size, "seed": seed}
    if nproc == 1:
        if threads is not None:
            torch.set_num_threads(threads)
        _train_and_report(dataset, out, settings)
    else:
        threads = threads or max(1, _cores() // nproc)
        launch(nproc, threads, _train_and_report, dataset, out, settings)


def _check_nproc(nproc: int, batch_size: int) -> None:
    most = _MOST_PROCESSES_PER_CORE * _cores()
    if nproc > most:
        raise DemoError(
            f"--nproc {nproc} is too many: this machine has {_cores()} cores, on which at most"
            f" {most} processes may train"
        )
    if batch_size % nproc:
        raise DemoError(
            f"--batch-size {batch_size} is not a multiple of --nproc {nproc}: the processes divide"
            f" each batch evenly; take {batch_size // nproc * nproc or nproc}"
        )


def _check_threads(threads: int | None, nproc: int) -> None:
    most = max(1, _MOST_THREADS_PER_CORE * _cores() // nproc)
    if threads is not None and threads > most:
        raise DemoError(
            f"--threads {threads} is too many: on the {_cores()} cores of this machine, each of"
            f" {nproc} processes may have at most {most}"
        )


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _train_and_report(dataset: data.Dataset, out: Path, settings: dict[str, Any]) -> None:
    """On the one process, or on each of them; the first one tells of it."""
    quiet_libraries()
    share = processes.share()
    is_first = share.rank == 0
    if share.processes > 1:
        tqdm.set_lock(threading.RLock())  # its own, between processes, would outlive an interrupt
    if is_first:
        threads = f"{torch.get_num_threads()} threads"
        if share.processes > 1:
            threads = f"{share.processes} processes, {threads} each"
        print(
            f"MovieLens-100K: {dataset.num_train} ratings to train on, the {dataset.num_test}"
            f" latest to test on; {settings['steps']} steps of {settings['batch_size']} ratings,"
            f" {threads}.",
            flush=True,
        )
    # Whole tables in turn: they are too small to be worth cutting.
    sharded = functools.partial(shard, sharding="table_wise", device=torch.device("cpu"))
    runs = train(
        dataset,
        {"recap_fast": recap_fast.build_optimizer, "reference": reference.build_optimizer},
        **settings,
        place=sharded if share.processes > 1 else fuse_embeddings,
        share=share,
        show_progress=True,
    )
    comparison = report.compare(runs)  # by all processes together
    if not is_first:
        return
    if share.processes > 1:
        settings = {**settings, "nproc": share.processes}
    print("\n" + report.table(comparison) + "\n")
    picture_path, results_path = out / "demo.png", out / "results.json"
    report.write_results(results_path, comparison, runs, settings)
    title = f"MovieLens-100K, {settings['steps']} steps of {settings['batch_size']} ratings"
    picture.draw(picture_path, runs, title)
    print(f"Wrote {picture_path} and {results_path}.")
