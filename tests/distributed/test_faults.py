"""What a training on two processes does when one of them fails, hangs, or sees a bad number.

With nccl, torch's watchdog ends a process that waits for a lost one: it aborts it after the
timeout and a minute or so, whatever Python does then. What is said, and how soon, is tested on gloo
only; so is what fails before there is a process group.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples.movielens import processes
from examples.movielens.errors import DemoError
from examples.movielens.sharding import DENSE
from tests.distributed import faulty_training
from tests.distributed.test_equivalence import TOLERANCE
from tests.support.processes import context, run
from tests.support.small_training import largest_difference, train

ROOT = Path(__file__).parents[2]
SCRIPT = faulty_training.__file__
FAULTY_STEP = 7
# Seconds: nccl takes some to start, and its watchdog to end a process.
PATIENCE = {"gloo": 60, "nccl": 240}


class Ranks:
    """The example's processes, started by hand: nothing but they themselves sees one fail."""

    def __init__(self, backend: str, *arguments: str, **variables: str) -> None:
        self._processes: list[subprocess.Popen] = []
        self._rendezvous = rendezvous(2)
        self._backend, self._arguments, self._variables = backend, arguments, variables

    def start(self, rank: int) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *self._arguments],
            env={
                **environment(self._backend),
                **self._rendezvous[rank],
                **self._variables,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def rendezvous(world_size: int) -> list[dict[str, str]]:
    """What torchrun sets for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        for rank in range(world_size)
    ]


def environment(backend: str) -> dict[str, str]:
    """With gloo, GPUs are hidden: processes that see them take nccl."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if backend == "gloo" else {}
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **hidden}


def environment_of_machine(number: int, backend: str) -> dict[str, str]:
    """With nccl, each of two machines has one of the GPUs."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    own = {"CUDA_VISIBLE_DEVICES": devices[number]} if backend == "nccl" else {}
    return {**environment(backend), **own}


def torchrun(
    backend: str, *arguments: str, machines: int = 1, **variables: str
) -> subprocess.CompletedProcess:
    """With two processes, on one machine or one for each; the result is that of the first."""
    environments = [environment(backend)]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={2 // machines}"]
    if machines > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        command += [f"--nnodes={machines}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        environments = [environment_of_machine(number, backend) for number in range(machines)]
    agents = [
        subprocess.Popen(
            [*command, *arguments],
            env={**own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in environments
    ]
    try:
        ends = [agent.communicate(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    first, (out, err) = agents[0], ends[0]
    return subprocess.CompletedProcess(first.args, first.returncode, out, err)


def example(arguments: tuple[str, ...], variables: dict[str, str], output: str) -> None:
    """In a new process: the example on the CPU; what it prints goes to the file `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ.pop("RANK", None)
    os.environ.update(variables)
    torch.cuda.is_available = lambda: False
    torch.set_num_threads(1)
    sys.argv = [SCRIPT, *arguments]
    faulty_training.main()


def run_forked(
    folder: Path, variables: list[dict[str, str]], *arguments: str
) -> list[tuple[int | None, str]]:
    """Runs `example` on a process for each of the environments, which imports nothing again.

    Returns:
        The exit status and the output of each.
    """
    outputs = [folder / f"output{number}" for number in range(len(variables))]
    started = [
        context("gloo").Process(target=example, args=(arguments, own, str(output)))
        for own, output in zip(variables, outputs, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        process.kill()
    return [
        (process.exitcode, output.read_text())
        for process, output in zip(started, outputs, strict=True)
    ]


def last_line(text: str) -> str:
    return re.split(r"[\r\n]+", text.strip())[-1]


@pytest.mark.long
@pytest.mark.parametrize("part", DENSE)
@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_stop_when_one_is_killed(lost: int, part: str, table_backend: str) -> None:
    fault = f"kill {lost} {FAULTY_STEP}"
    timeout, patience = {"gloo": "100", "nccl": "30"}[table_backend], PATIENCE[table_backend]
    with Ranks(table_backend, "--timeout", timeout, "--dense", part, FAULT=fault) as ranks:
        processes = [ranks.start(rank) for rank in range(2)]
        assert processes[lost].wait(timeout=patience) == -signal.SIGKILL
        begin = time.monotonic()
        _, said = processes[1 - lost].communicate(timeout=patience)
    if table_backend == "nccl":
        assert processes[1 - lost].returncode != 0
        return
    # The connection broke: nobody waited for the timeout.
    assert time.monotonic() - begin < 20
    assert processes[1 - lost].returncode == 1
    assert last_line(said).startswith(
        f"train_distributed.py: process {1 - lost} stops: another process has ended ("
    )


@pytest.mark.long
@pytest.mark.parametrize("part", DENSE)
@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_stop_when_one_hangs(lost: int, part: str, table_backend: str) -> None:
    fault = f"stop {lost} {FAULTY_STEP}"
    # With nccl, the processes make a communicator within the timeout.
    timeout = {"gloo": "4", "nccl": "30"}[table_backend]
    with Ranks(table_backend, "--timeout", timeout, "--dense", part, FAULT=fault) as ranks:
        processes = [ranks.start(rank) for rank in range(2)]
        _, said = processes[1 - lost].communicate(timeout=PATIENCE[table_backend])
        assert processes[lost].poll() is None
    if table_backend == "nccl":
        assert processes[1 - lost].returncode != 0
        return
    assert processes[1 - lost].returncode == 1
    assert last_line(said).startswith(
        f"train_distributed.py: process {1 - lost} stops: another process has not answered for 4"
        " seconds ("
    )


@pytest.mark.long
@pytest.mark.parametrize("present", [0, 1])
def test_nobody_waits_for_ever_for_one_that_never_came(present: int) -> None:
    with Ranks("gloo", "--timeout", "3") as ranks:
        process = ranks.start(present)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert last_line(said).startswith(
        f"train_distributed.py: process {present} stops: another process has not answered for 3"
        " seconds ("
    )


def test_without_torchrun_it_says_how_to_start(tmp_path: Path) -> None:
    ((status, said),) = run_forked(tmp_path, [{}])
    assert status == 1
    assert "RANK" in said and "`torchrun --nproc-per-node N`" in said


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    ((status, said),) = run_forked(tmp_path, rendezvous(1), "--clip-grad-norm", "0")
    assert status == 1 and "Traceback" not in said
    assert last_line(said).startswith("train_distributed.py: clip_grad_norm must be None or a num")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_trained_alike(
    ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], backend: str
) -> None:
    """Bit for bit; sums of a GPU may come in another order each time."""
    if backend == "gloo":
        for name, value in expected.items():
            assert torch.equal(ours[name], value), name
        return
    before = train("adam", "rowwise_adagrad")["before"]
    difference, name = largest_difference(ours, expected, before)
    assert difference < TOLERANCE, name


def check_like_one_process(ranks: list[tuple[dict[str, torch.Tensor], str]], **what) -> None:
    """Compares with a training on one process that left out what had to be left out."""
    ours = [state for state, _ in ranks]
    expected = train("adam", "rowwise_adagrad", **what)
    difference, name = largest_difference(ours[0], expected["after"], expected["before"])
    assert difference < TOLERANCE, name
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])
    # It mattered: with the batch, the result is another one.
    undisturbed = train("adam", "rowwise_adagrad", clip_grad_norm=what.get("clip_grad_norm"))
    difference, _ = largest_difference(ours[0], undisturbed["after"], undisturbed["before"])
    assert difference > 50 * TOLERANCE


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", DENSE)
@pytest.mark.parametrize("step", [0, FAULTY_STEP])
def test_a_bad_batch_of_one_is_skipped_by_all(step: int, part: str, table_backend: str) -> None:
    fault, arguments = ("nan-batch", 1, step), ("--dense", part)
    ranks = run(2, faulty_training.train_with_fault, fault, *arguments, backend=table_backend)
    assert ranks[0][1].endswith("1 batches skipped\n")
    check_like_one_process(ranks, without_batch={step})


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", DENSE)
@pytest.mark.parametrize("clip", [None, "1"])
def test_a_bad_gradient_of_one_skips_the_dense_step_of_all(
    clip: str | None, part: str, table_backend: str
) -> None:
    arguments = ["--dense", part, *([] if clip is None else ["--clip-grad-norm", clip])]
    fault = ("nan-gradient", 1, FAULTY_STEP)
    ranks = run(2, faulty_training.train_with_fault, fault, *arguments, backend=table_backend)
    assert ranks[0][1].endswith("0 batches skipped\n")
    clip_grad_norm = math.inf if clip is None else float(clip)
    check_like_one_process(ranks, without_step={FAULTY_STEP}, clip_grad_norm=clip_grad_norm)


def spoil_tables(folder: str, part: str) -> tuple[str, list[str]]:
    """What is said to gradients that are not finite and reach the tables, and what was saved."""
    saving = ("--checkpoint-dir", folder, "--checkpoint-every", "3", "--dense", part)
    with pytest.raises(DemoError) as caught:
        faulty_training.train_with_fault(("nan-tables", 1, FAULTY_STEP), *saving)
    return str(caught.value), sorted(path.name for path in Path(folder).glob("step-*"))


@pytest.mark.parametrize("part", DENSE)
def test_tables_with_a_bad_gradient_are_not_saved(
    tmp_path: Path, part: str, table_backend: str
) -> None:
    """The loss told nothing, and the backward pass trained them: only a checkpoint helps."""
    folder = str(tmp_path / "run")
    for said, saved in run(2, spoil_tables, folder, part, backend=table_backend):
        assert said.startswith(
            "gradients that are not finite have reached tables before step 9: start again"
        )
        assert saved == ["step-00000003", "step-00000006"]
    (resumed, _), (undisturbed, _) = (
        run(
            2, faulty_training.train_with_fault, None, "--dense", part, *more, backend=table_backend
        )[0]
        for more in (("--checkpoint-dir", folder), ())
    )
    assert_trained_alike(resumed, undisturbed, table_backend)


TABLE_END = r"2 processes, \d+ ratings/s, 0 batches skipped\n$"


def test_two_processes_train_without_a_fault(tmp_path: Path) -> None:
    """Joined as torchrun has them join."""
    (status, said), (other_status, _) = run_forked(tmp_path, rendezvous(2))
    assert (status, other_status) == (0, 0), said
    assert re.search(TABLE_END, said)


@pytest.mark.long
def test_torchrun_trains_without_a_fault(table_backend: str) -> None:
    result = torchrun(table_backend, SCRIPT)
    assert result.returncode == 0, result.stderr
    assert re.search(TABLE_END, result.stdout)


@pytest.mark.long
def test_torchrun_reports_who_was_killed(table_backend: str) -> None:
    result = torchrun(table_backend, SCRIPT, FAULT=f"kill 1 {FAULTY_STEP}")
    assert result.returncode == 1
    assert "Signal 9 (SIGKILL) received" in result.stderr


@pytest.mark.long
@pytest.mark.parametrize(("part", "machines"), [*((part, 1) for part in DENSE), ("ddp", 2)])
def test_a_restart_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, part: str, machines: int, table_backend: str
) -> None:
    """Two machines are two torchruns on this one, each of which counts its own restarts."""
    states = {}
    for name, fault in (("undisturbed", {}), ("restarted", {"FAULT": f"kill 1 {FAULTY_STEP}"})):
        folder = tmp_path / name
        folder.mkdir()
        saving = ["--checkpoint-dir", str(folder / "run"), "--checkpoint-every", "3"]
        result = torchrun(
            table_backend,
            "--max-restarts=2",
            SCRIPT,
            *saving,
            "--dense",
            part,
            machines=machines,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE=str(machines - 1),
            FINAL=str(folder / "final.pt"),
            ONCE=str(folder / "once"),
            **fault,
        )
        assert result.returncode == 0, result.stderr
        assert (folder / "once").exists() == bool(fault)
        states[name] = torch.load(folder / "final.pt")
    assert_trained_alike(states["restarted"], states["undisturbed"], table_backend)


def test_restarts_on_several_machines_need_a_store_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(DemoError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"):
        processes.join(1.0)
