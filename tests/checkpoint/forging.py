"""Changes a checkpoint as who may write into its folder can: with digests that fit, but no key."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recap_fast.checkpoint import save
from tests.checkpoint.small_training_state import small

DATA = "__0_0.distcp"
METADATA = ".metadata"


class Bomb:
    """What makes a pickle of it run a command: the file `marker` then exists."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def two_checkpoints(directory: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    """Saves after one step and after two; returns what there was first, and the second folder."""
    training = small().train(1)
    save(directory, 1, *training.all, extra="first", **options)
    first = training.contents()
    return first, save(directory, 2, *training.train(1).all, extra="second", **options)


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["content"]


def write_manifest(folder: Path, content: Any) -> None:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    found = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": content}
    (folder / "manifest.json").write_text(json.dumps(found))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = content_of(folder)
    change(content)
    write_manifest(folder, content)


def replace(folder: Path, name: str, data: bytes) -> None:
    """Gives a file other contents, and the manifest what fits them."""
    (folder / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_manifest(folder, lambda content: content["files"].update({name: entry}))


def change_metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    """Changes DCP's metadata as an object; `change` may return another one."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    other = change(metadata)
    replace(folder, METADATA, pickle.dumps(metadata if other is None else other))
