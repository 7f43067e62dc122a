"""Documents told to memories as people do it: in windows, in chunks on a warm cache, several in a batch, padded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from ..adapter.record import cache_argument, identity_of
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..errors import ArgumentError
from ..memory.state import MemoryState
from ..memory.telling import WRITE_TOKENS, Encoded, encoded_pieces
from ..text.encode import attention_mask, padded
from ..text.segments import chat_ids
from .costs import Stopwatch
from .data import BETWEEN
from .defaults import BATCH, CHUNK
from .extension import trained_length


@dataclass(frozen=True)
class Told:
    """What telling gave: a memory a document, and how many tokens of each went through the model."""

    memory: MemoryState
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Remembered:
    """A memory of one document, and what it cost: tokens that were told, and seconds."""

    memory: MemoryState
    tokens: int
    seconds: float


def window_for(model: nn.Module, window: int = 0) -> int:
    """Tokens of a context in which a document is told: ``window``; for 0 the trained length, at most 8,192."""
    return window or min(WRITE_TOKENS, trained_length(model))


def windows_of(model: nn.Module, tokenizer, parts: Sequence[str], window: int, between: str = BETWEEN) -> list[Encoded]:
    """A document as contexts of at most ``window`` tokens, each part a user's message (or plain text).

    Args:
        between: what stands between parts, where they are one text.

    Raises:
        ValueError: ``window`` is too little for the chat template, or the tokenizer is not the model's.
    """
    parts = [part for part in parts if part.strip()]
    if not parts:
        return []
    if not getattr(tokenizer, "chat_template", None):
        return encoded_pieces(model, tokenizer, between.join(parts), window)
    messages = [{"role": "user", "content": part} for part in parts]
    try:
        chat_ids(tokenizer, messages[:2], "parts")
    except ArgumentError:  # a template that wants users and assistants to take turns
        messages = [{"role": "user", "content": between.join(parts)}]
    return encoded_pieces(model, tokenizer, messages, window)


@torch.no_grad()
def tell(model: nn.Module, documents: Sequence[Sequence[Encoded]], *, chunk: int = CHUNK, batch: int = BATCH) -> Told:
    """Write each document into a memory of its own.

    A window is a context with positions from 0 (adapters are trained on contexts of a limited length), which is fed
    ``chunk`` tokens at a time to a cache that stays; the memory runs on from window to window. Windows of several
    documents go through the model together, padded on the right.

    Args:
        model: patched.
        documents: of each its windows, see ``windows_of``.
        chunk: tokens of a forward. An adapter that writes segments reads before the whole forward writes: its windows
            are fed whole. 0 = others, too.
        batch: documents told together.

    Returns:
        A memory with a row a document, in their order.
    """
    segmented = identity_of(model).config.segmented
    order = sorted(range(len(documents)), key=lambda n: -len(documents[n]))  # who ends first stands last
    rows: dict[int, MemoryState] = {}
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        memory = MemoryState.zeros(model, len(some))
        for turn in range(max((len(documents[n]) for n in some), default=0)):
            going = [n for n in some if len(documents[n]) > turn]
            if len(going) < memory.batch_size:  # others are done
                for place in range(len(going), memory.batch_size):
                    rows[some[place]] = memory.select([place])
                memory, some = memory.select(range(len(going))), going
            _feed(model, [documents[n][turn] for n in going], memory, 0 if segmented else chunk)
        for place, n in enumerate(some):
            rows[n] = memory.select([place])
    memory = MemoryState.cat([rows[n] for n in range(len(documents))]) if documents else MemoryState.zeros(model, 0)
    return Told(memory, tuple(sum(map(len, windows)) for windows in documents))


def remember(
    model: nn.Module, documents: Sequence[Sequence[Encoded]], *, chunk: int = CHUNK, batch: int = BATCH
) -> list[Remembered]:
    """``tell``, timed: of each document its memory, of one row, and its share of the seconds, by its tokens."""
    watch = Stopwatch(input_device(model))
    told = tell(model, documents, chunk=chunk, batch=batch)
    share = watch.seconds() / max(1, sum(told.tokens))
    return [Remembered(told.memory.select([row]), tokens, tokens * share) for row, tokens in enumerate(told.tokens)]


def _feed(model: nn.Module, windows: Sequence[Encoded], memory: MemoryState, chunk: int) -> None:
    """One context a row of the memory, in chunks (0 = whole) on one cache."""
    device, width = input_device(model), max(map(len, windows))
    rows = [window.ids[0].tolist() for window in windows]
    ids, mask, segments = padded(rows, 0).to(device), attention_mask(rows).to(device), None
    if windows[0].segments is not None:
        segments = padded([window.segments[0].tolist() for window in windows], -1).to(device)
    decoder = decoder_of(unwrap(model))
    cache = DynamicCache(config=decoder.config) if 0 < chunk < width else None
    for first in range(0, width, chunk or width):
        part = slice(first, first + (chunk or width))
        options = {cache_argument(model): cache, "use_cache": cache is not None}
        if segments is not None:
            options["segment_ids"] = segments[:, part]
        decoder(ids[:, part], attention_mask=mask[:, : part.stop], memory=memory, **options)


@torch.no_grad()
def tell_plainly(model: nn.Module, windows: Sequence[Encoded]) -> MemoryState:
    """What ``tell`` must equal, of one document: one forward a window, nothing batched, padded or cached."""
    memory, device = MemoryState.zeros(model), input_device(model)
    for window in windows:
        decoder_of(unwrap(model))(**window.arguments(device), memory=memory, use_cache=False)
    return memory


def difference(first: MemoryState, second: MemoryState) -> float:
    """The largest difference of any number of a layer's states, as a share of the layer's largest.

    0 of empty ones; infinity where one is not finite.
    """
    found = 0.0
    for layer, state in first.items():
        other = second[layer].to(state.device)
        if not (state.isfinite().all() and other.isfinite().all()):
            return math.inf
        largest = max(state.abs().max().item(), other.abs().max().item())
        if largest:
            found = max(found, (state - other).abs().max().item() / largest)
    return found
