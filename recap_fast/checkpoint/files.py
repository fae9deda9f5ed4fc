"""Regular files: their contents, sizes and sha256. Anything else, such as a pipe, is refused."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from recap_fast.checkpoint.errors import Damaged

_CHUNK = 1 << 20  # bytes


def describe(path: Path) -> dict[str, Any]:
    """Returns the size of a file, in bytes, and its sha256.

    Raises:
        Damaged: It is no regular file.
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    with _open(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def read(path: Path, most: int) -> bytes:
    """Returns what a file holds.

    Args:
        path: of the file.
        most: how many bytes it may have.

    Raises:
        Damaged: It cannot be read, is no regular file, or is larger.
    """
    try:
        with _open(path) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise Damaged(f"{path.name} has more than {most} bytes")
    return content


def find_damage(folder: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str:
    """Returns what is wrong with some of the files of a checkpoint; empty if nothing is."""
    for name in names:
        wanted = files[name]
        try:
            size = (folder / name).stat().st_size
            if size != wanted["size"]:
                return f"{name} has {size} bytes instead of {wanted['size']}"
            if describe(folder / name) != wanted:
                return f"{name} is not what was written: its sha256 is another"
        except Damaged as damage:
            return str(damage)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def shares(files: Mapping[str, Mapping[str, Any]], count: int) -> list[list[str]]:
    """Divides files among processes, each of which is to read about as many bytes."""
    parts: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in sorted(files, key=lambda name: (-files[name]["size"], name)):
        index = sizes.index(min(sizes))
        parts[index].append(name)
        sizes[index] += files[name]["size"] + 1
    return parts


def _open(path: Path) -> BinaryIO:
    _check_regular(path, os.stat(path))  # to open a device may do something to it
    # Of a pipe that took the place of the file since, do not wait for a writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()))
    except Damaged:
        file.close()
        raise
    return file


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path.name} is no regular file")
