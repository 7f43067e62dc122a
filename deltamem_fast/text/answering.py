"""How one answer is generated: the options of ``generate``, and what is said of an answer that was cut off."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.utils import TransformersKwargs

from ..adapter.wrappers import unwrap
from ..arguments import check_type, shown
from ..errors import ArgumentError
from ..notices import logger

DEFAULT_NEW_TOKENS = 512
THINKING_TOKENS = 2048  # more, for an answer that is wanted whole where the model may think first

# What a model's generation_config, or one that is given, does not decide: one row, one answer, into our own cache.
_UNSET = """
    num_beam_groups diversity_penalty early_stopping length_penalty constraints force_words_ids penalty_alpha
    dola_layers low_memory cache_implementation cache_config max_cache_len prefill_chunk_size is_assistant use_mtp
    prompt_lookup_num_tokens assistant_early_exit token_healing
""".split()
_OFF = "return_dict_in_generate output_attentions output_hidden_states output_scores output_logits".split()
_FIXED = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
_FIXED |= dict.fromkeys(_UNSET) | dict.fromkeys(_OFF, False)
# What a session and retrieve hand to generate themselves.
RESERVED = (
    "answer_is_fed", "assistant_early_exit", "assistant_model", "attention_mask", "cache", "cache_config",
    "cache_implementation", "constraints", "custom_generate", "ended_rows", "force_words_ids",
    "input_ids", "inputs", "inputs_embeds", "is_assistant", "max_cache_len", "memory", "num_beam_groups", "num_beams",
    "num_return_sequences", "past_key_values", "penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens",
    "return_dict_in_generate", "segment_ids", "streamer", "token_healing", "token_mask", "trust",
    "use_cache", "use_mtp",
)  # fmt: skip
# What generate takes out of its options by itself: no signature has them.
_TAKEN_OUT = ("assistant_tokenizer", "debug_io", "mm_encoder_outputs", "tokenizer", "trust_remote_code")


def answer_options(model: nn.Module, tokenizer, options: Mapping[str, Any], *, thinking: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``generate`` for one answer.

    The model's ``generation_config`` gives sampling settings and what is not named here, ``options`` go over it, and
    what one answer of one conversation needs (``_FIXED``) over both.

    Args:
        model: whose ``generation_config`` counts; may be wrapped.
        tokenizer: whose end-of-text token ends the answer, too.
        options: of ``generate``; a ``generation_config`` among them counts as its settings.
        thinking: tokens in addition to ``DEFAULT_NEW_TOKENS``, where nothing limits the answer.

    Raises:
        TypeError: ``generation_config`` is none.
        ValueError: an option that ``generate`` does not know.
    """
    check_names(model, options, "options")
    config = unwrap(model).generation_config
    found = dict(options)
    given = found.pop("generation_config", None)
    if given is not None:
        check_type(given, "generation_config", GenerationConfig, "a GenerationConfig")
        found = {name: value for name, value in given.to_dict().items() if _counts(name, value, config)} | found
    limits = [name for name in ("max_new_tokens", "max_length", "max_time") if found.get(name) is not None]
    if not limits and getattr(config, "max_new_tokens", None) is None:
        found["max_new_tokens"] = DEFAULT_NEW_TOKENS + thinking
    if found.get("max_new_tokens") is not None:
        found["max_length"] = None  # transformers warns of both
    if "eos_token_id" not in found:
        # Some chat models' generation_config does not list the token that ends a message.
        ends = as_ids(config.eos_token_id) + as_ids(tokenizer.eos_token_id)
        found["eos_token_id"] = list(dict.fromkeys(ends)) or None
    if found.get("pad_token_id", config.pad_token_id) is None:
        fillers = as_ids(tokenizer.pad_token_id) + as_ids(found.get("eos_token_id"))
        found["pad_token_id"] = next(iter(fillers), None)
    if found.get("stop_strings", getattr(config, "stop_strings", None)) is not None:
        found.setdefault("tokenizer", tokenizer)
    return found | {name: value for name, value in _FIXED.items() if hasattr(config, name)}


def check_names(model: nn.Module, options: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for an option that ``generate`` does not know: it would itself, but in the midst of a turn.

    One that is None is no option there.
    """
    model = unwrap(model)
    known = {*_TAKEN_OUT, *TransformersKwargs.__optional_keys__}
    for owner in (model, type(model)):  # a patched model's own generate takes anything
        for place in ("generate", "prepare_inputs_for_generation", "forward"):
            known.update(inspect.signature(function).parameters if (function := getattr(owner, place, None)) else ())
    for option, value in options.items():
        if value is not None and option not in known and not hasattr(model.generation_config, option):
            raise ArgumentError(
                f"{name}: got {shown(option)}, allowed options of the model's generate, such as max_new_tokens, "
                "do_sample, temperature and stop_strings"
            )


def check_reserved(options: Mapping[str, Any], name: str, owner: str, more: Sequence[str] = ()) -> None:
    """Raise for an option that ``owner`` hands to ``generate`` itself, or is one of ``more``."""
    for option in (*RESERVED, *more):
        if option in options:
            raise ArgumentError(f"{name}: got {option}, which {owner} itself decides; allowed generate's others")


def _counts(name: str, value: Any, config: GenerationConfig) -> bool:
    """Whether a setting of a ``generation_config`` is one that was made, and that is not fixed here."""
    return value is not None and name not in _FIXED and not name.startswith("_") and hasattr(config, name)


def as_ids(value: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """Token ids as settings have them (one, several, or None) as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def warn_if_cut_off(where: str, stream) -> None:
    """Say that an answer (a ``TextStream`` at its end) was cut off before its thinking had ended."""
    if stream.thinks:
        logger.warning(
            "%s: the answer was cut off before its thinking ended, after %d tokens, so that it has %d letters; raise "
            "max_new_tokens, or switch thinking off in the template (enable_thinking=False where it knows that)",
            where, len(stream.ids), len(stream.answer),
        )  # fmt: skip
