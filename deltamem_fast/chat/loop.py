"""A chat in a terminal: the loop around prompt and screen."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ..adapter.record import identity_of
from ..inspection.model_info import model_facts
from ..model.threads import fitting_threads
from . import small_world
from .about_context import turns_in_context
from .about_files import show_loaded
from .conversation import Chat
from .history import history_path, make_private
from .opening import Opening, open_chat, quiet_library
from .prompt import Fragments, Prompt
from .terminal import TerminalScreen
from .wording import counted, in_bytes

try:
    import termios
except ImportError:  # Windows
    termios = None


def converse_in_terminal(opening: Opening, *, history: bool, markdown: bool) -> None:
    """Ask for lines and answer them until the user ends it."""
    screen = TerminalScreen(markdown=markdown)
    with quiet_library():
        with screen.waiting(f"loading {opening.name}", bars=not opening.small_world):
            chat = open_chat(opening, screen)
        _greet(chat, opening, screen)
        chat.history = _history(screen) if history else None
        prompt = Prompt(chat.history, lambda: toolbar(chat, opening.name))
        # While no answer comes, an interrupt has nothing to stop; the prompt has its own way with it.
        with quiet_keys(), interrupts(signal.SIG_IGN), fitting_threads(chat.session.model, opening.threads):
            _converse(chat, prompt, screen)


def _history(screen: TerminalScreen) -> Path | None:
    path = history_path()
    if path is None:
        return None
    try:
        return make_private(path)
    except OSError as error:
        screen.hint(f"no history is kept: {error}")
        return None


def _greet(chat: Chat, opening: Opening, screen: TerminalScreen) -> None:
    facts = model_facts(chat.session.model)
    states = identity_of(chat.session.model).config.num_state_heads
    several = f" ({states} states a layer)" if states > 1 else ""
    memory = f"{strategy_of(chat)}{several}, {in_bytes(facts['memory_bytes'])} of memory"
    adapter = "" if opening.small_world else f"{facts['adapter']}: "
    screen.title(f"deltamem chat · {opening.name}", f"{adapter}{memory} · {facts['dtype']} on {facts['device']}")
    screen.hint("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    if opening.small_world:
        screen.hint(small_world.note(chat.random))
    screen.console.print()
    if opening.directory is not None:
        show_loaded(chat)


def _converse(chat: Chat, prompt: Prompt, screen: TerminalScreen) -> None:
    mentioned = False
    while True:
        try:
            text = prompt.ask()
        except KeyboardInterrupt:
            screen.hint("Ctrl-D or /quit ends the chat.")
            continue
        except EOFError:
            chat.ended = True
        else:
            _have(chat, text, screen)
        if not chat.ended:
            continue
        if mentioned or not chat.unsaved or not chat.session.turns:
            return
        mentioned, chat.ended = True, False
        screen.remark("This conversation is not saved: /save keeps it. Once more ends without.")


def _have(chat: Chat, text: str, screen: TerminalScreen) -> None:
    before = chat.changes
    try:
        with interrupts(interrupt_once):
            chat.line(text)
    except KeyboardInterrupt:
        if chat.changes == before:  # otherwise it came too late
            what = text.split()[0] if text.startswith("/") else "the turn"
            screen.remark(f"stopped; as before {what}")


@contextlib.contextmanager
def quiet_keys() -> Iterator[None]:
    """Between prompts keys wait for the next one, as they are.

    A terminal would show them in the middle of an answer, and would take Ctrl-D for the end of the input, and away.
    """
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [before[0] & ~termios.ICRNL, *before[1:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextlib.contextmanager
def interrupts(handler) -> Iterator[None]:
    """``handler`` is what Ctrl-C leads to inside, as ``signal.signal`` takes it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_once(number, frame) -> None:
    """Raises KeyboardInterrupt; further ones cannot disturb the taking back of what was begun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def toolbar(chat: Chat, name: str) -> Fragments:
    """Model, strategy, turns, context, and whether the memory is on."""
    session = chat.session
    limits = session.limits
    turns, tokens = str(turns_in_context(chat)), f"{session.context_tokens:,}"
    turns += "" if limits.turns is None else f" of {limits.turns}"
    tokens += "" if limits.tokens is None else f" of {limits.tokens:,}"
    parts = [name, strategy_of(chat), counted(session.turns, "turn"), f"in sight {turns}, {tokens} tokens"]
    shown: Fragments = [("", " " + " · ".join(parts) + " · ")]
    return [*shown, ("", "memory on") if session.remembers else ("class:bottom-toolbar.off", "memory off")]


def strategy_of(chat: Chat) -> str:
    """How the adapter writes: ``tsw``, ``ssw`` or ``msw``."""
    config = identity_of(chat.session.model).config
    return "ssw" if config.segmented else "msw" if config.num_state_heads > 1 else "tsw"
