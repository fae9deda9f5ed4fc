"""Lets the k-th use of a file system end a process, or fail, without any timing."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DIED = 99  # exit status
_EVENTS = frozenset(
    {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}
)


class Faults:
    """Counts uses of the file system, before they happen: all that Python audits, and flushes.

    Made once in a process that then ends, since an audit hook cannot be removed.
    """

    def __init__(self) -> None:
        self._left = 0
        self._action: Callable[[], None] | None = None
        sys.addaudithook(self._hook)
        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            self._count()
            fsync(descriptor)

        os.fsync = counted_fsync

    @contextmanager
    def at(self, use: int, action: Callable[[], None]) -> Iterator[None]:
        """Calls `action` instead of the `use`-th use from now on; the first is 1."""
        self._left, self._action = use, action
        try:
            yield
        finally:
            self._action = None

    @property
    def came(self) -> bool:
        """Whether there were that many."""
        return self._left <= 0

    def _hook(self, event: str, _: Any) -> None:
        if event in _EVENTS:
            self._count()

    def _count(self) -> None:
        if self._action is not None:
            self._left -= 1
            if self._left == 0:
                self._action()


def die() -> None:
    """Ends the process at once, as a kill would."""
    os._exit(DIED)


def disk_fails() -> None:
    """Once."""
    raise OSError(errno.EIO, "Input/output error")


def dies(function: Callable[[], Any]) -> bool:
    """Calls `function` in a fork of this process, which has one thread; whether it died."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)  # an exception
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, DIED), f"neither died nor came to its end: {status}"
    return status == DIED
