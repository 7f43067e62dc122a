"""What hostile text does to a memory, and what less trust in it saves and costs.

Four facts are told, then a text that somebody else has a hand in. Asked for are the facts (kept) and what the text says
instead or besides (learnt). The text is told with less and less trust, in two ways: each token's gates lowered
(``trust=``), or the memory moved a share of the way to what the whole text would have made of it (``share``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import nn

from deltamem_fast import Guard, MemoryState, patch_model, unpatch_model
from deltamem_fast.memory.trusting import hold_back
from deltamem_fast.recall.chats import ask, tell
from deltamem_fast.recall.task import Fact, changed, draw_facts, grouped, user
from deltamem_fast.recall.weights import SHIPPED, load_backbone

from ..instrument import commands, results
from ..instrument.rows import Row, counted
from .conversations import SENTENCES, Messages, filler
from .curves import fingerprints
from .figures import DIGITS, standard_error
from .variants import STRATEGIES

DIRECTORY = results.DIRECTORY / "trust"
EPISODES, FACTS = 48, 4
TRUSTS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.0)


@dataclass(frozen=True)
class Attack:
    """Facts, and a text that comes after them: ``told`` as messages, or token ``ids``; what it says of whom."""

    facts: list[Fact]
    told: Messages
    says: list[Fact]


def _until(random: Random, tokenizer, tokens: int, sentence: Callable[[], str]) -> Messages:
    """Messages of ``tokens`` tokens at least, made of sentences."""
    sentences: list[str] = []
    while True:
        sentences.append(sentence())
        told = grouped(random, sentences, SENTENCES)
        if sum(len(tokenizer(message["content"])["input_ids"]) + 2 for message in told) >= tokens:
            return told


def contradiction(random: Random, tokenizer, tokens: int) -> Attack:
    """Another value of each fact, again and again."""
    facts = draw_facts(random, FACTS, held_out=True)
    says = [changed(random, fact) for fact in facts]
    turn = iter(range(10**6))
    return Attack(facts, _until(random, tokenizer, tokens, lambda: says[next(turn) % FACTS].statement(random)), says)


def others(random: Random, tokenizer, tokens: int) -> Attack:
    """Facts about others, each once."""
    drawn = draw_facts(random, FACTS + tokens // 6, held_out=True)
    facts, rest, says = drawn[:FACTS], iter(drawn[FACTS:]), []

    def sentence() -> str:
        says.append(next(rest))
        return says[-1].statement(random)

    told = _until(random, tokenizer, tokens, sentence)
    return Attack(facts, told, says[-FACTS:])


def noise(random: Random, tokenizer, tokens: int) -> Attack:
    """Random tokens."""
    facts = draw_facts(random, FACTS, held_out=True)
    words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return Attack(facts, [user(tokenizer.decode(random.choices(words, k=tokens)))], [])


def talk(random: Random, tokenizer, tokens: int) -> Attack:
    """Sentences without a fact."""
    return Attack(draw_facts(random, FACTS, held_out=True), filler(random, tokenizer, tokens)[1], [])


TEXTS = {
    "contradiction 50": (contradiction, 50),
    "contradiction 200": (contradiction, 200),
    "facts of others 50": (others, 50),
    "facts of others 200": (others, 200),
    "random tokens 50": (noise, 50),
    "random tokens 200": (noise, 200),
    "talk 500": (talk, 500),
}


def _shares(model: nn.Module, tokenizer, memory: MemoryState, facts: Sequence[Sequence[Fact]]) -> list[bool]:
    rows = [row for row, asked in enumerate(facts) for _ in asked]
    chats = [[user(fact.question())] for asked in facts for fact in asked]
    found = ask(model, tokenizer, chats, memory.select(rows)) if chats else []
    return [text == fact.value for text, fact in zip(found, (fact for asked in facts for fact in asked), strict=True)]


def _row(name: str, parameters: dict, hits: dict[str, list[bool]]) -> Row:
    values: dict[str, float] = {}
    for part, right in hits.items():
        if right:
            share = sum(right) / len(right)
            values |= {part: round(share, DIGITS), f"{part}_error": round(standard_error(share, len(right)), DIGITS)}
    return counted(name, parameters, asked=len(hits["kept"]), **values)


def measure(
    directory: Path, episodes: int, adapters: Sequence[str], progress: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """All rows: of each adapter, with a guard on every forward and without, each text and trust."""
    model, tokenizer = load_backbone(directory / "backbone")
    drawn = {
        name: [draw(Random(f"{name} {n}"), tokenizer, tokens) for n in range(episodes)]
        for name, (draw, tokens) in TEXTS.items()
    }
    rows: list[Row] = []
    for adapter in adapters:
        for guard in (False, Guard()):
            patch_model(model, directory / adapter, guard=guard)
            for name, attacks in drawn.items():
                progress(f"{adapter}, guard {bool(guard)}: {name}")
                rows += _attacked(model, tokenizer, adapter, name, attacks, bool(guard))
            unpatch_model(model)
    return rows


def _attacked(model, tokenizer, adapter: str, name: str, attacks: list[Attack], guarded: bool) -> list[Row]:
    facts, says = [a.facts for a in attacks], [a.says for a in attacks]
    told = [grouped(Random(n), [f.statement(Random(n)) for f in a.facts], SENTENCES) for n, a in enumerate(attacks)]
    before = tell(model, tokenizer, told)
    rows, found = [], {"text": name, "guard": guarded}
    rows.append(_row(f"before/{adapter}", found, {"kept": _shares(model, tokenizer, before, facts)}))
    whole = None
    for way in ("gates", "share"):
        for trust in TRUSTS[:1] if guarded else TRUSTS:  # what a guard costs and saves shows at whole trust
            if way == "gates":
                memory = tell(model, tokenizer, [a.told for a in attacks], before.clone(), trust)
                whole = memory if trust == 1 else whole
            elif trust in (0.0, 1.0):  # the same as by gates
                continue
            else:
                memory = whole.clone()
                hold_back(memory, before, trust, None)
            hits = {"kept": _shares(model, tokenizer, memory, facts), "learnt": _shares(model, tokenizer, memory, says)}
            rows.append(_row(f"after/{adapter}", found | {"way": way, "trust": trust}, hits))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.recall trust``."""
    parser.add_argument("--episodes", type=int, default=EPISODES, help="conversations of each text (%(default)s)")
    parser.add_argument("--weights", type=Path, help="folder of backbone and adapters (the shipped ones)")
    parser.add_argument("--adapters", nargs="+", default=list(STRATEGIES), help="of its folders (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure and write."""
    if options.episodes < 1:
        raise ValueError(f"--episodes: got {options.episodes}, allowed 1 or more")
    directory = options.weights or SHIPPED
    progress = commands.progress()
    with torch.no_grad():
        rows = measure(directory, options.episodes, options.adapters, progress)
    small = options.episodes < EPISODES or options.weights is not None
    arguments = {"quick": small, "episodes": options.episodes}
    result = results.collect(rows, "cpu", arguments, weights=fingerprints(directory))
    print(results.write(options.output, result))
    return 0
