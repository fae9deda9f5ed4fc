"""What can be wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class CheckpointMismatchError(ValueError):
    """A checkpoint is of another model, optimizer or scheduler; nothing was changed."""


class Damaged(Exception):
    """A checkpoint cannot be used, and the one before it is to be taken; says what is wrong.

    Raised and caught inside this package.
    """
