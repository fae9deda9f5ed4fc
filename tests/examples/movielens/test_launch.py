from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException, start_processes

from examples.movielens import launch as starting
from examples.movielens.errors import DemoError
from examples.movielens.launch import launch
from tests.support.processes import context, in_own_process


def fork_instead(module: ModuleType = starting) -> None:
    """Has `launch` fork this process, which has one thread: nothing is imported again.

    The long tests, here and of the command line, have it spawn processes, as a user does.
    """
    module.spawn = functools.partial(start_processes, start_method="fork")


def launch_forks(*args: Any) -> None:
    fork_instead()
    launch(*args)


def write_what_is_seen(folder: str) -> None:
    total = torch.ones(1)
    dist.all_reduce(total)
    seen = f"{total.item():g} {torch.get_num_threads()}"
    Path(folder, str(dist.get_rank())).write_text(seen)


def fail_on_the_second(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise KeyError("a mistake")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_every_process_runs_and_reaches_the_others(tmp_path: Path) -> None:
    in_own_process(launch_forks, 2, 1, write_what_is_seen, str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2 1", "1": "2 1"}


def check_failure(how: str, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        launch_forks(2, 1, fail_on_the_second, how)


def test_an_error_shows_where_it_came_from() -> None:
    said = r"(?s)Process 1 .*fail_on_the_second.*a mistake"
    in_own_process(check_failure, "raise", ProcessRaisedException, said)


def test_a_killed_process_ends_the_others() -> None:
    said = r"one of the 2 processes has gone: process 1 .*SIGKILL"
    in_own_process(check_failure, "kill", DemoError, said)


def stay(folder: str) -> None:
    """Some wait in Python, the first in C++ for the others, as in an exchange."""
    Path(folder, str(os.getpid())).touch()
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(600)


START = """
import signal, sys
from examples.movielens.launch import launch
from tests.examples.movielens.test_launch import stay
if __name__ == "__main__":
    launch(int(sys.argv[2]), 1, stay, sys.argv[1])
"""


def is_alive(pid: int) -> bool:
    """A process that was left to another one to wait for is dead too."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def start(folder: Path, processes: int) -> subprocess.Popen:
    """A parent from scratch."""
    script = folder.parent / "start.py"
    script.write_text(START)
    command = [sys.executable, str(script), str(folder), str(processes)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def launch_in_session(*args: Any) -> None:
    os.setsid()
    launch_forks(*args)


class Forked:
    """A parent that is forked, with the methods of a `Popen`."""

    def __init__(self, folder: Path, processes: int) -> None:
        given = (processes, 1, stay, str(folder))
        self._process = context("gloo").Process(target=launch_in_session, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode


def check_end(
    start: Callable[[Path, int], Forked | subprocess.Popen],
    folder: Path,
    number: int,
    status: int,
    processes: int,
    early: bool,
) -> None:
    """Sends a signal to the parent alone, when all children have joined or as they begin."""
    folder.mkdir()
    parent = start(folder, processes)
    try:
        children: list[int] = []
        while len(children) < processes:
            assert parent.poll() is None
            time.sleep(0.02)
            if early:
                listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
                children = [int(pid) for pid in listed]
            else:
                children = [int(path.name) for path in folder.iterdir()]
        parent.send_signal(number)
        # Killed, it tells nobody, and children that only begin notice when they have begun.
        seconds = 60 if early and number == signal.SIGKILL else 5
        end = time.monotonic() + seconds
        while alive := [pid for pid in children if is_alive(pid)]:
            assert time.monotonic() < end, f"{alive} go on for {seconds} seconds"
            time.sleep(0.02)
        assert parent.wait(timeout=60) == status  # it closes torch
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()


def test_sigterm_to_the_parent_ends_the_children(tmp_path: Path) -> None:
    check_end(Forked, tmp_path / "run", signal.SIGTERM, 128 + signal.SIGTERM, 2, early=False)


@pytest.mark.long
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, -signal.SIGINT),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_signal_to_the_parent_ends_the_children(
    tmp_path: Path, number: int, status: int, early: bool
) -> None:
    check_end(start, tmp_path / "run", number, status, 3, early)
