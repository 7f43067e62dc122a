"""Rows of bytes by id in one SQLite file that many processes and threads share; ``MemoryBank`` without tensors.

Needs the standard library alone. What holds, whoever is killed when: a write is there as a whole or not at all, it
was made on the version it says it was, and once ``write`` has returned it stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    ConflictError,
    FileAccessError,
    FileFormatError,
    StateError,
    WaitedTooLongError,
    WrongPathKindError,
)

try:
    import fcntl
except ImportError:  # Windows: SQLite's own locks remain
    fcntl = None

APPLICATION_ID = 0x644D656D  # "dMem", in the file's header
FORMAT_VERSION = 1  # in the file's header as user_version
MAX_ID_BYTES = 512
ORDERS = ("id", "updated", "created", "bytes")

_PAGE_SIZES = (4096, 8192, 16384)
_WAL_BYTES = 64 * 2**20  # of the log before it is copied into the file
_CACHE_KIB = 4096  # a connection; holds the inner pages of a million rows, and stays in the processor's caches
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# A list reads entries alone, never a page of states. The states' keys keep rows of one size packed in order of arrival.
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE entries (
    id TEXT PRIMARY KEY,
    key INTEGER NOT NULL,
    version INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX entries_by_update ON entries (updated);
CREATE TABLE states (key INTEGER PRIMARY KEY, state BLOB NOT NULL);
"""
_READ = """
SELECT asked.key, entries.version, states.state FROM json_each(?) AS asked
CROSS JOIN entries ON entries.id = asked.value CROSS JOIN states ON states.key = entries.key
"""
_FIND = """
SELECT asked.key, entries.key, entries.version FROM json_each(?) AS asked
CROSS JOIN entries ON entries.id = asked.value
"""


class BankConflict(ConflictError):
    """A write was refused because entries are not at the versions that it was made on; nothing was written.

    Attributes:
        moved: id → (version it was made on, version found); 0 is "not there".
    """

    def __init__(self, moved: Mapping[str, tuple[int, int]]):
        self.moved = dict(moved)
        named = [
            f"{id!r} (made on {'no entry' if made == 0 else f'version {made}'}, "
            f"found {'no entry' if found == 0 else f'version {found}'})"
            for id, (made, found) in list(self.moved.items())[:5]
        ]
        more = f" and {len(self.moved) - 5} more" if len(self.moved) > 5 else ""
        super().__init__(
            f"ids: {', '.join(named)}{more} moved on, so nothing was written; gather again and repeat the turn "
            "(or overwrite)"
        )

    def __reduce__(self):
        return BankConflict, (self.moved,)

    @property
    def ids(self) -> list[str]:
        """The ids that moved on, in the order of the write."""
        return list(self.moved)


@dataclass(frozen=True, slots=True)
class BankEntry:
    """What a bank knows of one memory without reading it.

    Attributes:
        version: a number that no other write of this bank has had; 1 or more.
        bytes: of the stored row.
        created, updated: UTC, when the id was first and last written.
    """

    id: str
    version: int
    bytes: int
    created: datetime
    updated: datetime


class BankStore:
    """Rows of ``row_bytes`` bytes by id, in the SQLite file ``path`` and its companions (-wal, -shm, -lock).

    Any number of processes and threads may have it open, each with an object of its own or sharing one across
    ``os.fork``. The file must lie on a file system of this machine: WAL needs shared memory.

    Attributes:
        layout, row_bytes: as given when the file was made. Of an existing file they may differ from the arguments:
            comparing is the caller's part.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        layout: Mapping[str, str],
        row_bytes: int,
        *,
        durable: bool = True,
        timeout: float = 60.0,
    ):
        """Open the file, or make it (and its directory) if there is none.

        Args:
            layout: what a later opening has to know of the rows; written when the file is made.
            row_bytes: of each row, 1 or more.
            durable: True syncs every write to the disk before it returns. False leaves that to the operating system:
                a process that is killed loses nothing, a power cut the last writes.
            timeout: seconds to wait for other writers.

        Raises:
            ValueError: an argument is not allowed, or the file is not such a store, or of a newer format; it is left
                as it was.
            OSError: it cannot be opened or made.
        """
        if isinstance(row_bytes, bool) or not isinstance(row_bytes, int) or row_bytes < 1:
            raise ArgumentError(f"row_bytes: got {row_bytes!r}, allowed an integer, 1 or more")
        # The companions' names follow from the real one; a path that goes through a link must find the same.
        self.path = Path(os.path.realpath(path))
        self.durable, self.timeout = durable, timeout
        self._closed = False
        self._local = threading.local()
        self._handles: weakref.WeakSet[_Handle] = weakref.WeakSet()
        self._guard = threading.Lock()
        self._writer = threading.Lock()
        with _fork_lock:
            _stores.add(self)
        if self.path.is_dir():
            raise WrongPathKindError(f"path: {path}: a directory, allowed a file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.layout, self.row_bytes = self._open(dict(layout), row_bytes)
        except BaseException:
            self.close()
            raise

    # --- reading

    def read(self, ids: Sequence[str]) -> tuple[list[int], list[bytes | None]]:
        """Versions and rows of ``ids``, all of one moment; 0 and None for an unknown id.

        Raises:
            TypeError, ValueError: see ``check_ids``.
        """
        ids = check_ids(ids)
        versions, rows = [0] * len(ids), [None] * len(ids)
        for place, version, row in self.each(ids):
            versions[place], rows[place] = version, row
        return versions, rows

    def each(self, ids: Sequence[str]) -> Iterator[tuple[int, int, bytes]]:
        """(n, version, row) of the n-th id, all of one moment; nothing for an unknown id.

        For what is copied elsewhere at once, while the processor still has it. This thread must not use the store
        again until the iterator has ended or is closed.

        Raises:
            TypeError, ValueError: see ``check_ids``; at the first step.
        """
        ids = check_ids(ids)
        with self._connection() as connection:
            yield from connection.execute(_READ, (json.dumps(ids),))

    def versions(self, ids: Sequence[str]) -> list[int]:
        """Versions of ``ids``, all of one moment; 0 for an unknown id. Errors as ``read``."""
        ids = check_ids(ids)
        with self._connection() as connection:
            return [version for _, version in _find(connection, ids)]

    def entries(
        self,
        *,
        prefix: str = "",
        order_by: str = "id",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[BankEntry]:
        """What is stored under ids that begin with ``prefix``, without reading any row.

        Args:
            order_by: "id" (by code points), "updated", "created" or "bytes"; equals come by id. The first two have an
                index.
            limit: at most so many, after leaving out the first ``offset``; None is all.

        Raises:
            TypeError, ValueError: an argument is not allowed.
        """
        if not isinstance(prefix, str):
            raise ArgumentTypeError(f"prefix: got a {type(prefix).__name__}, allowed a string")
        if order_by not in ORDERS:
            raise ArgumentError(f"order_by: got {order_by!r}, allowed {', '.join(ORDERS)}")
        for name, value in (("limit", 0 if limit is None else limit), ("offset", offset)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise FileFormatError(f"{name}: got {value!r}, allowed an integer, 0 or more")
        first, end = prefix, _after(prefix)
        where = "WHERE id >= :first" + ("" if end is None else " AND id < :end") if prefix else ""
        way = "DESC" if descending else "ASC"
        order = f"{order_by} {way}" + ("" if order_by == "id" else f", id {way}")
        sql = (
            f"SELECT id, version, bytes, created, updated FROM entries {where} ORDER BY {order} "
            "LIMIT :limit OFFSET :offset"
        )
        values = {"first": first, "end": end, "limit": -1 if limit is None else limit, "offset": offset}
        with self._connection() as connection:
            rows = connection.execute(sql, values).fetchall()
        return [BankEntry(*row[:3], _moment(row[3]), _moment(row[4])) for row in rows]

    def count(self) -> int:
        """How many ids there are."""
        with self._connection() as connection:
            return connection.execute("SELECT count(*) FROM entries").fetchone()[0]

    def total_bytes(self) -> int:
        """Bytes of all rows; the file takes a little more."""
        with self._connection() as connection:
            return connection.execute("SELECT coalesce(sum(bytes), 0) FROM entries").fetchone()[0]

    # --- writing

    def write(self, ids: Sequence[str], expected: Sequence[int] | None, rows: Sequence) -> int:
        """Store the row of each id, all or none; returns their new version.

        Args:
            expected: the version that each id must be at, 0 for one that must not be there; None takes any.
            rows: of each id ``row_bytes`` bytes, or a buffer of so many.

        Raises:
            BankConflict: an id is at another version; nothing is written.
            TypeError, ValueError: an argument is not allowed (see ``check_ids``); nothing is written.
            TimeoutError: other writers took longer than ``timeout``; nothing is written.
        """
        ids = check_ids(ids)
        for name, values in (("expected", expected), ("rows", rows)):
            if values is not None and len(values) != len(ids):
                raise FileFormatError(f"{name}: got {len(values)}, allowed one for each of {len(ids)} ids")
        for id, row in zip(ids, rows):
            if memoryview(row).nbytes != self.row_bytes:
                raise ArgumentError(f"rows: {id!r}: got {memoryview(row).nbytes} bytes, allowed {self.row_bytes}")
        with self._transaction() as connection:
            found = _find(connection, ids)
            if expected is not None:
                moved = {
                    id: (made, version)
                    for id, made, (_, version) in zip(ids, expected, found)
                    if made != version
                }  # fmt: skip
                if moved:
                    raise BankConflict(moved)
            # One count for the whole store: an id that is deleted and made again never gets an old number back.
            connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'version'")
            version = connection.execute("SELECT value FROM meta WHERE name = 'version'").fetchone()[0]
            now = time.time_ns() // 1000
            # In the order of the trees, so that a page is touched once.
            new = sorted((id, place) for place, (id, (key, _)) in enumerate(zip(ids, found)) if key is None)
            old = sorted((key, id, place) for place, (id, (key, _)) in enumerate(zip(ids, found)) if key is not None)
            free = connection.execute("SELECT coalesce(max(key), 0) + 1 FROM states").fetchone()[0]
            connection.executemany(
                "UPDATE states SET state = ? WHERE key = ?", ((rows[place], key) for key, _, place in old)
            )
            connection.executemany(
                "UPDATE entries SET version = ?, bytes = ?, updated = ? WHERE id = ?",
                ((version, self.row_bytes, now, id) for _, id, _ in sorted(old, key=lambda one: one[1])),
            )
            connection.executemany(
                "INSERT INTO states VALUES (?, ?)", ((free + n, rows[place]) for n, (_, place) in enumerate(new))
            )
            connection.executemany(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)",
                ((id, free + n, version, self.row_bytes, now, now) for n, (id, _) in enumerate(new)),
            )
        return version

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the rows of ``ids``, all or none; returns how many there were. Errors as ``write``.

        Their bytes are zeroed in the file, at the latest when the last process closes it, and their room is used
        again by later rows.
        """
        ids = check_ids(ids)
        with self._transaction() as connection:
            known = [(id, key) for id, (key, _) in zip(ids, _find(connection, ids)) if key is not None]
            connection.executemany("DELETE FROM states WHERE key = ?", ((key,) for _, key in known))
            connection.executemany("DELETE FROM entries WHERE id = ?", ((id,) for id, _ in known))
        return len(known)

    def close(self) -> None:
        """Close every connection of this process; waits for calls in other threads. Again: nothing happens."""
        with self._guard:
            self._closed = True
            for handle in list(self._handles):
                with handle.lock:
                    handle.close()

    # --- connections

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, which nobody closes meanwhile."""
        handle = getattr(self._local, "handle", None)
        if handle is None:
            with self._guard:
                handle = self._local.handle = _Handle()
                self._handles.add(handle)
        with handle.lock:
            if self._closed:
                raise ArgumentError(f"bank: {self.path} was closed")
            if handle.connection is not None and handle.process != os.getpid():
                # SQLite believes to hold locks that belong to the other process. See ``_before_fork``.
                raise StateError(f"bank: {self.path} was open when this process was forked from outside Python")
            try:
                if handle.connection is None:
                    handle.keep(self._connect("rw"))
                yield handle.connection
            except sqlite3.OperationalError as error:
                if _code(error) == sqlite3.SQLITE_BUSY:
                    raise WaitedTooLongError(f"bank: {self.path}: others wrote for {self.timeout} s") from error
                if _code(error) == sqlite3.SQLITE_CANTOPEN:
                    raise FileAccessError(f"bank: {self.path}: cannot be opened any more: {error}") from error
                raise

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: committed at the end, undone after an error."""
        with self._connection() as connection, self._turn():
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The one writer among all threads and processes, its checkpoint included.

        SQLite alone would let a checkpoint run beside another's commit, which can lose that commit before 3.51.3
        (https://sqlite.org/wal.html#walresetbug), and lets waiting writers sleep up to 0.1 s at a time.
        """
        late = WaitedTooLongError(f"bank: {self.path}: others wrote for {self.timeout} s")
        end = time.monotonic() + self.timeout
        if not self._writer.acquire(timeout=self.timeout):
            raise late
        try:
            if fcntl is None:
                yield
                return
            # Opened each time: a descriptor that was kept would be shared with forked children, and its lock too.
            lock = os.open(f"{self.path}-lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                while True:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > end:
                            raise late from None
                        time.sleep(0.0005)
                yield
            finally:
                os.close(lock)
        finally:
            self._writer.release()

    def _connect(self, mode: str) -> sqlite3.Connection:
        """A new connection; ``mode`` "rw", or "rwc" to make a file that is not there."""
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode={mode}", uri=True, timeout=self.timeout, isolation_level=None,
            check_same_thread=False,  # closed by whichever thread closes the store
        )  # fmt: skip
        try:
            page_size = connection.execute("PRAGMA page_size").fetchone()[0]
            for setting in (
                f"synchronous = {'FULL' if self.durable else 'NORMAL'}",
                f"cache_size = -{_CACHE_KIB}",
                f"wal_autocheckpoint = {_WAL_BYTES // page_size}",
                f"journal_size_limit = {_WAL_BYTES}",
                "secure_delete = ON",  # what is forgotten shall not lie in free pages
            ):
                connection.execute(f"PRAGMA {setting}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self, layout: dict[str, str], row_bytes: int) -> tuple[dict[str, str], int]:
        """Check or make the file; returns its layout and row size."""
        handle = _Handle()
        with self._guard:
            self._handles.add(handle)  # so that a fork in another thread waits for it
        try:
            with handle.lock, contextlib.closing(handle):
                handle.keep(self._connect("rwc"))
                connection = handle.connection
                if not self._is_ours(connection):
                    with self._turn():
                        if not self._is_ours(connection):  # nobody else made it meanwhile
                            _create(connection, layout, row_bytes)
                if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    with self._turn():
                        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                            raise FileAccessError(
                                f"path: {self.path}: its file system has no shared memory for SQLite's WAL"
                            )
                meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
                return json.loads(meta["layout"]), meta["row_bytes"]
        except sqlite3.Error as error:
            if _code(error) == sqlite3.SQLITE_NOTADB:
                raise FileFormatError(f"path: {self.path}: not a SQLite file") from error
            raise FileAccessError(f"path: {self.path}: cannot be opened as a bank: {error}") from error

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """True for a store that this version reads, False for an empty file, else ValueError."""
        connection.execute("BEGIN")  # one moment for the three
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        connection.execute("COMMIT")
        if application == APPLICATION_ID and 1 <= version <= FORMAT_VERSION:
            return True
        if application == APPLICATION_ID:
            raise FileFormatError(
                f"path: {self.path}: a bank of format version {version}, this version reads 1 to {FORMAT_VERSION}"
            )
        if application or version or tables:
            raise FileFormatError(f"path: {self.path}: a SQLite file, but no bank (application_id {application:#x})")
        return False


class _Handle:
    """One thread's connection; whoever uses or closes it holds ``lock``."""

    def __init__(self):
        self.lock = threading.Lock()
        self.connection: sqlite3.Connection | None = None
        self.process = 0

    def keep(self, connection: sqlite3.Connection) -> None:
        self.connection, self.process = connection, os.getpid()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def __del__(self):
        self.close()


def check_ids(ids: Iterable[str], name: str = "ids") -> list[str]:
    """``ids`` as a list.

    Raises:
        TypeError: not an iterable of strings.
        ValueError: one is empty, longer than 512 bytes of UTF-8, holds NUL or half of a surrogate pair, or comes twice.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ArgumentTypeError(f"{name}: got a {type(ids).__name__}, allowed a list of strings")
    ids = list(ids)
    for id in ids:
        check_id(id, name)
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(id for id in ids if id in seen or seen.add(id))
        raise FileFormatError(f"{name}: got {twice!r} twice, allowed each once")
    return ids


def check_id(id: str, name: str = "id") -> str:
    """``id`` itself; errors as ``check_ids``."""
    if not isinstance(id, str):
        raise ArgumentTypeError(f"{name}: got {id!r}, a {type(id).__name__}, allowed strings")
    try:
        size = len(id.encode())
    except UnicodeEncodeError:
        raise FileFormatError(f"{name}: got {id!r}, which holds half of a surrogate pair") from None
    if not 1 <= size <= MAX_ID_BYTES or "\0" in id:
        shown = repr(id if size <= 80 else id[:40] + "…")
        raise FileFormatError(f"{name}: got {shown} of {size} bytes, allowed 1 to {MAX_ID_BYTES} bytes without NUL")
    return id


def page_size_for(row_bytes: int) -> int:
    """The page size, of 4096, 8192 and 16384, with which rows of ``row_bytes`` take the least room; a tie: 8192."""
    return min(_PAGE_SIZES, key=lambda page: (round(_bytes_per_row(row_bytes, page)), page != 8192))


def _bytes_per_row(row_bytes: int, page: int) -> float:
    """Of a table of (integer key, blob) rows, after https://sqlite.org/fileformat2.html#b_tree_pages."""
    payload = row_bytes + 8  # key, and the record's header
    local, overflow = payload, 0
    if payload > page - 35:
        least = (page - 12) * 32 // 255 - 23
        local = least + (payload - least) % (page - 4)
        local = local if local <= page - 35 else least
        overflow = -(-(payload - local) // (page - 4))
    return page / max(1, (page - 8) // (local + 12)) + overflow * page


def _create(connection: sqlite3.Connection, layout: dict[str, str], row_bytes: int) -> None:
    connection.execute(f"PRAGMA page_size = {page_size_for(row_bytes)}")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        # Counted from a random number: a version of one store says nothing about another that was put in its place.
        start = int.from_bytes(os.urandom(5), "big")
        values = {"layout": json.dumps(layout), "row_bytes": row_bytes, "version": start}
        connection.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _find(connection: sqlite3.Connection, ids: list[str]) -> list[tuple[int | None, int]]:
    """(key, version) of each id; (None, 0) if it is unknown."""
    found: list[tuple[int | None, int]] = [(None, 0)] * len(ids)
    for place, key, version in connection.execute(_FIND, (json.dumps(ids),)).fetchall():
        found[place] = (key, version)
    return found


def _after(prefix: str) -> str | None:
    """The first string in order of code points behind all that begin with ``prefix``; None if there is none."""
    for last in range(len(prefix) - 1, -1, -1):
        point = ord(prefix[last]) + 1
        point = 0xE000 if 0xD800 <= point <= 0xDFFF else point
        if point <= 0x10FFFF:
            return prefix[:last] + chr(point)
    return None


def _moment(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


# --- fork: SQLite keeps its locks by process, so a child that inherits an open file believes in locks that it does not
# hold, even for connections of its own. Nothing is open while Python forks; both sides then open again when asked.

_fork_lock = threading.Lock()
_stores: weakref.WeakSet[BankStore] = weakref.WeakSet()
_held: list[threading.Lock] = []


def _before_fork() -> None:
    _fork_lock.acquire()
    _held.append(_fork_lock)
    for store in list(_stores):
        store._guard.acquire()
        _held.append(store._guard)
        for handle in list(store._handles):
            handle.lock.acquire()
            _held.append(handle.lock)
            with contextlib.suppress(sqlite3.Error):  # such as a full disk in its checkpoint; it is closed all the same
                handle.close()


def _after_fork() -> None:
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
