"""What the proof tells and measures: a plan of a story and of episodes, the same for every memory; shares of answers.

The story is short: four facts are told and asked for, then one of them is revised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from torch import nn

from ..display import counted
from ..inspection.pictures import Snapshot, snapshot
from ..memory.state import MemoryState
from . import world
from .chats import answer, tell
from .measure import Episode, Revision, draw_episode, draw_revision, recall, revise
from .task import Fact, changed, draw_facts, user

FACTS_OF_A_KIND = 2  # in the story
FACTS = (1, 2, 3, 4, 6, 8, 12, 16)
HALF_FACTS = (4, 8)
REVISED_FACTS = 4

Say = Callable[[str], None]
# Number of facts, as text → the share that is answered right.
Shares = dict[str, float]


@dataclass(frozen=True)
class Story:
    """What is told, and the fact that takes the place of the first one."""

    facts: list[Fact]
    revised: Fact

    @property
    def questions(self) -> list[str]:
        """One for each fact; the same before and after the revision."""
        return [fact.question() for fact in self.facts]

    @property
    def holds(self) -> list[Fact]:
        """The facts after the revision."""
        return [self.revised, *self.facts[1:]]


@dataclass(frozen=True)
class Plan:
    """All that is told and asked, drawn before a model has run."""

    story: Story
    episodes: dict[int, list[Episode]]
    revisions: list[Revision]


def draw_plan(seed: int, questions: int) -> Plan:
    """At least ``questions`` questions for each number of facts; always the same for a seed."""

    def randoms(name: str, count: int) -> Iterator[Random]:
        return (Random(f"{seed} {name} {count} {i}") for i in range(math.ceil(questions / count)))

    return Plan(
        draw_story(seed),
        {count: [draw_episode(random, count) for random in randoms("recall", count)] for count in FACTS},
        [draw_revision(random, REVISED_FACTS) for random in randoms("revise", REVISED_FACTS)],
    )


# --- the story


def draw_story(seed: int) -> Story:
    """Facts of each kind, about names that were never trained on; always the same for a seed."""
    random = Random(seed)
    drawn = [draw_facts(random, FACTS_OF_A_KIND, held_out=True, kinds=(kind,)) for kind in world.KINDS]
    facts = [fact for group in zip(*drawn) for fact in group]
    return Story(facts, changed(random, facts[0]))


def tell_facts(model: nn.Module, tokenizer, story: Story) -> tuple[MemoryState, list[Snapshot]]:
    """Tell each fact in a context of its own; the memory, and what it looked like before and after each."""
    memory = MemoryState.zeros(model)
    snapshots = [snapshot(memory, "empty")]
    for count, fact in enumerate(story.facts, start=1):
        tell(model, tokenizer, [[user(fact.statement())]], memory)
        snapshots.append(snapshot(memory, counted(count, "fact")))
    return memory, snapshots


def tell_revision(model: nn.Module, tokenizer, story: Story, memory: MemoryState) -> Snapshot:
    """Overwrite the first fact, in a context of its own."""
    tell(model, tokenizer, [[user(story.revised.update())]], memory)
    return snapshot(memory, "revised")


def answers_to(model: nn.Module, tokenizer, story: Story, memory: MemoryState | None = None) -> list[str]:
    """What ``generate`` answers to each question in a context of its own; without a memory, the bare backbone."""
    return [answer(model, tokenizer, [user(question)], memory) for question in story.questions]


# --- measuring


def measure_bare(model: nn.Module, tokenizer, plan: Plan, say: Say) -> dict[str, Shares]:
    """The bare backbone: ``frozen`` (sees nothing), ``context`` (sees all facts), ``half_frozen`` (the newer half)."""
    names = {"frozen": "bare backbone", "context": "bare backbone, all in sight", "half_frozen": "bare backbone, half"}
    return {key: measure_recall(model, tokenizer, plan, key, name, say) for key, name in names.items()}


def measure_patched(model: nn.Module, tokenizer, plan: Plan, name: str, say: Say) -> dict[str, Any]:
    """A patched model: ``recall``, ``half`` (in sight, the older half told before), ``revise`` (see there)."""
    measured = {
        "recall": measure_recall(model, tokenizer, plan, "memory", name, say),
        "half": measure_recall(model, tokenizer, plan, "half_memory", f"{name}, half in sight", say),
    }
    say(f"{name}, one of {REVISED_FACTS} facts revised")
    return measured | {"revise": revise(model, tokenizer, plan.revisions)}


def measure_recall(model: nn.Module, tokenizer, plan: Plan, condition: str, name: str, say: Say) -> Shares:
    """``recall`` under one of its conditions at each number of facts; ``say`` is told the ``name``."""
    shares = {}
    for count in HALF_FACTS if condition.startswith("half") else FACTS:
        say(f"{name}, {counted(count, 'fact')}")
        shares[str(count)] = recall(model, tokenizer, plan.episodes[count], condition)
    return shares


def mean_share(shares: Shares) -> float:
    """The mean over the numbers of facts, at each of which as many questions are asked."""
    return sum(shares.values()) / len(shares)


def chance() -> float:
    """The share that a guess of the right kind answers right."""
    return sum(1 / len(world.VALUES[kind]) for kind in world.KINDS) / len(world.KINDS)
