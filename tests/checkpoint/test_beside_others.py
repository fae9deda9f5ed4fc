"""Others that save into the directory, read it, or have put links there, at the same time."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recap_fast.checkpoint import CheckpointError, load, save
from recap_fast.checkpoint.locks import ReaderLock, WriterLock
from tests.checkpoint.small_training_state import small
from tests.support.processes import context, run


def names(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name != ".lock")


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    training = small()
    save(tmp_path, 1, *training.all)
    leftover = tmp_path / f".saving-step-00000002-{'0' * 32}"
    leftover.mkdir()
    said = rf"process {os.getpid()} on .* is saving into {tmp_path} now: two trainings, or two thr"
    with WriterLock() as lock:
        lock.take(tmp_path)
        with pytest.raises(CheckpointError, match=said):
            save(tmp_path, 2, *training.all)
        assert leftover.exists(), "it is the other's"
    save(tmp_path, 2, *training.all)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def _hold(directory: str) -> None:
    lock = WriterLock()
    lock.take(Path(directory))
    Path(directory, "held").touch()
    time.sleep(120)


def test_a_dead_writer_holds_nothing(tmp_path: Path) -> None:
    process = context("gloo").Process(target=_hold, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    training = small()
    with pytest.raises(CheckpointError, match=f"process {process.pid} on .* is saving into"):
        save(tmp_path, 1, *training.all)
    process.kill()
    process.join()
    save(tmp_path, 1, *training.all)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not begin a checkpoint: process 0: OSError"):
        save(tmp_path, 1, *small().all)
    assert (tmp_path / "file").read_text() == "precious"


def _save_often(directory: str, first: int, last: int) -> None:
    torch.set_num_threads(1)
    training = small()
    for step in range(first, last):
        save(directory, step, *training.train(1).all, keep=1)
    Path(directory, "done").touch()


def test_a_reader_beside_a_writer_gets_whole_checkpoints(tmp_path: Path) -> None:
    """Each of which is gone soon, or replaced: the writer keeps one."""
    last, expected, training = 12, {}, small()
    for step in range(1, last):
        expected[step] = training.train(1).contents()
    save(tmp_path, 0, *small().all)
    expected[0] = small().contents()
    own, found = small(seed=1), []
    with ProcessPoolExecutor(1, context("gloo")) as pool:
        writing = pool.submit(_save_often, str(tmp_path), 1, last)
        while not (tmp_path / "done").exists():
            assert not writing.done() or writing.exception() is None
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                step = load(tmp_path, *own.all).step
            assert own.contents() == expected[step]
            found.append(step)
        writing.result()
    assert found == sorted(found)
    assert len(set(found)) > 1


def test_what_is_read_stays_until_a_later_save(tmp_path: Path) -> None:
    training = small()
    path = save(tmp_path, 1, *training.all)
    with ReaderLock() as lock, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lock.take(path)
        save(tmp_path, 2, *training.all, keep=1)
        save(tmp_path, 3, *training.all, keep=1)
        assert names(tmp_path) == ["step-00000001", "step-00000003"]
        assert lock.is_there()
    save(tmp_path, 4, *training.all, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_what_is_replaced_while_it_is_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name then leads to other tensors, in part."""
    import recap_fast.checkpoint.tensors as tensors
    from recap_fast.checkpoint import load as _  # noqa: F401

    training = small()
    path = save(tmp_path, 1, *training.all)
    read_data = tensors._Reader.read_data

    def replace_and_read(self: Any, *args: Any) -> Any:
        save(tmp_path, 1, *small(seed=3).all)
        return read_data(self, *args)

    monkeypatch.setattr(tensors._Reader, "read_data", replace_and_read)
    said = f"{path} was removed or replaced while it was read: another process saves.*partly"
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path, *small(seed=1).all)
    monkeypatch.undo()
    own = small(seed=1)
    assert load(tmp_path, *own.all).step == 1
    assert own.contents() == small(seed=3).contents()


def test_what_is_removed_while_it_is_checked_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recap_fast.checkpoint import manifest

    training = small()
    save(tmp_path, 1, *training.all)
    read, removed = manifest.read, []

    def remove_and_read(path: Path, key: bytes | None) -> dict[str, Any]:
        if not removed:
            removed.append(path)
            shutil.rmtree(path)  # as on a file system without locks
            save(tmp_path, 2, *training.all)
        return read(path, key)

    monkeypatch.setattr(manifest, "read", remove_and_read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, *small(seed=1).all).step == 2
    assert len(removed) == 1


@pytest.mark.parametrize("target", ["folder", "nothing", "file"])
def test_old_checkpoints_that_are_links(tmp_path: Path, target: str) -> None:
    """The links go when their time has come, without a word, and what they lead to stays."""
    training, directory = small(), tmp_path / "checkpoints"
    path = save(directory, 1, *training.all)
    path.rename(tmp_path / "folder")
    (tmp_path / "file").write_text("precious")
    path.symlink_to(tmp_path / target)
    leftover = directory / f".removed-step-00000000-{'0' * 32}"
    leftover.symlink_to(tmp_path / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (2, 3, 4):
            save(directory, step, *training.all, keep=2)
        left = ["step-00000003", "step-00000004"]
        if target != "folder":  # it is no checkpoint
            left.insert(0, "step-00000001")
        assert names(directory) == left
        (directory / "step-00000005").symlink_to(tmp_path / target)
        path = save(directory, 5, *training.all)
        assert not path.is_symlink()
    assert load(directory, *small(seed=1).all).step == 5
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "manifest.json",
    ]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_link_to_a_checkpoint_loads(tmp_path: Path) -> None:
    training, directory = small().train(1), tmp_path / "checkpoints"
    path = save(directory, 1, *training.all)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    own = small(seed=1)
    assert load(directory, *own.all).step == 1
    assert own.contents() == training.contents()


def _save_or_load(directory: str) -> str:
    training = small()
    save(directory, 1, *training.all)
    before = training.train(1).contents()
    with pytest.raises(CheckpointError) as raised:
        if dist.get_rank() == 0:
            save(directory, 2, *training.all)
        else:
            load(directory, *training.all)
    assert training.contents() == before
    dist.barrier()  # goes on as if nothing had been
    save(directory, 3, *training.all)
    return str(raised.value)


def test_one_that_saves_while_another_loads(tmp_path: Path, backend: str) -> None:
    for message in run(2, _save_or_load, str(tmp_path), backend=backend):
        assert message == (
            "process 0 is about to collect what to save, while process 1 is about to look for "
            "checkpoints: all processes call save together, or all of them load, with equal "
            "arguments"
        )
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
