"""Locks of files and directories (``flock``), each gone with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import WaitedTooLongError, WrongPathKindError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HAS_LOCKS = fcntl is not None
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # on a file system that has none


def lock_at_once(file: int) -> None:
    """Lock an open file or directory.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be locked, such as on a file system without locks.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def open_lock(path: Path, name: str, flags: int) -> int:
    """A descriptor of a lock file, one that is made here its user's alone; a link is not followed.

    Raises:
        WrongPathKindError: a link, or no plain file; ``name`` is the argument that it names.
    """
    try:
        lock = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if path.is_symlink():
            raise WrongPathKindError(f"{name}: {path}: a symbolic link, allowed a file") from error
        raise
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise WrongPathKindError(f"{name}: {path}: not a file")
    return lock


@contextlib.contextmanager
def closed_afterwards(file: int) -> Iterator[int]:
    """An open file or directory, to be closed at the end."""
    try:
        yield file
    finally:
        os.close(file)


def lock_until(end: float, file: int, pause: float, late: str) -> bool:
    """Lock an open file, waiting for others; False on a file system without locks.

    Args:
        end: of the waiting, as ``time.monotonic`` counts.
        pause: seconds between two attempts.
        late: what the error says if others held it all the time.

    Raises:
        WaitedTooLongError: they did.
        OSError: it cannot be locked.
    """
    while True:
        try:
            lock_at_once(file)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                raise WaitedTooLongError(late) from None
            time.sleep(pause)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False


def unlock(file: int) -> None:
    """Give a lock back before the file is closed: closing alone leaves it to children that were forked meanwhile."""
    fcntl.flock(file, fcntl.LOCK_UN)
