"""Where the document of a prompt is: in benchmarks' own formats, and guessed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_fast.eval.paper import PAPER_TASKS, SAMPLES
from deltamem_fast.eval.prompt_parts import Parts, has_document, prompt_parts

LONGBENCH = "Answer from the passages.\n\nThe following are passages.\n{}\n\nAnswer them.\n\nQuestion: {}\nAnswer:"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in SAMPLES[name].read_text().splitlines()]


def test_a_field_of_the_benchmark():
    (row, *_) = rows("hotpotqa")
    parts = prompt_parts(LONGBENCH.format(row["context"], row["question"]), row)
    assert parts.before == "Answer from the passages.\n\nThe following are passages.\n"
    assert parts.document == row["context"]
    assert parts.question == f"Answer them.\n\nQuestion: {row['question']}\nAnswer:"


def test_the_last_of_several():
    """Worked examples stand before the question, and stay with it."""
    (row, *_) = rows("babilong-qa1")
    shown = "Charlie went to the beach.\nWhere is Charlie? beach\n\n"
    for examples in (shown, f"{row['input']}\n{row['question']} office\n\n"):
        parts = prompt_parts(f"{examples}{row['input']}\n{row['question']}", row)
        assert (parts.before, parts.document, parts.question) == (examples, row["input"], row["question"])


def test_ruler():
    """No blank line, or one behind the instruction alone: the last line asks."""
    for row in rows("ruler-niah") + rows("ruler-vt"):
        parts = prompt_parts(row["input"], row)
        assert parts.before.strip() in row["input"].splitlines()[0]
        assert "hidden" in parts.before and "\n" not in parts.before.strip()
        assert parts.question == row["input"].splitlines()[-1]
        assert parts.document.count("The grass is green.") == row["length"] // 40
        behind = prompt_parts(f"{row['input']} {row['gen_prefix']}", row)
        assert behind.document == parts.document and behind.after.endswith(row["gen_prefix"])


@pytest.mark.parametrize(
    "text,expected",
    [
        ("Who is Ada?", ("", "", "Who is Ada?")),
        ("", ("", "", "")),
        ("\n\n", ("", "", "\n\n")),
        ("Rex is a dog.\nWho is Rex?", ("", "Rex is a dog.\n", "Who is Rex?")),
        ("Rex is a dog.\n\nWho is Rex?", ("", "Rex is a dog.\n\n", "Who is Rex?")),
        ("Read this.\n\nRex barks.\n\nWho?\n", ("Read this.\n\n", "Rex barks.\n\n", "Who?\n")),
        ("Read this.\nRex barks.\nAda sings.\nWho?", ("Read this.\n", "Rex barks.\nAda sings.\n", "Who?")),
        ("Rex\nbarks.\n \nAda sings.\n\n\nWho?\nSay!", ("Rex\nbarks.\n \n", "Ada sings.\n\n\n", "Who?\nSay!")),
        ("Read.\n\nRex barks, and Ada sings.\nWho?", ("Read.\n\n", "Rex barks, and Ada sings.\n", "Who?")),
        ("x" * 401 + "\n\nRex barks.\n\nWho?", ("", "x" * 401 + "\n\nRex barks.\n\n", "Who?")),
    ],
)
def test_guessed(text, expected):
    assert prompt_parts(text) == Parts(*expected)


def test_benchmarks_without_documents():
    """GPQA's choices and IFEval's constraints stay, whatever the policy; by lm_eval's fields, under any name there."""
    for row in rows("gpqa"):
        asked = f"What is the correct answer to this question:{row['Question']}"
        text = f"{asked}\nChoices:\n(A) 8\n(B) 36\n(C) v\n(D) 0\nSay: "
        parts = prompt_parts(text, row | {"choice1": "8", "choices": ["8", "36", "v", "0"], "answer": "(B)"})
        assert (parts.document, parts.prompt(""), parts.prompt("so")) == ("", text, text)
        assert prompt_parts(text).document  # which would have been guessed
    text = "\nWrite about bees.\n\nUse the words honey and hive.\n\nDo not use commas.\n"
    parts = prompt_parts(text, {"key": 1, "prompt": text, "instruction_id_list": [], "kwargs": []})
    assert (parts.document, parts.prompt("")) == ("", text) and prompt_parts(text).document
    for name in SAMPLES:
        assert [has_document(row) for row in rows(name)] == [PAPER_TASKS[name].document] * len(rows(name))


def test_a_field_that_is_not_there_is_guessed():
    for fields in ({"context": "Ada"}, {"context": 3}, {"context": " "}, {"input": "Rex barks."}, None):
        assert prompt_parts("Read.\n\nRex barks.\n\nWho?", fields) == Parts("Read.\n\n", "Rex barks.\n\n", "Who?")


def test_another_context():
    parts = prompt_parts("Read.\n\nRex barks.\nAda sings.\n\nWho?")
    assert parts.prompt("Ada sings.") == "Read.\n\nAda sings.\n\nWho?"
    assert parts.prompt(parts.document.strip()) == "Read.\n\nRex barks.\nAda sings.\n\nWho?"
    assert parts.prompt("") == "Read.\n\nWho?"
    assert prompt_parts("Rex barks.\n\nWho?").prompt("") == "Who?"
    assert prompt_parts("Who?").prompt("") == "Who?"
    assert Parts("", "Rex", " barks. Who?").prompt("Ada") == "Ada barks. Who?"


@given(st.text("ab \n.?", max_size=60), st.sampled_from(["", "ab", "a\n\nb"]))
def test_joined_they_are_the_prompt(text, document):
    parts = prompt_parts(text, {"context": document})
    assert parts.before + parts.document + parts.after == text
    assert parts.prompt(parts.document) == text or not parts.document.strip()
