"""SQLite as a bank uses it: how a connection is set up, what is of one moment, and its errors as ours."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ..errors import FileAccessError, FileFormatError, FilePermissionError, WaitedTooLongError

WAL_BYTES = 64 * 2**20  # of the log before it is copied into the file
_READER_MILLISECONDS = 500  # that a delete waits for readers of the log
_CACHE_KIB = 4096  # a connection; holds the inner pages of a million rows, and stays in the processor's caches


def connect(path: Path, durable: bool, timeout: float) -> sqlite3.Connection:
    """A new connection to a file that is there; ``durable`` and ``timeout`` as of ``BankStore``."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw", uri=True, timeout=timeout, isolation_level=None,
        check_same_thread=False,  # closed by whichever thread closes the store
    )  # fmt: skip
    try:
        page_size = connection.execute("PRAGMA page_size").fetchone()[0]
        for setting in (
            f"synchronous = {'FULL' if durable else 'NORMAL'}",
            f"cache_size = -{_CACHE_KIB}",
            f"wal_autocheckpoint = {WAL_BYTES // page_size}",
            f"journal_size_limit = {WAL_BYTES}",
            "secure_delete = ON",  # what is forgotten shall not lie in free pages
            "trusted_schema = OFF",  # the file may come from elsewhere
        ):
            connection.execute(f"PRAGMA {setting}")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def one_moment(connection: sqlite3.Connection) -> Iterator[None]:
    """All that is read inside is of one moment, whoever writes meanwhile."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """All that is written inside is committed at the end, and undone after an error."""
    try:
        connection.execute(f"BEGIN {kind}")
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite ends it itself where the disk is full
            with contextlib.suppress(sqlite3.Error):  # what stopped it is to be told, and closing undoes it too
                connection.execute("ROLLBACK")
        raise


def empty_log(connection: sqlite3.Connection, timeout: float) -> None:
    """Copy the log into the file and cut it to nothing, unless a reader needs it; for the one writer alone."""
    connection.execute(f"PRAGMA busy_timeout = {_READER_MILLISECONDS}")
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.OperationalError as error:
        if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(timeout * 1000)}")


def damaged(path: Path, what: str) -> FileFormatError:
    """The error of a bank that is not what was written."""
    return FileFormatError(f"bank: {path}: damaged: {what}")


@contextlib.contextmanager
def naming_errors(name: str, path: Path, timeout: float) -> Iterator[None]:
    """SQLite's errors inside come out as ours, which name the argument and the file."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a mistake of ours
    except (sqlite3.Error, MemoryError, UnicodeError) as error:
        raise _named(error, name, path, timeout) from error


def _named(error: Exception, name: str, path: Path, timeout: float) -> Exception:
    code = _code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return WaitedTooLongError(f"{name}: {path}: others wrote for {timeout} s")
    if code == sqlite3.SQLITE_NOTADB:
        return FileFormatError(f"{name}: {path}: not a SQLite file, or damaged at its beginning")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return FilePermissionError(f"{name}: {path}: cannot be written: {error}")
    if code == sqlite3.SQLITE_CANTOPEN:
        again = " any more" if name == "bank" else ""
        return FileAccessError(f"{name}: {path}: cannot be opened{again}: {error}")
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_PROTOCOL):
        return FileAccessError(f"{name}: {path}: cannot be read or written: {error}")
    # Malformed pages, a schema that is not ours, text that is not UTF-8, a constraint that does not hold, …
    return FileFormatError(f"{name}: {path}: damaged: {error or type(error).__name__}")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
