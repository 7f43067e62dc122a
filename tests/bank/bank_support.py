"""Helpers of the bank's tests, of the workers' processes too: the standard library and bank_store alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from deltamem_fast.storage.bank_store import BankConflict, BankStore

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ROW_BYTES = 9360  # of Qwen3-4B: an overflow page for each row
LAYOUT = {"kind": "test"}


def open_store(path, row_bytes: int = ROW_BYTES, **options) -> BankStore:
    return BankStore(path, LAYOUT, row_bytes, **({"durable": False} | options))


def sealed(fields: dict, size: int = ROW_BYTES) -> bytes:
    """A row that says what it is, and tells if any byte of it is of another write."""
    head = json.dumps(fields).encode()
    head = len(head).to_bytes(4, "big") + head
    filler = random.Random(head).randbytes(size - len(head) - 32)
    return head + filler + hashlib.sha256(head + filler).digest()


def unsealed(row: bytes) -> dict:
    assert hashlib.sha256(row[:-32]).digest() == row[-32:], "a row is half of one write and half of another"
    size = int.from_bytes(row[:4], "big")
    return json.loads(row[4 : 4 + size])


def add_one(store: BankStore, ids: list[str]) -> tuple[int, int]:
    """Count one up in the rows of ``ids``; returns the new version and how many conflicts came before."""
    conflicts = 0
    while True:
        versions, rows = store.read(ids)
        counts = [int.from_bytes(row or b"", "big") + 1 for row in rows]
        try:
            return store.write(ids, versions, [count.to_bytes(store.row_bytes, "big") for count in counts]), conflicts
        except BankConflict as conflict:
            assert set(conflict.ids) <= set(ids)
            conflicts += 1


def counts(store: BankStore, ids: list[str]) -> list[int]:
    return [int.from_bytes(row or b"", "big") for row in store.read(ids)[1]]


def check_file(path) -> None:
    """SQLite finds nothing wrong, and every entry has its row."""
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        entries = connection.execute("SELECT key FROM memories ORDER BY key").fetchall()
        assert entries == connection.execute("SELECT key FROM states ORDER BY key").fetchall()


def start(worker: str, *arguments, **options) -> subprocess.Popen:
    """A worker of this folder in a process of its own, its output in a pipe."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"), str(HERE)))}
    return subprocess.Popen(
        [sys.executable, str(HERE / worker), *map(str, arguments)], stdout=subprocess.PIPE, text=True,
        env=environment, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float = 120) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output
