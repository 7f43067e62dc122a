"""A text told to a memory: checked and in encoded pieces, what came of it, and erasing what it writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_kernels.reference.recurrence import split_projections, valid_tokens
from deltamem_kernels.segment_means import segment_means

from ..adapter.record import identity_of, is_disabled
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..arguments import check_text, check_tokenizer, shown
from ..errors import ArgumentError
from ..text.cutting import pieces_of
from ..text.encode import as_chat, check_known, encode_text, says_something
from ..text.messages import Message, plain_content, plain_messages
from ..text.segments import own_tokens
from .trusting import moved
from .watch import capture_projections

Text = str | Sequence[Message]

WRITE_TOKENS = 8192  # the write budget of the released recipe
# What forgetting leaves of what a text states unless told otherwise; see bench/memory/operators.py.
TOKEN_LEFT, SEGMENT_LEFT = 0.1, 0.3
MOST_STRENGTH = 64.0  # tellings at most, however narrow a text's widest gate is
STATES = 4.0  # a token whose gate is open a quarter as wide as a text's widest counts as stating something


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


@dataclass(frozen=True)
class Encoded:
    """A text on the CPU.

    Attributes:
        ids: int64 [1, T].
        segments: int64 [1, T], where the adapter writes segments.
        own: bool [1, T], which tokens are the text's own and not its chat template's; None = all.
    """

    ids: torch.Tensor
    segments: torch.Tensor | None
    own: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[1]

    def arguments(self, device: torch.device) -> dict[str, torch.Tensor]:
        """For the decoder's forward."""
        segments = {} if self.segments is None else {"segment_ids": self.segments.to(device)}
        return {"input_ids": self.ids.to(device)} | segments


def encoded_pieces(model: nn.Module, tokenizer, text: Text, tokens: int, *, own: bool = False) -> list[Encoded]:
    """A text in pieces of at most ``tokens`` tokens.

    Args:
        own: find out which tokens are the text's own, unless segments are written.
    """
    config = identity_of(model).config
    check_tokenizer(tokenizer)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def encode(part: Text, name: str) -> Encoded:
        ids, segments = encode_text(tokenizer, part, config, name)
        check_known(model, ids[0].tolist())
        chat = as_chat(tokenizer, part, name) if own and segments is None else None
        return Encoded(ids, segments, None if chat is None else own_tokens(tokenizer, chat, ids))

    found = [encoded for _, encoded in pieces_of(text, tokens, count, encode) if len(encoded)]
    if not found:
        raise ArgumentError("text: the tokenizer makes no token of it")
    return found


class WriteResult(int):
    """What ``ingest``, ``revise`` or ``forget`` has done: an int, the tokens that went through the model.

    Attributes:
        tokens: the same, as an attribute.
        pieces: in how many contexts they went.
        skipped: (token, layer) pairs left out because they were not finite.
        moved: how far the memory was moved, ``trusting.moved``: 0 not at all, 1 as far as an empty one becomes full.
    """

    pieces: int
    skipped: int
    moved: float

    def __new__(cls, tokens: int, *, pieces: int = 1, skipped: int = 0, moved: float = 0.0) -> WriteResult:
        made = super().__new__(cls, tokens)
        made.pieces, made.skipped, made.moved = pieces, skipped, moved
        return made

    def __getnewargs_ex__(self) -> tuple[tuple, dict]:
        return (int(self),), dict(vars(self))

    @property
    def tokens(self) -> int:
        """How many tokens went through the model."""
        return int(self)

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value!r}" for name, value in {"tokens": int(self), **vars(self)}.items())
        return f"{type(self).__name__}({figures})"


@torch.no_grad()
def erase(model: nn.Module, tokenizer, memory, text: Text, strength: float | None = None) -> WriteResult:
    """``operators.forget`` of a MemoryState; same arguments, result and errors."""
    check_ready(model, memory)
    memory.check_writable()
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if strength is not None and not (number and 0 <= strength < 1e9):
        raise ArgumentError(f"strength: got {shown(strength)}, allowed a number, 0 or more (less than 1e9)")
    pieces = encoded_pieces(model, tokenizer, checked_text(text), WRITE_TOKENS, own=True)
    left = SEGMENT_LEFT if identity_of(model).config.segmented else TOKEN_LEFT
    scratch, device = type(memory).zeros(model), input_device(model)
    with capture_projections() as found:
        for piece in pieces:
            decoder_of(unwrap(model))(**piece.arguments(device), memory=scratch, use_cache=False)
    layers, before = identity_of(model).memories, memory.clone()
    with memory.all_or_nothing():
        for index in memory:
            told = []
            for piece, projections in zip(pieces, found):
                segments = None if piece.segments is None else piece.segments.to(device)
                writes = writes_of(layers[index], projections[index], segments)
                # What the template writes stands in every text's memory: without it, others are not read either.
                if piece.own is not None:
                    writes = writes._replace(gates=writes.gates * piece.own.to(device)[..., None, None])
                told.append(writes)
            times = _strength(told, left) if strength is None else strength
            memory.put(index, _erased(memory[index], told, times), in_place=True)
        lost, far = int(scratch.skipped.sum()), moved(before, memory)
    return WriteResult(sum(map(len, pieces)), pieces=len(pieces), skipped=lost, moved=far)


def check_ready(model: nn.Module, memory) -> None:
    """Raise unless a MemoryState is one conversation's of this model, and may be used now."""
    identity = identity_of(model)
    if memory.batch_size != 1:
        raise ArgumentError(f"memory: got {memory.batch_size} rows, allowed 1; see MemoryState.select")
    if is_disabled(unwrap(model)):
        raise ArgumentError("model: its memory is disabled here (memory_disabled)")
    identity.check(memory.identity)
    memory.check_whole()


class Writes(NamedTuple):
    """What the tokens of a text, or its segments, write: each float32 [B, T, H, r]; a gate is 0 where nothing is."""

    keys: torch.Tensor
    values: torch.Tensor
    gates: torch.Tensor


def writes_of(layer, projections: torch.Tensor, segment_ids: torch.Tensor | None) -> Writes:
    """What a layer's raw projections, [B, T, W], write.

    Args:
        segment_ids: int64 [B, T], −1 = not written, for an adapter that writes segments; None = each token is written.
    """
    present = None
    if segment_ids is not None:
        projections, present, _ = segment_means(projections, segment_ids, None)
    projections = projections.float()
    valid, _ = valid_tokens(projections, present)
    projections = torch.where(valid.unsqueeze(-1), projections, 0.0)
    _, keys, values, _, _, beta = split_projections(projections, layer.gate_bias().float(), layer.rule)
    return Writes(keys, values, beta * valid[:, :, None, None])


def _strength(told: Sequence[Writes], left: float) -> torch.Tensor:
    """How many tellings leave so much under the widest gates, a token's channels averaged: float32 [1, 1, H, 1]."""
    widest = torch.cat([piece.gates for piece in told], 1).mean(3, keepdim=True).amax(1, keepdim=True)
    return (math.log(left) / torch.log1p(-widest.clamp(1e-6, 1 - left))).clamp(max=MOST_STRENGTH)


def _erased(state: torch.Tensor, told: Sequence[Writes], strength: float | torch.Tensor) -> torch.Tensor:
    """One layer's state [1, H, r, r] after what all pieces of a text write has been erased."""
    # Hundreds of nearly shut gates, each opened ``strength`` times as far, would erase everything.
    widest = torch.cat([piece.gates for piece in told], 1).amax((1, 3), keepdim=True).clamp(min=1e-30)
    for piece in told:
        times = strength * (STATES * piece.gates / widest).clamp(max=1).square()
        shares = 1 - (1 - piece.gates) ** times
        ways = F.normalize(piece.values, dim=-1)
        for key, way, share in zip(piece.keys.unbind(1), ways.unbind(1), shares.unbind(1)):
            # Facts share keys, in eight dimensions they must: what else stands under the key stays.
            key = key.unsqueeze(-2)
            written = ((state * key).sum(-1) * way).sum(-1, keepdim=True).clamp(min=0) * way
            state = state - (share * written).unsqueeze(-1) * key
    return state
