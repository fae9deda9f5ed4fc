"""Trainings killed at random moments, which go on from their checkpoints as if nothing had been."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torchrec.distributed.types import ShardedTensor

import recap_fast
from examples.movielens import data, processes
from examples.movielens.model import build_model
from recap_fast import checkpoint
from tests.distributed.test_equivalence import TOLERANCE
from tests.support.processes import context, device, join
from tests.support.sharded_models import local_parts, shard_tables
from tests.support.small_training import BATCH_SIZE, RATINGS, SIZES, configs, table_sizes

STEPS = 30
SAVE_EVERY = 2
LONGEST_LIFE = 0.5  # seconds from the first step on; all of the training takes about a second


def train(folder: str) -> None:
    """Trains to the end, from the newest checkpoint on; saves often, and what comes of it."""
    dataset = data.synthetic(RATINGS, seed=0)
    share = processes.share()
    dense_config, embedding_config = configs("adam", "rowwise_adagrad")
    model = build_model(0, table_sizes=table_sizes(dataset), **SIZES)
    model = shard_tables(model, embedding_config, "table_wise")
    optimizer, scheduler = recap_fast.build_optimizer(
        model, dense_config, embedding_config, clip_grad_norm=1.0
    )
    loaded = checkpoint.load(f"{folder}/checkpoints", model, optimizer, scheduler)
    start = 0 if loaded is None else loaded.step
    batches = dataset.batches(BATCH_SIZE, seed=0, share=share, start=start)
    Path(folder, f"begun{share.rank}").touch()
    for step in range(start, STEPS):
        batch = next(batches).to(device())
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % SAVE_EVERY == 0:
            checkpoint.save(f"{folder}/checkpoints", step + 1, model, optimizer, scheduler)
    state = {"model": model.state_dict(), **optimizer.state_dict()["state"]}
    own = {
        f"{name}.{key}": [part.to("cpu", copy=True) for part, _ in local_parts(value)]
        for name, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, (torch.Tensor, ShardedTensor))
    }
    torch.save(own, f"{folder}/unfinished{share.rank}.pt")
    os.replace(f"{folder}/unfinished{share.rank}.pt", f"{folder}/final{share.rank}.pt")


def stop_in_save(folder: str, number: int) -> None:
    """Has this process stand still in its `number`-th save, with half of the tensors written."""
    write_item, items = filesystem._write_item, 0
    save = checkpoint.save

    def counted_save(*args: Any, **options: Any) -> Path:
        nonlocal number
        number -= 1
        return save(*args, **options)

    def write_and_stop(*args: Any) -> Any:
        nonlocal items
        result = write_item(*args)
        items += number == 0
        if items == 20:
            args[1].flush()
            Path(folder, "stopped").touch()
            time.sleep(60)
        return result

    checkpoint.save, filesystem._write_item = counted_save, write_and_stop


def _main(rank: int, world_size: int, backend: str, folder: str, attempt: int, stops: bool) -> None:
    join(rank, world_size, backend, f"{folder}/store{attempt}")
    if stops and rank == 0:
        stop_in_save(folder, 3)
    try:
        train(folder)
        dist.barrier()
    except RuntimeError:
        os._exit(3)  # the other one was killed
    dist.destroy_process_group()


class Training:
    """The processes of a training in a folder, which may be killed and started again."""

    def __init__(self, folder: Path, world_size: int, backend: str) -> None:
        folder.mkdir()
        self.folder, self._world_size, self._attempts = folder, world_size, 0
        self._backend, self._context = backend, context(backend)

    def start(self, stops: bool = False) -> None:
        """With `stops`, the first process does so in its third save: see `stop_in_save`."""
        for begun in self.folder.glob("begun*"):
            begun.unlink()
        self._left_before = self._unfinished_saves()
        self._processes = [
            self._context.Process(
                target=_main,
                args=(
                    rank,
                    self._world_size,
                    self._backend,
                    str(self.folder),
                    self._attempts,
                    stops,
                ),
            )
            for rank in range(self._world_size)
        ]
        self._attempts += 1
        for process in self._processes:
            process.start()

    def live(self, seconds: float) -> None:
        """Waits until all have begun, and then for `seconds`, or until one has ended."""
        while not all((self.folder / f"begun{r}").exists() for r in range(self._world_size)):
            assert all(process.is_alive() or process.exitcode == 0 for process in self._processes)
            time.sleep(0.005)
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(process.is_alive() for process in self._processes):
            time.sleep(0.001)

    def kill(self, rank: int) -> bool:
        """Kills one process; the others notice. Returns whether it was in the middle of a save.

        With nccl, they would notice by a timeout only, and are killed too, as by torchrun.
        """
        self._processes[rank].kill()
        for process in self._processes:
            if self._backend == "nccl":
                process.kill()
            process.join(timeout=60)
            assert process.exitcode is not None, "the others wait for the dead"
        return bool(self._unfinished_saves() - self._left_before)

    def complete(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))

    def _unfinished_saves(self) -> set[Path]:
        return set((self.folder / "checkpoints").glob(".saving-*"))

    def finish(self) -> None:
        """Waits for the end."""
        for process in self._processes:
            process.join(timeout=120)
            assert process.exitcode == 0

    def finals(self) -> dict[int, dict[str, list[torch.Tensor]]]:
        """What each process has after the last step, by rank; of those that have come so far."""
        paths = {r: self.folder / f"final{r}.pt" for r in range(self._world_size)}
        return {rank: torch.load(path) for rank, path in paths.items() if path.exists()}


def check(tmp_path: Path, world_size: int, backend: str, kills: int, seed: int) -> None:
    """Kills once in the middle of a save, and then at random moments.

    When all is done before a kill, that one does not count, and another training begins.
    """
    undisturbed = Training(tmp_path / "undisturbed", world_size, backend)
    undisturbed.start()
    undisturbed.finish()
    expected = undisturbed.finals()
    assert len(expected) == world_size and all(len(own) > 50 for own in expected.values())

    draw = random.Random(seed)
    killed = Training(tmp_path / "killed", world_size, backend)
    killed.start(stops=True)
    while not (killed.folder / "stopped").exists():
        assert all(process.is_alive() for process in killed._processes)
        time.sleep(0.005)
    assert killed.kill(0)
    assert killed.complete() == ["step-00000002", "step-00000004"]
    in_time, in_saves, done = 1, 1, 0
    while in_time < kills:
        killed.start()
        seconds, rank = draw.uniform(0, LONGEST_LIFE), draw.randrange(world_size)
        killed.live(seconds)
        in_save = killed.kill(rank)
        print(
            f"killed process {rank} after {seconds:.3f} s, in a save: {in_save}; "
            f"{killed.complete()}"
        )
        finals = killed.finals()
        if finals:  # too late
            assert_equal(finals, expected, backend)
            done += 1
            killed = Training(tmp_path / f"killed{done}", world_size, backend)
            continue
        in_time += 1
        in_saves += in_save
    killed.start()
    killed.finish()
    finals = killed.finals()
    assert len(finals) == world_size
    assert_equal(finals, expected, backend)
    print(f"{in_time} kills, {in_saves} of them in a save; {done + 1} trainings")
    leftovers = [path.name for path in (killed.folder / "checkpoints").glob(".*")]
    assert leftovers == [".lock"], "the saves after a death clean up"


def assert_equal(
    found: dict[int, dict[str, list[torch.Tensor]]],
    expected: dict[int, dict[str, list[torch.Tensor]]],
    backend: str,
) -> None:
    """Bit for bit, for the processes that were `found`.

    Sums of a GPU may come in another order each time: there, up to what that makes of a tensor's
    largest value.
    """
    for rank, ours in found.items():
        assert ours.keys() == expected[rank].keys()
        for name, parts in expected[rank].items():
            for own, other in zip(ours[name], parts, strict=True):
                if backend == "gloo":
                    assert torch.equal(own, other), (rank, name)
                elif other.numel():
                    bound = TOLERANCE * float(other.abs().max())
                    assert float((own - other).abs().max()) <= bound, (rank, name)


@pytest.mark.long  # deaths at every operation on a file are in test_interrupted.py
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_killed_twenty_times_ends_as_if_undisturbed(
    tmp_path: Path, world_size: int, table_backend: str
) -> None:
    check(tmp_path, world_size, table_backend, kills=21, seed=10 + world_size)
