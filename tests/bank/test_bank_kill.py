"""kill -9 at random moments, also amid checkpoints and while the file is made: no acknowledged write is lost."""

import json
import os
import random
import time

import pytest
from bank_support import check_file, open_store, start, unsealed
from write_worker import IDS


def operations(output):
    """What a worker said it began, each with its answer: a version, 0 for a delete, "refused", or None for none."""
    found = []
    lines = output.split("\n")[:-1]  # what comes behind the last line end was cut off
    for line in map(json.loads, lines):
        if "begun" in line:
            found.append(line | {"answer": None})
        else:
            found[-1]["answer"] = "refused" if "refused" in line else line["done"]
    assert all(one["answer"] is not None for one in found[:-1])
    return found


def stored(path):
    """id → (version, token) of every row, each row and each batch checked."""
    store = open_store(path)
    check_file(path)
    versions, rows = store.read(IDS)
    store.close()
    fields = {id: unsealed(row) for id, row in zip(IDS, rows) if row is not None}
    assert all(fields[id]["id"] == id for id in fields)
    return {id: (version, fields[id]["token"]) for id, version in zip(IDS, versions) if version}, fields


def applied(tokens, operation):
    gone = {id: token for id, token in tokens.items() if id not in operation["ids"]}
    return gone if operation["begun"] == "delete" else gone | dict.fromkeys(operation["ids"], operation["token"])


def check_one_writer(before, after, said):
    """The store is exactly what was acknowledged, with or without the one operation that had no answer."""
    tokens = {id: token for id, (_, token) in before.items()}
    allowed = [tokens]
    for operation in said:
        assert operation["answer"] != "refused"
        allowed = [applied(allowed[-1], operation)] if operation["answer"] is not None else [
            allowed[-1], applied(allowed[-1], operation)]  # fmt: skip
    assert {id: token for id, (_, token) in after.items()} in allowed


def check_two_writers(before, after, fields, said):
    """Every acknowledged write is there or was followed by another, and no batch is there in part."""
    versions = [one["answer"] for one in said if isinstance(one["answer"], int)]
    assert len(set(versions)) == len(versions)
    for operation in said:
        if isinstance(operation["answer"], int):
            for id in operation["ids"]:
                version, token = after[id]
                assert version > operation["answer"] or (version, token) == (operation["answer"], operation["token"])
    old = max((version for version, _ in before.values()), default=0)
    for id, (version, _) in after.items():
        if version > old:  # written just now, by those who delete nothing
            assert all(after[other][0] >= version for other in fields[id]["ids"])


def kill(directory, rounds, seed):
    """Returns how many operations were acknowledged, and how many were under way when the kill came."""
    draw, acknowledged, cut = random.Random(seed), 0, 0
    path = directory / "new.bank"
    before = {}
    for turn in range(rounds):
        if turn % 5 == 0:  # a new file: some are killed while it is made
            path, before = directory / f"{turn}.bank", {}
        single = turn % 2 == 0
        options = (draw.choice(("durable", "fast")), draw.choice((40_000, 400_000, 64 * 2**20)))
        deletes = "deletes" if single else "writes"
        workers = [start("write_worker.py", path, f"{seed}{turn}{n}", *options, deletes) for n in range(2 - single)]
        for worker in workers:
            # Byte by byte: what comes after it is communicate's.
            assert b"".join(os.read(worker.stdout.fileno(), 1) for _ in range(6)) == b"ready\n"
        time.sleep(draw.uniform(0, 0.3))
        for worker in draw.sample(workers, len(workers)):
            worker.kill()
        outputs = [worker.communicate(timeout=60)[0] for worker in workers]
        assert all(worker.returncode == -9 for worker in workers), "a worker failed before it was killed"
        said = [operations(output) for output in outputs]
        after, fields = stored(path)
        if single:
            check_one_writer(before, after, said[0])
        else:
            check_two_writers(before, after, fields, said[0] + said[1])
        acknowledged += sum(isinstance(one["answer"], int) for each in said for one in each)
        cut += sum(one["answer"] is None for each in said for one in each)
        before = after
    return acknowledged, cut


def test_killed_twenty_times(tmp_path):
    acknowledged, cut = kill(tmp_path, 20, seed=1)
    assert acknowledged > 100 and cut > 3, "the kills came too early to show anything"


@pytest.mark.soak
def test_killed_two_hundred_times(tmp_path):
    acknowledged, cut = kill(tmp_path, 200, seed=2)
    assert acknowledged > 2000 and cut > 50


def test_killed_at_every_statement(tmp_path):
    """From the first statement that makes the file to the last of a delete."""
    reached = set()
    for last in range(1, 200):
        path = tmp_path / f"{last}.bank"
        worker = start("die_worker.py", path, last)
        said = worker.communicate(timeout=60)[0].split()
        reached.add(" ".join(said))
        store = open_store(path)
        there = [id for id, row in zip("abc", store.read(list("abc"))[1]) if row is not None and unsealed(row)]
        store.close()
        check_file(path)
        allowed = {0: [""], 1: ["", "abc"], 2: ["abc", "ac"], 3: ["ac"]}[len(said)]
        assert "".join(there) in allowed, (last, said)
        if worker.returncode == 0:
            break
        assert worker.returncode == -9
    assert reached == {"", "opened", "opened written", "opened written deleted"} and last > 30
