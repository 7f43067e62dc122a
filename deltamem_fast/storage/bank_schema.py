"""The tables of a bank's file: made, read, checked, and brought to this version from those before."""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FileFormatError
from .bank_entries import COLUMNS, LAST_MOMENT, check_count
from .bank_sqlite import damaged, one_moment, transaction
from .checksums import entry_sum, entry_sum_2, row_sum, row_sum_2, row_sum_3

APPLICATION_ID = 0x644D656D  # "dMem", in the file's header
FORMAT_VERSION = 4  # in the file's header as user_version; 1 had no checksums, 2 and 3 others of the rows
_PAGE_SIZES = (4096, 8192, 16384)

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
# What the parts of a file of any version are declared with: no CHECK, DEFAULT, WHERE or generated column, which SQLite
# would run, no function, no operator.
_WORDS = frozenset(re.findall(r"\w+", _SCHEMA)) | {"entries", "row_crc", "entry_crc"}
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
INSERT OR REPLACE INTO meta SELECT 'name', lower(hex(randomblob(16)))
""",
    2: """
ALTER TABLE memories RENAME COLUMN row_crc TO row_sum;
ALTER TABLE memories RENAME COLUMN entry_crc TO entry_sum;
INSERT OR IGNORE INTO meta SELECT 'name', lower(hex(randomblob(16)))
""",
    3: "ALTER TABLE memories RENAME COLUMN entry_crc TO entry_sum",
}
# What a file of each version consists of; a trigger or a view among it could change what is written.
_OF_ALL = {("table", "meta"), ("table", "states"), ("index", "entries_by_update")}
_PARTS = dict.fromkeys((2, 3, 4), _OF_ALL | {("table", "memories"), ("index", "memories_ids")})
_PARTS[1] = _OF_ALL | {("table", "entries")}
_NEXT = f"""
SELECT {COLUMNS}, state FROM states CROSS JOIN memories INDEXED BY memories_by_key ON memories.key = states.key
WHERE states.key > ? ORDER BY states.key LIMIT 1000
"""


def page_size_for(row_bytes: int) -> int:
    """The page size, of 4096, 8192 and 16384, with which rows of ``row_bytes`` take the least room; a tie: 8192."""
    return min(_PAGE_SIZES, key=lambda page: (round(bytes_per_row(row_bytes, page)), page != 8192))


def bytes_per_row(row_bytes: int, page: int) -> float:
    """Of a table of (integer key, blob) rows, after https://sqlite.org/fileformat2.html#b_tree_pages."""
    payload = row_bytes + 8  # key, and the record's header
    local, overflow = payload, 0
    if payload > page - 35:
        least = (page - 12) * 32 // 255 - 23
        local = least + (payload - least) % (page - 4)
        local = local if local <= page - 35 else least
        overflow = -(-(payload - local) // (page - 4))
    return page / max(1, (page - 8) // (local + 12)) + overflow * page


def create(connection: sqlite3.Connection, layout: dict[str, str], row_bytes: int) -> None:
    """Make the tables of an empty file."""
    connection.execute(f"PRAGMA page_size = {page_size_for(row_bytes)}")
    with transaction(connection, "EXCLUSIVE"):
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        # Counted from a random number: a version of one store says nothing about another that was put in its place.
        start = int.from_bytes(os.urandom(5), "big")
        values = {"layout": json.dumps(layout), "row_bytes": row_bytes, "version": start, "count": 0}
        values["name"] = secrets.token_hex(16)
        connection.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def version_of(connection: sqlite3.Connection, path: Path) -> int:
    """The format version of a store that this version reads, 0 for an empty file, else ValueError."""
    with one_moment(connection):
        # What has no page of its own is code: a trigger, a view, a virtual table. SQLite's own parts have one.
        parts = connection.execute("SELECT type, name, rootpage, sql FROM sqlite_master").fetchall()
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application == APPLICATION_ID and 1 <= version <= FORMAT_VERSION:
        names = {(kind, name) for kind, name, page, _ in parts if not (page and name.startswith("sqlite_"))}
        if names != _PARTS[version] or not all(page for _, _, page, _ in parts):
            raise damaged(path, f"its tables and indices are {sorted(names)}")
        for kind, name, _, sql in parts:
            if (kind, name) in names and not _is_plain(sql):
                raise damaged(path, f"its {kind} {name} is declared with more than columns")
        return version
    if application == APPLICATION_ID:
        raise FileFormatError(
            f"path: {path}: a bank of format version {version}, this version reads 1 to {FORMAT_VERSION}"
        )
    if application or version or parts:
        raise FileFormatError(f"path: {path}: a SQLite file, but no bank (application_id {application:#x})")
    return 0


def _is_plain(sql: Any) -> bool:
    """Whether a declaration is names and kinds of columns alone."""
    plain = isinstance(sql, str) and re.fullmatch(r'[\w\s(),"]*', sql) is not None
    return plain and _WORDS.issuperset(re.findall(r"\w+", sql))


class Head(NamedTuple):
    """The table ``meta`` of a file.

    Attributes:
        layout: what a later opening has to know of the rows.
        unchecked: the last version of rows that were written without a checksum; 0: there are none.
        name: of this store and its copies alone.
    """

    layout: dict[str, str]
    row_bytes: int
    unchecked: int
    name: str


def read_head(connection: sqlite3.Connection, path: Path) -> Head:
    """The head of a file of any version that this one reads.

    Raises:
        FileFormatError: it is damaged.
    """
    meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    size, unchecked, name = meta.get("row_bytes"), meta.get("unchecked", 0), meta.get("name", "")
    try:
        layout = json.loads(meta.get("layout"))
    except (TypeError, ValueError, RecursionError):
        layout = None
    if not all(type(number) is int for number in (size, unchecked, meta.get("version"))) or type(name) is not str:
        layout = None
    if not isinstance(layout, dict) or not all(isinstance(value, str) for value in layout.values()):
        raise damaged(path, "its head (the table meta) is not what was written")
    return Head(layout, size, unchecked, name)


def write_layout(connection: sqlite3.Connection, layout: dict[str, str]) -> None:
    """Put another layout in the place of the stored one."""
    connection.execute("UPDATE meta SET value = ? WHERE name = 'layout'", (json.dumps(layout),))


def upgrade(connection: sqlite3.Connection, path: Path, row_bytes: int) -> None:
    """Bring a file of a version before to this one, within a transaction; reads every row once."""
    before = version_of(connection, path)
    old_row_sum = {2: row_sum_2, 3: row_sum_3}.get(before)  # version 1 had none
    for statement in (*_UPGRADE[before].split(";"), "CREATE INDEX memories_by_key ON memories (key)"):
        connection.execute(statement)
    last, done = -1, 0
    while rows := connection.execute(_NEXT, (last,)).fetchall():
        checked = []
        for id, key, version, size, created, updated, kept, kept_entry, state in rows:
            numbers = (key, version, size, created, updated)
            sound = type(id) is str and all(type(number) is int and number >= 0 for number in numbers)
            sound = sound and type(state) is bytes and len(state) == row_bytes and max(created, updated) <= LAST_MOMENT
            if sound and old_row_sum is not None:
                sound = kept == old_row_sum(id, version, state) and kept_entry == entry_sum_2(id, *numbers, kept)
            if not sound:
                raise damaged(path, f"the row of {id!r:.80} is not as it was written")
            new = row_sum(id, version, state)
            checked.append((id, new, entry_sum(id, *numbers, new)))
        connection.executemany("UPDATE memories SET row_sum = ?2, entry_sum = ?3 WHERE id = ?1", sorted(checked))
        last, done = rows[-1][1], done + len(rows)
    check_count(connection, path, done)
    connection.execute("DROP INDEX memories_by_key")
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
