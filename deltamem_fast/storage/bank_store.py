"""Rows of bytes by id in one SQLite file that many processes and threads share; ``MemoryBank`` without tensors.

Needs no tensors. What holds, whoever is killed when: a write is there as a whole or not at all, it was made on the
version it says it was, and once ``write`` has returned it stays. What is read is what was written, or an error that
names the file: every row and every entry has a checksum, and every id is in two places.
"""

from __future__ import annotations

import contextlib
import errno
import json
import operator
import os
import secrets
import sqlite3
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ..arguments import MOST_64, check_integer, shown
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    ConflictError,
    FileAccessError,
    FileFormatError,
    FilePermissionError,
    StateError,
    WaitedTooLongError,
    WrongPathKindError,
    file_error,
)
from .checksums import entry_sum, entry_sum_2, row_sum, row_sum_2, row_sum_3
from .files import as_path, make_directory, naming_files

try:
    import fcntl
except ImportError:  # Windows: SQLite's own locks remain
    fcntl = None

APPLICATION_ID = 0x644D656D  # "dMem", in the file's header
FORMAT_VERSION = 4  # in the file's header as user_version; 1 had no checksums, 2 and 3 others of the rows
MAX_ID_BYTES = 512
ORDERS = ("id", "updated", "created", "bytes")

_PAGE_SIZES = (4096, 8192, 16384)
_WAL_BYTES = 64 * 2**20  # of the log before it is copied into the file
_READER_MILLISECONDS = 500  # that a delete waits for readers of the log
_CACHE_KIB = 4096  # a connection; holds the inner pages of a million rows, and stays in the processor's caches
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of flock, on a file system that has none
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = 253_402_300_799_999_999  # microseconds, the last moment that a datetime can be

# A list reads ``memories`` alone, never a page of states. The states' keys keep rows of one size packed in order of
# arrival. ``memories_ids`` is a second place for the ids, so that one that was lost to damage is no unknown one.
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE memories (
    id TEXT PRIMARY KEY,
    key INTEGER NOT NULL,
    version INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    row_sum INTEGER,
    entry_sum INTEGER
) WITHOUT ROWID;
CREATE INDEX entries_by_update ON memories (updated);
CREATE INDEX memories_ids ON memories (id);
CREATE TABLE states (key INTEGER PRIMARY KEY, state BLOB NOT NULL);
"""
# The table's other name makes a process of the version before, which has the file open still, fail and not half-write.
# "unchecked" is the last version of the rows that got their checksum here, and not when they were written.
_UPGRADE = {
    1: """
ALTER TABLE entries RENAME TO memories;
ALTER TABLE memories ADD COLUMN row_sum INTEGER;
ALTER TABLE memories ADD COLUMN entry_sum INTEGER;
CREATE INDEX memories_ids ON memories (id);
INSERT OR REPLACE INTO meta SELECT 'unchecked', value FROM meta WHERE name = 'version';
INSERT OR REPLACE INTO meta SELECT 'count', count(*) FROM memories;
INSERT OR REPLACE INTO meta SELECT 'name', lower(hex(randomblob(16)));
CREATE INDEX memories_by_key ON memories (key)
""",
    2: """
ALTER TABLE memories RENAME COLUMN row_crc TO row_sum;
ALTER TABLE memories RENAME COLUMN entry_crc TO entry_sum;
INSERT OR IGNORE INTO meta SELECT 'name', lower(hex(randomblob(16)));
CREATE INDEX memories_by_key ON memories (key)
""",
    3: """
ALTER TABLE memories RENAME COLUMN entry_crc TO entry_sum;
CREATE INDEX memories_by_key ON memories (key)
""",
}
# What a file of each version consists of; a trigger or a view among it could change what is written.
_PARTS = {
    1: {("table", "meta"), ("table", "entries"), ("table", "states"), ("index", "entries_by_update")},
    2: {
        ("table", "meta"), ("table", "memories"), ("table", "states"), ("index", "entries_by_update"),
        ("index", "memories_ids"),
    },
}  # fmt: skip
_PARTS[3] = _PARTS[4] = _PARTS[2]
_COLUMNS = "memories.id, memories.key, version, bytes, created, updated, row_sum, entry_sum"
_READ = """
SELECT asked.key, memories.version, memories.row_sum, states.state FROM json_each(?) AS asked
CROSS JOIN memories ON memories.id = asked.value LEFT JOIN states ON states.key = memories.key
"""
_FIND = f"""
SELECT asked.key, {_COLUMNS} FROM json_each(?) AS asked CROSS JOIN memories ON memories.id = asked.value
"""
_NEXT = f"""
SELECT {_COLUMNS}, state FROM states CROSS JOIN memories INDEXED BY memories_by_key ON memories.key = states.key
WHERE states.key > ? ORDER BY states.key LIMIT 1000
"""
_LOST = """
SELECT asked.value FROM json_each(?) AS asked CROSS JOIN memories INDEXED BY memories_ids
ON memories.id = asked.value LIMIT 1
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

    A new file and its companions are their user's alone (0600, a new directory 0700), whatever the umask; a file that
    is there keeps its mode, and its companions get the same.

    Attributes:
        layout, row_bytes: as given when the file was made. Of an existing file they may differ from the arguments:
            comparing is the part of ``check``.
        name: of this store and its copies alone.
        unchecked: the file was made by the version before, which had no checksums: what was damaged until it was
            upgraded was not found.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        layout: Mapping[str, str],
        row_bytes: int,
        *,
        durable: bool = True,
        timeout: float = 60.0,
        check: Callable[[dict[str, str], int], bool] | None = None,
    ):
        """Open the file, or make it (and its directory) if there is none; one of the version before is upgraded.

        Args:
            layout: what a later opening has to know of the rows; written when the file is made.
            row_bytes: of each row, 1 or more.
            durable: True syncs every write to the disk before it returns. False leaves that to the operating system:
                a process that is killed loses nothing, a power cut the last writes.
            timeout: seconds to wait for other writers.
            check: is given layout and row size of an existing file before anything of it is changed; raises, or returns
                whether ``layout`` takes the stored one's place.

        Raises:
            ValueError: an argument is not allowed, or the file is not such a store, damaged, or of a newer format; it
                is left as it was.
            OSError: it cannot be opened or made.
        """
        check_integer(row_bytes, "row_bytes", 1)
        # The companions' names follow from the real one; a path that goes through a link must find the same.
        self.path = Path(os.path.realpath(as_path(path, "path")))
        self.durable, self.timeout = durable, timeout
        self._closed = False
        self._local = threading.local()
        self._handles: weakref.WeakSet[_Handle] = weakref.WeakSet()
        self._guard = threading.Lock()
        self._writer = threading.Lock()
        with _fork_lock:
            _stores.add(self)
        self.unchecked = False
        _make_private(self.path)
        self._file = _which_file(self.path)
        try:
            self.layout, self.row_bytes, self.name = self._open(dict(layout), row_bytes, check)
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
            TypeError, ValueError: see ``check_ids``, at the first step; a row is not what was written, at the step
                that finds it.
        """
        ids, size, found = check_ids(ids), self.row_bytes, 0
        with self._connection() as connection:
            # One at a time: rows that are fetched together push one another out of the processor's caches.
            for place, version, kept, row in connection.execute(_READ, (json.dumps(ids),)):
                sound = type(row) is bytes and len(row) == size and type(version) is int and version >= 1
                if not sound or row_sum(ids[place], version, row) != kept:
                    raise self._damaged(f"the row of {ids[place]!r} is not what was written")
                found += 1
                yield place, version, row
            if found < len(ids):
                self._check_unknown(connection, ids)

    def versions(self, ids: Sequence[str]) -> list[int]:
        """Versions of ``ids``, all of one moment; 0 for an unknown id. Errors as ``read``."""
        ids = check_ids(ids)
        with self._connection() as connection:
            return [version for _, version, _ in self._find(connection, ids)]

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
        if any("\ud800" <= letter <= "\udfff" for letter in prefix):
            raise ArgumentError(f"prefix: got {prefix!r}, which holds half of a surrogate pair")
        if not isinstance(order_by, str) or order_by not in ORDERS:
            raise ArgumentError(f"order_by: got {shown(order_by)}, allowed {', '.join(ORDERS)}")
        for name, value in (("limit", 0 if limit is None else limit), ("offset", offset)):
            check_integer(value, name, 0, None)
        first, end = prefix, _after(prefix)
        where = "WHERE id >= :first" + ("" if end is None else " AND id < :end") if prefix else ""
        way = "DESC" if descending else "ASC"
        order = f"{order_by} {way}" + ("" if order_by == "id" else f", id {way}")
        sql = f"SELECT {_COLUMNS} FROM memories {where} ORDER BY {order} LIMIT :limit OFFSET :offset"
        values = {"first": first, "end": end, "limit": MOST_64 if limit is None else min(limit, MOST_64)}
        values["offset"] = min(offset, MOST_64)
        with self._connection() as connection:
            found = []
            with self._one_moment(connection):
                for row in connection.execute(sql, values):
                    self._check_entry(row)
                    id, _, version, size, created, updated = row[:6]
                    found.append(BankEntry(id, version, size, _moment(created), _moment(updated)))
                if not prefix and limit is None and not offset:
                    self._check_count(connection, len(found))
        return found

    def count(self) -> int:
        """How many ids there are."""
        with self._connection() as connection:
            with self._one_moment(connection):
                found = connection.execute("SELECT count(*) FROM memories").fetchone()[0]
                self._check_count(connection, found)
                return found

    def total_bytes(self) -> int:
        """Bytes of all rows; the file takes a little more."""
        with self._connection() as connection:
            return connection.execute("SELECT coalesce(sum(bytes), 0) FROM memories").fetchone()[0]

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
                raise ArgumentError(f"{name}: got {len(values)}, allowed one for each of {len(ids)} ids")
        for id, row in zip(ids, rows):
            if memoryview(row).nbytes != self.row_bytes:
                raise ArgumentError(f"rows: {id!r}: got {memoryview(row).nbytes} bytes, allowed {self.row_bytes}")
        with self._transaction() as connection:
            found = self._find(connection, ids)
            if expected is not None:
                moved = {
                    id: (made, version)
                    for id, made, (_, version, _) in zip(ids, expected, found)
                    if made != version
                }  # fmt: skip
                if moved:
                    raise BankConflict(moved)
            # One count for the whole store: an id that is deleted and made again never gets an old number back. It
            # goes on by chance, so that two copies of a file, each written to, have no version in common.
            step = 1 + int.from_bytes(os.urandom(3), "big")
            connection.execute("UPDATE meta SET value = value + ? WHERE name = 'version'", (step,))
            version = connection.execute("SELECT value FROM meta WHERE name = 'version'").fetchone()[0]
            if any(known >= version for _, known, _ in found):
                raise self._damaged("its count of versions is not what was written")
            now = time.time_ns() // 1000
            sums = [row_sum(id, version, row) for id, row in zip(ids, rows)]
            # In the order of the trees, so that a page is touched once.
            new = sorted((id, place) for place, (id, (key, *_)) in enumerate(zip(ids, found)) if key is None)
            old = sorted((key, id, place) for place, (id, (key, *_)) in enumerate(zip(ids, found)) if key is not None)
            free = connection.execute("SELECT coalesce(max(key), 0) + 1 FROM states").fetchone()[0]
            changed = connection.executemany(
                "UPDATE states SET state = ? WHERE key = ?", ((rows[place], key) for key, _, place in old)
            )
            if old and changed.rowcount != len(old):
                raise self._damaged("an id has no row")

            def entry(id: str, key: int, created: int, place: int) -> tuple:
                values = (key, version, self.row_bytes, created, now, sums[place])
                return (*values, entry_sum(id, *values), id)

            connection.executemany(
                "UPDATE memories SET key = ?, version = ?, bytes = ?, created = ?, updated = ?, row_sum = ?, "
                "entry_sum = ? WHERE id = ?",
                (entry(id, key, found[place][2], place) for key, id, place in sorted(old, key=lambda one: one[1])),
            )
            connection.executemany(
                "INSERT INTO states VALUES (?, ?)", ((free + n, rows[place]) for n, (_, place) in enumerate(new))
            )
            connection.executemany(
                "INSERT INTO memories (key, version, bytes, created, updated, row_sum, entry_sum, id) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (entry(id, free + n, now, place) for n, (id, place) in enumerate(new)),
            )
            connection.execute("UPDATE meta SET value = value + ? WHERE name = 'count'", (len(new),))
        return version

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the rows of ``ids``, all or none; returns how many there were. Errors as ``write``.

        Their bytes are zeroed in the file and gone from its log (-wal) when this returns, and their room is used again
        by later rows. Only where somebody reads just then, for longer than half a second (an unfinished ``each``), does
        the log keep them: until the next ``delete``, or until the last process closes the file.
        """
        ids = check_ids(ids)
        with self._connection() as connection, self._turn():
            with self._begun(connection):
                known = [(id, key) for id, (key, *_) in zip(ids, self._find(connection, ids)) if key is not None]
                connection.executemany("DELETE FROM states WHERE key = ?", ((key,) for _, key in known))
                connection.executemany("DELETE FROM memories WHERE id = ?", ((id,) for id, _ in known))
                connection.execute("UPDATE meta SET value = value - ? WHERE name = 'count'", (len(known),))
            if known:
                self._empty_log(connection)
        return len(known)

    def _empty_log(self, connection: sqlite3.Connection) -> None:
        """Copy the log into the file and cut it to nothing, unless a reader needs it; only within ``_turn``."""
        connection.execute(f"PRAGMA busy_timeout = {_READER_MILLISECONDS}")
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.OperationalError as error:
            if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
        finally:
            connection.execute(f"PRAGMA busy_timeout = {int(self.timeout * 1000)}")

    def close(self) -> None:
        """Close every connection of this process; waits for calls in other threads. Again: nothing happens."""
        with self._guard:
            self._closed = True
            for handle in list(self._handles):
                with handle.lock:
                    handle.close()

    # --- damage

    def _damaged(self, what: str) -> FileFormatError:
        return FileFormatError(f"bank: {self.path}: damaged: {what}")

    def _find(self, connection: sqlite3.Connection, ids: list[str]) -> list[tuple[int | None, int, int]]:
        """(key, version, created) of each id, checked; (None, 0, 0) if it is unknown."""
        found: list[tuple[int | None, int, int]] = [(None, 0, 0)] * len(ids)
        rows = connection.execute(_FIND, (json.dumps(ids),)).fetchall()
        for place, *row in rows:
            self._check_entry(row)
            found[place] = (row[1], row[2], row[4])
        if len(rows) < len(ids):
            self._check_unknown(connection, ids)
        return found

    def _check_entry(self, row: Sequence) -> None:
        # By type and range too: whoever can write the file can make checksums that fit.
        try:
            id, key, version, size, created, updated, own, kept = row
            sound = kept == entry_sum(id, key, version, size, created, updated, own)
            sound = sound and created <= _LAST and updated <= _LAST
        except (struct.error, AttributeError):  # numbers or an id that are none
            sound = False
        if not sound:
            raise self._damaged(f"the entry of {row[0]!r} is not what was written")

    def _check_count(self, connection: sqlite3.Connection, found: int) -> None:
        if (found,) != connection.execute("SELECT value FROM meta WHERE name = 'count'").fetchone():
            raise self._damaged("it has other entries than were written")

    def _check_unknown(self, connection: sqlite3.Connection, ids: list[str]) -> None:
        """Raise if an id that has no entry is in the second place of the ids."""
        with self._one_moment(connection):
            known = {place for place, *_ in connection.execute(_FIND, (json.dumps(ids),))}
            asked = [id for place, id in enumerate(ids) if place not in known]
            lost = connection.execute(_LOST, (json.dumps(asked),)).fetchone() if asked else None
        if lost is not None:
            raise self._damaged(f"the entry of {lost[0]!r} is lost")

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
            self._check_place(handle)
            if handle.connection is not None and handle.process != os.getpid():
                # SQLite believes to hold locks that belong to the other process. See ``_before_fork``.
                raise StateError(f"bank: {self.path} was open when this process was forked from outside Python")
            try:
                if handle.connection is None:
                    handle.keep(self._connect("rw"))
                yield handle.connection
                if handle.companions is None:
                    handle.companions = self._companions()
            except sqlite3.ProgrammingError:
                raise  # a mistake of ours
            except (sqlite3.Error, MemoryError, UnicodeError) as error:
                raise self._error(error, "bank") from error

    def _check_place(self, handle: _Handle) -> None:
        """Raise if the path no longer leads to the file that was opened: SQLite would go on with what nobody sees.

        Nor may its log and index go, which SQLite itself removes with the last connection alone.
        """
        kept = handle.companions
        if _which_file(self.path) != self._file or (kept is not None and kept != self._companions()):
            raise FileAccessError(
                f"bank: {self.path}: it, its -wal or its -shm was moved, removed or replaced while it was open here; "
                "nothing is read or written, and what was committed before may lie in the -wal: put them back "
                "together, or close the bank and open it anew"
            )

    def _companions(self) -> tuple:
        return _which_file(f"{self.path}-wal"), _which_file(f"{self.path}-shm")

    def _error(self, error: Exception, name: str) -> Exception:
        """SQLite's error as one of ours, which names the file."""
        code = _code(error)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return WaitedTooLongError(f"{name}: {self.path}: others wrote for {self.timeout} s")
        if code == sqlite3.SQLITE_NOTADB:
            return FileFormatError(f"{name}: {self.path}: not a SQLite file, or damaged at its beginning")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
            return FilePermissionError(f"{name}: {self.path}: cannot be written: {error}")
        if code == sqlite3.SQLITE_CANTOPEN:
            again = " any more" if name == "bank" else ""
            return FileAccessError(f"{name}: {self.path}: cannot be opened{again}: {error}")
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_PROTOCOL):
            return FileAccessError(f"{name}: {self.path}: cannot be read or written: {error}")
        # Malformed pages, a schema that is not ours, text that is not UTF-8, a constraint that does not hold, …
        return FileFormatError(f"{name}: {self.path}: damaged: {error or type(error).__name__}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: committed at the end, undone after an error."""
        with self._connection() as connection, self._turn(), self._begun(connection):
            yield connection

    @contextlib.contextmanager
    def _one_moment(self, connection: sqlite3.Connection) -> Iterator[None]:
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
    def _begun(self, connection: sqlite3.Connection) -> Iterator[None]:
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # what stopped it is to be told, and closing undoes it too
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
            lock = _open_lock(Path(f"{self.path}-lock"), self.path)
            try:
                while True:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > end:
                            raise late from None
                        time.sleep(0.0005)
                    except OSError as error:
                        if error.errno not in _NO_LOCKS:
                            raise file_error(error, "bank", f"{self.path}-lock") from error
                        break  # SQLite's own locks remain
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
                "trusted_schema = OFF",  # the file may come from elsewhere
            ):
                connection.execute(f"PRAGMA {setting}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self, layout: dict[str, str], row_bytes: int, check) -> tuple[dict[str, str], int, str]:
        """Check, make or upgrade the file; returns its layout, row size and name."""
        handle = _Handle()
        with self._guard:
            self._handles.add(handle)  # so that a fork in another thread waits for it
        try:
            with handle.lock, contextlib.closing(handle):
                handle.keep(self._connect("rw"))
                connection = handle.connection
                if not self._version_of(connection):
                    with self._turn():
                        if not self._version_of(connection):  # nobody else made it meanwhile
                            _create(connection, layout, row_bytes)
                found, size, _, _ = self._read_meta(connection)
                replace = check is not None and check(found, size)
                if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    with self._turn():
                        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                            raise FileAccessError(
                                f"path: {self.path}: its file system has no shared memory for SQLite's WAL"
                            )
                if replace or self._version_of(connection) < FORMAT_VERSION:
                    with self._turn(), self._begun(connection):
                        if self._version_of(connection) < FORMAT_VERSION:
                            self._upgrade(connection, size)
                        if replace:
                            connection.execute("UPDATE meta SET value = ? WHERE name = 'layout'", (json.dumps(layout),))
                self._file = _which_file(self.path)  # layered file systems copy one that is opened to be written
                found, size, unchecked, name = self._read_meta(connection)
                self.unchecked = unchecked > 0
                return found, size, name
        except sqlite3.ProgrammingError:
            raise
        except (sqlite3.Error, MemoryError, UnicodeError) as error:
            raise self._error(error, "path") from error

    def _upgrade(self, connection: sqlite3.Connection, row_bytes: int) -> None:
        """Bring a file of a version before to this one, within a transaction; reads every row once."""
        before = self._version_of(connection)
        old_row_sum = {2: row_sum_2, 3: row_sum_3}.get(before)  # version 1 had none
        for statement in _UPGRADE[before].split(";"):
            connection.execute(statement)
        last, done = -1, 0
        while rows := connection.execute(_NEXT, (last,)).fetchall():
            checked = []
            for id, key, version, size, created, updated, kept, kept_entry, state in rows:
                numbers = (key, version, size, created, updated)
                sound = type(id) is str and all(type(number) is int and number >= 0 for number in numbers)
                sound = sound and type(state) is bytes and len(state) == row_bytes and max(created, updated) <= _LAST
                if sound and old_row_sum is not None:
                    sound = kept == old_row_sum(id, version, state) and kept_entry == entry_sum_2(id, *numbers, kept)
                if not sound:
                    raise self._damaged(f"the row of {id!r} is not as it was written")
                new = row_sum(id, version, state)
                checked.append((new, entry_sum(id, *numbers, new), id))
            connection.executemany(
                "UPDATE memories SET row_sum = ?, entry_sum = ? WHERE id = ?",
                sorted(checked, key=operator.itemgetter(2)),
            )
            last, done = rows[-1][1], done + len(rows)
        self._check_count(connection, done)
        connection.execute("DROP INDEX memories_by_key")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")

    def _read_meta(self, connection: sqlite3.Connection) -> tuple[dict[str, str], int, int, str]:
        """Layout, row size, the last version of rows that were written without a checksum (0: there are none), name."""
        meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
        size, unchecked, name = meta.get("row_bytes"), meta.get("unchecked", 0), meta.get("name", "")
        try:
            layout = json.loads(meta.get("layout"))
        except (TypeError, ValueError, RecursionError):
            layout = None
        if not all(type(number) is int for number in (size, unchecked, meta.get("version"))) or type(name) is not str:
            layout = None
        if not isinstance(layout, dict) or not all(isinstance(value, str) for value in layout.values()):
            raise self._damaged("its head (the table meta) is not what was written")
        return layout, size, unchecked, name

    def _version_of(self, connection: sqlite3.Connection) -> int:
        """The format version of a store that this version reads, 0 for an empty file, else ValueError."""
        with self._one_moment(connection):
            # What has no page of its own is code: a trigger, a view, a virtual table. SQLite's own parts have one.
            parts = connection.execute("SELECT type, name, rootpage FROM sqlite_master").fetchall()
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application == APPLICATION_ID and 1 <= version <= FORMAT_VERSION:
            names = {(kind, name) for kind, name, page in parts if not (page and name.startswith("sqlite_"))}
            if names != _PARTS[version] or not all(page for _, _, page in parts):
                raise self._damaged(f"its tables and indices are {sorted(names)}")
            return version
        if application == APPLICATION_ID:
            raise FileFormatError(
                f"path: {self.path}: a bank of format version {version}, this version reads 1 to {FORMAT_VERSION}"
            )
        if application or version or parts:
            raise FileFormatError(f"path: {self.path}: a SQLite file, but no bank (application_id {application:#x})")
        return 0


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


def check_ids(ids: Iterable[str], name: str = "ids") -> list[str]:
    """``ids`` as a list.

    Raises:
        TypeError: not an iterable of strings.
        ValueError: one is empty, longer than 512 bytes of UTF-8, holds NUL or half of a surrogate pair, or comes twice.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ArgumentTypeError(f"{name}: got a {type(ids).__name__}, allowed a list of strings")
    try:
        ids = list(ids)
    except TypeError as error:  # such as a tensor of no dimension
        raise ArgumentTypeError(f"{name}: got a {type(ids).__name__}, allowed a list of strings") from error
    if not _plain(ids):
        for id in ids:
            check_id(id, name)
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(id for id in ids if id in seen or seen.add(id))
        raise ArgumentError(f"{name}: got {twice!r} twice, allowed each once")
    return ids


def _plain(ids: list[str]) -> bool:
    """Whether ids are sure to be allowed, each by itself; all of them at one look, for they come by hundreds."""
    if set(map(type, ids)) != {str}:
        return False
    text, sizes = "".join(ids), set(map(len, ids))
    return text.isascii() and "\0" not in text and 1 <= min(sizes) and max(sizes) <= MAX_ID_BYTES


def check_id(id: str, name: str = "id") -> str:
    """``id`` itself; errors as ``check_ids``."""
    if not isinstance(id, str):
        raise ArgumentTypeError(f"{name}: got {shown(id)}, a {type(id).__name__}, allowed strings")
    try:
        size = len(id.encode())
    except UnicodeEncodeError:
        raise ArgumentError(f"{name}: got {id!r}, which holds half of a surrogate pair") from None
    if not 1 <= size <= MAX_ID_BYTES or "\0" in id:
        raise ArgumentError(f"{name}: got {shown(id)} of {size} bytes, allowed 1 to {MAX_ID_BYTES} bytes without NUL")
    return id


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


def _open_lock(path: Path, bank: Path) -> int:
    """A descriptor of the lock file, made with the bank's mode if there is none; a link is not followed."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with naming_files("bank", path):
        try:
            lock = os.open(path, flags)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # another process was quicker
                lock = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
                _give_to_owner(lock, os.stat(bank))
                return lock
            lock = os.open(path, flags)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise WrongPathKindError(f"bank: {path}: a symbolic link, allowed a file") from error
            raise
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            os.close(lock)
            raise WrongPathKindError(f"bank: {path}: not a file")
        return lock


def _give_to_owner(lock: int, bank: os.stat_result) -> None:
    """Owner, group and mode of the bank for its lock file: root must not lock the owner out."""
    made, mode = os.fstat(lock), stat.S_IMODE(bank.st_mode) & 0o666
    try:
        if (made.st_uid, made.st_gid) != (bank.st_uid, bank.st_gid):
            os.fchown(lock, bank.st_uid if made.st_uid != bank.st_uid else -1, bank.st_gid)
    except OSError:  # not this user's to give away: what the bank's group may is no right of another group
        mode &= ~stat.S_IRWXG
    os.fchmod(lock, mode)


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
        values = {"layout": json.dumps(layout), "row_bytes": row_bytes, "version": start, "count": 0}
        values["name"] = secrets.token_hex(16)
        connection.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite ends it itself where the disk is full
            connection.execute("ROLLBACK")
        raise


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
