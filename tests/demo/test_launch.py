from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from recap_fast.demo.errors import DemoError
from recap_fast.demo.launch import launch


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
    launch(2, 1, write_what_is_seen, str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2 1", "1": "2 1"}


def test_an_error_shows_where_it_came_from() -> None:
    with pytest.raises(
        ProcessRaisedException, match=r"(?s)Process 1 .*fail_on_the_second.*a mistake"
    ):
        launch(2, 1, fail_on_the_second, "raise")


def test_a_killed_process_ends_the_others() -> None:
    with pytest.raises(DemoError, match=r"one of the 2 processes has gone: process 1 .*SIGKILL"):
        launch(2, 1, fail_on_the_second, "kill")
