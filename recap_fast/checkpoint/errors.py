"""What can be wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class CheckpointMismatchError(ValueError):
    """A checkpoint is of another model, optimizer or scheduler; nothing was changed."""
