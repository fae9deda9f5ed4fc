"""The recap recommender's program with one import swapped: `tests.support.original_program`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import recap_fast
from recap_fast import reference
from tests.support.original_configs import CLASSES
from tests.support.original_program import STEPS, ModelAndLoss, original, read, run

SWAPPED = {"recap_fast": recap_fast, "recap_fast.reference": reference}


@pytest.mark.parametrize("optimizer_mod", SWAPPED.values(), ids=SWAPPED)
@pytest.mark.parametrize(
    ("version", "init_state"), [("pydantic 1", True), ("pydantic 2", True), ("pydantic 2", False)]
)
def test_it_trains_as_before(version: str, optimizer_mod: Any, init_state: bool) -> None:
    config_class = CLASSES[version].recap_optimizer
    expected, theirs, _, _ = run(original, config_class, init_state)
    losses, ours, _, _ = run(optimizer_mod, config_class, init_state)
    # float32 and 40 steps of Adam: the bound that an A/B run of the program has to meet.
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert expected[-1] < expected[0]
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("version", CLASSES)
def test_its_checkpoint_goes_on_in_the_swapped_program(version: str) -> None:
    config = CLASSES[version].recap_optimizer
    _, model, optimizer, scheduler = run(original, config, False)
    ours = ModelAndLoss()
    ours.load_state_dict(model.state_dict())
    swapped, shim = recap_fast.build_optimizer(ours, read(config).optimizer, None)
    swapped.load_state_dict(optimizer.state_dict())
    shim.load_state_dict(scheduler.state_dict())
    assert shim.last_epoch == STEPS
    assert shim.get_last_lr() == scheduler.get_last_lr()
