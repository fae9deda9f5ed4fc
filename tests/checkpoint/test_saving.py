"""What `save` writes, replaces and removes."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from recap_fast.checkpoint import CheckpointError, load, save
from tests.checkpoint.small_training_state import small

UUID = "0123456789abcdef" * 2


def names(directory: str | Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name != ".lock")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    training = small()
    steps = [0, 5, 123, 123_456_789]
    for number, step in enumerate(steps, 1):
        path = save(tmp_path / "a" / "b", step, *training.all, keep=keep)
        assert path == tmp_path / "a" / "b" / f"step-{step:08d}"
        kept = steps[max(0, number - keep) : number]
        assert names(path.parent) == sorted(f"step-{each:08d}" for each in kept)


def test_two_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    for step in range(4):
        save(tmp_path, step, *small().all)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    training = small().train(1)
    save(tmp_path, 1, *training.all, extra="first")
    training.train(1)
    save(tmp_path, 1, *training.all, extra="second")
    assert names(tmp_path) == ["step-00000001"]
    other = small(seed=1)
    assert load(tmp_path, *other.all).extra == "second"
    assert other.contents() == training.contents()


def test_later_steps_are_complained_of_and_stay(tmp_path: Path) -> None:
    training = small()
    for step in (10, 20):
        save(tmp_path, step, *training.all)
    with pytest.warns(UserWarning, match=r"later steps than 5, .*: step-00000010, step-00000020;"):
        save(tmp_path, 5, *training.all, keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000010", "step-00000020"]
    assert load(tmp_path, *training.all).step == 20


def test_what_dead_saves_left_is_removed(tmp_path: Path) -> None:
    training = small()
    save(tmp_path, 1, *training.all)
    for leftover in ("saving-step-00000002", "removed-step-00000000"):
        (tmp_path / f".{leftover}-{UUID}" / "inner").mkdir(parents=True)
        (tmp_path / f".{leftover}-{UUID}" / "inner" / "file").write_text("x")
    # Not ours, although they look a little like it.
    others = [".saving-step-1", "step-1", "step-00000001-copy", ".replaced-x", "notes"]
    for other in others:
        (tmp_path / other).mkdir()
    save(tmp_path, 3, *training.all)
    assert names(tmp_path) == sorted([*others, "step-00000001", "step-00000003"])


def test_what_a_dead_save_was_about_to_replace_is_put_back(tmp_path: Path) -> None:
    training = small().train(2)
    path = save(tmp_path, 2, *training.all)
    path.rename(tmp_path / ".replaced-step-00000002")
    before = training.contents()
    other = small(seed=1)
    assert load(tmp_path, *other.all).step == 2
    assert other.contents() == before
    save(tmp_path, 3, *training.train(1).all)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003").rename(tmp_path / "elsewhere")
    assert load(tmp_path, *other.all).step == 2
    assert other.contents() == before


def test_what_has_been_replaced_is_removed(tmp_path: Path) -> None:
    training = small()
    path = save(tmp_path, 2, *training.all, extra="old")
    path.rename(tmp_path / ".replaced-step-00000002")
    (save(tmp_path / "other", 2, *training.all, extra="new")).rename(path)
    shutil.rmtree(tmp_path / "other")
    assert load(tmp_path, *training.all).extra == "new"
    save(tmp_path, 3, *training.all)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003").rename(tmp_path / "elsewhere")
    assert load(tmp_path, *training.all).extra == "new"


def test_nothing_to_load(tmp_path: Path) -> None:
    training = small()
    before = training.contents()
    assert load(tmp_path, *training.all) is None
    assert load(tmp_path / "missing", *training.all) is None
    assert not (tmp_path / "missing").exists()
    assert training.contents() == before


def test_what_is_loaded_says_where_from(tmp_path: Path) -> None:
    training = small()
    path = save(str(tmp_path), 7, *training.all)
    loaded = load(str(tmp_path), *training.all)
    assert (loaded.step, loaded.extra, loaded.path) == (7, None, path)


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="could not begin a checkpoint: process 0: "):
            save(directory, 1, *small().all)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="PermissionError"):
            save(tmp_path, 1, *small().all)
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == []


def test_all_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_rename(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        events.append(("rename", Path(target)))

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    directory = tmp_path / "new"
    target = save(directory, 1, *small().all)
    published = events.index(("rename", target))
    synced = [path for what, path in events[:published] if what == "sync"]
    # DCP writes its metadata under a name of its own, and renames it.
    assert {path.name.removesuffix(".tmp") for path in synced} >= set(names(target))
    assert synced[-1].name.startswith(".saving-step-00000001-")
    assert tmp_path in synced  # has the new directory
    assert ("sync", directory) in events[published:]


def test_what_cannot_be_replaced_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = small()
    target = save(tmp_path, 2, *training.all, extra="old")
    rename = os.rename
    failures = []

    def fail_once(source: Any, new: Any, **options: Any) -> None:
        if Path(new) == target and not failures:
            failures.append(source)
            raise OSError(5, "Input/output error")
        rename(source, new, **options)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Input/output"):
        patch.setattr(os, "rename", fail_once)
        save(tmp_path, 2, *training.all, extra="new")
    assert len(failures) == 1
    assert names(tmp_path) == ["step-00000002"]
    assert load(tmp_path, *training.all).extra == "old"


def test_an_interrupt_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    training = small()
    save(tmp_path, 1, *training.all)
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, *training.all)
    assert names(tmp_path) == ["step-00000001"]


def test_memory_around_a_state_is_not_written(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *small().train(1).all)
    # Small states share blocks of a MiB; a tensor takes 1 to 2 KiB as torch.save writes it.
    assert (path / "__0_0.distcp").stat().st_size < 100_000


def test_saving_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 1, *small().all)
        load(tmp_path, *small(seed=1).all)
