"""Recall as a number: tell facts, throw their context away, ask for each of them, and again after one was revised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from torch import nn

from ..arguments import check_choice
from ..errors import ArgumentError
from ..memory.state import MemoryState
from .chats import Chat, ask, tell
from .task import Fact, changed, draw_facts, grouped, user

# What answers a question: the memory alone; an empty memory; the bare backbone, which sees nothing; the bare backbone
# that sees all facts; the bare backbone, and the memory, with the newer half in sight and the older half told before.
CONDITIONS = ("memory", "empty", "frozen", "context", "half_frozen", "half_memory")


@dataclass(frozen=True)
class Episode:
    """One conversation: messages that are told, the facts that hold after them, and which messages stay visible."""

    told: list[dict[str, str]]
    facts: list[Fact]
    visible: list[dict[str, str]]


@dataclass(frozen=True)
class Revision:
    """An episode, which of its facts is overwritten (``place``), by what, and the sentence that says so."""

    episode: Episode
    place: int
    fact: Fact
    update: str


def draw_episode(random: Random, count: int) -> Episode:
    """``count`` facts about names that were never trained on; the newer half (rounded down) can stay visible."""
    facts = draw_facts(random, count, held_out=True)
    older = facts[: count - count // 2]
    told = grouped(random, [fact.statement(random) for fact in older], 4)
    visible = grouped(random, [fact.statement(random) for fact in facts[len(older) :]], 4)
    return Episode(told, facts, visible)


def draw_revision(random: Random, count: int) -> Revision:
    """An episode of ``count`` facts and a new value for one of them."""
    episode = draw_episode(random, count)
    place = random.randrange(count)
    fact = changed(random, episode.facts[place])
    return Revision(episode, place, fact, fact.update(random))


def recall(model: nn.Module, tokenizer, episodes: Sequence[Episode], condition: str, *, rows: int = 32) -> float:
    """The share of all facts of ``episodes`` that are answered right, each asked for once, 0 to 1.

    Args:
        model: patched; under ``frozen`` and ``context`` its memory is disabled.
        condition: one of ``CONDITIONS``. In all of them a question comes in a context of its own.
        rows: episodes told as one batch.

    Raises:
        ValueError: an unknown condition, or no episode.
    """
    check_choice(condition, "condition", CONDITIONS)
    if not episodes:
        raise ArgumentError("episodes: got none, allowed one or more")
    right: list[bool] = []
    for first in range(0, len(episodes), rows):
        chunk = episodes[first : first + rows]
        memory = _memory_of(model, tokenizer, chunk, condition)
        for episode, answers in zip(chunk, _answers(model, tokenizer, chunk, memory, condition)):
            right += _right(answers, episode)
    return sum(right) / len(right)


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
    revised, stale, kept = [], [], []
    for first in range(0, len(revisions), rows):
        chunk = revisions[first : first + rows]
        episodes = [revision.episode for revision in chunk]
        memory = _memory_of(model, tokenizer, episodes, "memory")
        tell(model, tokenizer, [[user(revision.update)] for revision in chunk], memory)
        for revision, answers in zip(chunk, _answers(model, tokenizer, episodes, memory, "memory")):
            right = _right(answers, revision.episode)
            stale.append(right.pop(revision.place))
            revised.append(answers[revision.place] == revision.fact.value)
            kept += right
    return {name: sum(right) / len(right) for name, right in (("revised", revised), ("stale", stale), ("kept", kept))}


def _memory_of(model, tokenizer, episodes: Sequence[Episode], condition: str) -> MemoryState | None:
    if condition == "memory":
        return tell(model, tokenizer, [[*e.told, *e.visible] for e in episodes])
    if condition == "half_memory":
        return tell(model, tokenizer, [e.told for e in episodes])
    return MemoryState.zeros(model, len(episodes)) if condition == "empty" else None


def _answers(model, tokenizer, episodes, memory: MemoryState | None, condition: str) -> list[list[str]]:
    """The answer to each fact of each episode, whose memory is a row of ``memory``."""
    asked = [(row, fact) for row, episode in enumerate(episodes) for fact in episode.facts]
    chats = [[*_seen(episodes[row], condition), user(fact.question())] for row, fact in asked]
    answers: list[str] = []
    for first in range(0, len(chats), 256):
        part = slice(first, first + 256)
        memories = None if memory is None else memory.select([row for row, _ in asked[part]])
        answers += ask(model, tokenizer, chats[part], memories)
    left = iter(answers)
    return [[next(left) for _ in episode.facts] for episode in episodes]


def _right(answers: list[str], episode: Episode) -> list[bool]:
    return [answer == fact.value for answer, fact in zip(answers, episode.facts)]


def _seen(episode: Episode, condition: str) -> Chat:
    if condition == "context":
        return [*episode.told, *episode.visible]
    return episode.visible if condition.startswith("half") else []
