"""Damaged banks: what was written, or an error of ours that names the file; never other values or SQLite's errors."""

import errno
import fcntl
import os
import random
import sqlite3
import stat
from contextlib import closing

import pytest
from bank_support import open_store

from deltamem_fast.errors import DeltaMemError, FileAccessError, FileFormatError, WrongPathKindError
from deltamem_fast.storage.bank_store import BankConflict, BankStore
from deltamem_fast.storage.checksums import entry_sum, row_sum

SIZE = 400
IDS = [f"user-{n:03}" for n in range(120)]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A bank's bytes, and what is in it."""
    path = tmp_path_factory.mktemp("good") / "good.bank"
    rows = random.Random(5)
    with closing(open_store(path, SIZE)) as store:
        for start in range(0, 120, 30):
            ids = IDS[start : start + 30]
            store.write(ids, [0] * 30, [rows.randbytes(SIZE) for _ in ids])
        store.delete(IDS[7:40:3])
        wanted = store.read(IDS), store.entries()
    return path.read_bytes(), *wanted


@pytest.fixture
def path(tmp_path):
    return tmp_path / "users.bank"


def damaged(data, rng):
    data, page = bytearray(data), 4096
    pages = len(data) // page
    match rng.choice("bit bit byte bytes page cut swap zeros head".split()):
        case "bit":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "byte":
            data[rng.randrange(len(data))] = rng.randrange(256)
        case "bytes":
            for _ in range(rng.randrange(2, 40)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case "page":
            at = rng.randrange(pages) * page
            data[at : at + page] = rng.randbytes(page)
        case "cut":
            del data[rng.randrange(1, len(data)) :]
        case "swap":
            a, b = (rng.randrange(pages) * page for _ in range(2))
            data[a : a + page], data[b : b + page] = data[b : b + page], data[a : a + page]
        case "zeros":
            at = rng.randrange(len(data) - 512)
            data[at : at + 512] = bytes(512)
        case "head":
            data[rng.randrange(pages) * page + rng.randrange(24)] ^= 1 << rng.randrange(8)
    return bytes(data)


def attempt(path, call):
    """What ``call`` gives, or None after an error of ours that names the file."""
    try:
        return call()
    except BankConflict:
        raise
    except DeltaMemError as error:
        assert str(path) in str(error)
        return None


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_found(good, path, seed):
    data, wanted, entries = good
    rng = random.Random(seed)
    path.write_bytes(damaged(data, rng))
    store = attempt(path, lambda: open_store(path, SIZE, timeout=2))
    if store is None or (store.layout, store.row_bytes) != ({"kind": "test"}, SIZE):
        return
    with closing(store):
        assert attempt(path, lambda: store.read(IDS)) in (None, wanted)
        assert attempt(path, lambda: store.versions(IDS)) in (None, wanted[0])
        for order in ("id", "updated"):
            found = attempt(path, lambda order=order: store.entries(order_by=order))
            assert found is None or sorted(found, key=lambda entry: entry.id) == entries
        assert attempt(path, store.count) in (None, len(entries))
        ids = rng.sample(IDS, 10)
        versions = [wanted[0][IDS.index(id)] for id in ids]
        version = attempt(path, lambda: store.write(ids, versions, [b"z" * SIZE] * 10))
        if version is not None:
            assert attempt(path, lambda: store.read(ids)) in (None, ([version] * 10, [b"z" * SIZE] * 10))
        attempt(path, lambda: store.delete(ids))


CHANGES = (
    ("UPDATE states SET state = zeroblob(400) WHERE key = 1", "the row of 'user-000' is not what was written"),
    ("UPDATE states SET state = 'text' WHERE key = 1", "the row of 'user-000'"),
    ("DELETE FROM states WHERE key = 1", "the row of 'user-000'"),
    ("UPDATE memories SET version = version + 1 WHERE id = 'user-000'", "the row of 'user-000'"),
    ("UPDATE memories SET key = 2 WHERE id = 'user-000'", "the row of 'user-000'"),
    ("UPDATE memories SET version = 'x', row_sum = NULL WHERE id = 'user-000'", "the row of 'user-000'"),
    ("UPDATE memories SET id = 'user-000' || x'ff' WHERE id = 'user-000'", ""),
)


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_rows_of_another_write_or_id_are_found(good, path, change, message):
    path.write_bytes(good[0])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(change)
        connection.commit()
    with closing(open_store(path, SIZE)) as store:
        if message:
            with pytest.raises(FileFormatError, match=message):
                store.read(["user-001", "user-000"])
        if "memories" in change:
            write = lambda: store.write(["user-000"], None, [bytes(SIZE)])  # noqa: E731
            for call in (store.entries, write) if message else (store.entries,):
                with pytest.raises(FileFormatError, match="damaged"):
                    call()
        assert store.read(["user-002"]) == ([good[1][0][2]], [good[1][1][2]])


@pytest.mark.parametrize(
    ("column", "value"), (("created", 10**18), ("created", "x"), ("version", -1), ("updated", -1), ("state", b"short"))
)
def test_checksums_that_fit_are_not_enough(good, path, column, value):
    """Whoever can write the file can make them."""
    path.write_bytes(good[0])
    names = ("key", "version", "bytes", "created", "updated")
    with closing(sqlite3.connect(path)) as connection:
        entry = connection.execute(f"SELECT {', '.join(names)} FROM memories WHERE id = 'user-000'").fetchone()
        values = dict(zip(names, entry)) | ({column: value} if column in names else {})
        (state,) = connection.execute("SELECT state FROM states WHERE key = 1").fetchone()
        state = value if column == "state" else state
        row = row_sum("user-000", values["version"], state)
        numbers = (number % 2**64 if isinstance(number, int) else 0 for number in values.values())
        own = entry_sum("user-000", *numbers, row)
        connection.execute("UPDATE states SET state = ? WHERE key = ?", (state, values["key"]))
        connection.execute(
            "UPDATE memories SET version = ?, created = ?, updated = ?, row_sum = ?, entry_sum = ? WHERE key = 1",
            (values["version"], values["created"], values["updated"], row, own),
        )
        connection.commit()
    with closing(open_store(path, SIZE)) as store, pytest.raises(FileFormatError, match="of 'user-000' is not what"):
        store.read(["user-000"]) if column == "state" else store.entries()


def test_an_id_that_was_lost_is_no_unknown_one(good, path):
    path.write_bytes(good[0].replace(b"user-050", b"user-05!", 1))  # in one of its two places
    with closing(open_store(path, SIZE)) as store:
        for call in (store.read, store.versions, lambda ids: store.write(ids, [0], [bytes(SIZE)])):
            with pytest.raises(FileFormatError, match=r"the entry of 'user-05[0!]' is (lost|not what was written)"):
                for id in ("user-050", "user-05!"):
                    call([id])
        assert store.read(["nobody"]) == ([0], [None])


@pytest.mark.parametrize(
    "statement",
    (
        "CREATE TRIGGER t AFTER UPDATE ON states BEGIN DELETE FROM memories; END",
        "CREATE VIEW v AS SELECT * FROM memories",
        "DROP TABLE states",
        "DELETE FROM meta WHERE name = 'layout'",
        "UPDATE meta SET value = '[' WHERE name = 'layout'",
        "UPDATE meta SET value = '[5]' WHERE name = 'layout'",
        "UPDATE meta SET value = '{\"a\": 5}' WHERE name = 'layout'",
        "UPDATE meta SET value = 'x' WHERE name = 'version'",
        "UPDATE meta SET value = NULL WHERE name = 'row_bytes'",
    ),
)
def test_other_parts_and_heads_are_refused(good, path, statement):
    path.write_bytes(good[0])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    with pytest.raises(FileFormatError, match=f"{path}: damaged"):
        open_store(path, SIZE)


@pytest.mark.parametrize(
    ("table", "declared", "instead"),
    (
        ("states", "BLOB NOT NULL", "BLOB NOT NULL CHECK (length(hex(state)) > 1)"),
        ("states", "BLOB NOT NULL", "BLOB NOT NULL, more GENERATED ALWAYS AS (hex(zeroblob(100000000)))"),
        ("memories", "row_sum INTEGER", "row_sum INTEGER DEFAULT (random())"),
        ("memories_ids", "(id)", "(id) WHERE hex(version) != 'x'"),
        ("memories_ids", "(id)", "(lower(id))"),
    ),
)
def test_a_declaration_that_would_be_run_is_refused(good, path, table, declared, instead):
    path.write_bytes(good[0])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        change = "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ? AND instr(sql, ?)"
        assert connection.execute(change, (declared, instead, table, declared)).rowcount == 1
        connection.commit()
    with pytest.raises(FileFormatError, match=f"{path}: damaged: its .* {table} is declared with more than columns"):
        open_store(path, SIZE)
    with closing(sqlite3.connect(path)) as connection:  # it is what SQLite itself takes
        assert connection.execute("SELECT count(*) FROM memories").fetchone()[0] > 50


def test_a_count_of_versions_that_went_back(good, path):
    path.write_bytes(good[0])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE meta SET value = 5 WHERE name = 'version'")
        connection.commit()
    with closing(open_store(path, SIZE)) as store, pytest.raises(FileFormatError, match="its count of versions"):
        store.write(["user-000"], None, [bytes(SIZE)])


# --- files


@pytest.mark.parametrize("umask", (0o000, 0o022, 0o777))
def test_files_are_their_users_alone(tmp_path, umask):
    folder = tmp_path / "a" / "b"
    if umask == 0o777:  # nothing could be made in a directory without rights
        folder.mkdir(0o700, parents=True)
        folder.parent.chmod(0o700)
    before = os.umask(umask)
    try:
        with closing(open_store(folder / "users.bank", SIZE)) as store:
            store.write(["a"], [0], [bytes(SIZE)])
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
            assert os.umask(umask) == umask, "the process's own stays"
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["users.bank", "users.bank-lock", "users.bank-shm", "users.bank-wal"], 0o600)
    assert {stat.S_IMODE(one.stat().st_mode) for one in (folder, folder.parent)} == {0o700}


def test_the_mode_of_a_file_that_is_there_is_kept(good, path):
    path.write_bytes(good[0])
    path.chmod(0o640)
    with closing(open_store(path, SIZE)) as store:
        store.write(["new"], [0], [bytes(SIZE)])
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(["users.bank", "users.bank-lock", "users.bank-shm", "users.bank-wal"], 0o640)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, who may give files away")
def test_a_lock_made_by_root_is_the_owners(good, path, monkeypatch):
    path.write_bytes(good[0])
    os.chown(path, 1234, 1235)
    path.chmod(0o660)
    lock = path.with_name("users.bank-lock")
    with closing(open_store(path, SIZE)) as store:
        lock.unlink(missing_ok=True)
        store.write(["new"], [0], [bytes(SIZE)])
        found = lock.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 1235, 0o660)
        lock.unlink()

        def refuse(*_):
            raise PermissionError

        monkeypatch.setattr(os, "chown", refuse)
        store.write(["newer"], [0], [bytes(SIZE)])
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600


def test_a_file_system_without_locks(good, path, monkeypatch):
    path.write_bytes(good[0])

    def failing(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        return flock

    with closing(open_store(path, SIZE)) as store:
        monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
        store.write(["new"], [0], [bytes(SIZE)])
        monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
        with pytest.raises(FileAccessError, match="users.bank-lock"):
            store.write(["newer"], [0], [bytes(SIZE)])
        assert store.read(["new", "newer"])[1] == [bytes(SIZE), None]


def test_a_lock_that_is_no_file_is_not_followed(good, path, tmp_path):
    path.write_bytes(good[0])
    other, lock = tmp_path / "other", tmp_path / "users.bank-lock"
    other.write_text("kept")
    with closing(open_store(path, SIZE)) as store:
        for make in (lambda: lock.symlink_to(other), lambda: os.mkfifo(lock)):
            lock.unlink(missing_ok=True)
            make()
            with pytest.raises(WrongPathKindError, match="users.bank-lock"):
                store.write(["new"], [0], [bytes(SIZE)])
        lock.unlink()
        lock.mkdir()
        with pytest.raises(WrongPathKindError, match="users.bank-lock"):
            store.delete(["user-000"])
        assert store.count() == len(good[2])
    assert other.read_text() == "kept"


@pytest.mark.parametrize("given", (5, None, b"x.bank", "a\0b", "\ud800x"))
def test_what_can_be_no_path(given):
    with pytest.raises(DeltaMemError, match="path: got"):
        open_store(given, SIZE)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "loop/users.bank", "pipe/users.bank"):
        with pytest.raises(FileAccessError, match="path: "):
            open_store(tmp_path / name, SIZE)


def test_deleted_bytes_are_gone_from_every_file(path):
    secret, row = b"what ada never wanted to be known", SIZE
    with closing(open_store(path, row)) as store, closing(open_store(path, row)) as other:
        store.write(["ada", "ben"], [0, 0], [secret.ljust(row, b"."), b"public".ljust(row, b".")])
        other.read(["ada"])
        assert any(secret in file.read_bytes() for file in path.parent.iterdir())
        assert store.delete(["ada"]) == 1
        assert not any(secret in file.read_bytes() for file in path.parent.iterdir())
        assert not any(b"ada" in file.read_bytes() for file in path.parent.iterdir()), "nor the id"
        assert other.read(["ada", "ben"])[1][0] is None


def test_a_reader_at_work_keeps_the_log_until_the_next_delete(path):
    secret = b"what ada never wanted to be known".ljust(SIZE, b".")
    log = path.with_name("users.bank-wal")
    with closing(open_store(path, SIZE)) as store, closing(BankStore(path, {}, SIZE, durable=False)) as other:
        store.write(["ada", "ben", "eve"], [0, 0, 0], [secret] * 3)
        reader = other.each(["ada", "ben", "eve"])
        next(reader)
        assert store.delete(["ada", "ben"]) == 2, "it does not wait for the reader's end"
        reader.close()
        assert store.delete(["eve"]) == 1 and secret not in log.read_bytes() + path.read_bytes()
