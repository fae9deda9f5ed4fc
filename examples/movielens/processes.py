"""How the processes of one training join, and what they tell each other."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from recap_fast.checkpoint import CheckpointError

from .errors import DemoError
from .share import Share


def join(timeout: float) -> torch.device:
    """Joins the processes that torchrun started, on nccl if there are GPUs and else on gloo.

    Args:
        timeout: seconds that a process waits for the others, here and in every later exchange,
            before it takes one of them for lost and ends.

    Returns:
        Where this process computes: its GPU, or the CPU.

    Raises:
        DemoError: torchrun did not start this process, or could not restart it, or there are too
            few GPUs.
    """
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise DemoError(
            f"{', '.join(missing)} not set in the environment: start this script with"
            " `torchrun --nproc-per-node N`"
        )
    is_one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if (
        not is_one_machine
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    ):
        raise DemoError(
            "torchrun on several machines keeps its store when it restarts everybody, with the"
            " addresses of the dead in it: for --max-restarts, set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of each torchrun"
        )
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise DemoError(
                f"process {local_rank} of this machine has no GPU, there are"
                f" {torch.cuda.device_count()}: start fewer, or set CUDA_VISIBLE_DEVICES= to train"
                " on the CPU"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    with naming_lost_processes(timeout):
        store, rank, world_size = next(
            dist.rendezvous("env://", timeout=timedelta(seconds=timeout))
        )
        if is_one_machine:
            # Here too torchrun keeps the store, unless it is called with --standalone. But only on
            # one machine do all processes have the same count.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt{attempt}", store)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
    return device


@contextmanager
def naming_lost_processes(timeout: float) -> Iterator[None]:
    """Raises a plain DemoError when another process has gone or no longer answers.

    What was sent or awaited then may still hold threads of the process group: end with `leave`.

    Args:
        timeout: what `join` got.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, DemoError) or not _is_of_communication(error):
            raise
        has_waited = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = f"has not answered for {timeout:g} seconds" if has_waited else "has ended"
        # gloo begins with a place in its source, and ends with good wishes.
        said = re.sub(r"^\[[^\]]*\] *|\. This is typically .*$", "", str(error).splitlines()[0])
        raise DemoError(
            f"process {os.environ.get('RANK', '?')} stops: another process {what} ({said})"
        ) from error


def leave(status: int = 0) -> NoReturn:
    """Ends this process at once, without closing the interpreter.

    Threads of the process group outlive `destroy_process_group` as long as anything refers to it.
    They may wait for a lost process, or let go of a Python object, which in a closing interpreter
    aborts the process.

    Args:
        status: 0 if all went well; then call `torch.distributed.barrier` first, else a process that
            ends early would cut off the others.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def fail(error: BaseException) -> NoReturn:
    """Tells of an error, in one line if the user can mend it, and leaves."""
    if isinstance(error, (DemoError, CheckpointError, ValueError)):
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    leave(1)


def _is_of_communication(error: Exception) -> bool:
    """Whether gloo, nccl or the store says so; gloo's errors are plain RuntimeErrors."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def share() -> Share:
    """This process's share; the whole where there is no process group."""
    if not dist.is_initialized():
        return Share()
    return Share(dist.get_rank(), dist.get_world_size())


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over all processes."""
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather(values: torch.Tensor) -> torch.Tensor:
    """The values of all processes, of equal shapes, one after the other by rank."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def all_finite(*values: torch.Tensor) -> bool:
    """Whether values are finite on every process; the same answer on all of them."""
    bad = torch.stack([~torch.isfinite(value).all() for value in values]).any().float()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad.item()
