"""The manifest of a checkpoint: what is in it, and how to tell that all of it is still there."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from recap_fast.checkpoint import files, schema
from recap_fast.checkpoint.errors import CheckpointError, Damaged

NAME: Final = "manifest.json"
FORMAT: Final = 1
MOST_BYTES: Final = 1 << 28

_LEAST_KEY: Final = 16  # bytes
_DIGESTS: Final = ("sha256", "hmac_sha256")


def check_key(key: bytes | None) -> None:
    """Raises TypeError or ValueError unless `key` is None, or bytes of a useful length."""
    if key is not None and not isinstance(key, bytes):
        raise TypeError(f"key must be bytes, found a {type(key).__name__}")
    if key is not None and len(key) < _LEAST_KEY:
        raise ValueError(f"key must have {_LEAST_KEY} bytes or more, found {len(key)}")


def write(folder: Path, content: Mapping[str, Any], key: bytes | None = None) -> None:
    """Writes the manifest of a checkpoint, whose files are all there; waits for the disk.

    Args:
        folder: of the checkpoint.
        content: plain values, as `schema` has them.
        key: only who has it can write a manifest that `read` takes with it.

    Raises:
        CheckpointError: It would be too large to be read.
    """
    body = {"format": FORMAT, **content}
    digests = {"sha256": _digest(body)}
    if key is not None:
        digests["hmac_sha256"] = _digest(body, key)
    text = json.dumps({**digests, "content": body}, indent=1).encode()
    if len(text) > MOST_BYTES:
        raise CheckpointError(
            f"{NAME} would have {len(text)} bytes, and at most {MOST_BYTES} are read: pass less as "
            "`extra`"
        )
    with (folder / NAME).open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path, key: bytes | None = None) -> dict[str, Any]:
    """Returns the content of the manifest of a checkpoint.

    Args:
        folder: of the checkpoint.
        key: if given, the manifest must have been written with it.

    Raises:
        Damaged: it cannot be read, is not what was written, or not as `schema` says.
        CheckpointError: it has a format that is not known here.
    """
    text = files.read(folder / NAME, MOST_BYTES)
    try:
        found = json.loads(str(text, "utf-8"))
        if type(found) is not dict or type(found.get("content")) is not dict:
            raise ValueError("it has no content")
        body: dict[str, Any] = found["content"]
        sha256, signature = (str(found.get(name)).encode() for name in _DIGESTS)
        is_whole = hmac.compare_digest(sha256, _digest(body).encode())
        is_signed = key is None or hmac.compare_digest(signature, _digest(body, key).encode())
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else repr(error)
        raise Damaged(f"{NAME} is not what was written: {said[:200]}") from None
    if not is_whole:
        raise Damaged(f"{NAME} is not what was written: its sha256 is another")
    if not is_signed:
        was = "with another key" if "hmac_sha256" in found else "without a key"
        raise Damaged(f"{NAME} was written {was}, or not by a holder of the key")
    version = body.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}, and this version of recap_fast reads format {FORMAT}: "
            "load it with the version that wrote it"
        )
    try:
        if type(version) is not int or version != FORMAT:
            raise schema.Malformed(f"format: {version!r:.80} is none")
        schema.check(body)
    except schema.Malformed as malformed:
        raise Damaged(f"{NAME} is not what recap_fast writes: {malformed}") from None
    return body


def _digest(body: Any, key: bytes | None = None) -> str:
    """The sha256 of plain values, or with a key their HMAC-SHA256."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    if key is not None:
        return hmac.new(key, text, hashlib.sha256).hexdigest()
    return hashlib.sha256(text).hexdigest()
