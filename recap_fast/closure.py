"""Evaluates the closure of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Calls `closure` with gradients enabled, as every torch optimizer does; None gives None."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
