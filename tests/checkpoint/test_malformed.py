"""A manifest that is not one, with a digest that fits, and files that are none, are passed over."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recap_fast.checkpoint import CheckpointError, load
from tests.checkpoint.forging import (
    DATA,
    METADATA,
    change_manifest,
    content_of,
    two_checkpoints,
    write_manifest,
)
from tests.checkpoint.small_training_state import small

DELETED = object()


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Of what waits for ever, as to open a pipe does, the test fails."""
    signal.alarm(300)
    yield
    signal.alarm(0)


def at(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value at a place, whose parts are divided by slashes, or deletes what is there."""

    def change(content: dict[str, Any]) -> None:
        *path, last = place.split("/")
        owner: Any = content
        for part in path:
            owner = owner[int(part) if isinstance(owner, list) else part]
        if value is DELETED:
            del owner[last]
        else:
            owner[last] = value

    return change


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["files"][new] = content["files"].pop(old)

    return change


WEIGHT = "tensors/model.first.weight"
ENTRIES = "optimizer/entries"
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    # What would switch checking off.
    "no files": (at("files", {}), "files lacks .metadata"),
    "files a list": (at("files", []), "files: Input should be a valid dictionary"),
    "no metadata": (at(f"files/{METADATA}", DELETED), "files lacks .metadata"),
    "no data": (at(f"files/{DATA}", DELETED), "is no file of the manifest"),
    "no tensors": (at("tensors", {}), "tensors lacks 'step' of 'first.weight'"),
    "a tensor less": (at("tensors/model.norm.bias", DELETED), "has other tensors than the man"),
    "no digest": (at(f"files/{DATA}/sha256", ""), f"files.{DATA}.sha256: String should match"),
    "no size": (at(f"files/{DATA}/size", DELETED), f"files.{DATA}.size: Field required"),
    # Names outside of the directory.
    "a file above": (rename(DATA, f"../step-00000001/{DATA}"), "is not the name of a file of a ch"),
    "a file elsewhere": (rename(DATA, "/etc/passwd"), "is not the name of a file of a checkpoint"),
    "a file below": (rename(DATA, f"below/{DATA}"), "is not the name of a file of a checkpoint"),
    "a name that ends": (rename(DATA, f"{DATA}\0"), "is not the name of a file of a checkpoint"),
    "a name and a line": (rename(DATA, f"{DATA}\n"), "is not the name of a file of a checkpoint"),
    # Types and ranges.
    "size a bool": (at(f"files/{DATA}/size", True), "size: Input should be a valid integer"),
    "size a text": (at(f"files/{DATA}/size", "1"), "size: Input should be a valid integer"),
    "size a float": (at(f"files/{DATA}/size", 1.0), "size: Input should be a valid integer"),
    "size below 0": (at(f"files/{DATA}/size", -1), "size: Input should be greater than or equal"),
    "size huge": (at(f"files/{DATA}/size", 2**64), "size: Input should be less than"),
    "step a text": (at("step", "2"), "step: Input should be a valid integer"),
    "step below 0": (at("step", -2), "step: Input should be greater than or equal to 0"),
    "no step": (at("step", DELETED), "step: Field required"),
    "no extra": (at("extra", DELETED), "extra: Field required"),
    "processes": (at("processes", 0), "processes: Input should be greater than or equal to 1"),
    "format a text": (at("format", "1"), "format: '1' is none"),
    "format a bool": (at("format", True), "format: True is none"),
    "format 0": (at("format", 0), "format: 0 is none"),
    "no format": (at("format", DELETED), "format: None is none"),
    "shape a number": (at(f"{WEIGHT}/shape", 4), "shape: Input should be a valid list"),
    "shape below 0": (at(f"{WEIGHT}/shape", [-4, -3]), "shape.0: Input should be greater than"),
    "shape another": (at(f"{WEIGHT}/shape", [3, 4]), "has other tensors than the manifest"),
    "dtype no dtype": (at(f"{WEIGHT}/dtype", "system"), "is not the name of a dtype of torch"),
    "dtype another": (at(f"{WEIGHT}/dtype", "int32"), "has other tensors than the manifest"),
    "optimizer": (at("optimizer", None), "optimizer: Input should be a valid dict"),
    "groups": (at("optimizer/groups", {}), "optimizer.groups: Input should be a valid list"),
    "a group": (at("optimizer/groups/0/params", [1]), "params.0: Input should be a valid string"),
    "options": (at("optimizer/groups/0/options", []), "options: Input should be a valid dict"),
    "entries": (at(ENTRIES, {"first.weight": {"step": 1}}), "entries.first.weight.step"),
    "an entry": (at(ENTRIES, {"a": {"step": "tensor"}}), "tensors lacks 'step' of 'a'"),
    "shards": (at("optimizer/column_shards", {"a": [[0, 0, 1]]}), "column_shards.a.0: List sho"),
    "passes": (at("optimizer/forward_passes", {"a": -1}), "forward_passes.a: Input should be gr"),
    "more": (at("optimizer/more", 1), "optimizer.more: Extra inputs are not permitted"),
    "scheduler": (at("scheduler", []), "scheduler: Input should be a valid dict"),
    "its class": (at("scheduler/class", 1), "scheduler.class: Input should be a valid string"),
    "its state": (at("scheduler/state", {}), "group_names"),
    "its step": (at("scheduler/state/last_epoch", "1"), "last_epoch"),
}


def check_passed_over(path: Path, first: dict[str, Any], said: str) -> None:
    own = small(seed=1).train(1)
    with pytest.warns(UserWarning) as warned:
        assert load(path.parent, *own.all).extra == "first"
    (message,) = (str(each.message) for each in warned)
    assert said in message
    assert message.startswith(f"{path} is damaged, and passed over: ")
    assert len(message) < 700
    assert own.contents() == first


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_is_none(tmp_path: Path, name: str) -> None:
    change, said = CHANGES[name]
    first, path = two_checkpoints(tmp_path)
    change_manifest(path, change)
    check_passed_over(path, first, said)


@pytest.mark.parametrize("content", [None, [], "text", 1, [[1]]])
def test_a_content_that_is_none(tmp_path: Path, content: Any) -> None:
    first, path = two_checkpoints(tmp_path)
    write_manifest(path, content)
    check_passed_over(path, first, "it has no content")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"content":{"step":' * 50_000, "it is nested too deeply"),
        ('{"content":{"step":' + "9" * 10_000 + "}}", "Exceeds the limit"),
        ('{"sha256":"\\ud800","content":{}}', "surrogates not allowed"),
        ('{"sha256":[],"content":{}}', "its sha256 is another"),
        ('{"content":{}}', "its sha256 is another"),
    ],
)
def test_a_text_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    first, path = two_checkpoints(tmp_path)
    (path / "manifest.json").write_text(text)
    check_passed_over(path, first, said)


def test_a_manifest_that_is_too_large(tmp_path: Path) -> None:
    first, path = two_checkpoints(tmp_path)
    os.truncate(path / "manifest.json", 2**40)  # takes no space
    check_passed_over(path, first, "manifest.json has more than 268435456 bytes")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("name", ["manifest.json", METADATA, DATA])
@pytest.mark.parametrize("make", [pipe, device, folder, link_to_itself])
def test_files_that_are_none(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    first, path = two_checkpoints(tmp_path)
    size = (path / name).stat().st_size
    (path / name).unlink()
    make(path / name)
    if make is not link_to_itself and name != "manifest.json":
        now = (path / name).stat().st_size
        assert now != size
        change_manifest(path, at(f"files/{name}/size", now))
    said = "cannot be read: Too many levels" if make is link_to_itself else "is no regular file"
    check_passed_over(path, first, f"{name} {said}")


def test_links_to_files_are_files(tmp_path: Path) -> None:
    """As tools make them that keep equal files once."""
    _, path = two_checkpoints(tmp_path / "checkpoints")
    for name in (DATA, METADATA, "manifest.json"):
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
    assert load(path.parent, *small(seed=1).all).extra == "second"


def test_a_later_format_is_no_damage(tmp_path: Path) -> None:
    _, path = two_checkpoints(tmp_path)
    write_manifest(path, {**content_of(path), "format": 2})
    with pytest.raises(CheckpointError, match="has format 2, and this version of recap_fast reads"):
        load(tmp_path, *small(seed=1).all)
