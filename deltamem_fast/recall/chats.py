"""Chats as batches of token ids, and what a model does with them: tell it facts, ask it for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import BatchEncoding

from ..adapter.record import identity_of, is_patched, memory_disabled
from ..adapter.wrappers import input_device, unwrap
from ..memory.state import MemoryState
from ..text.encode import attention_mask, padded
from ..text.segments import sentence_spans

Chat = Sequence[dict[str, str]]


def encode(tokenizer, chats: Sequence[Chat], *, add_generation_prompt: bool = False) -> BatchEncoding:
    """Token ids of chats as the recall tokenizer's chat template renders them, and their sentences as segments.

    Padded on the right: ``input_ids`` and ``attention_mask``, int64 [B, T]; ``segment_ids``, int64 [B, T], one a
    sentence, −1 = padding.

    The same as ``segment_ids_from_messages(tokenizer, chat, "sentence")`` chat by chat, a thousand times as fast: this
    template puts one token before each message and one behind it, and nothing else anywhere.
    """
    contents = [_sentences(message["content"]) for chat in chats for message in chat]
    tokens = iter(tokenizer([text for texts in contents for text in texts], add_special_tokens=False)["input_ids"])
    counts = map(len, contents)
    rows, segments = [], []
    for chat in chats:
        ids, owners, number = [], [], 0
        for message in chat:
            sentences = [next(tokens) for _ in range(next(counts))]
            sentences[0] = [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *sentences[0]]
            sentences[-1] = [*sentences[-1], tokenizer.eos_token_id]
            for sentence in sentences:
                ids += sentence
                owners += [number] * len(sentence)
                number += 1
        if add_generation_prompt:
            ids.append(tokenizer.convert_tokens_to_ids("<|assistant|>"))
            owners.append(-1)
        rows.append(ids)
        segments.append(owners)
    found = {"input_ids": padded(rows, tokenizer.pad_token_id), "attention_mask": attention_mask(rows)}
    return BatchEncoding(found | {"segment_ids": padded(segments, -1)})


def _sentences(content: str) -> list[str]:
    return [content[start:end].strip() for start, end in sentence_spans(content)] or [content]


@torch.no_grad()
def tell(
    model: nn.Module, tokenizer, chats: Sequence[Chat], memory: MemoryState | None = None, trust: float | None = None
) -> MemoryState:
    """What a patched model remembers of ``chats``, one row each; their context is gone afterwards.

    Args:
        memory: is written further, in place; None = an empty one.
        trust: as a forward takes it.
    """
    memory = MemoryState.zeros(model, len(chats)) if memory is None else memory
    batch = encode(tokenizer, chats).to(input_device(model))
    if not identity_of(model).config.segmented:
        del batch["segment_ids"]
    unwrap(model).model(**batch, memory=memory, trust=trust, use_cache=False)
    return memory


@torch.no_grad()
def next_logits(model: nn.Module, tokenizer, chats: Sequence[Chat], memory: MemoryState | None = None) -> torch.Tensor:
    """Logits, float32 [B, vocabulary], of the first token of the assistant's answer to each chat.

    Args:
        memory: is read, and not written; None = the bare backbone's answer.
    """
    batch = encode(tokenizer, chats, add_generation_prompt=True).to(input_device(model))
    last = batch.attention_mask.sum(1) - 1
    with _reading(model, memory) as arguments:
        arguments |= {"attention_mask": batch.attention_mask, "use_cache": False}
        hidden = unwrap(model).model(batch.input_ids, **arguments).last_hidden_state
    return unwrap(model).lm_head(hidden[torch.arange(len(chats), device=hidden.device), last]).float()


@contextlib.contextmanager
def _reading(model: nn.Module, memory: MemoryState | None) -> Iterator[dict[str, MemoryState]]:
    """Arguments with which a forward reads ``memory`` and writes nothing; None: inside, the backbone is bare."""
    if memory is not None:
        yield {"memory": memory.read_only()}
        return
    with memory_disabled(model) if is_patched(model) else contextlib.nullcontext():
        yield {}


def ask(model: nn.Module, tokenizer, chats: Sequence[Chat], memory: MemoryState | None = None) -> list[str]:
    """The likeliest one-token answer to each chat (codes and places are one token each); see ``next_logits``."""
    best = next_logits(model, tokenizer, chats, memory).argmax(-1).tolist()
    return [tokenizer.decode([token]).strip() for token in best]


@torch.no_grad()
def answer(model: nn.Module, tokenizer, chat: Chat, memory: MemoryState | None = None, max_new_tokens: int = 8) -> str:
    """What ``generate`` answers to one chat, greedily, in a context of its own: no cache, positions from 0.

    Args:
        memory: of one conversation; it is read, and not written. None = the bare backbone's answer.
    """
    batch = encode(tokenizer, [chat], add_generation_prompt=True).to(input_device(model))
    with _reading(model, memory) as arguments:
        tokens = model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **arguments,
        )
    return tokenizer.decode(tokens[0, batch.input_ids.shape[1] :], skip_special_tokens=True).strip()
