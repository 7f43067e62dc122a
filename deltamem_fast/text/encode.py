"""Texts and messages as token ids, with the segments that SSW writes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapter.wrappers import unwrap
from ..arguments import check_text
from ..config import DeltaMemConfig
from ..errors import ArgumentError, ArgumentTypeError
from .segments import refused_by_template, segment_ids_from_messages, sentence_spans, tokenize

Message = Mapping[str, Any]


def plain_messages(messages: Sequence[Message], name: str = "text") -> list[dict[str, Any]]:
    """Messages whose contents are strings: text parts are joined by line breaks, because most templates print a list.

    Args:
        messages: each with a ``role``, and a ``content`` that is a string or a list of ``{"type": "text", "text": …}``;
            it may be None or missing where there are ``tool_calls`` or ``reasoning_content``.
        name: of the argument, for errors.

    Raises:
        ValueError, TypeError: a message is not as described; which one is named.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ArgumentTypeError(f"{name}: got {type(messages).__name__}, allowed a str or a list of messages")
    if not messages:
        raise ArgumentError(f"{name}: got no message, allowed one or more")
    if not all(isinstance(message, Mapping) for message in messages):
        wrong = next(message for message in messages if not isinstance(message, Mapping))
        raise ArgumentTypeError(
            f"{name}: got a list with a {type(wrong).__name__}, allowed a str or a list of messages"
        )
    return [_plain(message, f"{name}[{place}]") for place, message in enumerate(messages)]


def _plain(message: Message, name: str) -> dict[str, Any]:
    check_text(message, name)  # its role, thinking and tool calls, too
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ArgumentError(f"{name}: got role {role!r:.80}, allowed a string that is not empty")
    if content is None:
        if not message.get("tool_calls") and not message.get("reasoning_content"):
            raise ArgumentError(f"{name}: got no content, allowed a string or a list of text parts")
        return dict(message)
    return {**message, "content": plain_content(content, name)}


def plain_content(content: Any, name: str) -> str:
    """A message's content as a string; text parts are joined by line breaks.

    Raises:
        ValueError: parts that are not text.
        TypeError: neither a string nor a list.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ArgumentTypeError(
            f"{name}: got content of type {type(content).__name__}, allowed a str or a list of parts"
        )
    for part in content:
        if not is_text_part(part):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ArgumentError(
                f'{name}: got a content part of type {kind!r:.80}, allowed {{"type": "text", "text": "…"}} only'
            )
    return "\n".join(part["text"] for part in content)


def is_text_part(part: Any) -> bool:
    """Whether a part of a message's content is ``{"type": "text", "text": "…"}``."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def vocabulary_size(model) -> int:
    """How many token ids a model has an embedding for."""
    embeddings = unwrap(model).get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0])


def check_known(model, ids: Sequence[int]) -> None:
    """Raise ValueError for token ids that a model has no embedding for; on a GPU they would end the process."""
    known = vocabulary_size(model)
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


def encode_text(
    tokenizer, text: str | Sequence[Message], config: DeltaMemConfig, name: str = "text"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids, int64 [1, T], and for an adapter that writes segments their ids, int64 [1, T], else None.

    Without a chat template a string is one segment, or with ``sentence_mean`` a segment a sentence.

    Raises:
        ValueError: ``text`` is neither a string nor a list of messages, there is no chat template for messages, or
            the template refuses them.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if isinstance(text, str):
        if not has_template:
            return _encode_plain(tokenizer, text, config)
        text = [{"role": "user", "content": text}]
    elif isinstance(text, bytes | Mapping) or not isinstance(text, Sequence):
        raise ArgumentError(f"{name}: got {type(text).__name__}, allowed a string or a list of messages")
    elif not has_template:
        raise ArgumentError("tokenizer: has no chat template, which messages need; allowed with it: a string")
    text = plain_messages(text, name)
    if config.segmented:
        return segment_ids_from_messages(tokenizer, text, config.memory_write_granularity)
    return torch.tensor([chat_ids(tokenizer, text, name)], dtype=torch.int64, device="cpu"), None


def chat_ids(
    tokenizer, messages: Sequence[Message], name: str = "text", template: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a chat.

    Args:
        name: of the argument, for errors.
        template: arguments of ``apply_chat_template``, whatever their names.

    Raises:
        ValueError: the chat template refuses it.
    """
    with refused_by_template(name):
        ids = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **(template or {}))
    return list(ids)


def _encode_plain(tokenizer, text: str, config: DeltaMemConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not config.segmented:
        return torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.int64, device="cpu"), None
    ids, starts = tokenize(tokenizer, text)
    by_sentence = config.memory_write_granularity == "sentence_mean"
    firsts = [start for start, _ in sentence_spans(text)] if by_sentence else [0]
    owners = [bisect_right(firsts, start) - 1 for start in starts]
    return torch.tensor([ids], dtype=torch.int64, device="cpu"), torch.tensor([owners], dtype=torch.int64, device="cpu")
