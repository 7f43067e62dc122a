"""What the start is computed from: a frozen model's hidden states where values are written, answered, and neither,
and how its output answers to what is added to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import nn

from deltamem_fast import memory_disabled
from deltamem_fast.adapter.record import record_of

from .episodes import OPENINGS, Question, message, opened, talk
from .facts import Fact, Words, draw_facts, place_of
from .pool import Asked, Encoder, Told

FACTS, TALKS, TALK_TOKENS = 3200, 120, 96
ASKED = 0.4  # of the facts are asked for
SYSTEM = 0.3  # of the contexts begin with the default system message
OTHERS = 6  # hidden states of an answer's chat, beside those that answer
ROWS = 64  # of one batch


@dataclass
class Seen:
    """What one layer's attention sees and does; hidden states, its inputs, are float32 [d] or [N, d], on the CPU.

    Attributes:
        writing: each is what writes a token of a value; in SSW its segment's mean, which writes all of it.
        values: the token id that each of ``writing`` is to pass on; in SSW the value's first.
        answering: of the tokens of answers before a value's.
        pairs: places in ``writing``, one for each of ``answering``.
        answers: the token ids of answers' values.
        gradients: float32 [d] each, by the attention's output at the token before: of its logit, less the mean of all,
            and of those of the value's tokens behind it.
        written, read: what else writes, and what else reads.
    """

    writing: list[torch.Tensor] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    answering: list[torch.Tensor] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    written: list[torch.Tensor] = field(default_factory=list)
    read: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def attention_inputs(
    attentions: Sequence[nn.Module], see: Callable[[nn.Module, torch.Tensor], object]
) -> Iterator[None]:
    """Inside, ``see`` is given each attention that runs, and its input [B, T, d], off the graph."""

    def hook(attention: nn.Module, arguments: tuple, named: dict) -> None:
        see(attention, (arguments[0] if arguments else named["hidden_states"]).detach())

    hooks = [attention.register_forward_pre_hook(hook, with_kwargs=True) for attention in attentions]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def hidden_states(model: nn.Module, encoder: Encoder, words: Words | None, random: Random) -> list[Seen]:
    """Those of each layer that has a memory: of a few thousand statements, questions for some of them, and other text.

    Args:
        model: patched; its memory is not read.
        words: most values are of these, so that what passes them on is not made for a few; None = all are of the lists.
    """
    layers = [Seen() for _ in record_of(model).attentions]
    facts: list[Fact] = []
    told: list[tuple[Told, list[list[int]]]] = []
    while len(facts) < FACTS:
        some = draw_facts(random, random.choice((1, 1, 2, 3)), held_out=False, words=words)
        told.append(_statements(encoder, random, some))
        facts += some
    writers: list[list[int]] = []  # of each fact, its places in ``writing``
    for (row, values), hidden in zip(told, _inputs(model, [row.ids for row, _ in told])):
        for tokens in values:
            writers.append(_add_value(layers, hidden, row, tokens))
        used = {token for tokens in values for token in tokens}
        for seen, states in zip(layers, hidden):
            seen.written.append(_others(states, row.segments, used))
            seen.read.append(states[3::5].clone())
    texts = [encoder.told(talk(random, held_out=False)) for _ in range(TALKS)]
    for row, hidden in zip(texts, _inputs(model, [row.ids[:TALK_TOKENS] for row in texts])):
        segments = None if row.segments is None else row.segments[:TALK_TOKENS]
        for seen, states in zip(layers, hidden):
            seen.written.append(_others(states, segments, set()))
            seen.read.append(states[::2].clone())
    asked = [
        encoder.asked([Question(f.question(random), f.answer(), f.bare_value)], system=random.random() < SYSTEM)
        for f in facts[: int(len(facts) * ASKED)]
    ]
    answered = _inputs(model, [row.ids for row in asked], [_before_values(row) for row in asked], layers)
    for row, places, hidden in zip(asked, writers, answered):
        values = [i + 1 for i in _before_values(row)]
        # One segment writes all of a value; tokens, one each, unless the answer cuts the value otherwise.
        places = places * len(values) if encoder.config.segmented else places
        others = [i for i in range(len(row.ids)) if i + 1 not in values]
        others = random.sample(others, min(OTHERS, len(others)))
        for seen, states in zip(layers, hidden):
            if len(values) == len(places):
                seen.answering += [states[i - 1].clone() for i in values]  # not a view of the whole batch
                seen.pairs += places
            seen.read.append(states[others])
    return layers


def _before_values(row: Asked) -> list[int]:
    return [i - 1 for i, weight in enumerate(row.weights) if weight == 1]


def _statements(encoder: Encoder, random: Random, facts: Sequence[Fact]) -> tuple[Told, list[list[int]]]:
    """A message in which facts are stated, and of each the places of its value's tokens."""
    sentences = [opened(random, fact.statement(random), OPENINGS) for fact in facts]
    messages, system = [message("user", " ".join(sentences))], random.random() < SYSTEM
    text = encoder.render(messages)
    text = text if system else text[len(encoder.system) :]
    offsets = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    values, end = [], 0
    for fact, sentence in zip(facts, sentences):
        begin = text.index(sentence, end)
        end = begin + len(sentence)
        start, stop = place_of(fact.bare_value, text, begin, end)
        values.append([i for i, (a, b) in enumerate(offsets) if b > start and a < stop])
    return encoder.told(messages, system=system), values


def _add_value(layers: list[Seen], hidden: torch.Tensor, row: Told, tokens: list[int]) -> list[int]:
    """Add what writes a value, whose tokens stand at these places of a row; returns its places in ``writing``."""
    first, writers = len(layers[0].writing), [[token] for token in tokens]
    if row.segments is not None:
        of = row.segments[tokens[0]]
        writers = [[i for i, segment in enumerate(row.segments) if segment == of]]
    for seen, states in zip(layers, hidden):
        seen.writing += [states[writer].mean(0) for writer in writers]
        seen.values += [row.ids[token] for token in tokens][: len(writers)]
    return list(range(first, first + len(writers)))


def _others(states: torch.Tensor, segments: list[int] | None, used: set[int]) -> torch.Tensor:
    """What else than these tokens a row writes, [n, d]: each token, or the mean of each segment without one of them."""
    if segments is None:
        return states[[i for i in range(len(states)) if i not in used]]
    left = {segment for segment in segments if segment >= 0} - {segments[i] for i in used}
    of = torch.tensor(segments)
    return torch.stack([states[of == segment].mean(0) for segment in sorted(left)]) if left else states[:0]


def _inputs(
    model: nn.Module, rows: Sequence[Sequence[int]], before: Sequence[list[int]] = (), layers: Sequence[Seen] = ()
) -> Iterator[torch.Tensor]:
    """Of each row in turn, the inputs of all attentions that have a memory, float32 [layers, tokens, d].

    Args:
        before: places in each row; the tokens behind them and their gradients are added to ``layers``.
    """
    attentions = list(record_of(model).attentions.values())
    found: dict[nn.Module, torch.Tensor] = {}
    with attention_inputs(attentions, found.__setitem__), memory_disabled(model):
        for begin in range(0, len(rows), ROWS):
            some = [torch.tensor(row) for row in rows[begin : begin + ROWS]]
            # Right padding: under a causal mask no real token sees it.
            ids = nn.utils.rnn.pad_sequence(some, batch_first=True).to(model.device)
            if before:
                places = [(row, i) for row, all_of in enumerate(before[begin : begin + ROWS]) for i in all_of]
                _add_gradients(model, attentions, layers, ids, torch.tensor(places).T)
            else:
                with torch.no_grad():
                    model.model(ids, use_cache=False)
            states = torch.stack([found[attention] for attention in attentions], 1).float().cpu()
            yield from (of_row[:, : len(row)] for of_row, row in zip(states, some))


def _add_gradients(
    model: nn.Module, attentions: Sequence[nn.Module], layers: Sequence[Seen], ids: torch.Tensor, places: torch.Tensor
) -> None:  # fmt: skip
    """Run the frozen model on ``ids``, and add what ``Seen.gradients`` is to each layer; ``places``: int64 [2, N]."""
    row, place = places
    embedding = model.get_output_embeddings().weight.detach()
    # What is added there is nothing; its gradient is wanted.
    nothing = [embedding.new_zeros(len(row), embedding.shape[1], requires_grad=True) for _ in attentions]

    def added(change: torch.Tensor):
        def add(module: nn.Module, arguments: tuple, output: tuple) -> tuple:
            return output[0].index_put((row, place), change, accumulate=True), *output[1:]

        return add

    hooks = [attention.register_forward_hook(added(change)) for attention, change in zip(attentions, nothing)]
    try:
        output = model.model(ids, use_cache=False).last_hidden_state[row, place]
    finally:
        for hook in hooks:
            hook.remove()
    tokens = ids[row, place + 1]
    logits = (output * (embedding[tokens] - embedding.mean(0))).sum()
    for seen, gradient in zip(layers, torch.autograd.grad(logits, nothing)):
        seen.answers += tokens.tolist()
        seen.gradients += gradient.float().cpu()
