"""The chat in a real (pseudo-)terminal: prompt, history, completion, toolbar, Ctrl-C in the middle of an answer."""

import os
import signal
import sys

import pytest
from chat_support import ASKED, TOLD, write_tiny_model

pytest.importorskip("pty")
from pty_driver import ALT_ENTER, CTRL_C, CTRL_D, DOWN, ENTER, TAB, UP, Terminal

PROMPT = "> "


def terminal(home, *arguments, **changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "DELTAMEM_", "NO_COLOR"))}
    own = {
        "HOME": str(home),
        "TERM": "xterm-256color",
        "OMP_NUM_THREADS": "1",
    }
    return Terminal([sys.executable, "-m", "deltamem_fast", "chat", *arguments], kept | own | changes)


def test_a_conversation_at_the_prompt(tmp_path):
    with terminal(tmp_path) as chat:
        greeting = chat.expect("memory on")
        assert "deltamem chat · small-world" in greeting and "Say for example" in greeting and PROMPT in greeting
        assert "small-world · msw · 0 turns · in sight 0 of 4, 0 tokens · memory on" in greeting
        chat.type(TOLD, ENTER)
        chat.expect("42\n\n")
        chat.expect("1 turn · in sight 1 of 4, 13 tokens")
        # Several lines: by Alt-Enter, and by a backslash at the end.
        chat.type("What is the", ALT_ENTER, "code of\\", ENTER, "Corpus?", ENTER)
        assert "> What is the\n. code of\n. Corpus?\n" in chat.expect("2 turns · in sight 2 of 4")
        chat.type("/context", ENTER)
        assert "What is the code of Corpus?" in chat.expect("Allowed: 4 turns")
        # Completion of a command, and of what follows it.
        chat.type("/mem", TAB, ENTER, ENTER)
        assert "layer 3 head 3" in chat.expect("4,096 bytes, norm")
        assert "\x1b[38;5;" in chat.raw
        chat.type("/off", ENTER)
        chat.expect("Memory off")
        chat.expect("memory off")
        chat.type("/foo", ENTER)
        chat.expect("/foo: no such command")
        # Ctrl-C clears a line, and on an empty one says how to end.
        chat.type("/never sent", CTRL_C, "/on", ENTER)
        assert "never sent: no such command" not in chat.expect("Memory on")
        chat.type(CTRL_C)
        chat.expect("Ctrl-D or /quit ends the chat")
        chat.type(UP, UP, UP, DOWN, ENTER)  # /on, /foo, /off, and back to /foo
        chat.expect("/foo: no such command")
        chat.type("/undo", ENTER, "/undo", ENTER, TOLD, ENTER, ASKED, ENTER, "/context drop", ENTER, "/forget ")
        chat.expect("2 turns out of sight")  # what was typed meanwhile has waited
        chat.type(ASKED, ENTER)
        chat.expect("of the state's norm is left")
        chat.type(CTRL_D)
        chat.expect("is not saved: /save keeps it")
        chat.type("/quit", ENTER)
        assert chat.end() == 0

    history = tmp_path / ".local" / "state" / "deltamem" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert f"+{TOLD}\n" in history.read_text() and "+What is the\n+code of\n+Corpus?\n" in history.read_text()

    # The next chat recalls it; nothing is coloured, and what was typed before is offered again.
    with terminal(tmp_path, "--strategy", "tsw", NO_COLOR="1") as chat:
        chat.expect("memory on")
        chat.type(UP, UP, ENTER)  # /quit, and /forget before it
        chat.expect("the memory was empty")
        chat.type("The code", "\x1b[C", ENTER)
        chat.expect("42\n\n")
        chat.type("/memory", ENTER)
        chat.expect("1,024 bytes, norm")
        chat.type(f"/save {tmp_path / 'ada'}", ENTER)
        chat.expect("Saved 1 turn")
        chat.type(CTRL_D)  # saved: nothing to mention
        assert chat.end() == 0
        assert "\x1b[38;5;" not in chat.raw and "\x1b[31m" not in chat.raw


def test_an_interrupt_in_the_middle_of_an_answer(tmp_path):
    model, adapter = write_tiny_model(tmp_path)
    arguments = [model, "--adapter", adapter, "--max-new-tokens", "100000", "--no-history"]
    with terminal(tmp_path, *arguments) as chat:
        chat.expect("memory on")
        chat.type("Where did Ada go?", ENTER)
        chat.expect("went market")
        chat.type("typed meanwhile", CTRL_C, CTRL_C, CTRL_C)
        shown = chat.expect("stopped; as before the turn")
        assert "typed meanwhile" not in shown and "Traceback" not in chat.raw
        chat.expect("0 turns · in sight 0 of 4, 0 tokens")
        chat.type()  # what is expected next is shown from here on
        os.kill(chat.pid, signal.SIGINT)  # nothing to stop: it changes nothing
        chat.expect("Ctrl-D or /quit ends the chat")  # till then it would take away what is typed
        chat.type("/set max_new_tokens 3", ENTER)
        chat.expect("greedy")
        chat.type("And then?", ENTER)
        chat.expect("1 turn · in sight 1 of 4")
        chat.type(f"/ask {ASKED}", ENTER)
        chat.expect("1 turn · in sight 1 of 4")
        chat.type("/undo", ENTER)
        chat.expect("Undone: the turn (And then?)")
        chat.type(CTRL_D)
        assert chat.end() == 0
    assert not (tmp_path / ".local").exists()
