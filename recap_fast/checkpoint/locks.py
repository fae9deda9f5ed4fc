"""One writer for each directory of checkpoints, and readers whose checkpoint stays while they read.

The system lets go of a lock when its process dies. File systems that know no locks have none: there
two writers are not told, and a reader may lose its checkpoint, which it then says.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from recap_fast.checkpoint.errors import CheckpointError

NAME: Final = ".lock"

# What file systems say that have no locks, or none of this kind: NFS of folders, EBADF.
_UNSUPPORTED: Final = frozenset(
    {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
)


class Busy(Exception):
    """Somebody else holds a lock."""


class WriterLock:
    """Held while a save writes, on a file that stays and says who wrote last."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, directory: Path) -> None:
        """Locks a directory, which must exist.

        Raises:
            CheckpointError: Another process, or another thread, is saving into it.
            OSError: The file of the lock cannot be made.
        """
        flags = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(directory / NAME, flags | os.O_RDWR, 0o666)
        except PermissionError:  # another user's
            descriptor = os.open(directory / NAME, flags | os.O_RDONLY, 0o666)
        try:
            _lock(descriptor, fcntl.LOCK_EX)
        except Busy:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise CheckpointError(
                f"{holder or 'another process'} is saving into {directory} now: two trainings, or "
                "two threads, must not save into one directory"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # as on a full disk
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Lets go of the lock, if it is held."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            _unlock(descriptor)

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class ReaderLock:
    """Held while a checkpoint is read: saves leave it for a later one to remove."""

    def __init__(self) -> None:
        self._path = Path()
        self._folder: os.stat_result | None = None
        self._descriptor: int | None = None

    def take(self, path: Path) -> bool:
        """Locks the folder of a checkpoint; whether it is still there, and not on its way out."""
        self.release()
        self._path, self._folder = path, _stat(path)
        try:
            self._descriptor = _open_folder(path)
            _lock(self._descriptor, fcntl.LOCK_SH)
        except Busy:
            return False
        except OSError:  # what is wrong with the folder, to read it will say
            pass
        return self.is_there()

    def is_there(self) -> bool:
        """Whether the folder is still the one that had this name before it was locked."""
        now = _stat(self._path)
        then = self._folder
        return now is not None and then is not None and os.path.samestat(now, then)

    def release(self) -> None:
        """Lets go of the lock, if it is held."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            _unlock(descriptor)

    def __enter__(self) -> ReaderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def unread(path: Path) -> Iterator[None]:
    """Keeps readers away from a folder that is to be removed.

    Raises:
        Busy: One is reading it.
        OSError: It cannot be opened.
    """
    descriptor = _open_folder(path)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _unlock(descriptor)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _unlock(descriptor: int) -> None:
    # To close it is not enough where a child that was forked meanwhile has it too.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
