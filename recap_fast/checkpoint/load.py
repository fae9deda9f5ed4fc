"""Reads checkpoints."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from recap_fast.checkpoint import folders, manifest
from recap_fast.checkpoint.contents import (
    Description,
    describe,
    merge,
    model_tensors,
    tensor_tree,
)
from recap_fast.checkpoint.errors import CheckpointError
from recap_fast.checkpoint.match import Shapes, check_match, shape_of
from recap_fast.checkpoint.ranks import Ranks
from recap_fast.checkpoint.restore import Restoration
from recap_fast.checkpoint.save import as_error
from recap_fast.checkpoint.trained import TrainedParam, trained_params


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
    process_group: dist.ProcessGroup | None = None,
) -> Loaded | None:
    """Loads the newest complete checkpoint in place; all processes of a training call it together.

    Their number, the sharding of tables and of dense parameters, and who steps them (`recap_fast`
    or `recap_fast.reference`) may be others than when it was written. Options of param groups, the
    rate too, become those of the checkpoint, as in torch; a `RecapLRShim` sets the rates of its own
    schedules at once.

    Files are checked before anything is changed: sizes and sha256. A damaged checkpoint is passed
    over with a warning, and the one before it taken.

    Args:
        directory: as for `save`. A checkpoint is read with pickle: do not load what you do not
            trust.
        model, optimizer, scheduler: like those given to `save`; the optimizer may be new, or have
            taken steps.
        process_group: as for `save`.

    Returns:
        What was loaded; None if `directory` has no checkpoint.

    Raises:
        CheckpointError: All checkpoints are damaged; or tensors could not be read after all, and
            the message says that model and optimizer are now partly loaded.
        CheckpointMismatchError: It is of another model, optimizer or scheduler, or cannot be
            resharded; the message says in what. Nothing was changed.
    """
    ranks = Ranks(process_group)
    found = ranks.on_first("look for checkpoints", lambda: folders.newest_first(Path(directory)))
    if not found:
        return None
    path, content = _newest_undamaged(found, ranks)
    saved = Description(**content["optimizer"])

    trained: list[TrainedParam] = []
    restoration: list[Restoration] = []

    def describe_own() -> tuple[Description, Shapes]:
        trained[:] = trained_params(model, optimizer)
        return describe(trained), _shapes(model, trained)

    def prepare() -> None:
        restoration.append(
            Restoration(str(path), saved, content["scheduler"], optimizer, scheduler, trained)
        )

    parts = ranks.together("look at the model", describe_own)
    own = merge(description for description, _ in parts)
    states = {name: state for _, each in parts for name, state in each.states.items()}
    check_match(str(path), saved, content["tensors"], own, Shapes(parts[0][1].model, states))
    ranks.together("make ready for loading", prepare)

    try:
        ranks.together("make state", restoration[0].make_state)
        _read_tensors(path, tensor_tree(model, trained), ranks)
        ranks.together("restore rates and counts", restoration[0].finish)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{error}; model and optimizer may now be partly those of {path}, so do not train on"
        ) from error
    return Loaded(content["step"], content["extra"], path)


def _newest_undamaged(found: list[Path], ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    """The first of the checkpoints that is as it was written, and its manifest; warns of others."""
    damages = []
    for path in found:
        content, damage = ranks.on_first("read the manifest", lambda path=path: _read(path))
        if not damage:
            mine = manifest.shares(content["files"], ranks.size)[ranks.rank]
            check = ranks.together(
                "check files",
                lambda path=path, content=content, mine=mine: manifest.find_damage(
                    path, content["files"], mine
                ),
            )
            damage = next(filter(None, check), "")
        if not damage:
            return path, content
        damages.append(f"{path.name}: {damage}")
        if ranks.is_first:
            warnings.warn(f"{path} is damaged, and passed over: {damage}", stacklevel=3)
    raise CheckpointError(f"all checkpoints in {found[0].parent} are damaged: {'; '.join(damages)}")


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return manifest.read(path), ""
    except manifest.Damaged as damage:
        return {}, str(damage)


def _shapes(model: nn.Module, trained: list[TrainedParam]) -> Shapes:
    """Those of what this process could load into."""
    return Shapes(
        {name: shape_of(each) for name, each in model_tensors(model).items()},
        {
            item.name: {name: shape_of(each) for name, each in (item.state_to_be() or {}).items()}
            for item in trained
        },
    )


def _read_tensors(path: Path, tree: dict[str, dict[str, Tensor]], ranks: Ranks) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(tree, storage_reader=dcp.FileSystemReader(path), process_group=ranks.group)
    except CheckpointException as error:  # derived from BaseException
        raise as_error(f"read {path}", error, ranks) from error
