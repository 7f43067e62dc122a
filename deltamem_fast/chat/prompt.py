"""The line that is typed: history, completion, several lines, and a toolbar, by prompt_toolkit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.styles import Style

from ..display import counted
from ..storage.files import make_directory, naming_files, state_home
from .commands import COMMANDS
from .conversation import Chat
from .options import HISTORY, OPTIONS

_STYLE = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "prompt-continuation": "ansicyan",
        "bottom-toolbar": "noreverse ansibrightblack",
        "bottom-toolbar.off": "noreverse bold ansiyellow",
    }
)
_PATHS = {"save": PathCompleter(expanduser=True, only_directories=True), "ingest": PathCompleter(expanduser=True)}
_PATHS["load"] = _PATHS["save"]
_WORDS = {"set": tuple(OPTIONS), "context": ("all", "drop", "tokens")}

Fragments = list[tuple[str, str]]


def history_path() -> Path | None:
    """Where the history lies: DELTAMEM_HISTORY (empty = nowhere, None), else ``deltamem/history`` in the state home."""
    chosen = os.environ.get(HISTORY)
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    return state_home() / "deltamem" / "history"


def make_private(path: Path) -> Path:
    """Make the file, or take an existing one, so that its owner alone may read it; missing directories likewise.

    Raises:
        OSError: it cannot be made, or is no file; the message names it.
    """
    with naming_files("history", path):
        make_directory(path.parent)
        # Never readable by others in between: made with this mode, and only then corrected where it was there already.
        # A pipe that nobody reads is an error, not a wait.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o600)
        try:
            if os.name != "nt" and os.fstat(handle).st_mode & 0o077 and os.path.isfile(path):
                os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    return path


class PrivateHistory(FileHistory):
    """A file that only its owner may read, also where it was taken away meanwhile; what cannot be written is not."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            make_private(Path(self.filename))
            super().store_string(string)


class CommandCompleter(Completer):
    """Names of commands, and what can follow them: paths, options."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        name, space, rest = before[1:].partition(" ")
        if not space:
            for found in COMMANDS:
                if found.startswith(name):
                    yield Completion(found, -len(name), display=f"/{found}", display_meta=COMMANDS[found].help)
        elif name in _PATHS:
            yield from _PATHS[name].get_completions(Document(rest), event)
        else:
            for word in _WORDS.get(name, ()):
                if word.startswith(rest):
                    yield Completion(word, -len(rest))


class Prompt:
    """Asks for lines.

    Args:
        history: the file that keeps them, or None: for this chat alone.
        toolbar: what stands at the bottom while a line is typed.
    """

    def __init__(self, history: Path | None, toolbar: Callable[[], Fragments]):
        types_a_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", "> ")],
            history=InMemoryHistory() if history is None else PrivateHistory(str(history)),
            auto_suggest=AutoSuggestFromHistory(),
            completer=CommandCompleter(),
            complete_while_typing=types_a_command,
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation=[("class:prompt-continuation", ". ")],
            bottom_toolbar=toolbar,
            reserve_space_for_menu=6,
            style=_STYLE,
        )

    def ask(self) -> str:
        """The next line, or lines.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C on an empty line.
        """
        return self._session.prompt()


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event) -> None:
        buffer = event.current_buffer
        chosen = buffer.complete_state and buffer.complete_state.current_completion
        if chosen:
            buffer.complete_state = None  # it stands in the line already
        elif buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    return keys


def toolbar(chat: Chat, name: str) -> Fragments:
    """Model, strategy, turns, context, and whether the memory is on."""
    session = chat.session
    limits = session.limits
    turns, tokens = str(chat.turns_in_context), f"{session.context_tokens:,}"
    turns += "" if limits.turns is None else f" of {limits.turns}"
    tokens += "" if limits.tokens is None else f" of {limits.tokens:,}"
    parts = [name, chat.strategy, counted(session.turns, "turn"), f"in sight {turns}, {tokens} tokens"]
    shown: Fragments = [("", " " + " · ".join(parts) + " · ")]
    return [*shown, ("", "memory on") if session.remembers else ("class:bottom-toolbar.off", "memory off")]
