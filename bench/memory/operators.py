"""What each operator leaves of a fact, and of the others, on the shipped weights of the recall proof.

Each memory is told ``facts`` facts about names that no training text holds; then an operator is applied with the
statement of the first one, and every fact is asked for in a context of its own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import nn

from deltamem_fast import MemoryState, forget, patch_model, revise, unpatch_model
from deltamem_fast.memory.figures import norm_of
from deltamem_fast.recall.chats import ask, tell
from deltamem_fast.recall.task import Fact, changed, draw_facts, user
from deltamem_fast.recall.weights import STRATEGIES, find_weights, load_backbone

from ..instrument import commands, results
from ..instrument.rows import Row, counted

DIRECTORY = results.DIRECTORY / "operators"
EPISODES, FACTS = 96, 4
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
DECAYS = (0.25, 0.5, 0.75)

Operator = Callable[..., object]  # (model, tokenizer, memory, *, fact: the first one, new: its new value)


def operators() -> dict[tuple[str, float | None], Operator]:
    """(name, its number or None) → what is done to a memory."""

    def forgetting(strength: float | None) -> Operator:
        return lambda *to, fact, new: forget(*to, fact.statement(), strength=strength)

    return {
        ("nothing", None): lambda *to, fact, new: None,
        **{("forget", strength): forgetting(strength) for strength in (None, *STRENGTHS)},
        ("revise", None): lambda *to, fact, new: revise(*to, new.update()),
        ("forget, then revise", None): lambda *to, fact, new: revise(*to, new.update(), replaces=fact.statement()),
        **{("decay", rate): lambda m, t, memory, rate=rate, **_: memory.decay(rate) for rate in DECAYS},
        ("zero_", None): lambda m, t, memory, **_: memory.zero_(),
    }


def measure(model: nn.Module, tokenizer, strategy: str, episodes: int = EPISODES) -> list[Row]:
    """A row for each operator, of a patched model."""
    chooser = Random(f"operators {FACTS}")
    drawn = [draw_facts(chooser, FACTS, held_out=True) for _ in range(episodes)]
    newer = [changed(chooser, facts[0]) for facts in drawn]
    told = [tell(model, tokenizer, [[user(" ".join(f.statement() for f in facts))]]) for facts in drawn]
    rows = []
    for (name, number), apply in operators().items():
        memories = [memory.clone() for memory in told]
        for memory, facts, new in zip(memories, drawn, newer):
            apply(model, tokenizer, memory, fact=facts[0], new=new)
        values = _shares(model, tokenizer, memories, drawn, newer)
        values["norm_left"] = math.hypot(*map(norm_of, memories)) / math.hypot(*map(norm_of, told))
        parameters = {"operator": name, "number": number, "facts": FACTS, "memories": episodes}
        rows.append(counted(f"operators/{strategy}", parameters, **{k: round(v, 4) for k, v in values.items()}))
    return rows


def _shares(model, tokenizer, memories, drawn: Sequence[list[Fact]], newer: Sequence[Fact]) -> dict[str, float]:
    together = MemoryState.cat(memories)
    answers = [ask(model, tokenizer, [[user(fact.question())] for fact in facts], together) for facts in zip(*drawn)]

    def share(given: Sequence[Sequence[str]], facts: Sequence[Sequence[Fact]]) -> float:
        pairs = [pair for texts, wanted in zip(given, facts) for pair in zip(texts, wanted)]
        return sum(text == fact.value for text, fact in pairs) / len(pairs)

    first, *others = zip(*drawn)
    return {
        "first": share(answers[:1], [first]),
        "revised": share(answers[:1], [newer]),
        "others": share(answers[1:], others),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.memory operators``."""
    parser.add_argument("--quick", action="store_true", help="eight memories a strategy; stays out of docs/results")


def run(options: argparse.Namespace) -> int:
    """Measure, print, write."""
    torch.set_grad_enabled(False)
    weights = find_weights()
    model, tokenizer = load_backbone(weights.backbone)
    rows = []
    for strategy in STRATEGIES:
        patch_model(model, weights.adapters[strategy])
        rows += measure(model, tokenizer, strategy, 8 if options.quick else EPISODES)
        unpatch_model(model)
    return commands.finish(rows, {"quick": options.quick}, options.output)
