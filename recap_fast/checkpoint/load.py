"""Reads checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from recap_fast.checkpoint.contents import (
    Description,
    describe,
    merge,
    model_tensors,
    tensor_tree,
)
from recap_fast.checkpoint.errors import CheckpointError
from recap_fast.checkpoint.find import Found, find
from recap_fast.checkpoint.locks import ReaderLock
from recap_fast.checkpoint.match import Shapes, check_match, shape_of
from recap_fast.checkpoint.params import TrainedParam, trained_params
from recap_fast.checkpoint.ranks import Ranks
from recap_fast.checkpoint.restore import Restoration
from recap_fast.checkpoint.tensors import read_tensors


@dataclass(frozen=True)
class Loaded:
    """What `load` found.

    Attributes:
        step: how many steps were taken.
        extra: as given to `save`.
        path: the folder of the checkpoint.
    """

    step: int
    extra: Any
    path: Path


def load(
    directory: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    *,
    key: bytes | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Loaded | None:
    """Loads the newest complete checkpoint in place; all processes of a training call it together.

    Their number, the sharding of tables and of dense parameters, whether tables are fused, and who
    steps them (`recap_fast` or `recap_fast.reference`) may be others than when it was written.
    Options of param groups, the rate too, become those of the checkpoint, as in torch; a
    `RecapLRShim` sets the rates of its own schedules at once.

    Files are checked before anything is changed: sizes and sha256, the manifest and the metadata. A
    damaged checkpoint is passed over with a warning, and the one before it taken. Nothing in a
    checkpoint is run, whoever wrote it; but without `key`, who can write into the directory can
    change what is trained.

    Args:
        directory: as for `save`. Another process may save into it meanwhile.
        model, optimizer, scheduler: like those given to `save`; the optimizer may be new, or have
            taken steps.
        key: as for `save`. If it is given, checkpoints that were not written with it are passed
            over as if they were damaged.
        process_group: as for `save`.

    Returns:
        What was loaded; None if `directory` has no checkpoint.

    Raises:
        CheckpointError: All checkpoints are damaged; or some processes load while others save; or
            tensors could not be read after all, and the message says that model and optimizer are
            now partly loaded.
        CheckpointMismatchError: It is of another model, optimizer or scheduler, or cannot be
            resharded; the message says in what. Nothing was changed.
    """
    ranks = Ranks(process_group)
    with ReaderLock() as lock:
        found = find(Path(directory), key, lock, ranks)
        if found is None:
            return None
        return _load(found, lock, model, optimizer, scheduler, ranks)


def _load(
    found: Found,
    lock: ReaderLock,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    ranks: Ranks,
) -> Loaded:
    path, content = found.path, found.content
    saved = Description(**content["optimizer"])

    trained: list[TrainedParam] = []
    restoration: list[Restoration] = []

    def describe_own() -> tuple[Description, Shapes]:
        trained[:] = trained_params(model, optimizer)
        return describe(trained), _shapes(model, trained)

    def prepare() -> None:
        restoration.append(
            Restoration(
                str(path),
                saved,
                content["step"],
                content["scheduler"],
                optimizer,
                scheduler,
                trained,
            )
        )

    parts = ranks.together("look at the model", describe_own)
    own = merge(description for description, _ in parts)
    states = {name: state for _, each in parts for name, state in each.states.items()}
    check_match(str(path), saved, content["tensors"], own, Shapes(parts[0][1].model, states))
    ranks.together("make ready for loading", prepare)

    try:
        ranks.together("make state", restoration[0].make_state)
        read_tensors(path, found.metadata, tensor_tree(model, trained, saved), ranks)
        ranks.together("read all of it", lambda: _check_is_there(path, lock))
        ranks.together("restore rates and counts", restoration[0].finish)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{error}; model and optimizer may now be partly those of {path}, so do not train on"
        ) from error
    return Loaded(content["step"], content["extra"], path)


def _check_is_there(path: Path, lock: ReaderLock) -> None:
    if not lock.is_there():
        raise CheckpointError(
            f"{path} was removed or replaced while it was read: another process saves into its "
            "directory"
        )


def _shapes(model: nn.Module, trained: list[TrainedParam]) -> Shapes:
    """Those of what this process could load into."""
    return Shapes(
        {name: shape_of(each) for name, each in model_tensors(model).items()},
        {
            item.name: {name: shape_of(each) for name, each in (item.state_to_be() or {}).items()}
            for item in trained
        },
    )
