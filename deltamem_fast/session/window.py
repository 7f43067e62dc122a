"""The KV cache of a session: feeding blocks, going back to where it was, building it anew."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ..adapter.record import is_disabled, record_of
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..memory.state import MemoryState
from ..model.cache import rewound
from ..text.encode import Message
from .blocks import Block


@dataclass(frozen=True)
class Turn:
    """One turn whose keys and values are in the cache.

    Attributes:
        messages: the messages of the turn, its answer last.
        prompt, answer: their blocks; each is one forward.
        before: the memory before the turn. Keys and values of the turn follow from it, from the blocks, and from what
            stands before them in the cache.
    """

    messages: tuple[Message, ...]
    prompt: tuple[Block, ...]
    answer: Block
    before: MemoryState

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its blocks, in order."""
        return *self.prompt, self.answer


@torch.no_grad()
def feed(model: nn.Module, cache: Cache, memory: MemoryState, block: Block) -> None:
    """One forward of a block: the cache gets its keys and values, the memory reads and writes (unless frozen)."""
    if not block.ids:
        return
    inner = unwrap(model)
    device = input_device(inner)
    arguments: dict[str, Any] = {}
    if not is_disabled(inner):
        arguments["memory"] = memory
        if block.segments is not None:
            arguments["segment_ids"] = torch.tensor([block.segments], device=device)
    ids = torch.tensor([block.ids], device=device)
    decoder_of(inner)(input_ids=ids, use_cache=True, **{record_of(inner).cache_name: cache}, **arguments)


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for one conversation."""
    return DynamicCache(config=decoder_of(unwrap(model)).config)


def build(
    model: nn.Module, preamble: Block, turns: Sequence[Turn], memory: MemoryState, *, written: bool
) -> DynamicCache:
    """A cache that holds ``turns``, each computed from the memory before it; ``memory`` is not changed.

    The same forwards in the same order as when the turns were had, so that it is the same cache to the bit.

    Args:
        preamble: what stands before them.
        memory: what the preamble reads where there is no turn.
        written: the preamble was written, at the conversation's start; otherwise it is read-only here.
    """
    cache = new_cache(model)
    scratch = (turns[0].before if turns else memory).clone()
    feed_preamble(model, cache, scratch, preamble, written=written)
    for place, turn in enumerate(turns):
        scratch = scratch if place == 0 else turn.before.clone()
        for block in turn.blocks:
            feed(model, cache, scratch, block)
    return cache


def feed_preamble(model: nn.Module, cache: Cache, memory: MemoryState, preamble: Block, *, written: bool) -> None:
    """The preamble is written once, at the start of a conversation; later windows show it and write nothing."""
    before = memory.frozen
    memory.frozen = before or not written
    try:
        feed(model, cache, memory, preamble)
    finally:
        memory.frozen = before


class Mark:
    """Where a cache was, to go back to: lengths where a layer only grows, else its tensors (windows, linear attention).

    Args:
        cache: as it is now.
        hold: keep the tensors of every layer: it then can be gone back to even if others have gone on from here, for
            as much memory as the cache takes.
    """

    def __init__(self, cache: Cache, *, hold: bool = False):
        self._layers = [_mark(layer, hold) for layer in cache.layers]

    def restore(self, cache: Cache) -> None:
        """Go back; once more does no harm, and neither does a cache whose layers were left at different lengths."""
        del cache.layers[len(self._layers) :]
        for layer, mark in zip(cache.layers, self._layers):
            if isinstance(mark, dict):
                vars(layer).clear()
                vars(layer).update(copy.deepcopy(mark) if _is_recurrent(layer) else mark)
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys[..., :mark, :], layer.values[..., :mark, :]
        rewound(cache)


def _is_recurrent(layer) -> bool:
    """Whether a layer holds states that are written in place (linear attention, convolutions)."""
    return hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states")


def _mark(layer, hold: bool) -> int | dict[str, Any]:
    if _is_recurrent(layer):
        return copy.deepcopy(vars(layer))
    if hold or layer.is_sliding or not layer.is_initialized:
        return dict(vars(layer))
    return layer.get_seq_length()
