"""Texts and messages as token ids, with the segments that SSW writes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from ..adapter.wrappers import unwrap
from ..config import DeltaMemConfig
from ..errors import ArgumentError
from .messages import Message, plain_content, plain_messages
from .segments import as_row, chat_ids, segment_ids_from_messages, sentence_spans, tokenize


def padded(rows: Sequence[Sequence[int]], fill: int, side: str = "right") -> torch.Tensor:
    """Rows of token ids and the like as int64 [B, T] on the CPU, padded on the ``right`` or ``left``; T ≥ 1."""
    width = max([1, *map(len, rows)])
    fills = [[fill] * (width - len(row)) for row in rows]
    whole = [[*row, *more] if side == "right" else [*more, *row] for row, more in zip(rows, fills)]
    return torch.tensor(whole, dtype=torch.int64, device="cpu")


def attention_mask(rows: Sequence[Sequence[int]], side: str = "right") -> torch.Tensor:
    """Which tokens of ``padded`` rows are no padding: int64 [B, T], 1 or 0."""
    return padded([[1] * len(row) for row in rows], 0, side)


def vocabulary_size(model) -> int:
    """How many token ids a model has an embedding for."""
    embeddings = unwrap(model).get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0])


def check_known(model, ids: Sequence[int]) -> None:
    """Raise ValueError for token ids that a model has no embedding for; on a GPU they would end the process."""
    check_below(vocabulary_size(model), ids)


def check_below(known: int, ids: Sequence[int]) -> None:
    """``check_known`` of a model that has embeddings for ids below ``known``."""
    if ids and not 0 <= min(ids) <= max(ids) < known:
        raise ArgumentError(
            f"tokenizer: gives token id {max(ids)}, the model knows 0 to {known - 1}; is it this model's?"
        )


def says_something(messages: Sequence[Message]) -> bool:
    """Whether a message that is no system message has text, thinking or tool calls in it."""
    return any(
        message.get("tool_calls")
        or str(message.get("reasoning_content") or "").strip()
        or plain_content(message.get("content") or "", "content").strip()
        for message in messages
        if message.get("role") not in ("system", "developer")
    )


def as_chat(tokenizer, text: str | Sequence[Message], name: str = "text") -> list[Message] | None:
    """A text's messages, a string as a user's; None: a string for a tokenizer without a chat template.

    Raises:
        ValueError: ``text`` is neither a string nor a list of messages, or there is no chat template for messages.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if isinstance(text, str):
        if not has_template:
            return None
        text = [{"role": "user", "content": text}]
    text = plain_messages(text, name)
    if not has_template:
        raise ArgumentError("tokenizer: has no chat template, which messages need; allowed with it: a string")
    return text


def encode_text(
    tokenizer, text: str | Sequence[Message], config: DeltaMemConfig, name: str = "text"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids, int64 [1, T], and for an adapter that writes segments their ids, int64 [1, T], else None.

    Without a chat template a string is one segment, or with ``sentence_mean`` a segment a sentence.

    Raises:
        ValueError: ``text`` is neither a string nor a list of messages, there is no chat template for messages, or
            the template refuses them.
    """
    chat = as_chat(tokenizer, text, name)
    if chat is None:
        return _encode_plain(tokenizer, text, config)
    if config.segmented:
        return segment_ids_from_messages(tokenizer, chat, config.memory_write_granularity)
    return as_row(chat_ids(tokenizer, chat, name)), None


def _encode_plain(tokenizer, text: str, config: DeltaMemConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not config.segmented:
        return as_row(tokenizer(text)["input_ids"]), None
    ids, starts = tokenize(tokenizer, text)
    by_sentence = config.memory_write_granularity == "sentence_mean"
    firsts = [start for start, _ in sentence_spans(text)] if by_sentence else [0]
    owners = [bisect_right(firsts, start) - 1 for start in starts]
    return as_row(ids), as_row(owners)
