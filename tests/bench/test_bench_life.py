"""python -m bench.life with small sizes: it measures, and says no where something drifts, grows or is lost."""

import json
import re

import numpy as np
import pytest
import torch

from bench.life import __main__ as life
from bench.life import bank, bank_worker, session, tokens
from bench.life.oracle import distance
from bench.memory import __main__ as memory
from deltamem_fast import MemoryBank


def test_tokens():
    for stream in (tokens.Stream("text", rows=2), tokens.Stream("same key, v by turns", rows=2, logit=5.0)):
        row = tokens.lived(stream, 6000, chunk=1500)
        assert row.status == "measured", row.note
        assert row.values["skipped"] == (0 if stream.logit else 2 * (3000 // tokens.BROKEN_EVERY))
        assert 0 < row.values["scan_error"] < 1e-4 and row.values["worst_apart"] < 1e-6
    assert tokens.model_lived(40, context=16).status == "measured"


def test_what_drifts_is_refused(monkeypatch):
    exact = tokens.follow
    monkeypatch.setattr(tokens, "follow", lambda x, *given: exact(x * 1.001, *given))
    row = tokens.lived(tokens.Stream("text"), 2000)
    assert row.status == "refused" and "decode: " in row.note and "scan: " in row.note


def test_what_is_not_a_number_is_far():
    assert not distance(torch.tensor([[torch.nan]]), torch.ones(1, 1)) <= 1
    assert np.isnan(tokens.larger(0.1, float("nan"))) and np.isnan(tokens.larger(float("nan"), 0.1))


def test_session(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "looks", lambda turns: [2, turns])
    monkeypatch.setattr(session, "SLOWER", 10)
    monkeypatch.setattr(session, "PAIRS", 2)
    assert life.main(["session", "--turns", "5", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    first, last = json.loads(path.read_text())["rows"]
    assert last["parameters"]["turns"] == 5 and last["values"]["json_bytes"] > first["values"]["json_bytes"] > 0
    assert last["samples"] == 2 and last["ratios"]["a new session"][1] > 0.1
    row = session.measured("session/turns", {"turns": 2000}, [2.0, 2.0], resident=9e9, files=3)
    session.compare(row, "a new session", [0.1, 0.1], [2.0, 2.0])
    early = session.measured("session/turns", {"turns": 100}, [0.1, 0.1], resident=1e6, files=2)
    session.checked([early, row])
    assert row.status == "refused" and "times as long" in row.note and "3 files" in row.note


def test_bank_and_what_it_loses(tmp_path, monkeypatch):
    row = bank.measure(tmp_path, 300, 4.0, 2, 1.0)
    assert row.status == "measured", row.note
    assert row.values["kills"] >= 1 and row.values["writes"] >= 1
    truths = [bank_worker.truth_of(tmp_path / f"journal-{n}", n, 2, 300) for n in range(2)]
    model, path = bank_worker.model_of_all(), tmp_path / "users.bank"
    assert bank.audit(path, model, truths) == []
    place = int(np.flatnonzero(truths[1].marks != bank_worker.GONE)[0])
    with MemoryBank(path, model) as opened:
        opened.delete([bank.name_of(2 * place + 1)])
    assert any("not what was acknowledged" in said for said in bank.audit(path, model, truths))
    truths[0].counted[3] += 10**6
    assert any("shared ids" in said for said in bank.audit(path, model, truths))


def test_a_journal_that_was_cut(tmp_path):
    journal = tmp_path / "journal"
    users = np.array([0, 4], np.int64)
    whole = bank_worker._HEAD.pack(b"w", 7, 2) + users.tobytes() + bank_worker._HEAD.pack(b"+", 0, 0)
    begun = bank_worker._HEAD.pack(b"d", 0, 2) + users.tobytes()
    journal.write_bytes(whole + begun[:-3])
    truth = bank_worker.truth_of(journal, 0, 2, 10)
    assert truth.marks[[0, 1, 2]].tolist() == [7, 0, 7] and truth.doubt is None
    assert journal.read_bytes() == whole
    journal.write_bytes(whole + begun)
    assert bank_worker.truth_of(journal, 0, 2, 10).doubt[0] == b"d"


@pytest.mark.parametrize("arguments", [["tokens", "--tokens", "0"], ["session", "--turns", "1"],
                                       ["bank", "--workers", "1"]])  # fmt: skip
def test_what_is_wrong_is_named(arguments, capsys):
    assert life.main(arguments) == 2 and arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize("room", [life, memory])
def test_a_bank_that_the_disk_has_no_room_for_is_not_begun(room, tmp_path, capsys):
    assert room.main(["bank", "--users", str(10**12), "--directory", str(tmp_path / "place")]) == 2
    assert re.search(r"error: .*place/bench-\w+: 1[14]000000\.0 GB needed, [\d.]+ GB free", capsys.readouterr().err)
    assert list((tmp_path / "place").iterdir()) == []
