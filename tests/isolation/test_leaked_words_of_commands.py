"""What is typed in a chat, and what an evaluation tells and asks: in logs, on the terminal, and in which files."""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path

import pytest
from chat_support import write_tiny_model
from leaks import WORD, files_with

from deltamem_fast.cli.main import main, parser
from deltamem_fast.eval import run

pytestmark = pytest.mark.usefixtures("silent")
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def tiny() -> tuple[str, str]:
    """The directories of a model that never says the word, and of its adapter."""
    with contextlib.redirect_stdout(None):
        return write_tiny_model(Path(FOLDER.name))


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("XDG_", "DELTAMEM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chat_arguments(*more):
    model, adapter = tiny()
    return ("chat", model, "--adapter", adapter, "--max-new-tokens", "2", "--backend", "reference", *more)


def test_a_chat_over_a_pipe_keeps_and_shows_no_word(home):
    said = [f"I am {WORD}.", "/memory", f"/forget I am {WORD}.", "/context drop", "/off", f"Who is {WORD}?", "/nothing"]
    assert main(chat_arguments("--system", f"Greet {WORD}.", *(f"--say={line}" for line in said))) == 1
    assert files_with(home) == []


def test_a_chat_saves_words_where_it_is_told_to(home):
    assert main(chat_arguments(f"--say=I am {WORD}.", "--say=/save ada")) == 0
    assert files_with(home) == ["session.json"]
    gone = [f"/forget --messages I am {WORD}.", "/context drop", "/save ada"]
    assert main(chat_arguments("--load", "ada", *(f"--say={line}" for line in gone))) == 0
    assert files_with(home) == []


@pytest.mark.parametrize("history", ["as ever", "none", "elsewhere"])
def test_a_chat_in_a_terminal_keeps_what_was_typed_in_its_history_alone(home, monkeypatch, history):
    pytest.importorskip("prompt_toolkit"), pytest.importorskip("rich")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from deltamem_fast.chat.loop import converse_in_terminal
    from deltamem_fast.chat.options import read_arguments

    if history != "as ever":
        monkeypatch.setenv("DELTAMEM_HISTORY", "" if history == "none" else str(home / "mine"))
    opening = read_arguments(parser().parse_args(chat_arguments()))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(f"I am {WORD}.\r/memory\r/nothing\r/quit\r/quit\r")
        converse_in_terminal(opening, history=True, markdown=False)
    kept = {"as ever": ["history"], "none": [], "elsewhere": ["mine"]}[history]
    assert files_with(home) == kept
    assert all(path.stat().st_mode & 0o077 == 0 for path in home.rglob("*") if path.name in kept)


def test_an_evaluation_keeps_what_was_answered_in_its_answers_alone(home, monkeypatch):
    """What is told, asked and wanted stays in the data's own file; what the model says of it, in the answers."""
    said = [{"speaker": "Ada", "dia_id": "D1:1", "text": f"{WORD} keeps bees."}]
    talk = {"speaker_a": "Ada", "speaker_b": "Bob", "session_1_date_time": "9:10 am on 4 March, 2024"}
    asked = [{"question": f"Who is {WORD}?", "answer": f"{WORD}!", "evidence": ["D1:1"], "category": n} for n in (1, 4)]
    long = [said[0] | {"text": f"{WORD} keeps bees. " * 200}]
    data = [
        {"sample_id": f"talk-{n}", "conversation": talk | {"session_1": lines}, "qa": asked}
        for n, lines in enumerate((said, long))
    ]
    (home / "data.json").write_text(json.dumps(data))
    real = run.answer_documents

    def quoting(*given, keep, **more):
        return real(*given, keep=lambda one: keep(dataclasses.replace(one, answer=f"It is {WORD}.")), **more)

    monkeypatch.setattr(run, "answer_documents", quoting)
    model, adapter = tiny()
    command = ("eval", "run", model, "--adapter", adapter, "--task", "locomo=data.json", "--output", "out")
    policies = ("--policy", "everything", "bm25-1")
    how = ("--new-tokens", "2", "--window", "64", "--backend", "reference", "--retrieval-chunk", "16")
    assert main([*command, *policies, *how]) == 0
    found = files_with(home / "out")
    answers = list((home / "out" / "answers").rglob("*.jsonl"))
    assert len(found) == 4 and sorted(found) == sorted(path.name for path in answers)
    assert main(["eval", "score", "locomo", str(answers[0]), "--data", "data.json"]) == 0
    assert main(["eval", "run", model, "--task", "locomo=data.json", "--output", "out", "--seed", "3"]) == 2
    assert sorted(files_with(home)) == sorted(["data.json", *found])
