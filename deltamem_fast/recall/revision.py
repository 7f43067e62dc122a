"""Revising one fact: is the new value answered, and are the other facts still known?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from torch import nn

from ..errors import ArgumentError
from .chats import ask, tell
from .measure import Episode, draw_episode
from .task import Fact, changed, user


@dataclass(frozen=True)
class Revision:
    """An episode, which of its facts is overwritten (``place``), by what, and the sentence that says so."""

    episode: Episode
    place: int
    fact: Fact
    update: str


def draw_revision(random: Random, count: int) -> Revision:
    """An episode of ``count`` facts and a new value for one of them."""
    episode = draw_episode(random, count)
    place = random.randrange(count)
    fact = changed(random, episode.facts[place])
    return Revision(episode, place, fact, fact.update(random))


def revise(model: nn.Module, tokenizer, revisions: Sequence[Revision], *, rows: int = 32) -> dict[str, float]:
    """Tell the facts, then in a context of its own the update, and ask for every fact in a context of its own.

    Args:
        model: patched.
        rows: episodes told as one batch.

    Returns:
        Shares, 0 to 1: ``revised``, of the overwritten facts that are answered with the new value; ``stale``, of
        those answered with the old one; ``kept``, of the other facts that are answered right.

    Raises:
        ValueError: no revision, or one without another fact.
    """
    if not revisions or any(len(revision.episode.facts) < 2 for revision in revisions):
        raise ArgumentError("revisions: got none, or one of a single fact, allowed one or more of two facts or more")
    revised = stale = kept = others = 0
    for first in range(0, len(revisions), rows):
        chunk = revisions[first : first + rows]
        for revision, answers in zip(chunk, _answers(model, tokenizer, chunk)):
            right = [answer == fact.value for answer, fact in zip(answers, revision.episode.facts)]
            stale += right.pop(revision.place)
            revised += answers[revision.place] == revision.fact.value
            kept += sum(right)
            others += len(right)
    return {"revised": revised / len(revisions), "stale": stale / len(revisions), "kept": kept / others}


def _answers(model, tokenizer, revisions: Sequence[Revision]) -> list[list[str]]:
    """The answer to each fact of each revision."""
    memory = tell(model, tokenizer, [[*r.episode.told, *r.episode.visible] for r in revisions])
    tell(model, tokenizer, [[user(r.update)] for r in revisions], memory)
    asked = [(row, fact) for row, r in enumerate(revisions) for fact in r.episode.facts]
    chats = [[user(fact.question())] for _, fact in asked]
    answers = iter(ask(model, tokenizer, chats, memory.select([row for row, _ in asked])))
    return [[next(answers) for _ in r.episode.facts] for r in revisions]
