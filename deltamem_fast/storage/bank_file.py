"""A bank's file as threads and processes share it: a connection a thread, one writer among all, none across a fork."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArgumentError, FileAccessError, StateError, WaitedTooLongError, WrongPathKindError
from .bank_sqlite import connect, naming_errors, transaction
from .files import give_to_owner_of, make_directory, naming_files
from .locks import HAS_LOCKS, closed_afterwards, lock_until, open_lock


class BankFile:
    """The file ``path`` and its companions (-wal, -shm, -lock), open in this process.

    Making it makes an empty file (and its directory) if there is none.

    Args:
        path: the real one; the companions' names follow from it.
        durable, timeout: see ``BankStore``.
    """

    def __init__(self, path: Path, durable: bool, timeout: float):
        self.path, self.durable, self.timeout = path, durable, timeout
        self._closed = False
        self._local = threading.local()
        self._handles: weakref.WeakSet[_Handle] = weakref.WeakSet()
        self._guard = threading.Lock()
        self._writer = threading.Lock()
        with _fork_lock:
            _files.add(self)
        _make_private(path)
        self._which = _which_file(path)

    @contextlib.contextmanager
    def opening(self) -> Iterator[sqlite3.Connection]:
        """A connection to check, make or upgrade the file with; errors name the argument ``path``."""
        handle = _Handle()
        with self._guard:
            self._handles.add(handle)  # so that a fork in another thread waits for it
        with naming_errors("path", self.path, self.timeout), handle.lock, contextlib.closing(handle):
            handle.keep(connect(self.path, self.durable, self.timeout))
            yield handle.connection
            self._which = _which_file(self.path)  # layered file systems copy one that is opened to be written

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, which nobody closes meanwhile."""
        handle = getattr(self._local, "handle", None)
        if handle is None:
            with self._guard:
                handle = self._local.handle = _Handle()
                self._handles.add(handle)
        with handle.lock:
            if self._closed:
                raise ArgumentError(f"bank: {self.path} was closed")
            self._check_place(handle)
            if handle.connection is not None and handle.process != os.getpid():
                # SQLite believes to hold locks that belong to the other process. See ``_before_fork``.
                raise StateError(f"bank: {self.path} was open when this process was forked from outside Python")
            with naming_errors("bank", self.path, self.timeout):
                if handle.connection is None:
                    handle.keep(connect(self.path, self.durable, self.timeout))
                yield handle.connection
                if handle.companions is None:
                    handle.companions = self._companions()

    def _check_place(self, handle: _Handle) -> None:
        """Raise if the path no longer leads to the file that was opened: SQLite would go on with what nobody sees.

        Nor may its log and index go, which SQLite itself removes with the last connection alone.
        """
        kept = handle.companions
        if _which_file(self.path) != self._which or (kept is not None and kept != self._companions()):
            raise FileAccessError(
                f"bank: {self.path}: it, its -wal or its -shm was moved, removed or replaced while it was open here; "
                "nothing is read or written, and what was committed before may lie in the -wal: put them back "
                "together, or close the bank and open it anew"
            )

    def _companions(self) -> tuple:
        return _which_file(f"{self.path}-wal"), _which_file(f"{self.path}-shm")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: committed at the end, undone after an error."""
        with self.connection() as connection, self.turn(), transaction(connection):
            yield connection

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The one writer among all threads and processes, its checkpoint included.

        SQLite alone would let a checkpoint run beside another's commit, which can lose that commit before 3.51.3
        (https://sqlite.org/wal.html#walresetbug), and lets waiting writers sleep up to 0.1 s at a time.
        """
        late = f"bank: {self.path}: others wrote for {self.timeout} s"
        end = time.monotonic() + self.timeout
        if not self._writer.acquire(timeout=self.timeout):
            raise WaitedTooLongError(late)
        try:
            if not HAS_LOCKS:
                yield
                return
            path = Path(f"{self.path}-lock")
            # Opened each time: a descriptor that was kept would be shared with forked children, and its lock too.
            with closed_afterwards(_lock_beside(self.path, path)) as lock:
                with naming_files("bank", path):
                    lock_until(end, lock, 0.0005, late)  # or there are no locks here, and SQLite's own remain
                yield
        finally:
            self._writer.release()

    def close(self) -> None:
        """Close every connection of this process; waits for calls in other threads. Again: nothing happens."""
        with self._guard:
            self._closed = True
            for handle in list(self._handles):
                with handle.lock:
                    handle.close()

    def close_for_fork(self, held: list[threading.Lock]) -> None:
        """Close every connection, and take its lock, which is put to ``held``: nobody opens one until it is free."""
        self._guard.acquire()
        held.append(self._guard)
        for handle in list(self._handles):
            handle.lock.acquire()
            held.append(handle.lock)
            with contextlib.suppress(sqlite3.Error):  # such as a full disk in its checkpoint; it is closed all the same
                handle.close()


class _Handle:
    """One thread's connection; whoever uses or closes it holds ``lock``."""

    def __init__(self):
        self.lock = threading.Lock()
        self.connection: sqlite3.Connection | None = None
        self.process = 0
        self.companions: tuple | None = None  # which files beside the bank's it has open; None: it was not used yet

    def keep(self, connection: sqlite3.Connection) -> None:
        self.connection, self.process = connection, os.getpid()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = self.companions = None

    def __del__(self):
        self.close()


def _which_file(path: str | os.PathLike) -> tuple[int, int] | None:
    """Which file lies there (device and inode), or None."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_private(path: Path) -> None:
    """Make an empty file (and its directory) for this user alone; one that is there is left as it is."""
    with naming_files("path", path):
        make_directory(path.parent)
        with contextlib.suppress(FileExistsError):
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.chmod(path, 0o600)  # whatever a umask took away
            os.close(made)
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "no plain file"
            raise WrongPathKindError(f"path: {path}: {kind}, allowed a file")
        if found.st_nlink > 1:
            raise FileAccessError(
                f"path: {path}: has {found.st_nlink} names (hard links), allowed one: SQLite keeps its log beside the "
                "name, so that what is committed under one is lost under the other; remove the other names, or copy "
                "the file and open the copy"
            )


def _lock_beside(bank: Path, path: Path) -> int:
    """A descriptor of the lock file, made with the bank's mode if there is none."""
    with naming_files("bank", path):
        with contextlib.suppress(FileNotFoundError):
            return open_lock(path, "bank", os.O_RDONLY)
        with contextlib.suppress(FileExistsError):  # another process was quicker
            lock = open_lock(path, "bank", os.O_RDONLY | os.O_CREAT | os.O_EXCL)
            try:
                os.fchmod(lock, give_to_owner_of(os.stat(bank), lock) & 0o666)  # root must not lock the owner out
            except OSError:
                os.close(lock)
                raise
            return lock
        return open_lock(path, "bank", os.O_RDONLY)


# --- fork: SQLite keeps its locks by process, so a child that inherits an open file believes in locks that it does not
# hold, even for connections of its own. Nothing is open while Python forks; both sides then open again when asked.

_fork_lock = threading.Lock()
_files: weakref.WeakSet[BankFile] = weakref.WeakSet()
_held: list[threading.Lock] = []


def _before_fork() -> None:
    _fork_lock.acquire()
    _held.append(_fork_lock)
    for file in list(_files):
        file.close_for_fork(_held)


def _after_fork() -> None:
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
