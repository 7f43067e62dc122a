"""Why facts fade while others talk: gates on talk, what is left of the facts' state, what talk writes itself.

Two facts are told, then talk without a fact. The state after the talk is the sum of two parts, since the recurrence is
affine in S: what the talk's tokens leave of the facts' state, and what they write into an empty one. Both are computed
from the projections of the tokens as they were, the facts' memory beside them. Talk is told behind the facts in the
same context (``whole``), and in contexts of its own of up to 256 tokens, which is what the backbone was trained on,
the memory carried from one to the next (``apart``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import nn

from deltamem_fast import MemoryState, patch_model, unpatch_model
from deltamem_fast.adapter.record import record_of
from deltamem_fast.memory.watch import capture_projections
from deltamem_fast.recall.chats import ask, encode, tell
from deltamem_fast.recall.task import user
from deltamem_fast.recall.weights import SHIPPED, load_backbone
from deltamem_kernels.reference.recurrence import split_projections

from ..instrument import commands, results
from ..instrument.rows import Row, counted
from ..instrument.tables import plain_table
from .conversations import Conversation, Messages, distant
from .figures import DIGITS, standard_error, weights_digest

DIRECTORY = results.DIRECTORY / "recall-fading"
NAME = "fading"
ADAPTERS = ("tsw-r8", "msw-r8")  # which write each token; what a sentence writes in SSW has no gate of a token's own
FACTS, DISTANCES, EPISODES = 2, (256, 512, 1024), 64
PIECE = 256  # tokens of a context of ``apart``, at most
OPEN = 0.01  # a gate over this writes


class Part(NamedTuple):
    """One layer's state after the talk, in parts, each float32 [B, H, r, r], and the talk's gates.

    Attributes:
        facts: the state before the talk.
        left: what the talk's tokens leave of it.
        talk: what they write into an empty state; ``left`` + ``talk`` is the state after them.
        beta: float32 [B, T, H, r], of the talk's tokens.
    """

    facts: torch.Tensor
    left: torch.Tensor
    talk: torch.Tensor
    beta: torch.Tensor


def decompose(state: torch.Tensor, projections: torch.Tensor, gate_bias: torch.Tensor, rule) -> Part:
    """Run the recurrence over a talk's tokens twice: from ``state`` without writing, and writing from nothing.

    Args:
        state: float32 [B, H, r, r], before the talk.
        projections: [B, T, W], raw, of the talk's tokens alone.
        gate_bias, rule: the layer's.
    """
    _, k, v, keep, erase, write = split_projections(projections.float(), gate_bias.float(), rule)
    left, talk = state.clone(), torch.zeros_like(state)
    for t in range(projections.shape[1]):
        key, kept, erased = k[:, t, :, None, :], keep[:, t, :, :, None], erase[:, t, :, :, None]
        left = kept * left - erased * (left * key).sum(-1, keepdim=True) * key
        talk = kept * talk - erased * (talk * key).sum(-1, keepdim=True) * key
        talk = talk + (write[:, t] * v[:, t])[..., None] * key
    return Part(state, left, talk, write)


def pieces(tokenizer, messages: Messages, most: int) -> list[Messages]:
    """Messages, in order, as contexts of ``most`` tokens at most (a message alone may have more)."""
    found: list[Messages] = [[]]
    used = 0
    for message in messages:
        size = 2 + len(tokenizer(message["content"], add_special_tokens=False)["input_ids"])
        if found[-1] and used + size > most:
            found.append([])
            used = 0
        found[-1].append(message)
        used += size
    return found


def told_apart(model: nn.Module, tokenizer, talks: Sequence[Conversation], facts: int) -> MemoryState:
    """The memory of conversations whose first ``facts`` sentences are told, then the rest in contexts of its own."""
    firsts, rests = zip(*(split(talk, facts) for talk in talks))
    memory = tell(model, tokenizer, firsts)
    contexts = [pieces(tokenizer, rest, PIECE) if rest else [] for rest in rests]
    rows = []
    # Rows differ in how many contexts they have, and a row without one must not be written.
    for row, own in enumerate(contexts):
        one = memory.select([row])
        for context in own:
            tell(model, tokenizer, [context], one)
        rows.append(one)
    return MemoryState.cat(rows)


def split(talk: Conversation, facts: int) -> tuple[Messages, Messages]:
    """The messages of the first ``facts`` sentences, which fill whole messages, and those behind them."""
    told = 0
    for place, message in enumerate(talk.told):
        if told == facts:
            return talk.told[:place], talk.told[place:]
        told += sum(sentence in message["content"] for sentence in talk.sentences[told:facts])
    return talk.told, []


@torch.no_grad()
def whole_parts(model: nn.Module, tokenizer, talks: Sequence[Conversation], tokens: int) -> dict[int, Part]:
    """By layer the parts of the state behind ``tokens`` tokens of talk, told in one context with the facts."""
    firsts = [split(talk, FACTS)[0] for talk in talks]
    before = tell(model, tokenizer, firsts)
    with capture_projections() as captured:
        tell(model, tokenizer, [talk.told for talk in talks])
    lengths = encode(tokenizer, [talk.told for talk in talks]).attention_mask.sum(1)
    places = lengths[:, None] - tokens + torch.arange(tokens, device="cpu")  # [B, T]
    layers = {a.delta_memory.layer_idx: a.delta_memory for a in record_of(model).attentions.values()}
    found = {}
    for index, projections in captured[0].items():
        rows = projections.gather(1, places[..., None].expand(-1, -1, projections.shape[-1]))
        layer = layers[index]
        found[index] = decompose(before[index].float(), rows, layer.gate_bias(), layer.rule)
    return found


def gate_rows(name: str, tokens: int, parts: dict[int, Part]) -> Iterator[Row]:
    """By layer: gates on talk, what is left of the facts' state, and what the talk wrote."""
    for index, part in parts.items():
        each = part.beta.mean((2, 3))  # [B, T]
        facts, left, talk = (state.flatten(1) for state in (part.facts, part.left, part.talk))
        norm = facts.norm(dim=1)
        bands = {f"beta_{first}": each[:, first : first + 256].sum(1).mean() for first in range(0, tokens, 256)}
        values = {
            "beta_mean": each.mean(), "beta_sum": each.sum(1).mean(), "open": (part.beta > OPEN).float().mean(),
            "left": (left.norm(dim=1) / norm).mean(), "left_cosine": torch.cosine_similarity(left, facts).mean(),
            "talk": (talk.norm(dim=1) / norm).mean(), **bands,
        }  # fmt: skip
        numbers = {key: round(float(value), DIGITS) for key, value in values.items()}
        yield counted(f"{NAME}/{name}", {"distance": tokens, "layer": index}, **numbers)


def recall_row(name: str, told: str, tokens: int, model, tokenizer, talks, memory: MemoryState) -> Row:
    """Recall of the talks' facts by a memory that was told them in one of the ways."""
    rows = [row for row, talk in enumerate(talks) for _ in talk.questions]
    chats = [[user(question.fact.question())] for talk in talks for question in talk.questions]
    wanted = [question.fact.value for talk in talks for question in talk.questions]
    hits = [a == b for a, b in zip(ask(model, tokenizer, chats, memory.select(rows)), wanted)]
    share = sum(hits) / len(hits)
    values = {"share": share, "error": standard_error(share, len(hits))}
    parameters = {"distance": tokens, "told": told}
    return counted(f"{NAME}-recall/{name}", parameters, **{key: round(v, DIGITS) for key, v in values.items()})


def measure(
    model: nn.Module, tokenizer, name: str, episodes: int, distances: Sequence[int], progress: Callable[[str], None]
) -> Iterator[Row]:
    """All rows of one patched model.

    Recall is of the memory as it is (``whole``), told in short contexts (``apart``), and of the state in one context
    without what the talk wrote (``left alone``).
    """
    for tokens in distances:
        progress(f"{name}: {tokens} tokens")
        random = Random(f"{NAME} {tokens}")
        talks = [distant(random, tokenizer, facts=FACTS, distance=tokens) for _ in range(episodes)]
        parts = whole_parts(model, tokenizer, talks, tokens)
        yield from gate_rows(name, tokens, parts)
        memory = tell(model, tokenizer, [talk.told for talk in talks])
        yield recall_row(name, "whole", tokens, model, tokenizer, talks, memory)
        left = memory.clone()
        for index, part in parts.items():
            left.put(index, part.left, in_place=True)
        yield recall_row(name, "left alone", tokens, model, tokenizer, talks, left)
        apart = told_apart(model, tokenizer, talks, FACTS)
        yield recall_row(name, "apart", tokens, model, tokenizer, talks, apart)


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.recall fading``."""
    parser.add_argument("--episodes", type=int, default=EPISODES, help="conversations of a point (%(default)s)")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of backbone and adapters (the shipped)")
    parser.add_argument("--adapter", nargs="+", default=list(ADAPTERS), help="folders there (%(default)s)")
    parser.add_argument("--distance", nargs="+", type=int, default=list(DISTANCES), help="tokens (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure, write, and print the table."""
    if options.episodes < 1:
        raise ValueError(f"--episodes: got {options.episodes}, allowed 1 or more")
    rows: list[Row] = []
    model, tokenizer = load_backbone(SHIPPED / "backbone")
    for name in options.adapter:
        patch_model(model, options.weights / name)
        rows += measure(model, tokenizer, name, options.episodes, options.distance, commands.progress())
        unpatch_model(model)
    small = options.episodes < EPISODES or options.weights != SHIPPED
    weights = {name: weights_digest(options.weights / name) for name in options.adapter}
    result = results.collect(rows, "cpu", {"quick": small, "episodes": options.episodes}, weights=weights)
    print(plain_table(rows))
    print(results.write(options.output, result))
    return 0
