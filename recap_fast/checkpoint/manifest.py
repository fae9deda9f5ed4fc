"""The manifest of a checkpoint: what is in it, and how to tell that all of it is still there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from recap_fast.checkpoint.errors import CheckpointError

NAME: Final = "manifest.json"
FORMAT: Final = 1


class Damaged(Exception):
    """A checkpoint cannot be used; says which file, and why."""


def describe_file(path: Path) -> dict[str, Any]:
    """Returns the size of a file, in bytes, and its sha256."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest of a checkpoint, whose files are all there; waits for the disk.

    Args:
        folder: of the checkpoint.
        content: plain values.
    """
    body = {"format": FORMAT, **content}
    text = json.dumps({"sha256": _digest(body), "content": body}, indent=1)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Raises:
        Damaged: it cannot be read, or is not what was written.
        CheckpointError: it has a format that is not known here.
    """
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        body, digest = found["content"], found["sha256"]
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{NAME} is not what was written: {error!r}") from error
    if digest != _digest(body):
        raise Damaged(f"{NAME} is not what was written: its sha256 is another")
    if body.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {body.get('format')!r}, and this version of recap_fast reads "
            f"format {FORMAT}: load it with the version that wrote it"
        )
    return body


def find_damage(folder: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str:
    """Returns what is wrong with some of the files of a checkpoint; empty if nothing is."""
    for name in names:
        wanted = files[name]
        try:
            size = (folder / name).stat().st_size
            if size != wanted["size"]:
                return f"{name} has {size} bytes instead of {wanted['size']}"
            if describe_file(folder / name) != wanted:
                return f"{name} is not what was written: its sha256 is another"
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


def _digest(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
