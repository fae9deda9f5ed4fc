"""A save that dies or fails at any use of the file system leaves the checkpoints as they were."""

from __future__ import annotations

import itertools
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recap_fast.checkpoint import CheckpointError, files, load, manifest, save
from tests.checkpoint.file_faults import Faults, die, dies, disk_fails
from tests.checkpoint.small_training_state import Training, built
from tests.support.processes import in_own_process

# The step that is saved, how many are kept, and what there is then.
CASES = {
    "new": (3, 2, ["step-00000002", "step-00000003"]),
    "replaced, after a death": (2, 1, ["step-00000002"]),
}


def names(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name != ".lock")


def small(seed: int = 0) -> Training:
    """With few tensors: as many files are used as for many."""
    torch.manual_seed(seed)
    return built(nn.Linear(3, 1))


class Scene:
    """Checkpoints of the steps 1 and 2, and a training that is to save another one."""

    def __init__(self, folder: Path, case: str) -> None:
        self.step, self.keep, self.expected = CASES[case]
        self._template, self._folder = folder / "template", folder
        self._count = itertools.count()
        self.training = small()
        save(self._template, 1, *self.training.train(1).all)
        self.older = self.training.contents()
        save(self._template, 2, *self.training.train(1).all)
        self.old = self.training.contents()
        self.new = self.training.train(1).contents()
        self._reader = small(seed=1)
        self.load(self._template)  # imports what is imported late
        if "after a death" in case:
            (self._template / "step-00000002").rename(self._template / ".replaced-step-00000002")
            for index, leftover in enumerate(("saving-step-00000003", "removed-step-00000000")):
                path = self._template / f".{leftover}-{index:032x}"
                shutil.copytree(self._template / "step-00000001", path)

    def directory(self) -> Path:
        """A new copy of it."""
        path = self._folder / str(next(self._count))
        shutil.copytree(self._template, path)
        return path

    def save(self, directory: Path) -> None:
        save(directory, self.step, *self.training.all, keep=self.keep)

    def load(self, directory: Path) -> tuple[int, dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a damaged one
            loaded = load(directory, *self._reader.all)
        return loaded.step, self._reader.contents()

    def finds_new(self, directory: Path) -> bool:
        """Whether the newest checkpoint is the one that was to be saved, or else the one before."""
        step, contents = self.load(directory)
        if contents == self.new and step == self.step:
            return True
        assert (step, contents) == (2, self.old)
        return False

    def check_next_save(self, directory: Path) -> None:
        """Whatever happened, the next save cleans up."""
        self.save(directory)
        assert names(directory) == self.expected
        shutil.rmtree(directory)


def _die_everywhere(folder: str, case: str) -> list[bool]:
    scene, faults = Scene(Path(folder), case), Faults()

    def save_and_die(directory: Path, use: int) -> None:
        with faults.at(use, die):
            scene.save(directory)

    found = []
    for use in itertools.count(1):
        directory = scene.directory()
        died = dies(lambda directory=directory, use=use: save_and_die(directory, use))
        found.append(scene.finds_new(directory))
        for path in directory.glob("step-*"):  # not only the newest is whole
            content = manifest.read(path)["files"]
            assert files.find_damage(path, content, content) == ""
        if not died:
            assert names(directory) == scene.expected
        scene.check_next_save(directory)
        if not died:
            return found


@pytest.mark.parametrize("case", CASES)
def test_a_save_may_die_at_any_moment(tmp_path: Path, case: str) -> None:
    found_new = in_own_process(_die_everywhere, str(tmp_path), case)
    assert len(found_new) > 25
    published = found_new.index(True)
    assert not any(found_new[:published]) and all(found_new[published:])
    assert published > 15 and len(found_new) - published > 5


def _fail_everywhere(folder: str, case: str) -> list[bool]:
    scene, faults = Scene(Path(folder), case), Faults()
    found = []
    for use in itertools.count(1):
        directory = scene.directory()
        before = names(directory)
        with faults.at(use, disk_fails), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                scene.save(directory)
                saved = True
            except CheckpointError as error:
                assert "Input/output error" in str(error)
                saved = False
        complaints = [str(warning.message) for warning in caught]
        failed = faults.came
        if saved:
            assert scene.finds_new(directory)
            assert bool(complaints) == (names(directory) != scene.expected)
            assert all(said.startswith("could not remove ") for said in complaints)
        else:
            assert not scene.finds_new(directory), f"use {use} failed, but there it is"
            # Nothing but, perhaps, what was put back, as the next save would have done.
            assert set(names(directory)) <= {*before, "step-00000002"}
        found.append(saved)
        scene.check_next_save(directory)
        if not failed:
            assert saved
            return found


@pytest.mark.parametrize("case", CASES)
def test_a_disk_may_fail_at_any_moment(tmp_path: Path, case: str) -> None:
    saved = in_own_process(_fail_everywhere, str(tmp_path), case)
    assert len(saved) > 25
    assert saved.count(False) > 15


def _fail_to_load_everywhere(folder: str) -> list[str]:
    scene, faults = Scene(Path(folder), "new"), Faults()
    directory = scene.directory()
    found = []
    for use in itertools.count(1):
        own = small(seed=2).train(1)
        before = own.contents()
        with faults.at(use, disk_fails), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                step = load(directory, *own.all).step
            except CheckpointError as error:
                assert "Input/output error" in str(error)
                if "may now be partly those of" not in str(error):
                    assert own.contents() == before
                    found.append("refused")
                else:
                    found.append("partly")
                continue
            finally:
                came = faults.came
        assert own.contents() == {1: scene.older, 2: scene.old}[step]
        assert len(warned) == 2 - step
        found.append(f"step {step}")
        if not came:
            return found


def test_a_disk_may_fail_while_loading(tmp_path: Path) -> None:
    found = in_own_process(_fail_to_load_everywhere, str(tmp_path))
    assert found[0] == "refused"  # the folders cannot be listed
    assert found[-1] == "step 2"
    # The manifest, both files, and the metadata again cannot be read; Python audits it twice.
    assert found.count("step 1") == 2 * 4
    assert "partly" in found  # they can no longer be read, after they were checked


def test_a_training_goes_on_with_what_was_loaded(tmp_path: Path) -> None:
    undisturbed: Training = small().train(5)
    training = small().train(2)
    save(tmp_path, 2, *training.all)
    training.train(2)  # lost
    load(tmp_path, *training.all)
    training.step = 2
    assert training.train(3).contents() == undisturbed.contents()
