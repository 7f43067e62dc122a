"""Recall as a number: tell facts, throw their context away, ask for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from torch import nn

from ..arguments import check_choice
from ..errors import ArgumentError
from ..memory.state import MemoryState
from .chats import Chat, ask, tell
from .task import Fact, draw_facts, grouped, user

# What answers a question: the memory alone; an empty memory; the bare backbone, which sees nothing; the bare backbone
# that sees all facts; the bare backbone, and the memory, with the newer half in sight and the older half told before.
CONDITIONS = ("memory", "empty", "frozen", "context", "half_frozen", "half_memory")


@dataclass(frozen=True)
class Episode:
    """One conversation: messages that are told, the facts that hold after them, and which messages stay visible."""

    told: list[dict[str, str]]
    facts: list[Fact]
    visible: list[dict[str, str]]


def draw_episode(random: Random, count: int) -> Episode:
    """``count`` facts about names that were never trained on; the newer half (rounded down) can stay visible."""
    facts = draw_facts(random, count, held_out=True)
    older = facts[: count - count // 2]
    told = grouped(random, [fact.statement(random) for fact in older], 4)
    visible = grouped(random, [fact.statement(random) for fact in facts[len(older) :]], 4)
    return Episode(told, facts, visible)


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
    right = total = 0
    for first in range(0, len(episodes), rows):
        chunk = episodes[first : first + rows]
        right += sum(_answers(model, tokenizer, chunk, condition))
        total += sum(len(episode.facts) for episode in chunk)
    return right / total


def _answers(model, tokenizer, episodes: Sequence[Episode], condition: str) -> list[bool]:
    memory = _memory_of(model, tokenizer, episodes, condition)
    asked = [(row, fact) for row, episode in enumerate(episodes) for fact in episode.facts]
    chats = [[*_seen(episodes[row], condition), user(fact.question())] for row, fact in asked]
    answers: list[str] = []
    for first in range(0, len(chats), 256):
        part = slice(first, first + 256)
        memories = None if memory is None else memory.select([row for row, _ in asked[part]])
        answers += ask(model, tokenizer, chats[part], memories)
    return [answer == fact.value for answer, (_, fact) in zip(answers, asked)]


def _memory_of(model, tokenizer, episodes: Sequence[Episode], condition: str) -> MemoryState | None:
    if condition == "memory":
        return tell(model, tokenizer, [[*e.told, *e.visible] for e in episodes])
    if condition == "half_memory":
        return tell(model, tokenizer, [e.told for e in episodes])
    return MemoryState.zeros(model, len(episodes)) if condition == "empty" else None


def _seen(episode: Episode, condition: str) -> Chat:
    if condition == "context":
        return [*episode.told, *episode.visible]
    return episode.visible if condition.startswith("half") else []
