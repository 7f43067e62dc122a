"""What each operator leaves of a fact, and of the others, on the shipped weights of the recall proof.

Each memory is told ``facts`` facts about names that no training text holds; then an operator is applied with the
statement of the first one, and every fact is asked for in a context of its own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
from torch import nn

from deltamem_fast import MemoryState, forget, patch_model, revise, unpatch_model
from deltamem_fast.recall.chats import ask, tell
from deltamem_fast.recall.task import Fact, changed, draw_facts, user
from deltamem_fast.recall.weights import STRATEGIES, find_weights, load_backbone

from ..instrument import commands, results
from ..instrument.rows import Row, counted

DIRECTORY = results.DIRECTORY / "operators"
EPISODES, FACTS = 96, 4
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
DECAYS = (0.25, 0.5, 0.75)

Operator = Callable[[nn.Module, object, MemoryState, Fact, Fact], object]


def operators() -> dict[tuple[str, float | None], Operator]:
    """(name, its number or None) → what is done to a memory: (model, tokenizer, memory, first fact, its new value)."""

    def forgetting(strength: float | None) -> Operator:
        return lambda model, tokenizer, memory, fact, new: forget(
            model, tokenizer, memory, fact.statement(), strength=strength
        )

    def replacing(model, tokenizer, memory, fact, new):
        return revise(model, tokenizer, memory, new.update(), replaces=fact.statement())

    return {
        ("nothing", None): lambda *_: None,
        ("forget", None): forgetting(None),
        **{("forget", strength): forgetting(strength) for strength in STRENGTHS},
        ("revise", None): lambda model, tokenizer, memory, fact, new: revise(model, tokenizer, memory, new.update()),
        ("forget, then revise", None): replacing,
        **{("decay", rate): lambda m, t, memory, f, n, rate=rate: memory.decay(rate) for rate in DECAYS},
        ("zero_", None): lambda model, tokenizer, memory, fact, new: memory.zero_(),
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
            apply(model, tokenizer, memory, facts[0], new)
        values = _shares(model, tokenizer, memories, drawn, newer)
        values["norm_left"] = _norm(memories) / _norm(told)
        parameters = {"operator": name, "number": number, "facts": FACTS, "memories": episodes}
        rows.append(counted(f"operators/{strategy}", parameters, **{k: round(v, 4) for k, v in values.items()}))
    return rows


def _shares(model, tokenizer, memories, drawn: Sequence[list[Fact]], newer: Sequence[Fact]) -> dict[str, float]:
    together = MemoryState.cat(memories)
    count = len(memories)
    first = ask(model, tokenizer, [[user(facts[0].question())] for facts in drawn], together)
    shares = {
        "first": sum(a == facts[0].value for a, facts in zip(first, drawn)) / count,
        "revised": sum(a == fact.value for a, fact in zip(first, newer)) / count,
    }
    right = 0
    for place in range(1, FACTS):
        found = ask(model, tokenizer, [[user(facts[place].question())] for facts in drawn], together)
        right += sum(a == facts[place].value for a, facts in zip(found, drawn))
    return shares | {"others": right / (count * (FACTS - 1))}


def _norm(memories: Sequence[MemoryState]) -> float:
    squares = (float(state.double().square().sum()) for memory in memories for _, state in memory.items())
    return math.sqrt(math.fsum(squares))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.memory operators``."""
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of the JSON (default: %(default)s)")
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
