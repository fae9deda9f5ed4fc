"""Finds the checkpoint to load: the newest one that is as it was written."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch.distributed.checkpoint.metadata import Metadata

from recap_fast.checkpoint import dcp_metadata, files, folders, manifest
from recap_fast.checkpoint.errors import CheckpointError, Damaged
from recap_fast.checkpoint.locks import ReaderLock
from recap_fast.checkpoint.ranks import Ranks

_MOST_LOOKS: Final = 20


class Found(NamedTuple):
    """A checkpoint that is as it was written.

    Attributes:
        path: its folder.
        content: of its manifest.
        metadata: where its tensors are.
    """

    path: Path
    content: dict[str, Any]
    metadata: Metadata


class _Gone(Exception):
    """Another process has removed or replaced a checkpoint since it was found."""


def find(directory: Path, key: bytes | None, lock: ReaderLock, ranks: Ranks) -> Found | None:
    """Returns the newest undamaged checkpoint, which is then locked; warns of damaged ones.

    Args:
        directory: of the checkpoints.
        key: that they must have been written with, if any.
        lock: of this process; taken on what is returned.
        ranks: who load together.

    Returns:
        None if there is no checkpoint.

    Raises:
        CheckpointError: All checkpoints are damaged.
        TypeError, ValueError: `key` is none.
    """
    for _ in range(_MOST_LOOKS):
        paths = ranks.on_first("look for checkpoints", lambda: _look(directory, key))
        try:
            return _newest_undamaged(paths, key, lock, ranks) if paths else None
        except _Gone:
            continue
    raise CheckpointError(
        f"each checkpoint in {directory} was removed before it could be read, {_MOST_LOOKS} times: "
        "another process saves into it too often, or keeps too few"
    )


def _look(directory: Path, key: bytes | None) -> list[Path]:
    manifest.check_key(key)
    return folders.newest_first(directory)


def _newest_undamaged(
    paths: list[Path], key: bytes | None, lock: ReaderLock, ranks: Ranks
) -> Found:
    damages = []
    for path in paths:
        if not all(ranks.together("open a checkpoint", functools.partial(lock.take, path))):
            raise _Gone
        content, damage = ranks.on_first("read the manifest", functools.partial(_read, path, key))
        own: list[Metadata] = []
        if not damage:

            def check(path: Path = path, content: Any = content, own: Any = own) -> str:
                return _check_files(path, content, ranks, own)

            damage = next(filter(None, ranks.together("check files", check)), "")
        if not damage:
            return Found(path, content, own[0])
        if not all(ranks.together("look again", lock.is_there)):
            raise _Gone
        damages.append(f"{path.name}: {damage}")
        if ranks.is_first:
            warnings.warn(f"{path} is damaged, and passed over: {damage}", stacklevel=4)
    raise CheckpointError(f"all checkpoints in {paths[0].parent} are damaged: {'; '.join(damages)}")


def _read(path: Path, key: bytes | None) -> tuple[dict[str, Any], str]:
    try:
        return manifest.read(path, key), ""
    except Damaged as damage:
        return {}, str(damage)


def _check_files(path: Path, content: dict[str, Any], ranks: Ranks, own: list[Metadata]) -> str:
    """What is wrong with this process's share of the files; adds the metadata to `own`."""
    names = files.shares(content["files"], ranks.size)[ranks.rank]
    damage = files.find_damage(path, content["files"], names)
    if damage:
        return damage
    try:
        own.append(dcp_metadata.read(path, content["tensors"], content["files"]))
    except Damaged as error:
        return str(error)
    return ""
