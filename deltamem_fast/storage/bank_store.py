"""Rows of bytes by id in one SQLite file that many processes and threads share; ``MemoryBank`` without tensors.

Needs no tensors. What holds, whoever is killed when: a write is there as a whole or not at all, it was made on the
version it says it was, and once ``write`` has returned it stays. What is read is what was written, or an error that
names the file: every row and every entry has a checksum, and every id is in two places.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..arguments import MOST_64, check_choice, check_integer
from ..errors import ArgumentError, ArgumentTypeError, FileAccessError
from .bank_entries import COLUMNS, ORDERS, BankEntry, check_count, check_unknown, entry_of, find
from .bank_file import BankFile
from .bank_ids import BankConflict, after, check_ids
from .bank_schema import FORMAT_VERSION, Head, create, read_head, upgrade, version_of, write_layout
from .bank_sqlite import damaged, empty_log, one_moment, transaction
from .checksums import entry_sum, row_sum
from .files import as_path

READ = """
SELECT asked.key, memories.version, memories.row_sum, states.state FROM json_each(?) AS asked
CROSS JOIN memories ON memories.id = asked.value LEFT JOIN states ON states.key = memories.key
"""


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
        self._file = BankFile(self.path, durable, timeout)
        try:
            head = self._open(dict(layout), row_bytes, check)
        except BaseException:
            self.close()
            raise
        self.layout, self.row_bytes, self.name = head.layout, head.row_bytes, head.name
        self.unchecked = head.unchecked > 0

    def _open(self, layout: dict[str, str], row_bytes: int, check) -> Head:
        """Check, make or upgrade the file."""
        path = self.path
        with self._file.opening() as connection:
            if not version_of(connection, path):
                with self._file.turn():
                    if not version_of(connection, path):  # nobody else made it meanwhile
                        create(connection, layout, row_bytes)
            head = read_head(connection, path)
            replace = check is not None and check(head.layout, head.row_bytes)
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                with self._file.turn():
                    if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                        raise FileAccessError(f"path: {path}: its file system has no shared memory for SQLite's WAL")
            if replace or version_of(connection, path) < FORMAT_VERSION:
                with self._file.turn(), transaction(connection):
                    if version_of(connection, path) < FORMAT_VERSION:
                        upgrade(connection, path, head.row_bytes)
                    if replace:
                        write_layout(connection, layout)
            return read_head(connection, path)

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
        with self._file.connection() as connection:
            # One at a time: rows that are fetched together push one another out of the processor's caches.
            for place, version, kept, row in connection.execute(READ, (json.dumps(ids),)):
                sound = type(row) is bytes and len(row) == size and type(version) is int and version >= 1
                if not sound or row_sum(ids[place], version, row) != kept:
                    raise damaged(self.path, f"the row of {ids[place]!r} is not what was written")
                found += 1
                yield place, version, row
            if found < len(ids):
                check_unknown(connection, self.path, ids)

    def versions(self, ids: Sequence[str]) -> list[int]:
        """Versions of ``ids``, all of one moment; 0 for an unknown id. Errors as ``read``."""
        ids = check_ids(ids)
        with self._file.connection() as connection:
            return [version for _, version, _ in find(connection, self.path, ids)]

    def entries(
        self,
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
            raise ArgumentError(f"prefix: got {prefix!r:.80}, which holds half of a surrogate pair")
        check_choice(order_by, "order_by", ORDERS)
        for name, value in (("limit", 0 if limit is None else limit), ("offset", offset)):
            check_integer(value, name, 0, None)
        end, way = after(prefix), "DESC" if descending else "ASC"
        where = "WHERE id >= :first" + ("" if end is None else " AND id < :end") if prefix else ""
        order = f"{order_by} {way}" + ("" if order_by == "id" else f", id {way}")
        sql = f"SELECT {COLUMNS} FROM memories {where} ORDER BY {order} LIMIT :limit OFFSET :offset"
        most, first = MOST_64 if limit is None else min(limit, MOST_64), min(offset, MOST_64)
        values = {"first": prefix, "end": end, "limit": most, "offset": first}
        with self._file.connection() as connection, one_moment(connection):
            found = [entry_of(self.path, row) for row in connection.execute(sql, values)]
            if not prefix and limit is None and not offset:
                check_count(connection, self.path, len(found))
        return found

    def count(self) -> int:
        """How many ids there are."""
        with self._file.connection() as connection, one_moment(connection):
            found = connection.execute("SELECT count(*) FROM memories").fetchone()[0]
            check_count(connection, self.path, found)
            return found

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
        with self._file.transaction() as connection:
            found = find(connection, self.path, ids)
            moved = {id: (made, at) for id, made, (_, at, _) in zip(ids, expected or (), found) if made != at}
            if moved:
                raise BankConflict(moved)
            # One count for the whole store: an id that is deleted and made again never gets an old number back. It
            # goes on by chance, so that two copies of a file, each written to, have no version in common.
            step = 1 + int.from_bytes(os.urandom(3), "big")
            connection.execute("UPDATE meta SET value = value + ? WHERE name = 'version'", (step,))
            version = connection.execute("SELECT value FROM meta WHERE name = 'version'").fetchone()[0]
            # Beyond 64 bits SQLite goes on with floats.
            if type(version) is not int or version < 1 or any(known >= version for _, known, _ in found):
                raise damaged(self.path, "its count of versions is not what was written")
            now = time.time_ns() // 1000
            sums = [row_sum(id, version, row) for id, row in zip(ids, rows)]
            # In the order of the trees, so that a page is touched once.
            new = sorted((id, place) for place, (id, (key, *_)) in enumerate(zip(ids, found)) if key is None)
            old = sorted((key, id, place) for place, (id, (key, *_)) in enumerate(zip(ids, found)) if key is not None)
            free = connection.execute("SELECT coalesce(max(key), 0) + 1 FROM states").fetchone()[0]
            if type(free) is not int or not 0 < free <= MOST_64 - len(new):
                raise damaged(self.path, "its rows have other keys than were written")
            changed = connection.executemany(
                "UPDATE states SET state = ? WHERE key = ?", ((rows[place], key) for key, _, place in old)
            )
            if old and changed.rowcount != len(old):
                raise damaged(self.path, "an id has no row")

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
        with self._file.connection() as connection, self._file.turn():
            with transaction(connection):
                known = [(id, key) for id, (key, *_) in zip(ids, find(connection, self.path, ids)) if key is not None]
                connection.executemany("DELETE FROM states WHERE key = ?", ((key,) for _, key in known))
                connection.executemany("DELETE FROM memories WHERE id = ?", ((id,) for id, _ in known))
                connection.execute("UPDATE meta SET value = value - ? WHERE name = 'count'", (len(known),))
            if known:
                empty_log(connection, self._file.timeout)
        return len(known)

    def close(self) -> None:
        """Close every connection of this process; waits for calls in other threads. Again: nothing happens."""
        self._file.close()
