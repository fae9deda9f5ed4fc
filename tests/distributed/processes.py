"""Runs a function on several processes that are joined in a process group."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = datetime.timedelta(seconds=60)  # of one collective


def device() -> torch.device:
    """Where this rank's tensors belong: on the CPU, or with nccl on a GPU of its own."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", dist.get_rank())
    return torch.device("cpu")


def mesh() -> DeviceMesh:
    """All ranks in a row. By default, torch would take a machine's GPUs for gloo too."""
    return init_device_mesh(device().type, (dist.get_world_size(),))


def context(backend: str) -> BaseContext:
    """How the processes of a group are started.

    For gloo, the imports are done once, in a server from which every process is forked. For nccl
    that is of no use: fbgemm-gpu asks for CUDA devices while it is imported, and a process forked
    from one that has asked cannot use them.
    """
    if backend == "nccl":
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torchrec.distributed", "recap_fast.checkpoint"])
    return server


def join(rank: int, world_size: int, backend: str, store: str) -> None:
    """Joins this process with the others, with one thread and, for nccl, the GPU of its rank.

    Args:
        rank, world_size: its number, and how many there are.
        backend: of the process group.
        store: a file that is not there yet.
    """
    torch.set_num_threads(1)
    # What torchrun sets, and torchrec reads.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    if backend == "nccl":
        torch.cuda.set_device(rank)
    file = dist.FileStore(store, world_size)
    dist.init_process_group(backend, rank=rank, world_size=world_size, store=file, timeout=TIMEOUT)


def run(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    timeout: float = 240,
) -> list:
    """Calls ``function(*args)`` on each rank, with one thread; returns the results by rank.

    Args:
        world_size: how many processes.
        function: importable by name; finds its rank with `torch.distributed.get_rank`.
        args: pickled.
        backend: of the process group; with nccl and too few GPUs, the test is skipped.
        timeout: seconds for all of it.

    Raises:
        RuntimeError: with the tracebacks, if a process failed or did not end in time.
    """
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        pytest.skip(f"nccl needs {world_size} CUDA devices")
    starter = context(backend)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            starter.Process(target=_main, args=(rank, world_size, backend, folder, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, time.monotonic() + timeout)
        failures, results = [], []
        for rank, process in enumerate(processes):
            outcome = Path(folder, f"outcome{rank}")
            if process.exitcode != 0 or not outcome.exists():
                said = Path(folder, f"failure{rank}")
                failures.append(
                    f"rank {rank} ended with {process.exitcode}:\n"
                    + (said.read_text() if said.exists() else "without a word")
                )
            else:
                results.append(pickle.loads(outcome.read_bytes()))
        if failures:
            raise RuntimeError("\n".join(failures))
        return results


def _wait(processes: list, deadline: float) -> None:
    """Until all have ended; once one fails, the others get a moment before they are killed."""
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        for process in processes:
            process.join(timeout=0.02)


def _main(
    rank: int, world_size: int, backend: str, folder: str, function: Callable, args: tuple
) -> None:
    try:
        join(rank, world_size, backend, f"{folder}/store")
        result = function(*args)
        Path(folder, f"outcome{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # or a peer's connection is closed while it still works
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failure{rank}").write_text(traceback.format_exc())
        sys.exit(1)
