"""Telling and asking by hand: what the shipped backbone's small world knows, and ``deltamem demo --interactive``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

from torch import nn

from ..inspection.pictures import heat_map_lines, snapshot
from ..memory.state import MemoryState
from . import world
from .chats import answer, tell
from .task import draw_facts, user
from .tokenizer import pieces

HELP = """\
A statement is told and its context thrown away; a line that ends in ? is answered from the memory alone.
/memory  the state, layer by layer     /reset  forget everything     /help  this     /quit  the end
"""
WORLD = """\
Codes are {codes}, places {places}, ...
Say:  {statements}
Ask:  {questions}
Anew: {updates}
Other people:  {people}
Other objects: {objects}"""

_WORD = re.compile(r"\w+|[^\w\s]")
_SHOWN = 6  # unknown words at most, in a hint


@functools.cache
def known_words() -> frozenset[str]:
    """All words and marks of the world. The parts of people's names are none, their pairs are."""
    names = {name for held_out in (False, True) for name in world.people(held_out)}
    words = {piece.strip() for piece in pieces()} - world.NAME_PARTS
    return frozenset({part for word in words for part in _WORD.findall(word)} | names | {".", "?", ":"})


def unknown_words(text: str) -> list[str]:
    """Words of ``text`` that the backbone was never taught, each once, in order."""
    return list(dict.fromkeys(word for word in _WORD.findall(text) if word not in known_words()))


def note(random) -> str:
    """What can be talked about, in two lines: a statement, and a question about it."""
    fact = _new_fact(random, world.KINDS[0])
    return (
        "A small world: people and their codes, objects and their places. Say for example\n"
        f"  {fact.statement()}\n  {fact.question()}"
    )


def hint(text: str) -> str | None:
    """Which words of ``text`` the backbone was never taught, in one line; None if it knows them all."""
    unknown = unknown_words(text)
    if not unknown:
        return None
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return f"not in its small world: {', '.join(unknown[:_SHOWN])}{more}; the answer may be anything (/help)"


def converse(
    model: nn.Module,
    tokenizer,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    random,
    style: str = "ascii",
    width: int = 80,
) -> None:
    """Answer ``lines`` until one is ``/quit`` or they end.

    Args:
        model: patched.
        lines: what the user types.
        write: is called with each text to show.
        random: draws the examples of ``/help``.
        style, width: of the heat map, see ``heat_map_lines``.
    """
    memory = MemoryState.zeros(model)
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if line == "/help":
            write(HELP + world_help(random))
        elif line == "/reset":
            memory.zero_()
            write("Forgotten.")
        elif line == "/memory":
            write("\n".join(heat_map_lines([snapshot(memory, "now")], style, width)))
        elif line.startswith("/"):
            write(f"No command {line}; allowed /memory, /reset, /help, /quit.")
        elif line:
            write(_respond(model, tokenizer, line, memory))


def world_help(random) -> str:
    """All that can be said, with examples: names that were never trained on."""
    person, thing = (_new_fact(random, kind) for kind in world.KINDS)
    return WORLD.format(
        codes=f"{world.CODES[0]} to {world.CODES[-1]}",
        places=", ".join(world.PLACES[:8]),
        statements="   ".join(fact.statement() for fact in (person, thing)),
        questions="   ".join(fact.question() for fact in (person, thing)),
        updates="   ".join(fact.update() for fact in (person, thing)),
        people=", ".join(random.sample(world.people(True), 8)),
        objects=", ".join(random.sample(world.objects(True), 6)),
    )


def _new_fact(random, kind):
    return draw_facts(random, 1, held_out=True, kinds=(kind,))[0]


def _respond(model, tokenizer, line: str, memory: MemoryState) -> str:
    unknown = unknown_words(line)
    if unknown:
        return f"Not in its small world: {', '.join(map(_with_hint, unknown))}. Nothing was told or asked; see /help."
    if not line.endswith("?"):
        line = line if line.endswith(".") else line + "."
        tell(model, tokenizer, [[user(line)]], memory)
        return f"Told: {line}"
    found = answer(model, tokenizer, [user(line)], memory)
    without = answer(model, tokenizer, [user(line)], MemoryState.zeros(model))
    return f"{found}   (with an empty memory: {without})"


def _with_hint(word: str) -> str:
    meant = sorted(known for known in known_words() if known.lower() == word.lower())
    return f"{word} (did you mean {meant[0]}?)" if meant else word
