"""Recall as a number: facts are told, their context is gone, and free answers are searched for the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import nn

from deltamem_fast import MemoryState, memory_disabled
from deltamem_fast.recall.talk import names
from deltamem_fast.text.encode import attention_mask, padded

from .episodes import Episode, draw_episode, message
from .pool import Encoder, Told

CONDITIONS = ("memory", "empty memory", "bare", "context")
TOKENS = 24  # of an answer, at most
ROWS = 64  # of one batch
# With what was told in messages of their own before the question, the bare model answers less: of 64 questions each
# 0.45 instead of 0.53 of one fact, 0.17 instead of 0.44 of four.
IN_SIGHT = "Here is what I have told you:\n{told}\n\nAnswer this: {question}"


@dataclass(frozen=True)
class Answer:
    """A question, what was answered, and the value that was asked for."""

    question: str
    answer: str
    value: str

    @property
    def right(self) -> bool:
        """Whether the answer names the value."""
        return names(self.answer, self.value)


def draw_test(
    count: int, questions: int, *, new_words: bool, known_values: bool = False, seed: int = 0
) -> list[Episode]:
    """Episodes of ``count`` facts with held-out names, each fact asked for once: ``questions`` or more.

    Args:
        new_words: statements and questions in words, and of a kind, that training lacks.
        known_values: values that training has; otherwise held-out ones, too.
    """
    options = {"held_out": True, "new_words": new_words, "known_values": known_values, "talks": 0.0, "updates": 0.0}
    return [draw_episode(Random(f"test {seed} {count} {i}"), count, **options) for i in range(-(-questions // count))]


@torch.no_grad()
def tell(model: nn.Module, encoder: Encoder, rows: Sequence[Told], memory: MemoryState) -> None:
    """Write a text to each row of a memory, in a context of its own, as ``ingest`` does."""
    device = model.device
    ids = [row.ids for row in rows]
    inputs = {"input_ids": padded(ids, encoder.tokenizer.pad_token_id).to(device)}
    inputs["attention_mask"] = attention_mask(ids).to(device)
    if encoder.config.segmented:
        inputs["segment_ids"] = padded([row.segments for row in rows], -1).to(device)
    model.model(**inputs, memory=memory, use_cache=False)


@torch.no_grad()
def answers(
    model: nn.Module, encoder: Encoder, chats: Sequence[Sequence[dict]], memory: MemoryState | None
) -> list[str]:
    """Greedy answers of up to ``TOKENS`` tokens, batched with padding on the left.

    Args:
        memory: a row a chat; it is read, and not written. None = the frozen model answers.
    """
    device, pad = model.device, encoder.tokenizer.pad_token_id
    rows = [encoder.ids(encoder.render(chat, prompt=True)) for chat in chats]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    options = {"attention_mask": mask, "max_new_tokens": TOKENS, "do_sample": False}
    if memory is None:
        with memory_disabled(model):
            found = model.generate(ids, **options)
    else:
        found = model.generate(ids, memory=memory.read_only(), **options)
    return [encoder.tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in found]


def recalled(model: nn.Module, encoder: Encoder, episodes: Sequence[Episode], condition: str) -> list[Answer]:
    """The answers to all questions, each asked in a context of its own.

    Args:
        condition: ``memory``; an ``empty memory``; the ``bare`` model, which sees the question alone; the bare model
            that has what was told in its ``context``, in the question's message.
    """
    found: list[Answer] = []
    for first in range(0, len(episodes), ROWS):
        part = episodes[first : first + ROWS]
        memory = None
        if condition in ("memory", "empty memory"):
            memory = MemoryState.zeros(model, len(part))
        if condition == "memory":
            tell(model, encoder, [encoder.told(episode.told) for episode in part], memory)
        asked = [(row, question) for row, episode in enumerate(part) for question in episode.questions]
        for start in range(0, len(asked), ROWS):
            some = asked[start : start + ROWS]
            texts = [question.text for _, question in some]
            if condition == "context":
                told = [" ".join(said["content"] for said in part[row].told) for row, _ in some]
                texts = [IN_SIGHT.format(told=said, question=text) for said, text in zip(told, texts)]
            chats = [[message("user", text)] for text in texts]
            picked = None if memory is None else memory.select([row for row, _ in some])
            texts = answers(model, encoder, chats, picked)
            found += [Answer(question.text, text, question.value) for (_, question), text in zip(some, texts)]
    return found


def share(found: Sequence[Answer]) -> float:
    """Of right answers."""
    return sum(answer.right for answer in found) / len(found)
