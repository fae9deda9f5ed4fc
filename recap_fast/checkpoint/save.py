"""Writes checkpoints."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from recap_fast.checkpoint import dcp_metadata, files, folders, manifest
from recap_fast.checkpoint.contents import Description, describe, merge, tensor_tree
from recap_fast.checkpoint.errors import CheckpointError
from recap_fast.checkpoint.locks import WriterLock
from recap_fast.checkpoint.params import trained_params
from recap_fast.checkpoint.plain import check_plain
from recap_fast.checkpoint.ranks import Ranks
from recap_fast.checkpoint.restore import scheduler_state
from recap_fast.checkpoint.tensors import write_tensors


def save(
    directory: str | Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    *,
    extra: Any = None,
    keep: int = 2,
    key: bytes | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes a checkpoint, whole or not at all; all processes of a training call it together.

    It is written into a hidden folder in `directory`, and flushed to the disk; when it is complete,
    one rename gives it the name `step-00000123`. A process, or the machine, that dies at any moment
    leaves the last complete checkpoint as it was; what is left over, the next save removes.

    Args:
        directory: of the checkpoints of one training, made if it is missing; on several machines,
            one that they share. Two trainings must not save into one directory; one that tries
            while another is writing is told so, where the file system has locks.
        step: how many steps were taken, 0 or more. A checkpoint of the same step is replaced.
        model: wrapped or not (DDP, torch.compile, FSDP2, torchrec's model parallel). What processes
            have copies of, buffers too, is that of the first one.
        optimizer: from `build_optimizer`, or any keyed one of torchrec's or optimizer of torch's.
        scheduler: anything with a `state_dict` of plain values.
        extra: small plain values, equal on all processes, that `load` gives back: None, bool, int,
            float, str, and lists and dicts of these, at most 100 levels deep.
        keep: how many checkpoints to leave in `directory`, this one included; older ones are
            removed.
        key: a secret of 16 bytes or more, by which `load` tells that a checkpoint was written by
            who has it. Nothing is encrypted.
        process_group: the processes that save; None for all, or for this one alone if
            torch.distributed is not initialised.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: On any of the processes, something could not be written, or another save
            into this directory is going on, or some processes save while others load; on all of
            them. There is no new checkpoint, and those that were there are still there.
        TypeError, ValueError: An argument is not as above, or the optimizer is of another model;
            nothing was written.
        RuntimeError: One that torch.distributed raises: another process has died. The checkpoint is
            complete or not there, as `load` will find; in the latter case nothing was removed.
    """
    ranks = Ranks(process_group)
    directory = Path(directory)
    content: list[Any] = []
    complaints: list[str] = []

    def collect() -> tuple[Description, str]:
        _check_arguments(step, keep, extra)
        manifest.check_key(key)
        trained = trained_params(model, optimizer)
        state = scheduler_state(scheduler)
        check_plain(state, "the state of the scheduler")
        content[:] = tensor_tree(model, trained), state
        return describe(trained), json.dumps([step, keep, str(directory), state, extra])

    parts = ranks.together("collect what to save", collect)
    _check_same([same for _, same in parts])
    tree, state = content
    described = merge(description for description, _ in parts)

    def complete() -> Path:
        for name in written:
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name} was written by another process, but is not here: the "
                    "directory must be one that all processes share"
                )
        what = {"step": step, "processes": ranks.size, "files": written}
        what["tensors"] = _shapes(metadata)
        how = {"optimizer": dataclasses.asdict(described), "scheduler": state, "extra": extra}
        manifest.write(folder, what | how, key)
        target = folders.publish(folder, step, complaints)
        folders.prune(directory, step, keep, complaints)
        return target

    with WriterLock() as lock:

        def begin() -> Path:
            folders.make(directory)
            lock.take(directory)
            return folders.begin(directory, step, complaints)

        folder = ranks.on_first("begin a checkpoint", begin)
        try:
            metadata = write_tensors(folder, tree, ranks)
            own_files = ranks.together(
                "read back what was written", lambda: _own_files(folder, ranks)
            )
            written = {name: each for part in own_files for name, each in part.items()}
            target = ranks.on_first("complete the checkpoint", complete)
        except BaseException:
            if ranks.is_first:
                folders.discard(folder)
            raise
    for complaint in complaints:
        warnings.warn(complaint, stacklevel=2)
    return target


def _check_arguments(step: int, keep: int, extra: Any) -> None:
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if type(value) is not int:
            raise TypeError(f"{name} must be an int, found {value!r}")
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more")
    check_plain(extra, "extra")


def _check_same(texts: list[str]) -> None:
    names = ("step", "keep", "directory", "the state of the scheduler", "extra")
    for rank, text in enumerate(texts):
        for name, first, other in zip(names, json.loads(texts[0]), json.loads(text), strict=True):
            if json.dumps(first) != json.dumps(other):  # which finds NaN equal to itself
                raise ValueError(
                    f"{name} is not the same on all processes: {first!r} on process 0, and "
                    f"{other!r} on process {rank}"
                )


def _own_files(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Describes the files that this process wrote."""
    folders.sync(folder)
    patterns = [f"__{ranks.rank}_*", *([dcp_metadata.NAME] if ranks.is_first else [])]
    return {
        path.name: files.describe(path) for pattern in patterns for path in folder.glob(pattern)
    }


def _shapes(metadata: Metadata) -> dict[str, dict[str, Any]]:
    saved: Mapping[str, Any] = metadata.state_dict_metadata
    return {
        key: {"shape": list(each.size), "dtype": str(each.properties.dtype).removeprefix("torch.")}
        for key, each in saved.items()
    }
