"""The state that the optimizers inside a keyed one keep, made without taking a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchrec.optim.warmup import WarmupOptimizer

from recap_fast.state.memory import StateMemory
from recap_fast.state.new import new_state


def new_state_of(
    owner: Any, group: Mapping[str, Any], param: Tensor, memory: StateMemory
) -> dict[str, Tensor]:
    """Returns what ``owner`` has of ``param`` before the first step.

    As `recap_fast.state.new.new_state`, and of torchrec's warm-up, which counts in a parameter that
    it pretends to have: its iteration and stage, int64, shape (2,).
    """
    if isinstance(owner, WarmupOptimizer):
        return {"warmup": torch.zeros(2, dtype=torch.long, device="cpu")}
    return new_state(owner, group, param, memory)
