"""What the proof measures: a plan of episodes, the same for every memory, and shares of right answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from torch import nn

from ..display import counted
from . import world
from .measure import Episode, draw_episode, recall
from .revision import Revision, draw_revision, revise
from .story import Story, draw_story

FACTS = (1, 2, 3, 4, 6, 8, 12, 16)
HALF_FACTS = (4, 8)
REVISED_FACTS = 4

Say = Callable[[str], None]
# Number of facts, as text → the share that is answered right.
Shares = dict[str, float]


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


def measure_bare(model: nn.Module, tokenizer, plan: Plan, say: Say) -> dict[str, Shares]:
    """The bare backbone: ``frozen`` (sees nothing), ``context`` (sees all facts), ``half_frozen`` (the newer half)."""
    return {
        "frozen": _measure(model, tokenizer, plan, FACTS, "frozen", "bare backbone", say),
        "context": _measure(model, tokenizer, plan, FACTS, "context", "bare backbone, all in sight", say),
        "half_frozen": _measure(model, tokenizer, plan, HALF_FACTS, "half_frozen", "bare backbone, half", say),
    }


def measure_patched(model: nn.Module, tokenizer, plan: Plan, name: str, say: Say) -> dict[str, Any]:
    """A patched model: ``recall``, ``half`` (in sight, the older half told before), ``revise`` (see there)."""
    measured = {
        "recall": _measure(model, tokenizer, plan, FACTS, "memory", name, say),
        "half": _measure(model, tokenizer, plan, HALF_FACTS, "half_memory", f"{name}, half in sight", say),
    }
    say(f"{name}, one of {REVISED_FACTS} facts revised")
    return measured | {"revise": revise(model, tokenizer, plan.revisions)}


def measure_empty(model: nn.Module, tokenizer, plan: Plan, say: Say) -> Shares:
    """A patched model with an empty memory."""
    return _measure(model, tokenizer, plan, FACTS, "empty", "empty memory", say)


def _measure(model, tokenizer, plan: Plan, counts, condition: str, name: str, say: Say) -> Shares:
    shares = {}
    for count in counts:
        say(f"{name}, {counted(count, 'fact')}")
        shares[str(count)] = recall(model, tokenizer, plan.episodes[count], condition)
    return shares


def mean_share(shares: Shares) -> float:
    """The mean over the numbers of facts, at each of which as many questions are asked."""
    return sum(shares.values()) / len(shares)


def chance() -> float:
    """The share that a guess of the right kind answers right."""
    return sum(1 / len(world.VALUES[kind]) for kind in world.KINDS) / len(world.KINDS)
