"""Runs a function on several processes that are joined in a process group."""

from __future__ import annotations

import atexit
import datetime
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
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

    The processes live on for the next function, unless one of them failed: what a function
    replaces in a module, it has to put back.

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
    deadline = time.monotonic() + timeout
    group = _groups.pop((world_size, backend), None) or _Group(world_size, backend)
    try:
        results = group.call(function, args, deadline)
    except BaseException:
        group.end()
        raise
    _groups[world_size, backend] = group
    return results


class _Group:
    """Processes that call one function after another.

    Pickled here: a pipe itself would send tensors as memory that both ends share.
    """

    def __init__(self, world_size: int, backend: str) -> None:
        starter = context(backend)
        self._folder = tempfile.TemporaryDirectory()
        self._store = f"{self._folder.name}/store"
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            near, far = starter.Pipe()
            process = starter.Process(
                target=_serve, args=(rank, world_size, backend, self._store, far), daemon=True
            )
            process.start()
            far.close()
            self._pipes.append(near)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], args: tuple, deadline: float) -> list:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        replies: dict[int, Any] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting and time.monotonic() < deadline:
            seconds = max(0.0, deadline - time.monotonic())
            ready = multiprocessing.connection.wait(list(waiting.values()), seconds)
            for rank, pipe in list(waiting.items()):
                if pipe not in ready:
                    continue
                del waiting[rank]
                try:
                    replies[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(timeout=5)
                    code = self._processes[rank].exitcode
                    replies[rank] = _Failed(f"ended with {code} without a word")
                if isinstance(replies[rank], _Failed):  # the others get a moment
                    deadline = min(deadline, time.monotonic() + 5)
        replies |= dict.fromkeys(waiting, _Failed("did not end in time"))
        failures = [
            f"rank {rank}: {reply.text}"
            for rank, reply in sorted(replies.items())
            if isinstance(reply, _Failed)
        ]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [replies[rank] for rank in range(len(self._pipes))]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


_groups: dict[tuple[int, str], _Group] = {}  # those that wait for a function


@atexit.register
def _end_all() -> None:
    for group in _groups.values():
        group.end()


@dataclass
class _Failed:
    text: str


def _serve(rank: int, world_size: int, backend: str, store: str, pipe: Connection) -> None:
    try:
        join(rank, world_size, backend, store)
        while True:
            function, args = pickle.loads(pipe.recv_bytes())
            torch.manual_seed(0)
            pipe.send_bytes(pickle.dumps(function(*args)))
            del function, args
            gc.collect()
    except BaseException:
        pipe.send_bytes(pickle.dumps(_Failed(traceback.format_exc())))
        sys.exit(1)
