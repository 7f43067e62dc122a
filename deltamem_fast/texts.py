"""Texts and messages as token ids, with the segments that SSW writes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import torch

from .config import DeltaMemConfig
from .errors import ArgumentError
from .segments import _tokenize, segment_ids_from_messages, sentence_spans


def encode_text(
    tokenizer, text: str | Sequence[Mapping], config: DeltaMemConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids, int64 [1, T], and for an adapter that writes segments their ids, int64 [1, T], else None.

    Without a chat template a string is one segment, or with ``sentence_mean`` a segment a sentence.

    Raises:
        ValueError: ``text`` is neither a string nor a list of messages, or there is no chat template for messages.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if isinstance(text, str):
        if not has_template:
            return _encode_plain(tokenizer, text, config)
        text = [{"role": "user", "content": text}]
    elif isinstance(text, bytes | Mapping) or not isinstance(text, Sequence):
        raise ArgumentError(f"text: got {type(text).__name__}, allowed a string or a list of messages")
    elif not has_template:
        raise ArgumentError("tokenizer: has no chat template, which messages need; allowed with it: a string")
    if config.segmented:
        return segment_ids_from_messages(tokenizer, text, config.memory_write_granularity)
    ids = tokenizer.apply_chat_template(text, tokenize=True, return_dict=False)
    return torch.tensor([list(ids)], dtype=torch.int64, device="cpu"), None


def _encode_plain(tokenizer, text: str, config: DeltaMemConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not config.segmented:
        return torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.int64, device="cpu"), None
    ids, starts = _tokenize(tokenizer, text)
    by_sentence = config.memory_write_granularity == "sentence_mean"
    firsts = [start for start, _ in sentence_spans(text)] if by_sentence else [0]
    owners = [bisect_right(firsts, start) - 1 for start in starts]
    return torch.tensor([ids], dtype=torch.int64, device="cpu"), torch.tensor([owners], dtype=torch.int64, device="cpu")
