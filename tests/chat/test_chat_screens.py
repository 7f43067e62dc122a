"""The two screens: what stands where, thinking dimmed and no part of the message, Markdown, control characters."""

import functools
import io

import pytest
from chat_support import have, recall_chat, tiny_chat
from rich.console import Console
from rich.live import Live

from deltamem_fast.chat.commands import take_line
from deltamem_fast.chat.screens import PlainScreen
from deltamem_fast.chat.terminal import TerminalScreen

THOUGHT = "<think>\nAda went to the market.\n</think>\n\nShe **went** home.\x1b[2J"


def terminal(monkeypatch, **options):
    """A terminal's screen, and what is written to it."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen, file = TerminalScreen(**options), io.StringIO()
    settings = {"highlight": False, "markup": False, "emoji": False}
    screen.console = Console(file=file, force_terminal=True, width=70, color_system="standard", **settings)
    return screen, file


def test_thinking_is_dim_and_not_part_of_the_message(monkeypatch):
    screen, file = terminal(monkeypatch)
    chat = tiny_chat(screen, THOUGHT)
    assert take_line(chat, "Where did Ada go?")
    written = file.getvalue()
    assert written.startswith("\x1b[2m…\x1b[0m\r\x1b[K\x1b[2mAda") and written.endswith("\n\n")
    before, after = written.split("She **went** home.\\x1b[2J")  # written out, not acted upon
    assert before.replace("\x1b[0m\x1b[2m", "").endswith("market.\x1b[0m\n\n") and after == "\n\n"
    assert chat.session.messages[-1]["content"] == "She **went** home.\x1b[2J"
    assert "market" in chat.session.messages[-1]["reasoning_content"]


def test_an_answer_that_is_nothing_but_thinking(monkeypatch):
    screen, file = terminal(monkeypatch)
    assert take_line(tiny_chat(screen, "<think>\nAda went.\n</think>\n"), "Why?")
    assert "(no answer)" in file.getvalue()


def test_markdown_is_rendered_once_at_the_end(monkeypatch):
    # No clock draws what has come so far: on a slow machine that may be half a mark.
    monkeypatch.setattr("deltamem_fast.chat.terminal.Live", functools.partial(Live, auto_refresh=False))
    screen, file = terminal(monkeypatch, markdown=True)
    assert take_line(tiny_chat(screen, THOUGHT), "Where did Ada go?")
    written = file.getvalue()
    assert "**" not in written and "\x1b[1mwent\x1b[0m" in written.split("\x1b[2K")[-1]
    assert "\x1b[2J" not in written


def test_a_dumb_terminal_gets_no_escape_sequences(monkeypatch):
    screen, file = terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    screen.console = Console(file=file, force_terminal=True, width=70, color_system=None)
    chat = tiny_chat(screen, THOUGHT)
    assert take_line(chat, "Where did Ada go?")
    assert "\x1b" not in file.getvalue()


def test_tables_and_errors_in_a_terminal(monkeypatch):
    screen, file = terminal(monkeypatch)
    chat = recall_chat()
    chat.screen = screen
    for line in ("It was [bold]all[/bold].", "/context", "/memory", "/help", "/nothing", "/off", "love?"):
        take_line(chat, line)
    written = file.getvalue()
    assert "[bold]all[/bold]" in written
    for text in ("tokens", "effective rank", "what can be typed", "no such command", "Memory off", "small world: love"):
        assert text in written
    assert "\x1b[31m/nothing" in written


def test_a_narrow_terminal_keeps_the_figures(monkeypatch):
    screen, file = terminal(monkeypatch)
    screen.console = Console(file=file, force_terminal=True, width=36, highlight=False)
    chat = recall_chat()
    chat.screen = screen
    for line in ("The small coat is in the bakery.", "/context"):
        take_line(chat, line)
    (row,) = (line for line in file.getvalue().splitlines() if line.lstrip().startswith("1 "))
    assert row.split()[:2] == ["1", str(chat.session.context_tokens)] and "…" in row and len(row.rstrip()) <= 36


def test_a_pipe_gets_the_answers_alone(capsys):
    chat = tiny_chat(PlainScreen(), THOUGHT)
    assert take_line(chat, "Where did Ada go?") and not take_line(chat, "/nothing")
    out, err = capsys.readouterr()
    assert out == "She **went** home.\x1b[2J\n"
    assert err.startswith("deltamem: error: /nothing: no such command") and err.count("\n") == 1


def test_a_pipe_gets_what_was_said_before_an_error(capsys, monkeypatch):
    chat = recall_chat()
    chat.screen = screen = PlainScreen()
    with pytest.raises(RuntimeError):
        with screen.answering() as answer:
            answer.piece("So far")
            raise RuntimeError
    take_line(chat, "/load /nowhere")
    out, err = capsys.readouterr()
    assert out == "So far\n" and "no snapshot there" in err


def test_saved_messages_are_shown(tmp_path, monkeypatch, capsys):
    chat = recall_chat()
    have(chat, "The code of Corpus is 42.")
    have(chat, f"/save {tmp_path / 'ada'}")
    screen, file = terminal(monkeypatch)
    for chat.screen in (screen, PlainScreen()):
        assert take_line(chat, f"/load {tmp_path / 'ada'}")
    assert "> The code of Corpus is 42." in file.getvalue()
    assert capsys.readouterr().out.splitlines()[-2:] == ["user: The code of Corpus is 42.", "assistant: 42"]
