"""The commands of a chat: what begins with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..adapter.wrappers import unwrap
from ..errors import ArgumentError
from ..session import MemorySession
from ..text.answering import DEFAULT_NEW_TOKENS
from . import about_context, about_files, about_memory, small_world
from .options import OPTIONS, generation_with, read_option, shown_options
from .wording import counted

if TYPE_CHECKING:
    from .conversation import Chat


@dataclass(frozen=True)
class Command:
    """``run(chat, rest)``, where ``rest`` is what follows the name; ``arguments`` and ``help`` are for the reader."""

    run: Callable[[Chat, str], None]
    arguments: str
    help: str


def run_command(chat: Chat, line: str) -> None:
    """Run the command that ``line`` begins with.

    Raises:
        ValueError: there is no such command, or one that takes nothing was given something; what is allowed is named.
    """
    name, *rest = line[1:].split(maxsplit=1)[:2] or [""]
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f" (did you mean /{near[0]}?)" if near else ""
        raise ArgumentError(f"/{name}: no such command{meant}; allowed {', '.join('/' + name for name in COMMANDS)}")
    rest = rest[0].strip() if rest else ""
    if rest and not command.arguments:
        raise ArgumentError(f"/{name}: got {rest!r}, allowed nothing after it")
    if not rest and command.arguments and not command.arguments.startswith("["):
        raise ArgumentError(f"/{name}: got nothing after it, allowed /{name} {command.arguments}")
    command.run(chat, rest)


def _help(chat: Chat, rest: str) -> None:
    rows = [[f"/{name} {command.arguments}".rstrip(), command.help] for name, command in COMMANDS.items()]
    chat.screen.table(["command", ""], [*rows, ["//…", "say something that begins with a slash"]], left=(0, 1))
    chat.screen.say("A line that ends in \\ goes on in the next one.")
    if chat.small_world:
        chat.screen.say("\n" + small_world.world_help(chat.random))


def _off(chat: Chat, rest: str) -> None:
    chat.session.remembers = False
    chat.screen.say("Memory off: the bare backbone answers; turns are not written. /on switches it on again.")


def _on(chat: Chat, rest: str) -> None:
    chat.session.remembers = True
    chat.screen.say("Memory on.")


def _undo(chat: Chat, rest: str) -> None:
    what = chat.undo()
    chat.screen.say(f"Undone: {what}; {counted(chat.session.turns, 'turn')} as before.")


def _reset(chat: Chat, rest: str) -> None:
    old = chat.session
    with chat.change("/reset"):
        chat.session = MemorySession(
            old.model,
            old.tokenizer,
            system=old.system,
            context_turns=old.limits.turns,
            context_tokens=old.limits.tokens,
            template=old.template,
            generation=old.generation,
        )
        chat.session.remembers = old.remembers
        chat.session._known = old._known  # what this chat saved, it may replace
    chat.screen.say("A new conversation, with an empty memory.")


def _set(chat: Chat, rest: str) -> None:
    if rest:
        name, *values = rest.split(maxsplit=1)
        value = read_option(name, "".join(values).strip(), f"/set {name}")
        if name == "seed":
            chat.set_seed(value)
        else:
            chat.session.generation = generation_with(chat.session.generation, {name: value})
    config = unwrap(chat.session.model).generation_config
    defaults = {"max_new_tokens": config.max_new_tokens or DEFAULT_NEW_TOKENS, "top_p": config.top_p}
    shown = shown_options(chat.session.generation, defaults, chat.seed)
    chat.screen.table(
        ["option", "value", ""], [[name, value, OPTIONS[name].help] for name, value in shown.items()], left=(0, 1, 2)
    )
    sampled = chat.session.generation.get("do_sample")
    chat.screen.say("Answers are sampled." if sampled else "Answers are greedy: the same each time.")


def _quit(chat: Chat, rest: str) -> None:
    chat.ended = True


COMMANDS = {
    "help": Command(_help, "", "what can be typed"),
    "save": Command(about_files.save, "[DIR]", "write conversation, context and memory into a directory"),
    "load": Command(about_files.load, "DIR", "go on with what was saved there"),
    "memory": Command(about_memory.memory, "[all]", "what the memory holds, layer by layer"),
    "ask": Command(about_memory.ask, "TEXT", "an answer from the memory alone; nothing is written"),
    "revise": Command(about_memory.revise, "TEXT", "write what holds from now on; no answer"),
    "forget": Command(
        about_memory.forget, "TEXT", "erase what was said from the memory (--messages TEXT: from the messages, too)"
    ),
    "ingest": Command(about_memory.ingest, "FILE", "read a text file into the memory; no answer"),
    "context": Command(about_context.context, "[N | all | tokens N | drop]", "what is in sight; its limits; empty it"),
    "off": Command(_off, "", "the bare backbone answers, without memory"),
    "on": Command(_on, "", "the memory is read and written again"),
    "undo": Command(_undo, "", "take back the last turn, or what a command changed"),
    "reset": Command(_reset, "", "a new conversation with an empty memory"),
    "set": Command(_set, "[NAME VALUE]", f"options of the answers: {', '.join(OPTIONS)}"),
    "quit": Command(_quit, "", "the end (Ctrl-D)"),
}
