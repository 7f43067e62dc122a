"""What happens before the layers of a forward run: who owns the state, which tokens are real."""

from __future__ import annotations

import contextvars
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..adapter.guard import Guarding
from ..arguments import check_share, check_type
from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError
from ..memory.state import MemoryState
from ..memory.watch import current_capture, current_record
from ..notices import warn_once
from .cache import adopt, check_rows, expect
from .call import Bridge, MemoryCall
from .checkpointing import is_sharded
from .paged import is_paged
from .sequences import sequence_starts
from .signatures import given_cache, given_tokens

NOT_WRITTEN = -1  # the segment id of tokens that are read and not written

_TOKEN_BY_TOKEN = (
    "segment_ids: got none in a forward of an adapter that writes segments ({granularity}), so that each token was "
    "written by itself, which it was not trained for. Pass segment_ids (see segment_ids_from_messages), or "
    "segment_ids=-1 to write nothing; generate and MemorySession do so by themselves"
)


_RAW_KEYS = (
    "trust: the adapter's keys are not normalised (normalize_qk=false): its writes are scaled, but no guard bounds "
    "what a hostile text can make of the memory"
)

# The identity of the model whose ``generate`` runs here. What it is given may call the model as well: the branch
# without the prompt of classifier-free guidance, a caller's logits processor or decoding loop.
generating: contextvars.ContextVar[Any] = contextvars.ContextVar("deltamem_generating", default=None)


class CallersMemory:
    """Carries a caller's MemoryState from the outer forward to the decoder's, past hooks that move what has ``.to``."""

    def __init__(self, state: Any):
        self.state = state


class PromptsMask:
    """What a model's own attention mask says of its prompt, bool [B, T] or True; the decoder's may have become longer.

    Models that put images in put them where a token holds their place, or in front of the prompt, or between.
    """

    def __init__(self, mask: torch.Tensor | bool):
        self.mask = mask

    def to(self, *args, **kwargs) -> PromptsMask:
        """The mask elsewhere: accelerate's hooks move what has this method to where the decoder computes."""
        return PromptsMask(self.mask if self.mask is True else self.mask.to(*args, **kwargs))

    def for_tokens(self, batch: int, length: int) -> torch.Tensor | bool | None:
        """The mask of a decoder's tokens [B, T]; None: they are others."""
        fits = self.mask is True or tuple(self.mask.shape) == (batch, length)
        return self.mask if fits else None


class LastTokens:
    """Segment ids or trust [B, T] of the last T tokens of a forward, which others may put tokens in front of (PEFT)."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def of(self, length: int, front: float) -> torch.Tensor:
        """Those of ``length`` tokens, ``front`` of what is in front."""
        return torch.nn.functional.pad(self.values, (max(0, length - self.values.shape[1]), 0), value=front)


def begin(
    decoder: nn.Module,
    identity,
    kwargs: dict[str, Any],
    memory: MemoryState | None,
    segment_ids: torch.Tensor | int | None,
    token_mask: torch.Tensor | bool | None,
    trust: torch.Tensor | float | None,
    cache_name: str,
    guarding: Guarding,
) -> MemoryCall:
    """Check a forward's arguments and make its MemoryCall.

    Args:
        decoder: the patched decoder.
        identity: of its memory.
        kwargs: the decoder's own arguments by name; gets a cache where the decoder would make one.
        memory: the caller's state, or None = the cache's.
        segment_ids: int [B, T] (SSW); −1 = nothing of this forward is written; None = each token by itself.
        token_mask: bool [B, T]; True = all tokens are real; None = take it from the attention mask.
        trust: with which share of its strength each token is written, 0 to 1: a number, or a float tensor [B, T] or
            [B]; None = 1. On a GPU a tensor's numbers are not waited for: NaN, and what is outside of 0 to 1, writes
            nothing there.
        cache_name: of the argument that is the cache; see ``PatchRecord``.
        guarding: which forwards hold their gates and values.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.
    """
    tokens = given_tokens(kwargs)
    if tokens is None:
        raise ArgumentError("input_ids: got neither input_ids nor inputs_embeds")
    batch, length = tokens.shape[:2]
    if not batch or not length:
        raise ArgumentError(f"input_ids: got shape {list(tokens.shape[:2])}, allowed one row and one token, or more")
    cache = kwargs.get(cache_name)
    if cache is not None and (isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache)):
        if memory is not None and kwargs.get("cu_seq_lens_q") is not None and is_paged(cache):
            cache = None  # of continuous batching: it keeps sequences apart by itself, and the memory is its requests'
        else:
            raise ArgumentTypeError(f"past_key_values: got {type(cache).__name__}, allowed a decoder's Cache")
    _check_memory(memory, identity)
    unwritten = False
    if segment_ids is not None:
        segment_ids = _check_segments(segment_ids, identity, batch, length, tokens.device)
        unwritten = segment_ids is None
    elif identity.config.segmented and memory is None and _is_generating(identity):
        # As generate's own steps: the first tokens of a cache are one segment, the later ones are not written.
        unwritten = cache is not None and int(cache.get_seq_length()) > 0
        if not unwritten:
            segment_ids = torch.zeros(batch, length, dtype=torch.int64, device=tokens.device)
    token_mask = _token_mask(token_mask, kwargs.get("attention_mask"), cache, batch, length)
    trust = _trust(trust, batch, length, tokens.device)
    state, rows = memory, batch
    fed = held = None
    cu_seqlens = sequence_starts(kwargs, cache, token_mask, batch, length)

    if cu_seqlens is not None:
        if segment_ids is not None:
            raise UnsupportedError("segment_ids: not supported with several sequences in a row (packed)")
        rows = cu_seqlens.numel() - 1
        _check_packed_rows(memory, rows)
    else:
        checkpoints = decoder.training and getattr(decoder, "gradient_checkpointing", False)
        uses_cache = kwargs.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(decoder.config, "use_cache", False)
        if cache is None and uses_cache and not checkpoints:  # transformers turns it off there, too
            cache = kwargs[cache_name] = DynamicCache(config=decoder.config)
        if cache is not None and checkpoints:
            raise ArgumentError("past_key_values: got a cache, which transformers drops under gradient checkpointing")
        if memory is not None:
            memory.check_whole()
        if cache is not None:
            state = adopt(cache, identity, memory, batch)
            fed, held = expect(cache, identity)
        elif memory is not None:
            check_rows(memory, batch)
    if state is None:
        state = MemoryState({i: spec.zeros(rows) for i, spec in identity.layer_specs().items()}, identity=identity)
    if state.broken and (state is not memory or torch.is_grad_enabled()):
        raise ArgumentError(state.broken)
    state.check_whole()
    if fed is not None:
        fed.tokens = None if held is None else held + length
    frozen = state.frozen or unwritten or (isinstance(trust, float) and trust == 0)
    untrusted = (trust is not None or state.is_untrusted) and not frozen
    if untrusted and guarding.rule is None and not identity.config.rule.normalize:
        warn_once("raw keys", _RAW_KEYS)
    if isinstance(trust, float):
        trust = torch.full((batch, length), trust, dtype=torch.float32, device=tokens.device)
    if segment_ids is None and identity.config.segmented and not frozen and not torch.compiler.is_compiling():
        granularity = identity.config.memory_write_granularity
        warn_once("token by token", _TOKEN_BY_TOKEN.format(granularity=granularity))
    return MemoryCall(
        state,
        token_mask,
        segment_ids,
        cu_seqlens,
        trust=trust,
        rule=guarding.rule if guarding.always or untrusted else None,
        frozen=frozen,
        bridge=Bridge(ordered=is_sharded(decoder)) if torch.is_grad_enabled() else None,
        gates={} if current_record() is not None and not frozen else None,
        projections={} if current_capture() is not None else None,
        fed=fed,
        held=held,
    )


def check_unused(
    identity,
    kwargs: dict[str, Any],
    memory: MemoryState | None,
    segment_ids: torch.Tensor | int | None,
    token_mask: torch.Tensor | bool | None,
    trust: torch.Tensor | float | None,
) -> None:
    """Raise as ``begin`` does for what no forward takes, where the memory is disabled and none of it is used.

    Only these four are looked at: the bare backbone's arguments are its own.

    Args:
        kwargs: the decoder's (or the model's) own arguments by name.
    """
    tokens = given_tokens(kwargs)
    if tokens is None or (memory is None and segment_ids is None and token_mask is None and trust is None):
        return
    batch, length = tokens.shape[:2]
    _check_memory(memory, identity)
    if segment_ids is not None:
        _check_segments(segment_ids, identity, batch, length, tokens.device)
    if token_mask is not None:
        token_mask = _token_mask(token_mask, None, None, batch, length)
    _trust(trust, batch, length, tokens.device)
    if memory is not None and memory.batch_size != batch:  # a row for each, if there are several sequences in a row
        starts = sequence_starts(kwargs, given_cache(kwargs), token_mask, batch, length)
        if starts is None:
            check_rows(memory, batch)
        else:
            _check_packed_rows(memory, starts.numel() - 1)


def _is_generating(identity) -> bool:
    # Compiled code, which cannot ask for a context, gets segment_ids from generate's own steps.
    return not torch.compiler.is_compiling() and generating.get() is identity


def _check_packed_rows(memory: MemoryState | None, rows: int) -> None:
    if memory is not None and memory.batch_size != rows:
        raise ArgumentError(f"memory: got {memory.batch_size} row(s), allowed {rows}: one for each packed sequence")


def _check_memory(memory: Any, identity) -> None:
    """Raise unless a caller's memory is one, and fits the model's adapter; None always does."""
    if memory is None:
        return
    check_type(memory, "memory", MemoryState, "a MemoryState")
    specs = identity.layer_specs()
    layers = dict(memory.items())
    if layers.keys() != specs.keys() or any(layers[i].shape[1:] != spec.shape for i, spec in specs.items()):
        have = {i: list(state.shape[1:]) for i, state in memory.items()}
        want = {i: list(spec.shape) for i, spec in specs.items()}
        raise ArgumentError(f"memory: got layers {have}, the model's adapter has {want}")
    for i, spec in specs.items():
        if layers[i].dtype != torch.float32:
            raise ArgumentTypeError(f"memory: layer {i} is {layers[i].dtype}, allowed float32")
        if layers[i].device != spec.device:
            raise ArgumentError(
                f"memory: layer {i} is on {layers[i].device}, the model's is on {spec.device}; see to()"
            )
    identity.check(memory.identity)


def _check_segments(segment_ids, identity, batch: int, length: int, device) -> torch.Tensor | None:
    """Segment ids on the tokens' device; None if nothing is to be written."""
    if not identity.config.segmented:
        raise ArgumentError(
            "segment_ids: the adapter writes every token (memory_write_granularity 'token'), allowed with "
            "'message_mean' or 'sentence_mean' only"
        )
    if isinstance(segment_ids, int) and segment_ids == NOT_WRITTEN:
        return None
    if isinstance(segment_ids, LastTokens):
        segment_ids = segment_ids.of(length, NOT_WRITTEN)
    if not isinstance(segment_ids, torch.Tensor) or segment_ids.is_floating_point() or segment_ids.dtype == torch.bool:
        got = f"dtype {segment_ids.dtype}" if isinstance(segment_ids, torch.Tensor) else type(segment_ids).__name__
        raise ArgumentTypeError(f"segment_ids: got {got}, allowed an integer tensor [B, T], or -1 for all tokens")
    if tuple(segment_ids.shape) != (batch, length):
        raise ArgumentError(f"segment_ids: got shape {list(segment_ids.shape)}, allowed [{batch}, {length}]")
    return segment_ids.to(device)


def _token_mask(token_mask, attention_mask, cache, batch: int, length: int) -> torch.Tensor | None:
    """bool [B, T] of this forward's tokens, or None = all are real."""
    if isinstance(token_mask, PromptsMask):
        token_mask = token_mask.for_tokens(batch, length)
    if token_mask is True:
        return None
    if token_mask is not None:
        if not isinstance(token_mask, torch.Tensor) or tuple(token_mask.shape) != (batch, length):
            shape = list(token_mask.shape) if isinstance(token_mask, torch.Tensor) else token_mask
            raise ArgumentError(f"token_mask: got {shape}, allowed a tensor [{batch}, {length}] or True")
        return token_mask != 0
    if attention_mask is None:
        return None
    if isinstance(attention_mask, dict) and all(mask is None for mask in attention_mask.values()):
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        shape = (
            list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        )
        raise ArgumentError(
            f"attention_mask: got {shape}, allowed [batch, length]: which tokens are real cannot be told from a "
            f"prepared mask; pass token_mask=, a bool tensor [{batch}, {length}] or True, beside it"
        )
    # Column n of the mask is position n of the cache; it may be wider than what is filled.
    past = 0 if cache is None else cache.get_seq_length()
    width = attention_mask.shape[1]
    if isinstance(past, torch.Tensor):  # a static cache counts on its device: do not wait for it
        if width < length:
            raise ArgumentError(f"attention_mask: got {list(attention_mask.shape)}, allowed [{batch}, past + {length}]")
        columns = past + torch.arange(length, device=past.device)
        return attention_mask.index_select(1, columns.to(attention_mask.device)) != 0
    if attention_mask.shape[0] != batch or width < past + length:
        raise ArgumentError(f"attention_mask: got {list(attention_mask.shape)}, allowed [{batch}, {past + length}]")
    return attention_mask[:, past : past + length] != 0


def _trust(trust: Any, batch: int, length: int, device) -> torch.Tensor | float | None:
    """``trust`` of a forward as a number from 0 to less than 1, or as float32 [B, T]; None = 1 of all tokens.

    Raises:
        ValueError, TypeError: it is neither a number from 0 to 1 nor a float tensor [B, T] or [B]; on the CPU, outside
            of compiled code, also for a tensor with a number outside of 0 to 1. Elsewhere the host would have to wait
            for the numbers: there those count as 0 (``shares``).
    """
    if isinstance(trust, LastTokens):
        trust = trust.of(length, 1.0)
    if trust is None or not isinstance(trust, torch.Tensor):
        return None if trust is None or check_share(trust, "trust") == 1 else float(trust)
    if not trust.is_floating_point():
        raise ArgumentTypeError(f"trust: got dtype {trust.dtype}, allowed floating point, 0 to 1")
    if tuple(trust.shape) not in ((batch, length), (batch,)):
        raise ArgumentError(f"trust: got shape {list(trust.shape)}, allowed [{batch}, {length}] or [{batch}]")
    if is_at_hand(trust) and not ((trust >= 0) & (trust <= 1)).all():
        raise ArgumentError("trust: got numbers outside of 0 to 1 (or NaN), allowed 0 to 1")
    trust = shares(trust.to(device))
    return (trust if trust.ndim == 2 else trust[:, None]).expand(batch, length)


def is_at_hand(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers can be looked at without waiting: on the CPU, outside of compiled code."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def shares(trust: torch.Tensor) -> torch.Tensor:
    """float32 trust, in which what is no share of 1 (NaN, Inf, less than 0, more than 1) is 0: it writes nothing.

    What is more than 1 is not cut off at 1: it says nothing of how far its token is to be trusted (50 may be per cent),
    and a memory that took it whole could not be mended.
    """
    trust = trust.to(torch.float32)
    return torch.where((trust >= 0) & (trust <= 1), trust, 0.0)


def composite_mask(kwargs: dict[str, Any]) -> PromptsMask | None:
    """What a model that prepares its masks itself must tell its decoder: ``token_mask``; None: it cannot be told here.

    Args:
        kwargs: the model's own arguments by name.
    """
    tokens = given_tokens(kwargs)
    attention_mask = kwargs.get("attention_mask")
    if tokens is None or not (attention_mask is None or getattr(attention_mask, "ndim", 0) == 2):
        return None
    try:
        mask = _token_mask(None, attention_mask, given_cache(kwargs), *tokens.shape[:2])
    except ArgumentError:  # the cache holds more than the mask knows of: only the decoder's mask can tell
        return None
    return PromptsMask(True if mask is None else mask)
