"""With a key, only checkpoints of its holder are loaded."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest

from recap_fast.checkpoint import CheckpointError, load, save
from tests.checkpoint.forging import DATA, change_manifest, content_of, replace, two_checkpoints
from tests.checkpoint.small_training_state import small

KEY = bytes(range(32))


def test_what_the_holder_wrote_loads(tmp_path: Path) -> None:
    two_checkpoints(tmp_path, key=KEY)
    own = small(seed=1)
    assert load(tmp_path, *own.all, key=KEY).extra == "second"
    assert own.contents() == small().train(2).contents()
    assert load(tmp_path, *small(seed=1).all).extra == "second", "without a key too"


def test_the_signature_is_an_hmac_of_the_content(tmp_path: Path) -> None:
    _, path = two_checkpoints(tmp_path, key=KEY)
    found = json.loads((path / "manifest.json").read_text())
    text = json.dumps(content_of(path), sort_keys=True, separators=(",", ":"))
    assert found["hmac_sha256"] == hmac.new(KEY, text.encode(), hashlib.sha256).hexdigest()


def keep_signature(path: Path, change: Any) -> None:
    """Changes a manifest by `change`, and puts the signature of the old one in."""
    signature = json.loads((path / "manifest.json").read_text())["hmac_sha256"]
    change()
    found = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**found, "hmac_sha256": signature}))


FORGERIES = {
    "manifest": lambda path: change_manifest(path, lambda content: content.update(extra="forged")),
    "data": lambda path: replace(path, DATA, (path / DATA).read_bytes()[::-1]),
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("signed", [False, True])
def test_what_was_forged_is_passed_over(tmp_path: Path, name: str, signed: bool) -> None:
    first, path = two_checkpoints(tmp_path, key=KEY)
    if signed:
        keep_signature(path, lambda: FORGERIES[name](path))
    else:
        FORGERIES[name](path)
    own = small(seed=1)
    said = "with another key" if signed else "without a key"
    with pytest.warns(UserWarning, match=f"was written {said}, or not by a holder of the key"):
        assert load(tmp_path, *own.all, key=KEY).extra == "first"
    assert own.contents() == first


@pytest.mark.parametrize(("written", "said"), [(None, "without a key"), (KEY, "with another key")])
def test_another_key(tmp_path: Path, written: bytes | None, said: str) -> None:
    two_checkpoints(tmp_path, key=written)
    own = small(seed=1)
    before = own.contents()
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match=f"all checkpoints in .* {said}"),
    ):
        load(tmp_path, *own.all, key=b"another key of ours")
    assert own.contents() == before


@pytest.mark.parametrize(
    ("key", "kind", "said"),
    [
        ("a text of some length", TypeError, "key must be bytes, found a str"),
        (b"short", ValueError, "key must have 16 bytes or more, found 5"),
        (b"", ValueError, "key must have 16 bytes or more, found 0"),
    ],
)
def test_what_is_no_key(tmp_path: Path, key: Any, kind: type[Exception], said: str) -> None:
    training = small()
    with pytest.raises(kind, match=said):
        save(tmp_path / "new", 1, *training.all, key=key)
    assert not (tmp_path / "new").exists()
    with pytest.raises(kind, match=said):
        load(tmp_path, *training.all, key=key)
