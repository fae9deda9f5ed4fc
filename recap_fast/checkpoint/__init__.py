"""Checkpoints of a training that survive its death, and a change of how many processes share it.

    loaded = load("checkpoints", model, optimizer, scheduler)
    for step in range(loaded.step if loaded else 0, steps):
        ...
        if (step + 1) % 1000 == 0:
            save("checkpoints", step + 1, model, optimizer, scheduler)

A checkpoint is a folder that torch.distributed.checkpoint writes and reads, and a manifest, by
which `load` tells whether it is complete, undamaged and of this model.
"""

from __future__ import annotations

from recap_fast import torchrec_checked  # noqa: F401 - first: says if torchrec is missing

# isort: split
from recap_fast.checkpoint.errors import CheckpointError, CheckpointMismatchError
from recap_fast.checkpoint.load import Loaded, load
from recap_fast.checkpoint.save import save

__all__ = ["CheckpointError", "CheckpointMismatchError", "Loaded", "load", "save"]
