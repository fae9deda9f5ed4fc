"""What the processes that save or load together tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist

from recap_fast.checkpoint.errors import CheckpointError, CheckpointMismatchError

T = TypeVar("T")


# These tell a user what to change; all others tell of a machine or a disk.
_PASSED_ON = (TypeError, ValueError, CheckpointError, CheckpointMismatchError)


class _Failure(NamedTuple):
    kind: type[Exception] | None  # what to raise, if not a CheckpointError that says where
    text: str


class Ranks:
    """The processes of a group, or this one alone without torch.distributed.

    Args:
        group: the process group; None for the default one.

    Attributes:
        group: as given.
        rank: of this process in the group.
        size: how many processes there are.
        is_first: whether this is the process that does what only one may do.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)
        self.is_first = self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank, on each of them."""
        if self._alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, what: str, function: Callable[[], T]) -> list[T]:
        """Calls `function` on all processes; returns what it returned on each, by rank.

        Raises:
            CheckpointError: Others do not call this now, but another function of this package.
            TypeError, ValueError, CheckpointMismatchError: raised by `function` on one of them; now
                on all.
            CheckpointError: anything else was; says `what` could not be done, where and why.
        """
        own: T | _Failure
        cause = None
        try:
            own = function()
        except Exception as error:
            cause = error  # of which only the text travels
            if type(error) in _PASSED_ON:
                own = _Failure(type(error), str(error))
            else:
                own = _Failure(None, f"{type(error).__name__}: {error}")
        told = self.gather((what, own))
        self._check_same_call([name for name, _ in told])
        failures = {
            rank: outcome for rank, (_, outcome) in enumerate(told) if isinstance(outcome, _Failure)
        }
        if not failures:
            return [outcome for _, outcome in told if not isinstance(outcome, _Failure)]
        kind, text = next(iter(failures.values()))
        if kind is not None:
            raise kind(text) from cause
        where = "; ".join(f"process {rank}: {failure.text}" for rank, failure in failures.items())
        raise CheckpointError(f"could not {what}: {where}") from cause

    def _check_same_call(self, names: list[str]) -> None:
        """Raises where one process saves and another loads, on all of them."""
        for rank, name in enumerate(names):
            if name != names[0]:
                raise CheckpointError(
                    f"process 0 is about to {names[0]}, while process {rank} is about to {name}: "
                    "all processes call save together, or all of them load, with equal arguments"
                )

    def on_first(self, what: str, function: Callable[[], T]) -> T:
        """Calls `function` on the first process; returns what it returned, on all of them.

        Raises:
            As `together`.
        """
        told: list[Any] = self.together(what, function if self.is_first else lambda: None)
        return cast(T, told[0])
