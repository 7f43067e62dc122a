"""What ``generate`` needs to know of a memory: which rows have ended, which tokens are real, what cannot be right."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from .record import identity_of, is_disabled


class EndedRows(StoppingCriteria):
    """Records which rows have ended, so that their padding is not written.

    Stands in for the caller's own criteria, which it asks once a step, and adds the end-of-sequence tokens.
    """

    def __init__(self, criteria: StoppingCriteriaList, eos_token_ids: list[int]):
        self.criteria = criteria
        self.eos_token_ids = eos_token_ids
        self.ended: torch.Tensor | None = None

    def __call__(self, input_ids, scores, **kwargs):
        stop = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            stop = stop | criterion(input_ids, scores, **kwargs)
        eos = torch.zeros_like(stop)
        for token in self.eos_token_ids:
            eos = eos | (input_ids[:, -1] == token)
        ended = stop | eos
        self.ended = ended if self.ended is None else self.ended | ended
        return stop


def generation_overrides(model) -> dict:
    """Instance methods that replace the model's own: name → function of (self, …)."""
    if not hasattr(type(model), "prepare_inputs_for_generation"):
        return {}
    return {
        "generate": _generate,
        "prepare_inputs_for_generation": _prepare_inputs_for_generation,
        **{name: _refuse_batch for name in ("generate_batch", "init_continuous_batching") if hasattr(model, name)},
    }


def _refuse_batch(self, *args, **kwargs):
    raise NotImplementedError(
        "generate_batch: continuous batching packs many requests into one row and pages their keys and values; a "
        "memory does not follow that yet. Use generate"
    )


def _generate(self, inputs=None, generation_config=None, **kwargs):
    """GenerationMixin.generate with a memory: also takes ``memory`` and ``segment_ids``."""
    if not is_disabled(self):
        _check_generate(self, inputs, generation_config, kwargs)
        settings = _settings(self, generation_config, kwargs)
        if settings["num_beams"] == 1:
            criteria = kwargs.get("stopping_criteria")
            criteria = StoppingCriteriaList(criteria if criteria is not None else [])
            watch = EndedRows(_with_stop_strings(self, criteria, settings, kwargs), settings["eos_token_ids"])
            kwargs["stopping_criteria"] = StoppingCriteriaList([watch])
            kwargs["ended_rows"] = watch
    return type(self).generate(self, inputs, generation_config, **kwargs)


def _with_stop_strings(self, criteria, settings, kwargs) -> StoppingCriteriaList:
    """The caller's criteria, and the stop strings: rows that end by one are padded like the others."""
    if settings["stop_strings"] is None or kwargs.get("tokenizer") is None:
        return criteria
    from transformers import StopStringCriteria

    return StoppingCriteriaList(
        [*criteria, StopStringCriteria(stop_strings=settings["stop_strings"], tokenizer=kwargs["tokenizer"])]
    )


def _settings(self, generation_config: GenerationConfig | None, kwargs: dict) -> dict:
    """The generation settings that matter here, from the call, its configuration, or the model's."""

    def value(name, default=None):
        for source in (
            kwargs.get(name),
            getattr(generation_config, name, None),
            getattr(self.generation_config, name, None),
        ):
            if source is not None:
                return source
        return default

    eos = value("eos_token_id")
    eos = eos.tolist() if isinstance(eos, torch.Tensor) else eos
    return {
        "num_beams": value("num_beams", 1),
        "num_return_sequences": value("num_return_sequences", 1),
        "prefill_chunk_size": value("prefill_chunk_size"),
        "use_cache": value("use_cache", True),
        "stop_strings": value("stop_strings"),
        "prompt_lookup_num_tokens": value("prompt_lookup_num_tokens"),
        "assistant_early_exit": value("assistant_early_exit"),
        "cache_implementation": value("cache_implementation"),
        "eos_token_ids": [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos],
    }


def _check_generate(self, inputs, generation_config, kwargs) -> None:
    """Raise for what a memory cannot follow, before anything is generated."""
    settings = _settings(self, generation_config, kwargs)
    memory, segment_ids = kwargs.get("memory"), kwargs.get("segment_ids")
    config = generation_config if generation_config is not None else self.generation_config
    assisted = (
        kwargs.get("assistant_model") is not None
        or settings["prompt_lookup_num_tokens"] is not None
        or settings["assistant_early_exit"] is not None
        or config.get_generation_mode() == GenerationMode.ASSISTED_GENERATION
    )
    if assisted:
        raise NotImplementedError(
            "generate: assisted and prompt-lookup decoding take tokens back that were not accepted; what the memory "
            "has written cannot be taken back"
        )
    if settings["cache_implementation"] == "paged":
        _refuse_batch(self)
    if memory is not None:
        for name in ("num_beams", "num_return_sequences"):
            if settings[name] > 1:
                raise ValueError(
                    f"{name}: got {settings[name]} with memory=, allowed 1: the caller's memory has one row for each "
                    "prompt and cannot follow several continuations; leave memory out (the cache's own memory does), "
                    "or pass memory.repeat(n) with the prompts repeated"
                )
        if settings["use_cache"] is False:
            raise ValueError("use_cache: got False with memory=, allowed True: every step would write the prompt again")
    if identity_of(self).config.segmented and settings["prefill_chunk_size"] is not None:
        raise ValueError(
            f"prefill_chunk_size: got {settings['prefill_chunk_size']}, allowed None with SSW, whose tokens read the "
            "state from before the whole prompt"
        )
    if segment_ids is not None:
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None and tuple(segment_ids.shape) != tuple(prompt.shape):
            raise ValueError(
                f"segment_ids: got shape {list(segment_ids.shape)}, allowed the prompt's, {list(prompt.shape)}"
            )
        if settings["use_cache"] is False:
            raise ValueError(
                "use_cache: got False with segment_ids=, allowed True: every later step would write the prompt "
                "token by token"
            )


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
    ended_rows=None,
    **kwargs,
):
    inputs = type(self).prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=next_sequence_length,
        past_key_values=past_key_values,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        is_first_iteration=is_first_iteration,
        **kwargs,
    )
    if is_disabled(self):
        return inputs
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    length = tokens.shape[1]
    if memory is not None:
        inputs["memory"] = memory
    if segment_ids is not None and is_first_iteration:
        inputs["segment_ids"] = segment_ids[:, -length:]
    # With a static cache `attention_mask` is a prepared 4-D mask by now; the 2-D one says which tokens are real.
    real = True if attention_mask is None else attention_mask[:, -length:] != 0
    # Without a cache every step runs the whole rows from an empty memory again, and nothing is kept.
    if length == 1 and tokens.shape[0] > 1 and ended_rows is not None and ended_rows.ended is not None:
        live = ~ended_rows.ended.to(tokens.device)[:, None]
        real = live if real is True else real & live
    inputs["token_mask"] = real
    return inputs
