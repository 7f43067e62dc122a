"""One store in many processes and threads at once."""

import os
import sqlite3
import threading
import time
from contextlib import closing, contextmanager

import pytest
from bank_support import add_one, check_file, counts, finish, open_store, sealed, start, unsealed

from deltamem_fast.storage.bank_file import BankFile
from deltamem_fast.storage.bank_store import BankConflict


@pytest.fixture
def path(tmp_path):
    return tmp_path / "users.bank"


def test_no_count_is_lost(path):
    """Three processes of two threads each count up the same rows, two at a time in one write."""
    ids = ["a", "b"]
    workers = [start("count_worker.py", path, 150, 2, *ids) for _ in range(3)]
    results = [tuple(map(int, finish(worker).split())) for worker in workers]
    assert [done for done, _ in results] == [300] * 3
    with closing(open_store(path, 64)) as store:
        assert counts(store, ids) == [900, 900]
    assert sum(conflicts for _, conflicts in results) > 0, "they never met"
    check_file(path)


def test_threads_share_a_store(path):
    ids, done = ["a", "b", "c"], []
    with closing(open_store(path, 64)) as store:

        def count(own):
            for _ in range(40):
                add_one(store, [own, "all"])
                done.append(own)

        threads = [threading.Thread(target=count, args=(id,)) for id in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts(store, [*ids, "all"]) == [40, 40, 40, 120] and len(done) == 120
    check_file(path)


def test_a_thread_that_ends_closes_its_connection(path):
    with closing(open_store(path, 64)) as store:
        store.count()
        for _ in range(5):
            thread = threading.Thread(target=store.count)
            thread.start()
            thread.join()
        assert len(store._file._handles) == 1


def test_closing_waits_for_other_threads(path):
    store, errors = open_store(path, 64), []

    def count():
        try:
            while True:
                add_one(store, ["a"])
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    store.close()
    for thread in threads:
        thread.join(timeout=30)
    assert len(errors) == 2 and all("was closed" in error for error in errors)
    check_file(path)


@pytest.mark.parametrize("attempt", range(3))
def test_many_make_the_same_file(path, attempt):
    workers = [start("count_worker.py", path, 1, 1, f"own-{n}", "all") for n in range(5)]
    assert [finish(worker).split()[0] for worker in workers] == ["1"] * 5
    with closing(open_store(path, 64)) as store:
        assert counts(store, ["all"]) == [5] and store.count() == 6
    check_file(path)


def test_who_comes_second_to_make_it_opens_it(path, monkeypatch):
    turn = BankFile.turn

    @contextmanager
    def after_another(self):
        monkeypatch.setattr(BankFile, "turn", turn)
        with closing(open_store(path, 64)) as other:
            add_one(other, ["a"])
        with turn(self):
            yield

    monkeypatch.setattr(BankFile, "turn", after_another)
    with closing(open_store(path, 64)) as store:
        assert counts(store, ["a"]) == [1]


def test_opening_and_reading_while_another_writes(path):
    """Every read is of one moment: rows that were always written together carry the same token."""
    open_store(path).close()
    writer = start("write_worker.py", path, 5, "fast", 400_000, "writes")
    try:
        seen = set()
        end = time.monotonic() + 30
        while len(seen) < 30 and time.monotonic() < end:
            with closing(open_store(path)) as store:
                names = [entry.id for entry in store.entries()]
                versions, rows = store.read(names)
            found = {id: (version, unsealed(row)) for id, version, row in zip(names, versions, rows)}
            for version, fields in found.values():
                assert all(found[other][0] >= version for other in fields["ids"] if other in found)
            seen.add(max(versions, default=0))
        assert len(seen) == 30
    finally:
        writer.kill()
        writer.communicate(timeout=30)
    check_file(path)


def test_a_reader_is_not_held_up_by_a_writer(path):
    with closing(open_store(path)) as store:
        version = store.write(["a"], [0], [sealed({"n": 1})])
        with store._file.transaction() as connection:
            connection.execute("DELETE FROM states")
            connection.execute("DELETE FROM memories")
            found = []
            thread = threading.Thread(target=lambda: found.append(store.read(["a"])))
            thread.start()
            thread.join(timeout=30)
            assert found[0][0] == [version] and unsealed(found[0][1][0]) == {"n": 1}
            connection.execute("ROLLBACK")
            connection.execute("BEGIN")
        assert store.versions(["a"]) == [version]


def test_a_writer_that_hangs_is_waited_for_so_long(path):
    with closing(open_store(path, 64)) as one, closing(open_store(path, 64, timeout=0.2)) as other:
        version = one.write(["a"], [0], [bytes(64)])
        with one._file.transaction():
            begin = time.monotonic()
            for call in (lambda: other.write(["a"], [version], [bytes(64)]), lambda: other.delete(["a"])):
                with pytest.raises(TimeoutError, match=r"others wrote for 0\.2 s"):
                    call()
            assert 0.3 < time.monotonic() - begin < 10
            assert other.versions(["a"]) == [version]
        other.write(["a"], [version], [bytes(64)])
        with pytest.raises(BankConflict):
            one.write(["a"], [version], [bytes(64)])


def test_a_lock_of_sqlites_own_is_waited_for_too(path):
    with closing(open_store(path, 64, timeout=0.2)) as store, closing(sqlite3.connect(path)) as tool:
        tool.execute("BEGIN IMMEDIATE")
        with pytest.raises(TimeoutError, match="others wrote"):
            store.write(["a"], [0], [bytes(64)])
        tool.execute("ROLLBACK")
        store.write(["a"], [0], [bytes(64)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_children_share_a_store(path):
    counted = int(finish(start("fork_worker.py", path, 4, 200)))
    with closing(open_store(path, 64)) as store:
        assert counts(store, ["n"]) == [counted]
    check_file(path)


def test_a_file_that_was_moved_away_is_not_made_again(path):
    with closing(open_store(path, 64)) as store:
        path.rename(path.with_suffix(".away"))
        with pytest.raises(OSError, match="was moved, removed or replaced"):
            store.write(["a"], [0], [bytes(64)])
        assert not path.exists()
