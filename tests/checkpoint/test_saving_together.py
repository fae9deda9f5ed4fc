"""Several processes save together: they agree, and what one cannot do fails on all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.optim.fused import FusedOptimizer

from recap_fast.checkpoint import CheckpointError, load, manifest, save
from recap_fast.keyed import leaves
from tests.checkpoint.resuming import Setup, Training
from tests.checkpoint.small_training_state import small
from tests.support.processes import run


def names(directory: str | Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name != ".lock")


def _refusals(directory: str, cases: list[list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """What each case, arguments by rank, raises."""
    raised = []
    for per_rank in cases:
        given = {"directory": directory, "step": 1, **per_rank[dist.get_rank()]}
        with pytest.raises((TypeError, ValueError)) as caught:
            save(given.pop("directory"), given.pop("step"), *small().all, **given)
        raised.append((type(caught.value).__name__, str(caught.value)))
    return raised


def test_processes_must_agree(tmp_path: Path, backend: str) -> None:
    differing = {
        "step": (1, 2),
        "keep": (1, 2),
        "extra": ({"a": 1}, {"a": 1.0}),
        "directory": (str(tmp_path / "a"), str(tmp_path / "b")),
    }
    cases = [[{name: value} for value in values] for name, values in differing.items()]
    one_refuses = [{}, {"extra": {1, 2}}]
    cases.append(one_refuses)
    first, second = run(2, _refusals, str(tmp_path / "new"), cases, backend=backend)
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


def test_what_one_process_cannot_write_fails_on_all(tmp_path: Path, backend: str) -> None:
    cases = [(0, "write"), (1, "write"), (1, "flush"), (0, "manifest")]
    for outcomes in run(2, _save_where_one_cannot, str(tmp_path), cases, backend=backend):
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


def test_groups_of_processes_save_by_themselves(tmp_path: Path, backend: str) -> None:
    found = run(2, _save_alone, str(tmp_path), backend=backend)
    assert found == [(0, True), (1, True)]


def _differing_buffers(directory: str) -> tuple[bool, list[float]]:
    """Running statistics as batch normalisation has them after a forward pass: DDP leaves them."""
    training = small()
    buffers = [training.model.norm.running_mean, training.model.norm.running_var]
    for buffer in buffers:
        buffer.fill_(10.0 + dist.get_rank())
    save(directory, 1, *training.all)
    is_unchanged = all((buffer == 10.0 + dist.get_rank()).all() for buffer in buffers)
    load(directory, *training.all)
    return is_unchanged, [value for buffer in buffers for value in buffer.tolist()]


def test_buffers_are_those_of_the_first_process(tmp_path: Path, backend: str) -> None:
    """Since DDP copies these to the others before the next forward pass."""
    found = run(2, _differing_buffers, str(tmp_path), backend=backend)
    assert found == [(True, [10.0] * 8)] * 2


def _rates_of_kernels(directory: str) -> list[tuple[float, float]]:
    """After loading into another rate without a scheduler: of the param groups and the kernels."""
    saved, own = (Training(Setup(2, "row_wise", tables="sgd"), seed=seed) for seed in range(2))
    for group in saved.optimizer.param_groups:
        group["lr"] = 0.125
    saved.optimizer.sync_fused_learning_rates()
    save(directory, 0, saved.model, saved.optimizer)
    load(directory, own.model, own.optimizer)
    return [
        (leaf.param_groups[0]["lr"], leaf._emb_module.get_learning_rate())
        for leaf in leaves(own.optimizer)
        if isinstance(leaf, FusedOptimizer)
    ]


def test_kernels_of_sharded_tables_get_the_rate_without_a_scheduler(
    tmp_path: Path, table_backend: str
) -> None:
    for rates in run(2, _rates_of_kernels, str(tmp_path), backend=table_backend):
        assert rates and set(rates) == {(0.125, 0.125)}
