"""`load` notices damage, passes a damaged checkpoint over, and takes nothing from it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from recap_fast.checkpoint import CheckpointError, load, save
from tests.checkpoint.small_training_state import small
from tests.support.processes import mesh, run

DATA = "__0_0.distcp"


def cut(name: str, by: int = 1) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-by] if by > 0 else content + bytes(-by))

    return damage


def flip(name: str, place: float) -> Callable[[Path], None]:
    """Flips a bit of the byte at a place between 0, the first, and 1, the last."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[round(place * (len(content) - 1))] ^= 4
        (folder / name).write_bytes(content)

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


MANIFEST = "manifest.json is not what was written: "
DAMAGES = {
    "data cut": (cut(DATA), rf"{DATA} has \d+ bytes instead of \d+"),
    "data longer": (cut(DATA, -1), rf"{DATA} has \d+ bytes instead of \d+"),
    "data emptied": (write(DATA, b""), f"{DATA} has 0 bytes instead of"),
    "data missing": (remove(DATA), f"{DATA} is missing"),
    "metadata missing": (remove(".metadata"), ".metadata is missing"),
    "metadata cut": (cut(".metadata", 100), r".metadata has \d+ bytes instead of"),
    "metadata flipped": (flip(".metadata", 0.5), ".metadata is not what was written: its sha256"),
    **{
        f"data flipped at {place}": (flip(DATA, place), f"{DATA} is not what was written: its sha")
        for place in (0, 0.3, 0.7, 1)
    },
    "no manifest": (remove("manifest.json"), "manifest.json cannot be read: No such file"),
    "manifest cut": (cut("manifest.json"), MANIFEST + "JSONDecodeError"),
    "manifest emptied": (write("manifest.json", b""), MANIFEST + "JSONDecodeError"),
    "manifest of zeros": (write("manifest.json", bytes(500)), MANIFEST + "JSONDecodeError"),
    "manifest no text": (write("manifest.json", b"\xff\xfe"), MANIFEST + "UnicodeDecodeError"),
    "manifest a list": (write("manifest.json", b"[]"), MANIFEST + ".*no content"),
    "manifest null": (write("manifest.json", b"null"), MANIFEST + ".*no content"),
    "manifest another": (write("manifest.json", b"{}"), MANIFEST + ".*no content"),
    "empty folder": (empty, "manifest.json cannot be read: No such file"),
}


def two_checkpoints(directory: Path) -> tuple[list[dict[str, Any]], Path]:
    """Saves after one step and after two; returns what there was, and the folder of the last."""
    training = small()
    contents = []
    for step in (1, 2):
        path = save(directory, step, *training.train(1).all, extra=f"after {step}")
        contents.append(training.contents())
    return contents, path


@pytest.mark.parametrize("name", DAMAGES)
def test_the_one_before_is_taken(tmp_path: Path, name: str) -> None:
    contents, path = two_checkpoints(tmp_path)
    damage, said = DAMAGES[name]
    damage(path)
    other = small(seed=1).train(3)
    with pytest.warns(UserWarning) as warned:
        loaded = load(tmp_path, *other.all)
    assert [each.filename for each in warned] == [__file__]
    message = str(warned[0].message)
    assert message.startswith(f"{path} is damaged, and passed over: ")
    assert re.search(said, message), message
    assert (loaded.step, loaded.extra) == (1, "after 1")
    assert other.contents() == contents[0]


@pytest.mark.parametrize("place", [0.1, 0.4, 0.6, 0.9])
def test_a_change_in_the_manifest(tmp_path: Path, place: float) -> None:
    contents, path = two_checkpoints(tmp_path)
    text = (path / "manifest.json").read_text()
    # Another digit, so that it is still JSON.
    digit = re.compile(r"\d").search(text, round(place * len(text)))
    changed = str((int(digit[0]) + 1) % 10)
    (path / "manifest.json").write_text(text[: digit.start()] + changed + text[digit.end() :])
    other = small(seed=1)
    with pytest.warns(UserWarning, match=MANIFEST + "its sha256 is another"):
        assert load(tmp_path, *other.all).step == 1
    assert other.contents() == contents[0]


def test_all_damaged(tmp_path: Path) -> None:
    _, path = two_checkpoints(tmp_path)
    cut(DATA)(path)
    remove(DATA)(path.with_name("step-00000001"))
    for other in (small(seed=1), small(seed=1).train(2)):
        before = other.contents()
        said = (
            rf"all checkpoints in {tmp_path} are damaged: step-00000002: {DATA} has \d+ bytes "
            rf"instead of \d+; step-00000001: {DATA} is missing"
        )
        with pytest.warns(UserWarning) as warned, pytest.raises(CheckpointError, match=said):
            load(tmp_path, *other.all)
        assert len(warned) == 2
        assert other.contents() == before


def test_a_damaged_one_is_replaced_by_the_next_save(tmp_path: Path) -> None:
    _, path = two_checkpoints(tmp_path)
    empty(path)
    training = small(seed=3).train(2)
    save(tmp_path, 2, *training.all)
    other = small(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, *other.all).step == 2
    assert other.contents() == training.contents()


def test_another_format_is_no_damage(tmp_path: Path) -> None:
    _, path = two_checkpoints(tmp_path)
    body = json.loads((path / "manifest.json").read_text())["content"]
    body["format"] = 2
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    content = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": body}
    (path / "manifest.json").write_text(json.dumps(content))
    other = small(seed=1)
    before = other.contents()
    with pytest.raises(CheckpointError, match=r"has format 2, and this version .* reads format 1"):
        load(tmp_path, *other.all)
    assert other.contents() == before


def test_files_of_others_do_no_harm(tmp_path: Path) -> None:
    contents, path = two_checkpoints(tmp_path)
    (path / "notes.txt").write_text("x")
    (tmp_path / "step-00000009").write_text("a file, no folder")
    other = small(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, *other.all).step == 2
    assert other.contents() == contents[1]


def test_what_fails_after_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    _, path = two_checkpoints(tmp_path)
    monkeypatch.setattr(dcp.FileSystemReader, "read_data", fail)
    said = rf"could not read {path}: process 0: OSError: .*; model and optimizer may now be partly"
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path, *small(seed=1).all)


def _sharded(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 4)
    for name, param in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(param.detach(), mesh(), [Shard(0)])))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _load_where_one_file_is_damaged(directory: str, name: str) -> tuple[int, int, bool]:
    saved = []
    for step in (1, 2):
        model, optimizer = _sharded(step)
        path = save(directory, step, model, optimizer)
        saved.append(model.weight.to_local().clone())
    if dist.get_rank() == 0:
        cut(name)(path)
    dist.barrier()
    model, optimizer = _sharded(3)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded = load(directory, model, optimizer)
    said = [str(each.message) for each in warned if "damaged" in str(each.message)]
    assert all(name in each for each in said)
    return loaded.step, len(said), torch.equal(model.weight.to_local(), saved[0])


def test_all_processes_pass_over_what_is_damaged_for_one(tmp_path: Path, backend: str) -> None:
    file = "__1_0.distcp"
    outcomes = run(2, _load_where_one_file_is_damaged, str(tmp_path), file, backend=backend)
    assert outcomes == [(1, 1, True), (1, 0, True)]
