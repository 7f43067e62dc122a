"""A chat on the shipped backbone: told, out of sight, asked, revised, forgotten, saved, loaded, undone."""

import subprocess
import sys
from pathlib import Path

import pytest
from chat_support import ASKED, TOLD, fail, have, recall_chat, state_bits

from deltamem_fast.chat.commands import take_line
from deltamem_fast.session import MemorySession


def test_what_has_left_the_context_is_answered_from_the_memory():
    chat = recall_chat(context_turns=1)
    assert have(chat, TOLD) == "42"
    have(chat, "The small coat is in the bakery.")
    assert have(chat, ASKED) == "42"
    assert [message["content"] for message in chat.session.context] == [ASKED, "42"]
    assert have(chat, "Now the code of Corpus is 17.") == "17"
    assert have(chat, ASKED) == "17"
    assert chat.session.turns == 5 and chat.changes == 5 and chat.unsaved


def test_off_answers_without_the_memory_and_writes_nothing():
    chat = recall_chat(context_turns=1)
    have(chat, TOLD)
    have(chat, "/context drop")
    before = state_bits(chat)[0]
    assert "/on" in have(chat, "/off")
    assert have(chat, ASKED) != "42"
    assert state_bits(chat)[0] == before
    assert "Memory on" in have(chat, "/on")
    assert have(chat, ASKED) == "42"


def test_the_operators():
    chat = recall_chat()
    have(chat, TOLD)
    assert have(chat, f"/ask {ASKED}") == "42"
    before = state_bits(chat)
    told = have(chat, f"/forget {TOLD}")
    assert "% of the state's norm is left" in told and "/context drop" in told and "/save writes it" in told
    assert have(chat, f"/ask {ASKED}") != "42"
    assert state_bits(chat)[1] == before[1]
    have(chat, "/undo")
    assert state_bits(chat) == before and have(chat, f"/ask {ASKED}") == "42"
    assert "tokens" in have(chat, "/revise Now the code of Corpus is 17.")
    assert have(chat, f"/ask {ASKED}") == "17"
    have(chat, "/context drop")
    assert "in sight" not in have(chat, f"/forget {TOLD}")
    have(chat, f"/revise {TOLD}")
    have(chat, TOLD)
    told = have(chat, f"/forget --messages {TOLD}")
    assert "Taken out of 2 messages; 1 turn left the context." in told and "/save" not in told and "typed" not in told
    chat.history = Path("typed")
    assert "What was typed stays in typed, this line too." in have(chat, f"/forget --messages {TOLD}")
    assert TOLD not in str(chat.session.messages)
    have(chat, "/reset")
    assert have(chat, "/forget The rain sang.") == "Erased, as far as it is told from others: the memory was empty."


def test_ingest(tmp_path, monkeypatch):
    chat = recall_chat()
    file = tmp_path / "facts.txt"
    file.write_text("\ufeffThe code of Corpus is 42.\n\nThe small coat is in the bakery.\n", encoding="utf-8")
    told = have(chat, f"/ingest {file}")
    assert "tokens" in told and "60 bytes" in told
    assert chat.session.turns == 0 and have(chat, f"/ask {ASKED}") == "42"
    before = state_bits(chat)
    for name, content, message in (
        ("absent.txt", None, "no such file"),
        (".", None, "not a file"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8 (byte 3)"),
        ("empty.txt", b" \n", "nothing but white space"),
        ("large.txt", b"word " * 9, "has 45 bytes, allowed at most 44"),
    ):
        monkeypatch.setattr("deltamem_fast.chat.commands.MOST_BYTES", 44)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        error = fail(chat, f"/ingest {tmp_path / name}")
        assert error.startswith("/ingest: ") and message in error and "\n" not in error
    assert state_bits(chat) == before


def test_saved_here_and_loaded_in_another_process(tmp_path):
    chat = recall_chat(context_turns=2)
    for line in (TOLD, "The small coat is in the bakery.", "The rain sang all day."):
        have(chat, line)
    told = have(chat, f"/save {tmp_path / 'ada'}")
    size = sum(path.stat().st_size for path in (tmp_path / "ada").iterdir() if path.name != ".lock")
    assert "Saved 3 turns" in told and f"{size / 1000:.1f} kB" in told and not chat.unsaved
    questions = (ASKED, "Where is the small coat?", "What happened then?")
    command = [sys.executable, "-m", "deltamem_fast", "chat", "--load", str(tmp_path / "ada")]
    for question in questions:
        command += ["--say", question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [have(chat, question) for question in questions]
    assert done.stdout.splitlines()[0] == "42"


def test_save_and_load_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = recall_chat()
    have(chat, TOLD)
    saved = state_bits(chat)
    have(chat, "/save first")
    have(chat, ASKED)
    assert chat.unsaved and "in place of what was there" in have(chat, "/save") and chat.directory == "first"
    later = state_bits(chat)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "is not empty and holds no session" in fail(chat, "/save full")
    assert "which is a file" in fail(chat, "/save full/notes.txt")
    for name in ("absent", "full"):
        assert "no snapshot there" in fail(chat, f"/load {name}")
    assert state_bits(chat) == later and chat.directory == "first"

    other = recall_chat()
    have(other, "The rain sang all day.")
    shown = have(other, "/load first")
    assert "Loaded first: 2 turns, in sight 2 turns" in shown and shown.endswith(f"42\n{ASKED}\n42")
    assert state_bits(other) == later and not other.unsaved
    have(other, "/undo")
    assert other.session.messages[0]["content"] == "The rain sang all day."
    assert "allowed another directory, or /save --overwrite first" in fail(other, "/save first")
    have(chat, "/reset")
    assert "in place of" in have(chat, "/save")  # its own
    assert "in place of" in have(other, "/save --overwrite first")
    assert "holds another session" in fail(chat, "/save")
    (name,) = have(recall_chat(), "/save").split(" to ")[1].split(" (")[:1]
    assert name.startswith("deltamem-chat-") and (tmp_path / name / "session.json").is_file()
    assert state_bits(chat) != saved


def test_undo_goes_back_over_everything_that_changed():
    chat = recall_chat(context_turns=2)
    assert "nothing left to undo" in fail(chat, "/undo")
    past = []
    for line in (
        TOLD,
        ASKED,
        f"/forget {TOLD}",
        "/context drop",
        "/revise Now the code of Corpus is 17.",
        "/reset",
        TOLD,
    ):
        past.append(state_bits(chat))
        have(chat, line)
    have(chat, "/off")
    for before in reversed(past):
        assert have(chat, "/undo").startswith("Undone: ")
        assert state_bits(chat) == before
        assert not chat.session.remembers  # a switch, and no part of the conversation
    assert "nothing left to undo" in fail(chat, "/undo")
    have(chat, "/on")
    for _ in range(10):
        have(chat, TOLD)
    for _ in range(8):
        have(chat, "/undo")
    assert "the last 8 changes" in fail(chat, "/undo") and chat.session.turns == 2


def test_after_undo_it_goes_on_as_if_nothing_had_been():
    chat, plain = recall_chat(context_turns=2), recall_chat(context_turns=2)
    for line in (TOLD, "The rain sang all day.", "The small coat is in the bakery."):
        assert have(chat, line) == have(plain, line)
    have(chat, "Now the code of Corpus is 17.")
    have(chat, "/undo")
    assert have(chat, ASKED) == have(plain, ASKED)
    assert state_bits(chat) == state_bits(plain)


@pytest.mark.parametrize("error", (RuntimeError("out of memory"), KeyError("x"), KeyboardInterrupt()))
def test_a_turn_that_fails_leaves_no_trace(monkeypatch, error):
    chat = recall_chat()
    have(chat, TOLD)
    before = state_bits(chat)
    send = MemorySession.send

    def break_off(self, *arguments, **options):
        yield next(send(self, *arguments, **options))
        raise error

    monkeypatch.setattr(MemorySession, "send", break_off)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            take_line(chat, ASKED)
    else:
        assert fail(chat, ASKED) == ("out of memory" if isinstance(error, RuntimeError) else "KeyError: 'x'")
    monkeypatch.undo()
    assert state_bits(chat) == before and chat.changes == 1
    chat.screen.take()
    assert have(chat, ASKED) == "42"


def test_words_that_it_does_not_know_are_pointed_out_and_the_turn_is_had():
    chat = recall_chat()
    assert take_line(chat, "What is love and war, or a b c d e f?")
    (kind, hint), (_, answer) = chat.screen.take()
    assert kind == "hint" and hint.startswith("not in its small world: love, and, war") and "more" in hint
    assert answer and chat.session.turns == 1
    assert take_line(chat, ASKED) and [kind for kind, _ in chat.screen.take()] == ["answer"]
