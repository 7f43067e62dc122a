"""BankStore: rows of bytes by id, versions, refusals, lists, and the files that it does not take."""

import os
import pickle
import resource
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from bank_support import LAYOUT, check_file, open_store

from deltamem_fast.errors import FileAccessError, FileFormatError
from deltamem_fast.storage import bank_entries, bank_schema, bank_store, checksums
from deltamem_fast.storage.bank_store import BankConflict, BankStore

SIZE = 100
A, B, C = (bytes([n]) * SIZE for n in b"abc")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "users.bank"


@pytest.fixture
def store(path):
    store = open_store(path, SIZE)
    yield store
    store.close()


def content(store):
    ids = [entry.id for entry in store.entries()]
    return dict(zip(ids, zip(*store.read(ids))))


def test_round_trip(store):
    version = store.write(["a", "b"], [0, 0], [A, memoryview(B)])
    assert store.read(["b", "x", "a"]) == ([version, 0, version], [B, None, A])
    assert store.versions(["x", "b"]) == [0, version]
    assert store.count() == 2 and [entry.bytes for entry in store.entries()] == [SIZE, SIZE]
    assert store.read([]) == ([], []) and store.write([], [], []) > version


def test_each(store):
    version = store.write(["a", "b"], [0, 0], [A, B])
    assert sorted(store.each(["b", "x", "a"])) == [(0, version, B), (2, version, A)]
    rows = store.each(["a", "b"])
    next(rows)
    rows.close()
    store.write(["a"], [version], [C])
    with pytest.raises(ValueError, match="ids: got 'a' twice"):
        next(store.each(["a", "a"]))


def test_it_stays(path):
    with closing(open_store(path, SIZE)) as store:
        version = store.write(["a"], [0], [A])
    with closing(BankStore(path, {"kind": "other"}, 7)) as store:
        assert store.layout == LAYOUT and store.row_bytes == SIZE, "what the file was made with"
        assert store.read(["a"]) == ([version], [A])


def test_any_text_is_an_id(store):
    ids = [
        "é",
        "e\u0301",
        "😀",
        '"',
        "\\",
        "%",
        "_",
        "a'b",
        "\n",
        "\ud7ff",
        "\U0010ffff",
        " a",
        "a ",
        "1",
        "01",
        "x" * 512,
    ]
    rows = [bytes([n]) * SIZE for n in range(len(ids))]
    store.write(ids, [0] * len(ids), rows)
    assert store.read(ids[::-1])[1] == rows[::-1]
    assert [entry.id for entry in store.entries()] == sorted(ids)


def test_a_write_on_an_old_version_is_refused(store):
    first = store.write(["a", "b"], [0, 0], [A, B])
    second = store.write(["a"], [first], [C])
    before = content(store)
    with pytest.raises(BankConflict) as refused:
        store.write(["new", "b", "a"], [0, first, first], [A, A, A])
    assert refused.value.moved == {"a": (first, second)} and refused.value.ids == ["a"]
    assert f"'a' (made on version {first}, found version {second})" in str(refused.value)
    with pytest.raises(BankConflict, match=r"'b' \(made on no entry, found version"):
        store.write(["b"], [0], [A])
    with pytest.raises(BankConflict, match=r"'z' \(made on version 7, found no entry\)"):
        store.write(["z"], [7], [A])
    assert content(store) == before
    assert store.write(["a", "z"], None, [A, A]) > second, "None takes any version"


def test_a_conflict_travels_between_processes():
    conflict = pickle.loads(pickle.dumps(BankConflict({f"user-{n}": (1, n) for n in range(9)})))
    assert conflict.ids == [f"user-{n}" for n in range(9)] and "and 4 more" in str(conflict)
    assert isinstance(conflict, RuntimeError)


def test_no_version_comes_twice(store, tmp_path):
    old = store.write(["a"], [0], [A])
    for _ in range(3):
        assert store.delete(["a"]) == 1
        new = store.write(["a"], [0], [A])
        assert new > old
        with pytest.raises(BankConflict):
            store.write(["a"], [old], [B])
        old = new
    # nor in a store that was put in this one's place
    with closing(open_store(tmp_path / "other.bank", SIZE)) as other:
        assert abs(other.write(["a"], [0], [A]) - old) > 1000


def test_delete(store):
    store.write(["a", "b", "c"], [0, 0, 0], [A, B, C])
    assert store.delete(["a", "x", "c"]) == 2 and store.delete(["a"]) == 0 and store.delete([]) == 0
    assert list(content(store)) == ["b"]


def test_what_is_deleted_is_not_in_the_file(path):
    secret = os.urandom(3000)
    with closing(open_store(path, 30_000)) as store:
        store.write(["a", "b"], [0, 0], [secret * 10, bytes(30_000)])
        store.delete(["a"])
    assert not any(secret[n : n + 100] in path.read_bytes() for n in range(0, 3000, 500))
    assert sorted(file.name for file in path.parent.iterdir()) == ["users.bank", "users.bank-lock"]


BAD_IDS = [
    (["a", "a"], ValueError, "ids: got 'a' twice"),
    ([""], ValueError, "ids: got '' of 0 bytes, allowed 1 to 512 bytes"),
    (["é" * 257], ValueError, "of 514 bytes"),
    (["a\0b"], ValueError, "without NUL"),
    (["\ud800"], ValueError, "half of a surrogate pair"),
    (["a", 5], TypeError, "ids: got 5, a int"),
    ([b"a"], TypeError, "allowed strings"),
    ("abc", TypeError, "ids: got a str, allowed a list of strings"),
    (5, TypeError, "ids: got a int"),
]


@pytest.mark.parametrize(("ids", "error", "message"), BAD_IDS)
def test_bad_ids_change_nothing(store, ids, error, message):
    store.write(["a"], [0], [A])
    before = content(store)
    count = len(ids) if isinstance(ids, list) else 1
    calls = (store.read, store.versions, store.delete, lambda ids: store.write(ids, [0] * count, [B] * count))
    for call in calls:
        with pytest.raises(error, match=message):
            call(ids)
    assert content(store) == before


def test_bad_rows_change_nothing(store):
    for arguments, message in (
        ((["a"], [0], [A + b"x"]), "rows: 'a': got 101 bytes, allowed 100"),
        ((["a", "b"], [0, 0], [A]), "rows: got 1, allowed one for each of 2 ids"),
        ((["a"], [0, 0], [A]), "expected: got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            store.write(*arguments)
    with pytest.raises(TypeError):
        store.write(["a"], [0], ["text"])
    assert store.count() == 0


def test_an_error_within_a_write_undoes_it(store):
    first = store.write(["a"], [0], [A])

    class Broken(list):
        def __getitem__(self, place):
            if place == 1:
                raise KeyboardInterrupt
            return super().__getitem__(place)

    with pytest.raises(KeyboardInterrupt):
        store.write(["a", "b"], [first, 0], Broken([B, B]))
    assert content(store) == {"a": (first, A)}
    store.write(["a"], [first], [B])


def test_entries(store):
    ids = ["b", "a", "ab", "ac", "a\U0010ffff", "\U0010ffff", "\U0010ffffz", "\ud7ff", "\ue000"]
    for id in ids:
        store.write([id], [0], [A])
    names = lambda **options: [entry.id for entry in store.entries(**options)]  # noqa: E731
    assert names() == sorted(ids) and names(descending=True) == sorted(ids)[::-1]
    for prefix in ("", "a", "ab", "x", "\ud7ff", "\U0010ffff", "a\U0010ffff"):
        assert names(prefix=prefix) == sorted(id for id in ids if id.startswith(prefix)), prefix
    assert names(order_by="created") == ids
    store.write(["a"], None, [B])
    assert names(order_by="updated")[-1] == "a" and names(order_by="created") == ids
    assert names(order_by="bytes") == sorted(ids)
    assert names(limit=2) == sorted(ids)[:2] and names(limit=0) == []
    assert names(limit=2, offset=3) == sorted(ids)[3:5] and names(offset=7) == sorted(ids)[7:]
    for options, message in (
        ({"order_by": "version; DROP TABLE meta"}, "allowed id, updated, created, bytes"),
        ({"limit": -1}, "limit: got -1"),
        ({"offset": 1.5}, "offset: got 1.5"),
        ({"limit": True}, "limit: got True"),
    ):
        with pytest.raises(ValueError, match=message):
            store.entries(**options)
    assert names(limit=10**400) == sorted(ids) and names(offset=10**400) == []
    with pytest.raises(ValueError, match="prefix: got .* half of a surrogate pair"):
        store.entries(prefix="a\ud800")
    with pytest.raises(TypeError, match="prefix: got a int"):
        store.entries(prefix=1)


def test_an_entry_says_what_and_when(store):
    before = datetime.now(UTC)
    store.write(["a"], [0], [A])
    version = store.write(["a"], None, [B])
    (entry,) = store.entries()
    assert (entry.id, entry.version, entry.bytes) == ("a", version, SIZE)
    assert before - timedelta(seconds=1) < entry.created <= entry.updated < datetime.now(UTC) + timedelta(seconds=1)
    assert entry.created.tzinfo is UTC
    with pytest.raises(AttributeError):
        entry.id = "b"


def plan(path, sql, *values):
    with closing(sqlite3.connect(path)) as connection:
        return " | ".join(row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + sql, values))


def test_nothing_scans_or_sorts(store, path):
    """A million rows: whatever has an index must use it, and rows are looked up by it."""
    store.write(["a"], [0], [A])
    for sql in (bank_store.READ, bank_entries.FIND, bank_entries.LOST):
        assert "SCAN memories" not in plan(path, sql, "[]") and "SCAN states" not in plan(path, sql, "[]")
    for order in ("id", "updated DESC, id DESC"):
        assert "TEMP B-TREE" not in plan(path, f"SELECT id, created FROM memories ORDER BY {order}")
    assert "SEARCH" in plan(path, "SELECT id FROM memories WHERE id >= 'a' AND id < 'b' ORDER BY id")


@pytest.mark.parametrize("row_bytes", (8, 780, 9360, 4 * 36 * (64 * 4 + 1)))
def test_little_room_is_wasted(path, row_bytes):
    rows, batch = 4000, 500
    with closing(open_store(path, row_bytes)) as store:
        for start in range(0, rows, batch):
            ids = [f"user-{n:08}" for n in range(start, start + batch)]
            store.write(ids, [0] * batch, [os.urandom(row_bytes)] * batch)
    size = path.stat().st_size / rows
    assert size < 1.17 * row_bytes + 150, size
    predicted = bank_schema.bytes_per_row(row_bytes, bank_schema.page_size_for(row_bytes))
    assert 0 <= size - predicted < 150 + 0.05 * row_bytes


def test_opening(tmp_path):
    deep = tmp_path / "a b" / "50%" / "x?y#z.bank"
    with closing(open_store(deep, SIZE)) as store:
        store.write(["a"], [0], [A])
    (tmp_path / "link.bank").symlink_to(deep)
    with closing(open_store(tmp_path / "link.bank", SIZE)) as store, closing(open_store(deep, SIZE)) as other:
        assert store.read(["a"])[1] == [A] and store.path == other.path
    (tmp_path / "empty.bank").touch()
    with closing(open_store(tmp_path / "empty.bank", SIZE)) as store:
        assert store.count() == 0
    with pytest.raises(IsADirectoryError, match="a directory, allowed a file"):
        open_store(tmp_path, SIZE)
    with pytest.raises(OSError):
        open_store(deep / "below.bank", SIZE)
    for wrong in (0, -1, 1.5, True, "9"):
        with pytest.raises(ValueError, match="row_bytes: got"):
            open_store(tmp_path / "new.bank", wrong)
    assert not (tmp_path / "new.bank").exists()


def sqlite_file(path, *statements):
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda path: path.write_bytes(b"no database, whatever its name says" * 999), "not a SQLite file"),
        (lambda path: path.write_bytes(b"short"), "not a SQLite file"),
        (lambda path: sqlite_file(path, "CREATE TABLE entries (id)"), "a SQLite file, but no bank"),
        (lambda path: sqlite_file(path, "PRAGMA journal_mode = WAL", "CREATE TABLE a (id)"), "but no bank"),
        (lambda path: sqlite_file(path, "PRAGMA application_id = 77"), r"but no bank \(application_id 0x4d\)"),
    ),
)
def test_other_files_are_refused_and_kept(path, make, message):
    make(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        open_store(path, SIZE)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["users.bank"]


def test_a_newer_format_is_refused_and_kept(path):
    open_store(path, SIZE).close()
    sqlite_file(path, "PRAGMA user_version = 5")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a bank of format version 5, this version reads 1 to 4"):
        open_store(path, SIZE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [None, "row", "entry"])
@pytest.mark.parametrize("before", [2, 3])
def test_a_file_with_the_checksums_of_a_version_before(path, before, damage):
    rows = {"ada": A, "ben": bytes(SIZE)}
    with closing(open_store(path, SIZE)) as store:
        version = store.write(list(rows), [0, 0], list(rows.values()))
    with closing(sqlite3.connect(path)) as connection:
        for id, *entry in connection.execute(
            "SELECT id, key, version, bytes, created, updated FROM memories"
        ).fetchall():
            row = {2: checksums.row_sum_2, 3: checksums.row_sum_3}[before](id, version, rows[id]) + (damage == "row")
            sums = row, checksums.entry_sum_2(id, *entry, row) + (damage == "entry"), id
            connection.execute("UPDATE memories SET row_sum = ?, entry_sum = ? WHERE id = ?", sums)
        connection.execute("ALTER TABLE memories RENAME COLUMN entry_sum TO entry_crc")
        if before == 2:
            connection.execute("ALTER TABLE memories RENAME COLUMN row_sum TO row_crc")
        connection.execute(f"PRAGMA user_version = {before}")
        connection.commit()
    if damage:
        with pytest.raises(FileFormatError, match="the row of 'ada' is not as it was written"):
            open_store(path, SIZE)
        return
    for _ in range(2):
        with closing(open_store(path, SIZE)) as store:
            assert store.read(["ben", "ada"]) == ([version] * 2, [bytes(SIZE), A])
            assert store.write(["eve"], None, [A]) > version


def test_a_damaged_file_is_no_silent_loss(path):
    with closing(open_store(path, 9360)) as store:
        store.write([f"user-{n}" for n in range(50)], [0] * 50, [os.urandom(9360)] * 50)
    data = bytearray(path.read_bytes())
    data[8192:16384] = os.urandom(8192)
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=f"{path}: damaged"), closing(open_store(path, 9360)) as store:
        store.read([f"user-{n}" for n in range(50)])
        store.entries()


def test_closed(store):
    store.close()
    store.close()
    for call in (store.count, lambda: store.read(["a"]), lambda: store.write(["a"], None, [A])):
        with pytest.raises(ValueError, match="was closed"):
            call()


def test_the_format_is_frozen(store, path):
    """A change of these needs a new format version."""
    store.write(["a"], [0], [A])
    with closing(sqlite3.connect(path)) as connection:
        tables = {
            table: [row[1:3] for row in connection.execute(f"PRAGMA table_info({table})")]
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        assert connection.execute("PRAGMA application_id").fetchone() == (0x644D656D,)
        assert connection.execute("PRAGMA user_version").fetchone() == (4,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        names = {name for (name,) in connection.execute("SELECT name FROM meta")}
        assert names == {"layout", "row_bytes", "version", "count", "name"}
    integers = [(name, "INTEGER") for name in ("key", "version", "bytes", "created", "updated", "row_sum", "entry_sum")]
    assert tables == {
        "meta": [("name", "TEXT"), ("value", "")],
        "memories": [("id", "TEXT"), *integers],
        "states": [("key", "INTEGER"), ("state", "BLOB")],
    }
    check_file(path)


def test_needs_no_torch():
    heavy = "{'torch', 'numpy', 'transformers'}"
    code = f"import sys, deltamem_fast.storage.bank_store; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.strip() == "", result


# --- a file that is moved, linked or copied


@pytest.mark.parametrize("away", ("moved", "removed", "replaced"))
def test_a_file_that_is_no_longer_there_takes_nothing(store, path, away):
    """SQLite would go on writing to a file that nobody finds again."""
    store.write(["a"], [0], [A])
    kept = path.with_name("kept")
    os.link(path, kept) if away == "removed" else os.rename(path, kept)
    if away == "removed":
        path.unlink()
    elif away == "replaced":
        path.write_bytes(b"")
    for use in (lambda: store.write(["b"], [0], [B]), lambda: store.read(["a"]), lambda: store.delete(["a"])):
        with pytest.raises(FileAccessError, match="users.bank: it, its -wal or its -shm was moved, removed"):
            use()
    os.replace(kept, path)
    store.write(["b"], [0], [B])
    store.close()
    with closing(open_store(path, SIZE)) as again:
        assert again.read(["a", "b"])[1] == [A, B]


@pytest.mark.parametrize("gone", ("-wal", "-shm"))
def test_a_log_that_was_removed_is_missed(store, path, gone):
    """Another process would make a new one, and what either commits would be lost to the other."""
    store.write(["a"], [0], [A])
    kept = path.with_name("kept")
    os.rename(f"{path}{gone}", kept)
    for use in (lambda: store.write(["b"], [0], [B]), lambda: store.read(["a"])):
        with pytest.raises(FileAccessError, match="was moved, removed or replaced"):
            use()
    os.replace(kept, f"{path}{gone}")
    store.write(["b"], [0], [B])
    assert store.read(["a", "b"])[1] == [A, B]


def test_a_file_of_two_names_is_refused(store, path):
    store.write(["a"], [0], [A])
    other = path.with_name("other.bank")
    os.link(path, other)
    store.write(["b"], [0], [B])
    with pytest.raises(FileAccessError, match=r"path: .*other.bank: has 2 names \(hard links\), allowed one"):
        open_store(other, SIZE)
    assert store.read(["a", "b"])[1] == [A, B]


def test_two_copies_of_a_file_have_no_version_in_common(store, path):
    store.write(["a"], [0], [A])
    store.close()
    shutil.copy(path, path.with_name("copy.bank"))
    with closing(open_store(path, SIZE)) as one, closing(open_store(path.with_name("copy.bank"), SIZE)) as other:
        assert one.name == other.name and len(one.name) == 32
        version = one.write(["a"], None, [B])
        other.write(["a"], None, [C])
        with pytest.raises(BankConflict):
            other.write(["a"], [version], [B])


def test_a_disk_that_is_full_while_a_file_is_made_is_said_to_be(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(FileAccessError, match="cannot be read or written"):
            open_store(tmp_path / "full.bank", SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    open_store(tmp_path / "full.bank", SIZE).close()


@pytest.mark.parametrize("name", ("helper", "sqlite_helper"))
def test_code_in_a_file_is_not_run(store, path, name):
    """A trigger would run at the next write; SQLite lets nobody name one sqlite_, but a file may hold one."""
    store.write(["a", "b"], [0, 0], [A, B])
    store.close()
    trigger = f"CREATE TRIGGER {name} AFTER UPDATE ON memories BEGIN DELETE FROM states; END"
    with closing(sqlite3.connect(path, isolation_level=None)) as tool:
        tool.execute("PRAGMA writable_schema = ON")
        tool.execute("INSERT INTO sqlite_master VALUES ('trigger', ?, 'memories', 0, ?)", (name, trigger))
    with pytest.raises(FileFormatError, match=f"its tables and indices are .*'trigger', '{name}'"):
        open_store(path, SIZE)


def test_statistics_of_sqlite_are_no_damage(store, path):
    store.write(["a"], [0], [A])
    with closing(sqlite3.connect(path)) as tool:
        tool.execute("ANALYZE")
    with closing(open_store(path, SIZE)) as again:
        assert again.read(["a"])[1] == [A]
