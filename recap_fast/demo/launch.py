"""Starts the processes of one training on this machine."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, spawn

from recap_fast.demo.errors import DemoError
from recap_fast.demo.processes import leave

_TIMEOUT: Final = timedelta(minutes=5)  # of one exchange between the processes


def launch(processes: int, threads: int, function: Callable[..., Any], *args: Any) -> None:
    """Calls `function(*args)` on new processes that are joined in a gloo group; waits for them.

    When one of them fails, the others are ended.

    Args:
        processes: how many.
        threads: torch's intra-op threads in each.
        function: importable by name; `torch.distributed.get_rank` tells it which process it is in.
        args: pickled.

    Raises:
        DemoError: a process was killed.
        torch.multiprocessing.ProcessRaisedException: `function` raised; has the traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_main, (processes, threads, f"{folder}/store", function, args), processes)
        except ProcessExitedException as error:
            raise DemoError(f"one of the {processes} processes has gone: {error}") from error


def _main(
    rank: int,
    processes: int,
    threads: int,
    store: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=processes,
        store=dist.FileStore(store, processes),
        timeout=_TIMEOUT,
    )
    # Interrupted, end at once: threads of the process group still wait for the others.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    function(*args)
    dist.barrier()
    leave()
