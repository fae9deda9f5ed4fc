"""Starts the processes of one training on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, spawn

from .errors import DemoError
from .processes import leave
from .signals import raising_on_sigterm

_TIMEOUT: Final = timedelta(minutes=5)  # of one exchange between the processes
_GRACE: Final = 2.0  # seconds to end by SIGTERM, before SIGKILL


def launch(processes: int, threads: int, function: Callable[..., Any], *args: Any) -> None:
    """Calls `function(*args)` on new processes that are joined in a gloo group; waits for them.

    When one of them fails, the others are ended. When this process is, by an interrupt, SIGTERM or
    any exception here, all are, within seconds; if it is killed, they notice.

    Args:
        processes: how many.
        threads: torch's intra-op threads in each.
        function: importable by name; `torch.distributed.get_rank` tells it which process it is in.
        args: pickled.

    Raises:
        DemoError: a process was killed.
        torch.multiprocessing.ProcessRaisedException: `function` raised; has the traceback.
    """
    others = set(multiprocessing.active_children())
    with raising_on_sigterm(), tempfile.TemporaryDirectory() as folder:
        given = (os.getpid(), processes, threads, f"{folder}/store", function, args)
        try:
            context = spawn(_main, given, processes, join=False)
            while not context.join():
                pass
        except ProcessExitedException as error:
            raise DemoError(f"one of the {processes} processes has gone: {error}") from error
        finally:
            _end(set(multiprocessing.active_children()) - others)


def _end(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + _GRACE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
    for process in processes:
        process.join()


def _main(
    rank: int,
    parent: int,
    processes: int,
    threads: int,
    store: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # Interrupted, end at once: threads of the process group still wait for the others. The system
    # interrupts this process when its parent goes, as spawn has asked it to.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getppid() != parent:
        leave(1)
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=processes,
        store=dist.FileStore(store, processes),
        timeout=_TIMEOUT,
    )
    function(*args)
    dist.barrier()
    leave()
