"""Parts of the chat by themselves: history file, wrapping, lines of a pipe, completion, interrupts, wording."""

import io
import os
import signal

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from deltamem_fast.chat.loop import interrupt_once, interrupts, whole_lines
from deltamem_fast.chat.options import OPTIONS, generation_with, read_option
from deltamem_fast.chat.prompt import CommandCompleter, PrivateHistory, history_path, make_private
from deltamem_fast.chat.screens import Wrap
from deltamem_fast.display import columns, counted, harmless, in_bytes, shortened


def test_where_the_history_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DELTAMEM_HISTORY", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    at_home = tmp_path / ".local" / "state" / "deltamem" / "history"
    assert history_path() == at_home
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which the specification tells to ignore
    assert history_path() == at_home
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert history_path() == tmp_path / "state" / "deltamem" / "history"
    monkeypatch.setenv("DELTAMEM_HISTORY", "~/mine")
    assert history_path() == tmp_path / "mine"
    monkeypatch.setenv("DELTAMEM_HISTORY", "")
    assert history_path() is None


def test_the_history_is_private(tmp_path):
    umask = os.umask(0)
    try:
        path = make_private(tmp_path / "state" / "deltamem" / "history")
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("kept")
    path.chmod(0o644)
    make_private(path)
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "kept"
    with pytest.raises(OSError):
        make_private(tmp_path)


def test_history_that_was_taken_away_is_private_again(tmp_path):
    path = make_private(tmp_path / "history")
    history = PrivateHistory(str(path))
    history.store_string("one")
    path.unlink()
    history.store_string("two")
    assert path.stat().st_mode & 0o777 == 0o600 and list(history.load_history_strings()) == ["two"]
    PrivateHistory(str(tmp_path)).store_string("nowhere")  # told once, at the start


class Terminal:
    """The few escape sequences that Wrap writes, on a screen of lines."""

    def __init__(self):
        self.lines = [""]

    def write(self, text):
        stream = io.StringIO(text)
        while char := stream.read(1):
            if char == "\n":
                self.lines.append("")
            elif char == "\x1b":
                code = ""
                while not code or not code[-1].isalpha():
                    code += stream.read(1)
                if code.endswith("D"):
                    self.lines[-1] = self.lines[-1][: -int(code[1:-1])]
                else:
                    assert code == "[K"
            else:
                self.lines[-1] += char


@pytest.mark.parametrize("size", (1, 2, 5, 100))
def test_text_is_broken_between_words_however_it_arrives(size):
    text = "The rain sang all day, and unbelievablylongwords were cut.\n\n- a list\n- of things"
    terminal, wrap = Terminal(), Wrap(13)
    for begin in range(0, len(text), size):
        terminal.write(wrap.add(text[begin : begin + size]))
    assert all(len(line) <= 12 for line in terminal.lines)
    assert [line.rstrip() for line in terminal.lines] == [
        "The rain", "sang all", "day, and", "unbelievably", "longwords", "were cut.", "", "- a list", "- of things",
    ]  # fmt: skip


def test_wide_characters_take_two_columns():
    terminal, wrap = Terminal(), Wrap(6)
    terminal.write(wrap.add("你好世界"))
    assert terminal.lines == ["你好", "世界"]


def test_control_characters_are_written_out():
    assert harmless("a\x1b[2J\tb\r\n\x9b") == "a\\x1b[2J\tb\\r\n\\x9b"


def test_lines_of_a_pipe_go_on_after_a_backslash():
    lines = ["one\n", "two \\\n", "three\r\n", "\n", "four\\\n"]
    assert list(whole_lines(lines)) == ["one", "two \nthree", "", "four"]


def test_options_of_generate():
    assert generation_with({}, {}) == {"do_sample": False}
    assert generation_with({}, {"temperature": 0.0, "top_p": 0.9}) == {"do_sample": False}
    assert generation_with({}, {"top_p": 0.9}) == {"do_sample": True, "top_p": 0.9, "temperature": 1.0}
    assert generation_with({"do_sample": True, "temperature": 2.0}, {}) == {"do_sample": True, "temperature": 2.0}


def test_what_can_be_set_can_be_saved():
    from deltamem_fast.text.settings import GENERATION, MOST_NEW_TOKENS

    for name, texts in {
        "temperature": ("0", "0.5", "1e9"), "top_p": ("0.1", "1"), "max_new_tokens": ("1", str(MOST_NEW_TOKENS)),
    }.items():  # fmt: skip
        assert all(GENERATION[name].holds(read_option(name, text), 0) for text in texts)
    for name, text in (
        ("temperature", "2e9"), ("temperature", "inf"), ("max_new_tokens", "9" * 20),
        ("max_new_tokens", str(MOST_NEW_TOKENS + 1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: got '{text}', allowed .* up to 1"):
            read_option(name, text)
    assert f"{MOST_NEW_TOKENS:,}" in OPTIONS["max_new_tokens"].allowed


def completions(text):
    found = CommandCompleter().get_completions(Document(text), CompleteEvent())
    return [text[: len(text) + completion.start_position] + completion.text for completion in found]


def test_completion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ada").mkdir()
    (tmp_path / "adam.txt").write_text("")
    assert completions("/s") == ["/save", "/set"]
    assert "/memory" in completions("/") and completions("hello") == completions("hello /s") == []
    assert completions("/load a") == ["/load ada"] and completions("/save a") == ["/save ada"]
    assert completions("/ingest a") == ["/ingest ada", "/ingest adam.txt"]
    assert completions("/set t") == ["/set temperature", "/set top_p"]
    assert completions("/context ") == ["/context all", "/context drop", "/context tokens"]
    assert completions("/ask t") == []


def test_one_interrupt_and_no_more():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with interrupts(interrupt_once):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)  # while the turn is taken back
                undone = True
    assert undone and signal.getsignal(signal.SIGINT) is before


def test_wording():
    assert [in_bytes(size) for size in (0, 4096, 36_100, 2_400_000, 3e9)] == [
        "0 bytes", "4,096 bytes", "36.1 kB", "2.4 MB", "3.0 GB",
    ]  # fmt: skip
    assert counted(1, "turn") == "1 turn" and counted(1200, "turn") == "1,200 turns"
    assert shortened("a  b\nc") == "a b c" and shortened("abcdef", 4) == "abc…"
    assert columns([("", "one"), ("a name", "10")]) == ["        one", "a name   10"]
    assert columns([("torch", "2.9"), ("é", "no text ")], (0, 1)) == ["torch  2.9", "é      no text"]
