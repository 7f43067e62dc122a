"""What a chat on the shipped backbone tells of the small world that it knows."""

from __future__ import annotations

from random import Random

from ..recall import world
from ..recall.hints import help_text, unknown_words
from ..recall.task import draw_facts

_SHOWN = 6  # unknown words at most


def examples(random: Random) -> list[str]:
    """A statement and a question about it, with a name that was never trained on."""
    fact = draw_facts(random, 1, held_out=True, kinds=(world.KINDS[0],))[0]
    return [fact.statement(), fact.question()]


def note(random: Random) -> str:
    """What it can talk about, in two lines."""
    told, asked = examples(random)
    return f"A small world: people and their codes, objects and their places. Say for example\n  {told}\n  {asked}"


def world_help(random: Random) -> str:
    """All that can be said, with examples."""
    text = help_text(random)
    return text[text.index("Codes are") :]


def hint(text: str) -> str | None:
    """Which words of ``text`` the backbone was never taught, in one line; None if it knows them all."""
    unknown = unknown_words(text)
    if not unknown:
        return None
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return f"not in its small world: {', '.join(unknown[:_SHOWN])}{more}; the answer may be anything (/help)"
