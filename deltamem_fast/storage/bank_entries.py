"""What a bank's table ``memories`` says of its rows, each entry checked; no row is read."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from .bank_sqlite import damaged, one_moment
from .checksums import entry_sum

ORDERS = ("id", "updated", "created", "bytes")
LAST_MOMENT = 253_402_300_799_999_999  # microseconds, the last that a datetime can be
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

COLUMNS = "memories.id, memories.key, version, bytes, created, updated, row_sum, entry_sum"
FIND = f"""
SELECT asked.key, {COLUMNS} FROM json_each(?) AS asked CROSS JOIN memories ON memories.id = asked.value
"""
LOST = """
SELECT asked.value FROM json_each(?) AS asked CROSS JOIN memories INDEXED BY memories_ids
ON memories.id = asked.value LIMIT 1
"""


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


def find(connection: sqlite3.Connection, path: Path, ids: list[str]) -> list[tuple[int | None, int, int]]:
    """(key, version, created) of each id; (None, 0, 0) if it is unknown."""
    found: list[tuple[int | None, int, int]] = [(None, 0, 0)] * len(ids)
    rows = connection.execute(FIND, (json.dumps(ids),)).fetchall()
    for place, *row in rows:
        _check(path, row)
        found[place] = (row[1], row[2], row[4])
    if len(rows) < len(ids):
        check_unknown(connection, path, ids)
    return found


def entry_of(path: Path, row: Sequence) -> BankEntry:
    """The entry that a row of ``COLUMNS`` is."""
    _check(path, row)
    id, _, version, size, *moments = row[:6]
    return BankEntry(id, version, size, *(_EPOCH + timedelta(microseconds=moment) for moment in moments))


def _check(path: Path, row: Sequence) -> None:
    # By type and range too: whoever can write the file can make checksums that fit.
    try:
        id, key, version, size, created, updated, own, kept = row
        sound = kept == entry_sum(id, key, version, size, created, updated, own)
        sound = sound and created <= LAST_MOMENT and updated <= LAST_MOMENT
    except (struct.error, AttributeError):  # numbers or an id that are none
        sound = False
    if not sound:
        raise damaged(path, f"the entry of {row[0]!r:.80} is not what was written")


def check_count(connection: sqlite3.Connection, path: Path, found: int) -> None:
    """Raise unless so many entries were written."""
    if (found,) != connection.execute("SELECT value FROM meta WHERE name = 'count'").fetchone():
        raise damaged(path, "it has other entries than were written")


def check_unknown(connection: sqlite3.Connection, path: Path, ids: list[str]) -> None:
    """Raise if an id that has no entry is in the second place of the ids."""
    with one_moment(connection):
        known = {place for place, *_ in connection.execute(FIND, (json.dumps(ids),))}
        asked = [id for place, id in enumerate(ids) if place not in known]
        lost = connection.execute(LOST, (json.dumps(asked),)).fetchone() if asked else None
    if lost is not None:
        raise damaged(path, f"the entry of {lost[0]!r} is lost")
