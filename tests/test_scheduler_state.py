"""States of other schedulers, and schedules of other classes, in a `RecapLRShim`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchrec.optim import keyed

from recap_fast.config import LearningRate
from recap_fast.scheduler import RecapLRShim
from recap_fast.schedules.compute import compute_lr
from tests.support.models import constant, ramp
from tests.support.original_configs import CLASSES
from tests.support.original_program import Shim

RATES = {"liked": ramp(0.5, 8), "backbone": constant(0.25)}


def optimizer() -> keyed.CombinedOptimizer:
    return keyed.CombinedOptimizer(
        [
            keyed.KeyedOptimizerWrapper(
                {name: nn.Parameter(torch.ones(1))}, lambda params: torch.optim.SGD(params, lr=1.0)
            )
            for name in RATES
        ]
    )


def state_after(steps: int, scheduler: LRScheduler) -> dict[str, Any]:
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
    return scheduler.state_dict()


def rates_of(optimizer: keyed.CombinedOptimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("steps", [0, 3])
def test_the_state_of_the_originals_shim(steps: int) -> None:
    original = optimizer()
    state = state_after(steps, Shim(original, RATES, None))
    assert {"lr_dict", "base_lrs", "last_epoch", "_last_lr", "_step_count"} <= state.keys()

    resumed = optimizer()
    shim = RecapLRShim(resumed, RATES)
    shim.load_state_dict(state)
    assert shim.last_epoch == steps
    assert rates_of(resumed) == shim.get_last_lr() == rates_of(original)
    resumed.step()
    shim.step()
    assert rates_of(resumed) == [compute_lr(rate, steps + 1) for rate in RATES.values()]
    assert shim.group_names == list(RATES)  # nothing else was taken from the state


def test_other_attributes_of_a_state_are_not_looked_at() -> None:
    state = {"last_epoch": 2, "group_names": ["of", "others"], "verbose": False, "lr_dict": None}
    resumed = optimizer()
    RecapLRShim(resumed, RATES).load_state_dict(state)
    assert rates_of(resumed) == [0.125, 0.25]


class Noting(RecapLRShim):
    """One that saves something of its own besides."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "note": 1}


def test_a_derived_class_may_save_more_and_is_checked_as_well() -> None:
    resumed = optimizer()
    shim = Noting(resumed, RATES)
    state = {**shim.state_dict(), "last_epoch": 2}
    shim.load_state_dict(state)
    assert rates_of(resumed) == [0.125, 0.25]
    RecapLRShim(optimizer(), RATES).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has 1 dense group\(s\): other; this scheduler has 2"):
        shim.load_state_dict({**state, "group_names": ["other"]})
    assert shim.last_epoch == 2


def test_a_step_may_be_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    shim = RecapLRShim(optimizer(), RATES)
    shim.load_state_dict({"last_epoch": numpy.int64(2)})
    assert type(shim.last_epoch) is int and shim.last_epoch == 2
    for wrong in (numpy.float32(2), numpy.int64(-1), True, None):
        with pytest.raises(ValueError, match="last_epoch in the state must be an int, 0 or more"):
            shim.load_state_dict({"last_epoch": wrong})


def test_the_state_of_another_torch_scheduler() -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    state = state_after(4, LambdaLR(sgd, lambda _: 1.0))
    resumed = optimizer()
    RecapLRShim(resumed, RATES).load_state_dict(state)
    assert rates_of(resumed) == [0.25, 0.25]


@pytest.mark.parametrize("version", CLASSES)
def test_schedules_of_the_originals_classes(version: str) -> None:
    original = CLASSES[version].learning_rate
    rates = {
        "liked": original(linear_ramp_to_constant={"learning_rate": 0.5, "num_ramp_steps": 8}),
        "backbone": {"constant": 0.25},
    }
    shim = RecapLRShim(optimizer(), rates)
    assert shim.lr_dict == RATES
    assert all(isinstance(rate, LearningRate) for rate in shim.lr_dict.values())
