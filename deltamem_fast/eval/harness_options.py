"""Arguments of ``deltamem`` as a model of lm-evaluation-harness, and options of its requests."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from ..arguments import check_integer
from ..errors import ArgumentError
from ..text.thinking import END_THINK

# What ``hf`` takes that has no place here: models are loaded by this package, on one device.
LOADS = """
    revision subfolder trust_remote_code use_fast_tokenizer parallelize max_memory_per_gpu max_cpu_memory offload_folder
    tp_plan peft delta autogptq gptqmodel gguf_file mixed_precision_dtype
""".split()
PASSED = """
    truncation logits_cache max_length softmax_dtype batch_size max_batch_size add_bos_token prefix_token_id
    think_end_token enable_thinking chat_template_args
""".split()
OWN = """
    pretrained adapter backend strategy policy device dtype attention tokenizer window chunk chunk_tokens embedder
""".split()
_PLAIN = {"until", "do_sample", "max_gen_toks"}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of ``hf`` that is not passed on, or is none."""
    for name in options:
        if name not in PASSED:
            why = "which deltamem does not take: it loads models itself" if name in LOADS else "unknown"
            raise ArgumentError(f"{name}: {why}; allowed {', '.join((*OWN, *PASSED))}")


def with_end_of_thinking(options: Mapping[str, Any], tokenizer) -> dict[str, Any]:
    """``options`` with ``think_end_token``: as given, or ``</think>`` where the tokenizer has it as one token.

    It is given by its id: where it is a special token, the text of an answer is without it.
    """
    token = tokenizer.get_vocab().get(END_THINK)
    if token is None or options.get("think_end_token") is not None:
        return dict(options)
    return dict(options) | {"think_end_token": token}


def checked_telling(window: Any, chunk: Any, chunk_tokens: Any, embedder: str | None) -> dict[str, Any]:
    """How documents are told and what is found in them, as fields of ``Settings``; numbers may come as strings.

    Raises:
        ValueError: a number is too small, or none.
    """
    given = {"window": (window, 0), "chunk": (chunk, 1), "chunk_tokens": (chunk_tokens, 1)}
    numbers = {name: check_integer(_whole(value), name, least) for name, (value, least) in given.items()}
    return numbers | {"embedder": embedder}


def _whole(value: Any) -> Any:
    digits = isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20
    return int(value) if digits else value


def is_greedy(options: Mapping[str, Any]) -> bool:
    """Whether generation options say no more than how many tokens an answer may have."""
    return not options.get("do_sample") and not options.get("until") and set(options) <= _PLAIN


@contextlib.contextmanager
def no_warning_of_models() -> Iterator[None]:
    """lm_eval warns that a model that is there already ignores arguments; those were used to make it."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
