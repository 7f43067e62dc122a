"""What the memory does to text that does not need it: perplexity with it ÷ perplexity of the frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_fast import MemoryState
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.recall import task
from deltamem_fast.recall.chats import encode, tell
from deltamem_fast.recall.task import TEXTS

from ..instrument.rows import Row, counted
from .conversations import SENTENCES, Messages
from .figures import DIGITS

NAME = "perplexity"
# Read-only and empty; read-only and full of facts that have nothing to do with the text; written by the text itself.
MEMORIES = ("empty", "filled", "live")
EVERYTHING = "all"
FACTS = 8  # that fill a memory
ROWS = 64  # texts of one batch


@dataclass(frozen=True)
class Text:
    """A held-out text, and messages with facts about others than those in it."""

    kind: str
    messages: Messages
    elsewhere: Messages


def draw_texts(episodes: int) -> list[Text]:
    """``episodes`` texts of each kind, always the same; their names occur in no training text."""
    found = []
    for kind in TEXTS:
        random = Random(f"{NAME} {kind}")
        for _ in range(episodes):
            messages = task.text(random, kind, held_out=True)
            found.append(Text(kind, messages, _elsewhere(random, messages)))
    return found


def _elsewhere(random: Random, messages: Messages) -> Messages:
    text = " ".join(message["content"] for message in messages)
    facts = task.draw_facts(random, 4 * FACTS, held_out=True)
    others = [fact for fact in facts if fact.key not in text][:FACTS]
    return task.grouped(random, [fact.statement(random) for fact in others], SENTENCES)


@torch.no_grad()
def losses(model: nn.Module, tokenizer, texts: Sequence[Text], memory: str | None) -> torch.Tensor:
    """Summed cross-entropy of each text and the number of tokens it is of, all but the first: float64 [N, 2].

    Args:
        model: the bare backbone, or patched.
        memory: one of ``MEMORIES``; None = the bare backbone.
    """
    found = []
    for first in range(0, len(texts), ROWS):
        part = texts[first : first + ROWS]
        chats = [text.messages for text in part]
        state = None if memory is None else MemoryState.zeros(model, len(part))
        if memory == "filled":
            tell(model, tokenizer, [text.elsewhere for text in part], state)
        if state is not None:
            state.frozen = memory != "live"
        # What segments write is read by later forwards only, so a memory that is written goes message by message.
        turns = range(max(map(len, chats)))
        steps = [[chat[n : n + 1] for chat in chats] for n in turns] if memory == "live" else [chats]
        found += _row_losses(*_logits(model, tokenizer, steps, state))
    return torch.tensor(found, dtype=torch.float64)


def _logits(model, tokenizer, steps, memory: MemoryState | None):
    """Logits [B, T, vocabulary] of chats fed in ``steps``, and their ids and mask [B, T]; padding between the steps."""
    arguments = {} if memory is None else {"memory": memory}
    segmented = memory is not None and identity_of(model).config.segmented
    hidden, ids, masks, cache = [], [], [], None
    for step in steps:
        batch = encode(tokenizer, step).to(next(model.parameters()).device)
        ids.append(batch.input_ids)
        masks.append(batch.attention_mask)
        seen = torch.cat(masks, 1)
        if segmented:
            arguments["segment_ids"] = batch.segment_ids
        output = model.model(
            batch.input_ids,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0)[:, -batch.input_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
        cache = output.past_key_values
        hidden.append(output.last_hidden_state)
    return model.lm_head(torch.cat(hidden, 1)).float(), torch.cat(ids, 1), torch.cat(masks, 1).bool()


def _row_losses(logits, ids, mask) -> Iterator[tuple[float, int]]:
    for row in range(len(ids)):
        own, targets = logits[row][mask[row]][:-1], ids[row][mask[row]][1:]
        yield F.cross_entropy(own, targets, reduction="sum").item(), len(targets)


def perplexity(losses: torch.Tensor) -> float:
    """Of texts as ``losses`` returns them."""
    total, tokens = losses.sum(0).tolist()
    return math.exp(total / tokens)


def ratio(losses: torch.Tensor, frozen: torch.Tensor) -> tuple[float, float]:
    """Perplexity ÷ that of the same texts under the frozen backbone, and its standard error over the texts."""
    difference, tokens = losses[:, 0] - frozen[:, 0], frozen[:, 1]
    mean = difference.sum() / tokens.sum()
    # To first order, as a ratio of two sums over texts that are drawn independently.
    error = (difference - mean * tokens).norm() / tokens.sum()
    return math.exp(mean), math.exp(mean) * float(error)


def rows(
    name: str, memory: str | None, texts: Sequence[Text], losses: torch.Tensor, frozen: torch.Tensor
) -> Iterator[Row]:
    """The rows of one variant: each kind of text, and all of them."""
    for kind in (*TEXTS, EVERYTHING):
        chosen = torch.tensor([kind in (text.kind, EVERYTHING) for text in texts])
        values = {"perplexity": perplexity(losses[chosen]), "tokens": int(losses[chosen][:, 1].sum())}
        if memory is not None:
            values["ratio"], values["error"] = ratio(losses[chosen], frozen[chosen])
        parameters = {"text": kind} | ({"memory": memory} if memory is not None else {})
        yield counted(f"{NAME}/{name}", parameters, **{key: round(value, DIGITS) for key, value in values.items()})
