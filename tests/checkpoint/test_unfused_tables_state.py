"""The state of tables in checkpoints, before the first step and in its counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recap_fast.checkpoint import load, save
from tests.checkpoint.small_training_state import Training, with_tables

TABLE = "ebc.embedding_bags.t_user.weight"


def state_of(training: Training) -> dict[str, torch.Tensor]:
    return training.optimizer.state_dict()["state"][TABLE]


def test_unfused_tables_that_took_no_step_leave_fused_ones_without_state(tmp_path: Path) -> None:
    save(tmp_path, 0, *with_tables(fused=False).all)
    own = with_tables(1).train(2)
    assert state_of(own)["sum"].any()
    own.step = load(tmp_path, *own.all).step
    assert not state_of(own)["sum"].any()
    fresh = with_tables()
    torch.testing.assert_close(own.train(2).model.state_dict(), fresh.train(2).model.state_dict())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_steps_of_fused_tables_are_counted_on(tmp_path: Path, steps_before: int) -> None:
    """Those of the training, where the kernel counts nothing."""
    save(tmp_path, 3, *with_tables().train(3).all)
    own = with_tables(1, fused=False).train(steps_before)
    load(tmp_path, *own.all)
    assert state_of(own)["step"] == 3
    assert state_of(own.train(1))["step"] == 4


def test_steps_of_unfused_tables_are_kept(tmp_path: Path) -> None:
    saved = with_tables(fused=False, adam={}).train(3)
    save(tmp_path, 3, *saved.all)
    own = with_tables(1, fused=False, adam={})
    own.step = load(tmp_path, *own.all).step
    assert state_of(own)["step"] == 3
    torch.testing.assert_close(own.train(2).model.state_dict(), saved.train(2).model.state_dict())
