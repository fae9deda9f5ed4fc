"""The folders of checkpoints: how one comes into being, is replaced, and goes.

A complete checkpoint is `step-<number>`. Beside it there are, for moments or after a process died,
hidden folders: `.saving-...`, which is not complete yet; `.removed-...`, on its way out; and
`.replaced-...`, complete, until the folder that takes its name is in place.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from recap_fast.checkpoint import locks

_COMPLETE = re.compile(r"(?P<replaced>\.replaced-)?step-(?P<step>\d{8,})")
_LEFTOVER = re.compile(r"\.(saving|removed)-step-\d{8,}-[0-9a-f]{32}")


def folder_name(step: int) -> str:
    """Returns what the folder of a step's checkpoint is called."""
    return f"step-{step:08d}"


def newest_first(directory: Path) -> list[Path]:
    """Returns the folders of complete checkpoints."""
    found: dict[int, Path] = {}
    for path, step, is_replaced in _complete(directory):
        if not is_replaced or step not in found:
            found[step] = path
    return [found[step] for step in sorted(found, reverse=True)]


def make(directory: Path) -> None:
    """Makes a directory for checkpoints, if it is missing, and has it survive a crash."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def begin(directory: Path, step: int, complaints: list[str]) -> Path:
    """Makes an empty folder for a checkpoint that is to be written, after cleaning up.

    What earlier saves left behind when they died is removed; a checkpoint that one of them was
    about to replace is put back.

    Args:
        directory: where.
        step: of the checkpoint.
        complaints: gets what could not be removed, and why.
    """
    for path, replaced_step, is_replaced in _complete(directory):
        if is_replaced and not (directory / folder_name(replaced_step)).exists():
            os.rename(path, directory / folder_name(replaced_step))
            sync(directory)
        elif is_replaced:
            _remove(path, complaints)
    for path in _entries(directory):
        if _LEFTOVER.fullmatch(path.name):
            _remove(path, complaints)
    folder = directory / f".saving-{folder_name(step)}-{uuid.uuid4().hex}"
    folder.mkdir()
    return folder


def publish(folder: Path, step: int, complaints: list[str]) -> Path:
    """Gives a folder that is complete the name that says so; returns its new path.

    If that fails, all is as it was before.
    """
    sync(folder)
    target = folder.parent / folder_name(step)
    replaced = folder.parent / f".replaced-{target.name}"
    if os.path.lexists(target):
        os.rename(target, replaced)
    try:
        os.rename(folder, target)
        sync(folder.parent)
    except OSError:
        if not folder.exists():
            os.rename(target, folder)
        if os.path.lexists(replaced):
            os.rename(replaced, target)
        raise
    if os.path.lexists(replaced):
        _remove(replaced, complaints)
    return target


def prune(directory: Path, step: int, keep: int, complaints: list[str]) -> None:
    """Removes the checkpoints before `step` but for the newest `keep - 1`.

    Those of later steps are of another past, and only complained of.
    """
    try:
        found = list(_complete(directory))
    except OSError as error:
        complaints.append(f"could not remove earlier checkpoints in {directory}: {error}")
        return
    others = [(own_step, path) for path, own_step, _ in found if own_step != step]
    later = sorted(path.name for own_step, path in others if own_step > step)
    if later:
        complaints.append(
            f"{directory} has checkpoints of later steps than {step}, which was saved just now: "
            f"{', '.join(later)}; load takes the newest, so remove those that are not of this run"
        )
    earlier = sorted((pair for pair in others if pair[0] < step), reverse=True)
    for _, path in earlier[keep - 1 :]:
        _remove(path, complaints)


def discard(folder: Path) -> None:
    """Removes a folder that will not be completed, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


def sync(folder: Path) -> None:
    """Has the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(directory: Path) -> Iterator[tuple[Path, int, bool]]:
    """The folders of complete checkpoints, their steps, and whether they are being replaced."""
    for path in _entries(directory):
        match = _COMPLETE.fullmatch(path.name)
        if match and path.is_dir():
            yield path, int(match["step"]), match["replaced"] is not None


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _remove(path: Path, complaints: list[str]) -> None:
    """Removes a folder; at no moment is a part of it left under the name of a complete one.

    One that is being read stays for now. Of a link, or a file, that is called like one, itself is
    removed, and not what it leads to.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        with locks.unread(path):
            if not _LEFTOVER.fullmatch(path.name):
                name = path.name.removeprefix(".replaced-")
                path = path.rename(path.with_name(f".removed-{name}-{uuid.uuid4().hex}"))
            shutil.rmtree(path)
    except locks.Busy:
        return  # the next save removes it
    except OSError as error:
        complaints.append(f"could not remove {path}: {error}")
