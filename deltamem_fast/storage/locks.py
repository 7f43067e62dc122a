"""Locks of files and directories (``flock``), each gone with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import time

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


def lock_until(end: float, file: int, pause: float) -> bool:
    """Lock an open file, waiting for others; False on a file system without locks.

    Args:
        end: of the waiting, as ``time.monotonic`` counts.
        pause: seconds between two attempts.

    Raises:
        BlockingIOError: others held it all the time.
        OSError: it cannot be locked.
    """
    while True:
        try:
            lock_at_once(file)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(pause)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False


def unlock(file: int) -> None:
    """Give a lock back before the file is closed: closing alone leaves it to children that were forked meanwhile."""
    fcntl.flock(file, fcntl.LOCK_UN)
