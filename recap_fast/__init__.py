"""recap_fast: the optimizer of a multi-task ranker, stepped in one native call.

    from recap_fast import build_optimizer

    optimizer, scheduler = build_optimizer(model, config.optimizer)

or, in a program that has an optimizer of `torch.optim` or torchrec:

    recap_fast.fuse(optimizer)

Names are loaded when first used: `recap_fast.optim` works without torchrec, and
`recap_fast.reference` without the compiled extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recap_fast import checkpoint as checkpoint
    from recap_fast import config as config
    from recap_fast import embeddings as embeddings
    from recap_fast import keyed as keyed
    from recap_fast import optim as optim
    from recap_fast import reference as reference
    from recap_fast._native import build_info
    from recap_fast.build import build_optimizer
    from recap_fast.config import (
        EmbeddingOptimizerConfig,
        OptimizerConfig,
        RecapOptimizerConfig,
        load_optimizer_config,
    )
    from recap_fast.fusing import fuse, unfuse
    from recap_fast.keyed.fused import FusedCombinedOptimizer
    from recap_fast.optim import FusedRowwiseAdagrad
    from recap_fast.scheduler import RecapLRShim

__version__ = "0.1.0"

_HOME = {
    "EmbeddingOptimizerConfig": "recap_fast.config",
    "FusedCombinedOptimizer": "recap_fast.keyed.fused",
    "FusedRowwiseAdagrad": "recap_fast.optim",
    "OptimizerConfig": "recap_fast.config",
    "RecapLRShim": "recap_fast.scheduler",
    "RecapOptimizerConfig": "recap_fast.config",
    "build_info": "recap_fast._native",
    "build_optimizer": "recap_fast.build",
    "fuse": "recap_fast.fusing",
    "load_optimizer_config": "recap_fast.config",
    "unfuse": "recap_fast.fusing",
}

_MODULES = frozenset({"checkpoint", "config", "embeddings", "keyed", "optim", "reference"})

__all__ = [
    "EmbeddingOptimizerConfig",
    "FusedCombinedOptimizer",
    "FusedRowwiseAdagrad",
    "OptimizerConfig",
    "RecapLRShim",
    "RecapOptimizerConfig",
    "build_info",
    "build_optimizer",
    "fuse",
    "load_optimizer_config",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__) | _MODULES)
