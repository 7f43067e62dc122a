"""What ``generate`` needs to know of a memory: which rows have ended, which tokens are real, what cannot be right."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator

import torch
from transformers import Cache, GenerationConfig, StoppingCriteriaList

from ..adapter.record import identity_of, is_disabled, record_of
from ..adapter.wrappers import RECORD
from ..arguments import check_share, check_type
from ..errors import ArgumentError, UnsupportedError
from ..memory.state import MemoryState, taken_back
from ..notices import logger, warn_once
from . import continuous
from .begin import NOT_WRITTEN, LastTokens, PromptsMask, check_unused, generating
from .cache import cut_short
from .signatures import cache_name, given_cache, given_tokens


class WatchedCriteria(StoppingCriteriaList):
    """The stopping criteria that one ``generate`` has put together, each asked once a step.

    Attributes:
        ended: which rows have ended by them, so that their padding is not written; None: they were not asked yet.
    """

    ended: torch.Tensor | None = None

    def __call__(self, input_ids, scores, **kwargs):
        stop = super().__call__(input_ids, scores, **kwargs)
        self.ended = stop if self.ended is None else self.ended | stop.to(self.ended.device)
        return stop


_PAGED = "cache_implementation: got 'paged', allowed others: continuous batching is generate_batch's"
_ONE_SEGMENT = (
    "generate: got no segment_ids, and the adapter writes segments ({granularity}): the prompt is written as one "
    "segment. Pass segment_ids (see segment_ids_from_messages), or segment_ids=-1 to write nothing of it"
)
_ANSWER_NOT_WRITTEN = (
    "generate: the adapter writes segments ({granularity}), and what is generated has none while it comes: it is read "
    "and not written. To write an answer, ingest its message, or have the conversation in a MemorySession"
)
_LOST = (
    "generate: %d (token, layer) pairs were left out of the memory, because they, or the state after them, were NaN or "
    "Inf. What is generated from there on is of little worth; in float16 a layer's output may overflow where it does "
    "not in bfloat16"
)
_NO_CACHE = (
    "use_cache: got False, and the adapter writes segments ({granularity}): a row's tokens read the memory from before "
    "it, and without a cache that is empty at each step, so that what is generated remembers nothing"
)
# generate builds its criteria out of reach of its model arguments; the call in this context is the one meant.
_watching: contextvars.ContextVar[WatchedCriteria | None] = contextvars.ContextVar("deltamem_watching", default=None)


_CONTINUOUS = ("generate_batch", "init_continuous_batching")


def generation_overrides(model) -> dict:
    """Instance methods that replace the model's own: name → function of (self, …)."""
    if not hasattr(type(model), "prepare_inputs_for_generation"):
        return {}
    return {
        "generate": _generate,
        "prepare_inputs_for_generation": _prepare_inputs_for_generation,
        "_get_stopping_criteria": _get_stopping_criteria,
        **{name: _with_original(name) for name in _CONTINUOUS if hasattr(model, name)},
    }


def _with_original(name: str):
    """The method ``name`` of ``continuous``, which gets the model's own."""
    function = getattr(continuous, name)

    @functools.wraps(function)
    def method(self, *args, **kwargs):
        return function(self, *args, original=_original(self, name), **kwargs)

    return method


def _original(self, name: str):
    record = vars(self).get(RECORD)
    # A wrapper may have kept one of these past unpatching.
    return getattr(type(self), name).__get__(self) if record is None else record.original(self, name)


def _generate(self, *args, **kwargs):
    """transformers' ``generate`` with a memory: also takes ``memory``, ``segment_ids`` and ``trust``.

    ``trust``: a number, of prompt and answer; or a tensor as the forward takes it, of the prompt: what is generated is
    then written whole.

    SSW: a prompt without ``segment_ids`` is one segment (without what is in the cache already), −1 writes nothing of
    it. Generated tokens are read, and not written: their segment is known when the answer has ended.
    ``answer_is_fed``: the caller writes the answer afterwards.

    After an error or an interrupt a caller's ``memory`` is what it was, and the cache beside it is of no use any more.
    """
    original = _original(self, "generate")
    answer_is_fed = kwargs.pop("answer_is_fed", False)
    if "past_key_values" in kwargs:  # newer versions warn of this name
        kwargs[record_of(self).cache_name] = kwargs.pop("past_key_values")
    given = inspect.signature(original).bind_partial(*args, **kwargs).arguments
    if is_disabled(self):
        _check_disabled(self, given, kwargs)
        return original(*args, **kwargs)
    settings = _settings(self, given.get("generation_config"), kwargs)
    _check_generate(self, given, kwargs, settings)
    _warn_of_segments(self, kwargs, settings, answer_is_fed)
    # Beams are rows that never end: what has ended is kept aside.
    watch = WatchedCriteria() if settings["num_beams"] == 1 else None
    memory = kwargs.get("memory")
    counters = None if memory is None or memory.frozen else memory.counters()
    token, running = _watching.set(watch), generating.set(identity_of(self))
    try:
        with _taken_back(memory, given_cache(kwargs)):
            out = original(*args, **kwargs)
    finally:
        _watching.reset(token)
        generating.reset(running)
    if counters is not None and (lost := memory.skipped_since(counters)):
        logger.warning(_LOST, lost)
    return out


@contextlib.contextmanager
def _taken_back(memory: MemoryState | None, cache: Cache | None) -> Iterator[None]:
    """Inside, a caller's memory changes wholly or not at all; a cache that got tokens cannot be used any more."""
    before = _length_of(cache)
    try:
        with taken_back(None if memory is not None and memory.frozen else memory):
            yield
    except BaseException as error:
        if _length_of(cache) != before:
            cut_short(cache, error)
        raise


def _length_of(cache: Cache | None) -> int:
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


def _get_stopping_criteria(self, *args, **kwargs):
    criteria = _original(self, "_get_stopping_criteria")(*args, **kwargs)
    watch = _watching.get()
    if watch is None:
        return criteria
    watch[:] = criteria
    return watch


# The settings of ``generate`` that matter here, and what holds where nobody says.
_DEFAULTS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True} | dict.fromkeys(
    ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "cache_implementation")
)


def _settings(self, generation_config: GenerationConfig | None, kwargs: dict) -> dict:
    """``_DEFAULTS``, as the call, its configuration or the model's has them."""
    found = {}
    for name, default in _DEFAULTS.items():
        if name in kwargs:  # also None: the configurations do not count then
            said = [kwargs[name]]
        else:
            said = [getattr(source, name, None) for source in (generation_config, self.generation_config)]
        found[name] = next((value for value in said if value is not None), default)
    return found


def _warn_of_segments(self, kwargs: dict, settings: dict, answer_is_fed: bool) -> None:
    """Say what an adapter that writes segments does not write, or writes otherwise than it was trained to."""
    config = identity_of(self).config
    memory = kwargs.get("memory")
    if not config.segmented or getattr(memory, "frozen", False):
        return
    if settings["use_cache"] is False:
        warn_once("segments without a cache", _NO_CACHE.format(granularity=config.memory_write_granularity))
        return
    if kwargs.get("segment_ids") is None:
        warn_once("prompt without segments", _ONE_SEGMENT.format(granularity=config.memory_write_granularity))
    if not answer_is_fed:
        warn_once("answer not written", _ANSWER_NOT_WRITTEN.format(granularity=config.memory_write_granularity))


def _check_generate(self, given: dict, kwargs: dict, settings: dict) -> None:
    """Raise for what a memory cannot follow, before anything is generated."""
    memory, segment_ids = kwargs.get("memory"), kwargs.get("segment_ids")
    assisted = [given.get("assistant_model"), settings["prompt_lookup_num_tokens"], settings["assistant_early_exit"]]
    if settings["use_mtp"] or any(way is not None for way in assisted):
        raise UnsupportedError(
            "generate: assisted and prompt-lookup decoding take tokens back that were not accepted; what the memory "
            "has written cannot be taken back"
        )
    if settings["cache_implementation"] == "paged":
        raise UnsupportedError(_PAGED)
    _check_of_prompt(given, kwargs)
    if memory is not None:
        check_type(memory, "memory", MemoryState, "a MemoryState")
        for name in ("num_beams", "num_return_sequences"):
            if settings[name] > 1:
                raise ArgumentError(
                    f"{name}: got {settings[name]} with memory=, allowed 1: the caller's memory has one row for each "
                    "prompt and cannot follow several continuations; leave memory out (the cache's own memory does), "
                    "or pass memory.repeat(n) with the prompts repeated"
                )
        if settings["use_cache"] is False:
            raise ArgumentError(
                "use_cache: got False with memory=, allowed True: every step would write the prompt again"
            )
    if isinstance(kwargs.get("trust"), torch.Tensor):
        if settings["prefill_chunk_size"] is not None:
            raise ArgumentError(
                f"prefill_chunk_size: got {settings['prefill_chunk_size']} with a tensor of trust, allowed None"
            )
        if settings["use_cache"] is False:
            raise ArgumentError("use_cache: got False with a tensor of trust, allowed True")
    if identity_of(self).config.segmented and settings["prefill_chunk_size"] is not None:
        raise ArgumentError(
            f"prefill_chunk_size: got {settings['prefill_chunk_size']}, allowed None with SSW, whose tokens read the "
            "state from before the whole prompt"
        )
    if isinstance(segment_ids, torch.Tensor) and settings["use_cache"] is False:
        raise ArgumentError(
            "use_cache: got False with segment_ids=, allowed True: every later step would write the prompt "
            "token by token"
        )


def _check_of_prompt(given: dict, kwargs: dict) -> None:
    """Raise for what the memory's arguments cannot be, of whatever memory; the forward looks at the rest of it."""
    segment_ids, trust = kwargs.get("segment_ids"), kwargs.get("trust")
    if kwargs.get("token_mask") is not None:
        raise ArgumentError("token_mask: generate takes attention_mask instead, which also says where prompts begin")
    shape = _prompt_shape(given, kwargs)
    if segment_ids is not None and not (isinstance(segment_ids, int) and segment_ids == NOT_WRITTEN):
        check_type(segment_ids, "segment_ids", torch.Tensor, "an integer tensor [B, T], or -1 for all tokens")
        if shape is not None and list(segment_ids.shape) != shape:
            raise ArgumentError(f"segment_ids: got shape {list(segment_ids.shape)}, allowed the prompt's, {shape}")
    if trust is not None and not isinstance(trust, torch.Tensor):
        check_share(trust, "trust")
    elif trust is not None and shape is not None and list(trust.shape) not in (shape, shape[:1]):
        raise ArgumentError(f"trust: got shape {list(trust.shape)}, allowed the prompt's, {shape}, or {shape[:1]}")


def _check_disabled(self, given: dict, kwargs: dict) -> None:
    """Raise for what the memory's arguments cannot be; how it generates is the bare backbone's affair."""
    _check_of_prompt(given, kwargs)
    prompt = kwargs if given.get("inputs") is None else {"input_ids": given["inputs"]}
    memory, segment_ids, trust = (kwargs.get(name) for name in ("memory", "segment_ids", "trust"))
    check_unused(identity_of(self), prompt, memory, segment_ids, None, trust)


def _prompt_shape(given: dict, kwargs: dict) -> list[int] | None:
    """[B, T] of what ``generate`` was given, or None."""
    prompt = given["inputs"] if given.get("inputs") is not None else kwargs.get("input_ids")
    if kwargs.get("inputs_embeds") is not None:
        prompt = kwargs["inputs_embeds"][..., 0]
    return None if prompt is None else list(prompt.shape)


def _is_wrapped(self) -> bool:
    """Whether somebody's own preparation of the inputs, as PEFT's, calls ours."""
    found = vars(self).get("prepare_inputs_for_generation")
    return getattr(found, "__func__", None) is not _prepare_inputs_for_generation


def _prepare_inputs_for_generation(
    self,
    input_ids,
    next_sequence_length=None,
    past_key_values=None,
    attention_mask=None,
    inputs_embeds=None,
    is_first_iteration=False,
    memory=None,
    segment_ids=None,
    trust=None,
    cache=None,
    **kwargs,
):
    past_key_values = cache if past_key_values is None else past_key_values
    original = _original(self, "prepare_inputs_for_generation")
    kwargs[record.cache_name if (record := vars(self).get(RECORD)) else cache_name(original)] = past_key_values
    inputs = original(
        input_ids,
        next_sequence_length=next_sequence_length,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        is_first_iteration=is_first_iteration,
        **kwargs,
    )
    if RECORD not in vars(self) or is_disabled(self):
        return inputs
    tokens = given_tokens(inputs)
    length = tokens.shape[1]
    if memory is not None:
        inputs["memory"] = memory
    if self._delta_memory_patch.identity.config.segmented:
        segments = _segments_of(tokens, segment_ids, is_first_iteration and past_key_values is not None)
        with_front = _is_wrapped(self) and isinstance(segments, torch.Tensor)
        inputs["segment_ids"] = LastTokens(segments) if with_front else segments
    elif segment_ids is not None and is_first_iteration:
        inputs["segment_ids"] = segment_ids  # refused: the adapter writes every token
    if isinstance(trust, torch.Tensor):
        trust = _trust_of(trust, length, with_front=_is_wrapped(self)) if is_first_iteration else None
    if trust is not None:
        inputs["trust"] = trust
    # With a static cache `attention_mask` is a prepared 4-D mask by now; the 2-D one says which tokens are real.
    real = True if attention_mask is None else attention_mask[:, -length:] != 0
    # Without a cache every step runs the whole rows from an empty memory again, and nothing is kept.
    watch = _watching.get()
    if length == 1 and tokens.shape[0] > 1 and watch is not None and watch.ended is not None:
        live = ~watch.ended.to(tokens.device)[:, None]
        real = live if real is True else real & live
    elif _is_wrapped(self) and getattr(inputs.get("attention_mask"), "ndim", 0) == 2:
        # PEFT puts virtual tokens in front of the prompt, and their ones in front of the mask: that one tells.
        return inputs
    inputs["token_mask"] = PromptsMask(real) if self._delta_memory_patch.composite else real
    return inputs


def _trust_of(trust: torch.Tensor, length: int, *, with_front: bool) -> torch.Tensor | LastTokens:
    """The trust of the prompt's last ``length`` tokens, from that of the prompt, [B, T] or [B]."""
    if trust.ndim != 2:
        return trust
    return LastTokens(trust[:, -length:]) if with_front else trust[:, -length:]


def _segments_of(tokens: torch.Tensor, segment_ids: torch.Tensor | int | None, prompt: bool) -> torch.Tensor | int:
    """Segment ids of the tokens that one step of ``generate`` feeds: the end of the prompt's, one for all, or none.

    Args:
        tokens: [B, T] ids, or [B, T, d] embeddings.
        segment_ids: of the whole prompt, −1, or None.
        prompt: the step feeds the prompt, and what is written is kept.
    """
    batch, length = tokens.shape[:2]
    if not prompt or isinstance(segment_ids, int):
        return NOT_WRITTEN
    if segment_ids is None:
        return torch.zeros(batch, length, dtype=torch.int64, device=tokens.device)
    return segment_ids[:, -length:]
