"""examples/movielens/train_distributed.py: its help, its table, what it says of wrong arguments."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from examples.movielens import processes
from examples.movielens.data import TASKS
from examples.movielens.errors import DemoError
from examples.movielens.sharding import SHARDINGS
from recap_fast.checkpoint import CheckpointError, CheckpointMismatchError
from tests.distributed.faulty_training import EXAMPLE, train_with_fault
from tests.support.processes import run


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["train_distributed.py", *arguments])
    return runpy.run_module(EXAMPLE)["parse"]()


def test_help_tells_how_to_start_and_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(monkeypatch, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "torchrun --nproc-per-node 2 -m examples.movielens.train_distributed" in text
    options = vars(parse(monkeypatch))
    for name in options:
        assert f"--{name.replace('_', '-')} " in text
    for name, default in options.items():
        if default is not None:
            assert re.search(rf"--{name.replace('_', '-')} [^-]*\(default:\s*{default}\)", text)
    source = Path(processes.__file__).with_name("train_distributed.py")
    assert len(source.read_text().splitlines()) <= 150


class Left(BaseException):
    """In the place of `processes.leave`, which ends the process at once."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DemoError("no GPU"), "train_distributed.py: no GPU\n"),
        (CheckpointError("no space"), "train_distributed.py: no space\n"),
        (CheckpointMismatchError("another model"), "train_distributed.py: another model\n"),
        (ValueError("too few rows"), "train_distributed.py: too few rows\n"),
        (KeyError("a mistake"), "KeyError: 'a mistake'\n"),
        (KeyboardInterrupt(), "KeyboardInterrupt\n"),
        (None, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_end_leaves_without_closing_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    said: str,
) -> None:
    """What the user can mend is one line, a mistake a traceback."""

    def leave(status: int = 0) -> None:
        raise Left(status)

    def join(timeout: float) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["train_distributed.py"])
    main = runpy.run_module(EXAMPLE)["main"]
    monkeypatch.setattr(processes, "leave", leave)
    monkeypatch.setattr(processes, "join", join)
    monkeypatch.setitem(main.__globals__, "train", lambda options, device: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    with pytest.raises(Left) as caught:
        main()
    assert caught.value.args == ((0,) if error is None else (1,))
    found = capsys.readouterr().err
    is_mistake = not isinstance(error, (DemoError, CheckpointError, ValueError, type(None)))
    assert found.endswith(said) and ("Traceback" in found) == is_mistake


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_first_process_prints_a_table(sharding: str, table_backend: str) -> None:
    ranks = run(2, train_with_fault, None, "--sharding", sharding, backend=table_backend)
    (state, printed), (other, silent) = ranks
    assert silent == ""
    assert all(torch.equal(other[name], value) for name, value in state.items())
    lines = printed.strip().splitlines()
    assert len(lines) == 2 + len(TASKS)
    for task, line in zip(TASKS, lines[1:], strict=False):
        name, loss, auc = line.split()
        assert name == task and 0 < float(loss) < 1 and 0 < float(auc) < 1
    assert re.fullmatch(r"2 processes, \d+ ratings/s, 0 batches skipped", lines[-1])


def complaint(*arguments: str) -> str:
    with pytest.raises(DemoError) as caught:
        train_with_fault(None, *arguments)
    return str(caught.value)


def test_a_batch_that_cannot_be_divided_is_refused(table_backend: str) -> None:
    for said in run(2, complaint, "--batch-size", "47", backend=table_backend):
        assert said.startswith("--batch-size 47 is not a multiple of the 2 processes")


def train_in_two_parts(folder: str) -> list[str]:
    """Goes on after the end of a training, and then as if it were another one."""
    saving = ("--checkpoint-dir", folder, "--checkpoint-every", "8")
    outputs = [train_with_fault(None, *saving)[1] for _ in range(2)]
    with contextlib.redirect_stdout(io.StringIO()):
        return [*outputs, complaint(*saving, "--seed", "1")]


def test_a_finished_training_is_only_tested_again_and_another_one_refused(
    tmp_path: Path, table_backend: str
) -> None:
    ranks = run(2, train_in_two_parts, str(tmp_path / "run"), backend=table_backend)
    first, again, refused = ranks[0]
    aucs = [[line.split()[-1] for line in text.splitlines()[2:5]] for text in (first, again)]
    assert aucs[0] == aucs[1]
    assert "is of another run: {'seed': 0" in refused
    assert "not {'seed': 1" in refused
