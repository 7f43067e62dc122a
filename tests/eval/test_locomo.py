"""LoCoMo: its format, what is asked, and its scores by hand."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

import deltamem_fast
from deltamem_fast.errors import ArgumentError, FileFormatError, FileMissingError
from deltamem_fast.eval.data import Question
from deltamem_fast.eval.locomo import TASK, load, overall, score

DATA = Path(deltamem_fast.__file__).parent / "data/eval/locomo.json"


def asked(category, answer, **more):
    return Question("q", "?", (answer,), category, more=more)


def samples():
    return json.loads(DATA.read_text())


def written(tmp_path, value):
    path = tmp_path / "data.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_sessions_have_their_date_the_speakers_and_their_pictures():
    first = load(DATA)[0]
    assert first.id == "smoke-1" and len(first.parts) == 2
    lines = first.parts[0].split("\n")
    assert lines[:2] == ["DATE: 9:10 am on 4 March, 2024", "CONVERSATION:"]
    assert lines[3] == 'Piet said, "Brave of you! I only grow tomatoes and beans, nothing that stings."'
    assert lines[4] == 'Hanna said, "Look at my first frame." and shared a photo of a wooden frame full of honeycomb.'


def test_every_category_is_asked():
    questions = [question for document in load(DATA) for question in document.questions]
    assert Counter(question.category for question in questions) == {
        "multi-hop": 2, "temporal": 2, "open-domain": 2, "single-hop": 3, "adversarial": 2
    }  # fmt: skip
    assert [question.id for question in questions[:2]] == ["smoke-1-q0", "smoke-1-q1"]
    temporal, plain = questions[1], questions[0]
    assert "approximate date" in temporal.text and "approximate date" not in plain.text
    assert temporal.query == "When did Piet sell his van?" and plain.query in plain.text
    assert questions[3].answers == ("9",)  # a number in the file


def test_options_of_an_adversarial_question_depend_on_its_id_alone():
    found = {}
    for document in load(DATA) + load(DATA):
        for question in document.questions:
            if question.category == "adversarial":
                options = question.more["options"]
                assert sorted(options) == ["a", "b"] and "No information available" in options.values()
                assert f"(a) {options['a']} (b) {options['b']}." in question.text
                assert found.setdefault(question.id, options) == options
    assert len(found) == 2


def test_both_letters_come_first_for_many_questions(tmp_path):
    sample = samples()[0]
    sample["qa"] = [sample["qa"][-1]] * 40
    firsts = Counter(question.more["options"]["a"] for question in load(written(tmp_path, [sample]))[0].questions)
    assert sum(firsts.values()) == 40 and min(firsts.values()) >= 10 and len(firsts) == 2


@pytest.mark.parametrize(
    ("category", "accepted", "answer", "expected"),
    (
        ("single-hop", "the honey jars", "honey jar", 1.0),
        ("single-hop", "honey jars", "Answer: three jars\nof honey", 0.5),  # of the first line: three, jar
        ("temporal", "17 May, 2024", "in May 2024", 2 / 3),  # in, may, 2024: 2 of 3 and 2 of 3
        ("open-domain", "On a farm; she keeps bees", "a farm", 2 / 3),  # farm: 1 of 1, and of on, farm 1 of 2
        ("multi-hop", "clocks, swimming", "swimming, cooking", 0.5),
        ("multi-hop", "clocks, swimming", "clock swims", 2 / 3),  # one part: 1 of 2 and 1 of 1, for either
        ("single-hop", "Ghent", "", 0.0),
        ("single-hop", "Ghent", "\n \n Ghent \n", 1.0),
    ),
)
def test_scores_by_hand(category, accepted, answer, expected):
    assert score(asked(category, accepted), answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    (
        ("(b)", 1), ("B", 1), ("b) No information", 1), ("I choose (b).", 1),
        ("(a)", 0), ("a", 0), ("three jars", 0), ("", 0),
        ("That is not mentioned.", 1), ("NO INFORMATION AVAILABLE", 1),
    ),
)  # fmt: skip
def test_adversarial_scores_by_hand(answer, expected):
    options = {"a": "three jars of honey", "b": "No information available"}
    assert score(asked("adversarial", "No information available", options=options), answer) == expected


def test_overall_is_over_questions_with_and_without_adversarial():
    found = overall({"single-hop": [1.0, 0.5], "temporal": [0.0], "adversarial": [1.0]})
    assert found == {"overall": pytest.approx(0.5), "with_adversarial": pytest.approx(2.5 / 4)}
    assert overall({"adversarial": [1.0]})["overall"] is None


def test_without_a_file_the_error_says_where_it_is(tmp_path):
    with pytest.raises(ArgumentError, match=r"locomo10\.json of https://github\.com/snap-research/locomo"):
        load(None)
    with pytest.raises(FileMissingError, match="no such file"):
        load(tmp_path / "none.json")


def broken(change):
    value = samples()
    change(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    (
        ("{", "not JSON"),
        ({"a": 1}, "allowed an array of objects"),
        ([], "has no conversation"),
        (broken(lambda v: v[1].pop("qa")), "conversation 1: has no 'qa'"),
        (broken(lambda v: v[0].update(qa=[])), "no session or no question"),
        (broken(lambda v: v[0]["qa"][2].update(category=6)), "question 2: category: got 6, allowed 1 to 5"),
        (broken(lambda v: v[0]["qa"][2].update(category=True)), "got a bool, allowed int"),
        (broken(lambda v: v[0]["qa"][3].pop("answer")), "question 3: has no 'answer'"),
        (broken(lambda v: v[0]["conversation"].pop("session_2_date_time")), "session_2: has no 'session_2_date_time'"),
        (broken(lambda v: v[0]["conversation"]["session_1"].append("hi")), "turn 4: got a JSON str"),
        (broken(lambda v: v.append(v[0])), "two conversations have one sample_id"),
        ("[" * 100_000, "nested too deeply"),
    ),
    ids=range(12),
)
def test_other_formats_are_told(tmp_path, value, message):
    with pytest.raises(FileFormatError, match=message):
        load(written(tmp_path, value))


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    value = samples()
    value[0]["conversation"]["session_1"][0]["text"] = "Hi \ud83d!"
    assert 'said, "Hi ?!"' in load(written(tmp_path, value))[0].parts[0]


def test_without_a_file_the_error_says_how_to_give_one():
    with pytest.raises(ArgumentError, match=r"--task locomo=FILE .*run.* or --data FILE .*score"):
        load(None)


def test_the_report_is_told_of_audit_and_licence():
    notes = " ".join(TASK.notes)
    assert "F1 that is close to 100" in notes and "temperature 0.4" in notes
    assert "99 of the 1,540" in notes and "CC BY-NC 4.0" in notes and "reported apart" in notes


def test_the_published_counts(tmp_path):
    """Of a file with as many conversations and questions as locomo10.json, which may not be shipped; DELTAMEM_LOCOMO
    names the real one, to be counted instead."""
    counts = {1: 282, 2: 321, 3: 96, 4: 841, 5: 446}
    path = os.environ.get("DELTAMEM_LOCOMO")
    if path is None:
        asked = [
            {"question": f"{i}?", "category": number, "adversarial_answer" if number == 5 else "answer": i}
            for number, count in counts.items()
            for i in range(count)
        ]
        first = samples()[0]
        path = written(tmp_path, [{**first, "sample_id": f"conv-{i}", "qa": asked[i::10]} for i in range(10)])
    documents = load(Path(path))
    found = Counter(question.category for document in documents for question in document.questions)
    assert len(documents) == 10 and sum(found.values()) == 1986
    assert found == {
        "multi-hop": 282, "temporal": 321, "open-domain": 96, "single-hop": 841, "adversarial": 446
    }  # fmt: skip
    assert len({question.id for document in documents for question in document.questions}) == 1986
