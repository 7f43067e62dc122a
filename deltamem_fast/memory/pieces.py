"""A text that is to be written into a memory, in encoded pieces."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter.record import identity_of
from ..arguments import check_text, check_tokenizer
from ..errors import ArgumentError
from ..text.cutting import pieces_of
from ..text.encode import Message, check_known, encode_text, plain_content, plain_messages, says_something

Text = str | Sequence[Message]


WRITE_TOKENS = 8192  # the write budget of the released recipe


def checked_text(text: Text) -> Text:
    if not isinstance(text, str):
        text = plain_messages(text)
        if not says_something(text) and not any(plain_content(m.get("content") or "", "text").strip() for m in text):
            raise ArgumentError("text: got messages with nothing but white space, allowed a text")
        return text
    if not text.strip():
        raise ArgumentError("text: got nothing but white space, allowed a text")
    check_text(text, "text")
    return text


def as_messages(text: Text) -> list[Message]:
    return [{"role": "user", "content": text}] if isinstance(text, str) else list(text)


@dataclass(frozen=True)
class Encoded:
    """Token ids [1, T] of a text on the CPU, and their segments where the adapter writes segments."""

    ids: torch.Tensor
    segments: torch.Tensor | None

    def __len__(self) -> int:
        return self.ids.shape[1]

    def arguments(self, device: torch.device) -> dict[str, torch.Tensor]:
        """For the decoder's forward."""
        segments = {} if self.segments is None else {"segment_ids": self.segments.to(device)}
        return {"input_ids": self.ids.to(device)} | segments


def encoded_pieces(model: nn.Module, tokenizer, text: Text, tokens: int) -> list[Encoded]:
    """A text in pieces of at most ``tokens`` tokens."""
    config = identity_of(model).config
    check_tokenizer(tokenizer)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def encode(part: Text, name: str) -> Encoded:
        ids, segments = encode_text(tokenizer, part, config, name)
        check_known(model, ids[0].tolist())
        return Encoded(ids, segments)

    found = [encoded for _, encoded in pieces_of(text, tokens, count, encode) if len(encoded)]
    if not found:
        raise ArgumentError("text: the tokenizer makes no token of it")
    return found


def with_bar(pieces: list[Encoded], total: int, progress: bool | None) -> Iterator[Encoded]:
    if progress is None:
        progress = len(pieces) > 1 and sys.stderr.isatty()
    if not progress:
        yield from pieces
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="tok", unit_scale=True, desc="ingest") as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece))
