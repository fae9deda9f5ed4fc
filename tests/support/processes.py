"""Runs a function on several processes that are joined in a process group."""

from __future__ import annotations

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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
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
    server.set_forkserver_preload(["tests.support.preloaded"])
    return server


def start_server() -> None:
    """Has the server of `context` make its imports beside what this process does meanwhile."""
    context("gloo")
    forkserver.ensure_running()


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
        group.kill()
        raise
    _groups[world_size, backend] = group
    return results


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Returns what `function`, of a module's own, returns in a new process with one thread."""
    with ProcessPoolExecutor(1, context("gloo"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(function, *args).result()


def end_all() -> None:
    """Ends the processes that wait for another function.

    Raises:
        RuntimeError: one of them did not end, or not well.
    """
    while _groups:
        _groups.popitem()[1].end()


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
        replies: dict[int, Any] = dict.fromkeys(range(len(self._pipes)), _Failed("did not end"))
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            ready = multiprocessing.connection.wait(list(waiting), left)
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                replies[rank] = self._reply(rank)
                if isinstance(replies[rank], _Failed):  # the others get a moment
                    deadline = min(deadline, time.monotonic() + 5)
        failures = [
            f"rank {rank}: {reply.text}"
            for rank, reply in replies.items()
            if isinstance(reply, _Failed)
        ]
        if failures:
            raise RuntimeError("\n".join(failures))
        return list(replies.values())

    def _reply(self, rank: int) -> Any:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join(timeout=5)
            return _Failed(f"ended with {self._processes[rank].exitcode} without a word")

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + 60
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        exit_codes = [process.exitcode for process in self._processes]
        self.kill()
        if any(code != 0 for code in exit_codes):
            raise RuntimeError(f"processes ended with {exit_codes}; None: they did not end")

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


_groups: dict[tuple[int, str], _Group] = {}  # those that wait for a function


@dataclass
class _Failed:
    text: str


def _serve(rank: int, world_size: int, backend: str, store: str, pipe: Connection) -> None:
    try:
        join(rank, world_size, backend, store)
        while request := _next(pipe):
            function, args = pickle.loads(request)
            torch.manual_seed(0)
            pipe.send_bytes(pickle.dumps(function(*args)))
            del function, args
            gc.collect()
            gc.freeze()  # what is left are modules: the next collection need not look at them
        dist.barrier()  # or a peer's connection is closed while it still works
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps(_Failed(traceback.format_exc())))
        sys.exit(1)


def _next(pipe: Connection) -> bytes | None:
    try:
        return pipe.recv_bytes()
    except EOFError:
        return None
