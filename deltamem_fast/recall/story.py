"""A short story: four facts are told and asked for, then one of them is revised."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from torch import nn

from ..display import counted
from ..inspection.pictures import Snapshot, snapshot
from ..memory.state import MemoryState
from . import world
from .chats import answer, tell
from .task import Fact, changed, draw_facts, user

FACTS_OF_A_KIND = 2


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
        snapshots.append(snapshot(memory, f"{counted(count, 'fact')}"))
    return memory, snapshots


def tell_revision(model: nn.Module, tokenizer, story: Story, memory: MemoryState) -> Snapshot:
    """Overwrite the first fact, in a context of its own."""
    tell(model, tokenizer, [[user(story.revised.update())]], memory)
    return snapshot(memory, "revised")


def answers(model: nn.Module, tokenizer, story: Story, memory: MemoryState | None = None) -> list[str]:
    """What ``generate`` answers to each question in a context of its own; without a memory, the bare backbone."""
    return [answer(model, tokenizer, [user(question)], memory) for question in story.questions]
