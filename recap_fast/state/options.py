"""Options of param groups, as they are loaded."""

from __future__ import annotations

import copy
from typing import Any, Final

import torch

EXECUTION_OPTIONS: Final = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""How an optimizer runs its step, which says nothing about what is trained."""


def option_like(own: Any, saved: Any) -> Any:
    """Returns a saved option with the type of the one it replaces; a tensor is filled in place."""
    if isinstance(own, torch.Tensor):
        return own.fill_(saved)
    if isinstance(own, tuple) and isinstance(saved, (tuple, list)) and len(own) == len(saved):
        return tuple(option_like(a, b) for a, b in zip(own, saved, strict=True))
    return copy.deepcopy(saved)
