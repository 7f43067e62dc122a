"""A chat's loop: over lines of a pipe, a file or the command line, and in a terminal around prompt and screen."""

from __future__ import annotations

import codecs
import contextlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging

from ..adapter.record import identity_of
from ..display import in_bytes
from ..errors import FileFormatError
from ..inspection.facts import model_facts
from ..model.threads import fitting_threads
from ..recall import hints
from .commands import show_loaded, take_line
from .conversation import Chat, open_chat
from .options import Opening
from .screens import PlainScreen

if TYPE_CHECKING:  # they need packages that a pipe does not
    from .prompt import Prompt
    from .terminal import TerminalScreen

try:
    import termios
except ImportError:  # Windows
    termios = None

_OTHERS = {"UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-32": (codecs.BOM_UTF32_BE,)}


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """transformers says errors only: its warnings would stand in the middle of answers."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- over a pipe


def converse_over_pipe(opening: Opening, said: Sequence[str] | None) -> bool:
    """Have what is ``said``, or else the lines of stdin, until they end or one is ``/quit``; whether all went well."""
    with quiet_library():
        chat = open_chat(opening, PlainScreen())
        well = True
        with fitting_threads(chat.session.model, opening.threads):
            for text in said if said is not None else whole_lines(typed_lines()):
                well = take_line(chat, text) and well
                if chat.ended:
                    break
        return well


def whole_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines without their ends; one that ends in a backslash goes on in the next."""
    parts: list[str] = []
    for line in lines:
        line = line.rstrip("\r\n")
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []
    if parts:
        yield "\n".join(parts)


def typed_lines() -> Iterator[str]:
    """The lines. A byte order mark is no text; a byte that is no text becomes a mark, and ends nothing.

    Raises:
        ValueError: the input is UTF-16 or UTF-32, which its byte order mark says.
    """
    start = _start()
    for name, marks in _OTHERS.items():
        if start.startswith(marks):
            raise FileFormatError(f"standard input: {name}, allowed UTF-8")
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdin.reconfigure(errors="replace", encoding="utf-8" if start.startswith(codecs.BOM_UTF8) else None)
    for number, line in enumerate(sys.stdin):
        yield line.removeprefix("\ufeff") if number == 0 else line


def _start() -> bytes:
    """The first bytes, which stay to be read."""
    try:
        return sys.stdin.buffer.peek(4)[:4]
    except (AttributeError, OSError, ValueError):  # no file of bytes behind it
        return b""


# --- in a terminal


def converse_in_terminal(opening: Opening, *, history: bool, markdown: bool) -> None:
    """Ask for lines and answer them until the user ends it."""
    from .prompt import Prompt, toolbar
    from .terminal import TerminalScreen

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
    from .prompt import history_path, make_private

    path = history_path()
    try:
        return None if path is None else make_private(path)
    except OSError as error:
        screen.hint(f"no history is kept: {error}")
        return None


def _greet(chat: Chat, opening: Opening, screen: TerminalScreen) -> None:
    facts = model_facts(chat.session.model)
    states = identity_of(chat.session.model).config.num_state_heads
    several = f" ({states} states a layer)" if states > 1 else ""
    memory = f"{chat.strategy}{several}, {in_bytes(facts['memory_bytes'])} of memory"
    adapter = "" if opening.small_world else f"{facts['adapter']}: "
    screen.title(f"deltamem chat · {opening.name}", f"{adapter}{memory} · {facts['dtype']} on {facts['device']}")
    screen.hint("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    if opening.small_world:
        screen.hint(hints.note(chat.random))
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
            take_line(chat, text)
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
