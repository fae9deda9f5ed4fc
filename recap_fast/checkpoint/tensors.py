"""Writes and reads the tensors of a checkpoint, through torch.distributed.checkpoint."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from recap_fast.checkpoint.errors import CheckpointError
from recap_fast.checkpoint.ranks import Ranks


def write_tensors(folder: Path, tree: dict[str, Any], ranks: Ranks) -> Metadata:
    """Writes the tensors of all processes into a folder; returns where they are.

    Raises:
        CheckpointError: Something could not be written.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=False)
    # The first process has the buffers that DDP copies to the others before each forward pass.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with _own_errors("write a checkpoint", ranks):
        written: Metadata = dcp.save(
            tree, storage_writer=writer, planner=planner, process_group=ranks.group
        )
    return written


def read_tensors(
    folder: Path, metadata: Metadata, tree: dict[str, dict[str, Tensor]], ranks: Ranks
) -> None:
    """Reads tensors into those of `tree`.

    Args:
        folder: of the checkpoint.
        metadata: where they are; as checked, not as the folder has it.
        tree: as it was given to `write_tensors`, with any shards.
        ranks: who read together.

    Raises:
        CheckpointError: Something could not be read, and others may have been.
    """
    reader, planner = _Reader(folder, metadata), _Planner()
    with _own_errors(f"read {folder}", ranks):
        dcp.load(tree, storage_reader=reader, planner=planner, process_group=ranks.group)


class _Reader(dcp.FileSystemReader):
    """Unpickles no metadata, neither that of all processes nor of one.

    Of tensors, DCP does so by `torch.load(..., weights_only=True)`, which makes tensors only.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Loads tensors only: of anything else DCP would take the pickle and run it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn!r} is no tensor")


@contextmanager
def _own_errors(what: str, ranks: Ranks) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:  # derived from BaseException
        raise _as_error(what, error, ranks) from error


def _as_error(what: str, error: CheckpointException, ranks: Ranks) -> BaseException:
    """Returns what to raise: says what could not be done, on which processes, and why."""
    cause, _ = error.failures.get(ranks.rank, (None, None))
    if isinstance(cause, KeyboardInterrupt):
        return cause
    reasons = "; ".join(
        f"process {rank}: {_reason(cause)}" for rank, (cause, _) in sorted(error.failures.items())
    )
    return CheckpointError(f"could not {what}: {reasons}")


def _reason(cause: BaseException) -> str:
    if "weights_only" in str(cause):  # torch's advice is to run what is there
        return "in place of a tensor there is something else, which was not run"
    return f"{type(cause).__name__}: {cause}"
