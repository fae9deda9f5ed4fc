"""What `save` writes, replaces, removes, and refuses."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from recap_fast.checkpoint import CheckpointError, load, manifest, save
from tests.checkpoint.small_training_state import small
from tests.distributed.processes import run

UUID = "0123456789abcdef" * 2


def names(directory: str | Path) -> list[str]:
    return sorted(os.listdir(directory))


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
    (tmp_path / "other").rmdir()
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


@pytest.mark.parametrize(
    "extra",
    [
        None,
        True,
        2**80,
        -0.1,
        math.inf,
        5e-324,
        "ü\n\ud800\0",
        [],
        {},
        {"b": [1, 1.0, None, {"": False}], "a": {"step": 3}},
    ],
)
def test_extra_comes_back(tmp_path: Path, extra: Any) -> None:
    training = small()
    save(tmp_path, 1, *training.all, extra=extra)
    found = load(tmp_path, *training.all).extra
    assert repr(found) == repr(extra)  # which tells 1 from 1.0, and finds the order of keys


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ((1, 2), "extra is a tuple"),
        ({"best": [{}, {"set": {1}}]}, r"extra\['best'\]\[1\]\['set'\] is a set"),
        ({1: 2}, "extra has the key 1: the keys of a dict must be str"),
        ({"path": Path("x")}, r"extra\['path'\] is a PosixPath"),
    ],
)
def test_extra_must_be_plain(tmp_path: Path, extra: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        save(tmp_path / "new", 1, *small().all, extra=extra)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"step": -1}, ValueError, "step=-1 must be 0 or more"),
        ({"step": 1.0}, TypeError, r"step must be an int, found 1\.0"),
        ({"step": True}, TypeError, "step must be an int, found True"),
        ({"keep": 0}, ValueError, "keep=0 must be 1 or more"),
        ({"keep": None}, TypeError, "keep must be an int, found None"),
    ],
)
def test_refused_arguments(
    tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], said: str
) -> None:
    training = small()
    given = dict(zip(("model", "optimizer", "scheduler"), training.all, strict=True))
    with pytest.raises(kind, match=said):
        save(tmp_path / "new", **{"step": 1, **given, **arguments})
    assert names(tmp_path) == []


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model, (_, optimizer, scheduler) = small().model, small().all
    said = r"parameter 0 of param group 0 of the optimizer, of shape \(4, 3\), is not a parameter"
    with pytest.raises(ValueError, match=said):
        save(tmp_path / "new", 1, model, optimizer, scheduler)
    assert names(tmp_path) == []


def test_a_scheduler_with_more_than_plain_state_is_refused(tmp_path: Path) -> None:
    class Scheduler:
        def state_dict(self) -> dict[str, Any]:
            return {"best": small().model.last.weight}

    training = small()
    with pytest.raises(TypeError, match=r"scheduler\['state'\]\['best'\] is a Parameter"):
        save(tmp_path / "new", 1, training.model, training.optimizer, Scheduler())
    assert names(tmp_path) == []


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


# Several processes


def _refusals(directory: str, cases: list[list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """What each case, arguments by rank, raises."""
    raised = []
    for per_rank in cases:
        given = {"directory": directory, "step": 1, **per_rank[dist.get_rank()]}
        with pytest.raises((TypeError, ValueError)) as caught:
            save(given.pop("directory"), given.pop("step"), *small().all, **given)
        raised.append((type(caught.value).__name__, str(caught.value)))
    return raised


def test_processes_must_agree(tmp_path: Path) -> None:
    differing = {
        "step": (1, 2),
        "keep": (1, 2),
        "extra": ({"a": 1}, {"a": 1.0}),
        "directory": (str(tmp_path / "a"), str(tmp_path / "b")),
    }
    cases = [[{name: value} for value in values] for name, values in differing.items()]
    one_refuses = [{}, {"extra": {1, 2}}]
    first, second = run(2, _refusals, str(tmp_path / "new"), [*cases, one_refuses])
    assert first == second
    *disagreements, refusal = first
    for (name, (one, other)), found in zip(differing.items(), disagreements, strict=True):
        said = f"{name} is not the same on all processes: {one!r} on process 0, and {other!r} on"
        assert found == ("ValueError", f"{said} process 1")
    assert refusal[0] == "TypeError" and refusal[1].startswith("extra is a set")
    assert names(tmp_path) == []


_STAGES = {
    "write": (dcp.FileSystemWriter, "write_data"),
    "flush": (os, "fsync"),
    "manifest": (manifest, "write"),
}


def _save_where_one_cannot(directory: str, cases: list[tuple[int, str]]) -> list[Any]:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    training = small().train(1)
    save(directory, 1, *training.all)
    found = []
    for failing, stage in cases:
        training.train(1)
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == failing:
                patch.setattr(*_STAGES[stage], full)
            with pytest.raises(CheckpointError) as raised:
                save(directory, 2, *training.all)
        dist.barrier()  # until the first process has removed what it began
        found.append((str(raised.value), names(directory)))
        dist.barrier()
    save(directory, 3, *training.all)
    other = small(seed=1)
    assert load(directory, *other.all).step == 3
    assert other.contents() == training.contents()
    return found


def test_what_one_process_cannot_write_fails_on_all(tmp_path: Path) -> None:
    cases = [(0, "write"), (1, "write"), (1, "flush"), (0, "manifest")]
    for outcomes in run(2, _save_where_one_cannot, str(tmp_path), cases):
        for (failing, _), (message, left) in zip(cases, outcomes, strict=True):
            assert "No space left on device" in message
            assert f"process {failing}: OSError" in message
            assert left == ["step-00000001"]
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def _save_alone(directory: str) -> tuple[int, bool]:
    rank = dist.get_rank()
    own = [dist.new_group([each]) for each in range(2)][rank]
    training = small(seed=rank).train(1)
    save(f"{directory}/{rank}", 1, *training.all, extra=rank, process_group=own)
    other = small(seed=5)
    loaded = load(f"{directory}/{rank}", *other.all, process_group=own)
    return loaded.extra, other.contents() == training.contents()


def test_groups_of_processes_save_by_themselves(tmp_path: Path) -> None:
    assert run(2, _save_alone, str(tmp_path)) == [(0, True), (1, True)]


def test_saving_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 1, *small().all)
        load(tmp_path, *small(seed=1).all)
