"""Settings of ``generate`` and of a chat template that a file may hold: those that choose tokens, not code or files.

``model.generate`` takes arguments that load code (``custom_generate``, ``trust_remote_code``, and those that it sends
to a repository: ``penalty_alpha``, ``dola_layers``, …), and a chat template is a program. None of them is ever saved,
or believed when a file has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..arguments import MOST_64, check_type, shown
from ..errors import ArgumentError, ArgumentTypeError, FileFormatError

MOST_DEPTH = 64  # of lists and objects in one another
MOST_NEW_TOKENS = 2**20  # of an answer; a file could ask for one that never ends

# Arguments of apply_chat_template that would change what is returned, or that have no meaning here.
RESULT_ARGUMENTS = (
    "continue_final_message", "max_length", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation",
)  # fmt: skip
# Arguments of apply_chat_template that are the session's own; no template can have one called self.
RESERVED_TEMPLATE = tuple(
    sorted((*RESULT_ARGUMENTS, "add_generation_prompt", "conversation", "conversations", "messages", "self"))
)


@dataclass(frozen=True)
class _Kind:
    """Which values a setting may have: in words, and ``holds(value, vocabulary)``."""

    allowed: str
    holds: Callable[[Any, int], bool]


def _is_int(value, least: int, most: int = MOST_64) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value) -> bool:
    # An int may be beyond every float.
    return type(value) in (int, float) and -1e9 <= value <= 1e9


def _is_id(value, vocabulary: int, least: int = 0) -> bool:
    return _is_int(value, least, vocabulary - 1)


def _is_ids(value, vocabulary: int, least: int = 0) -> bool:
    return _is_list(value) and all(_is_id(item, vocabulary, least) for item in value)


def _is_list(value) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _is_bias(value, vocabulary: int) -> bool:
    return _is_list(value) and len(value) == 2 and _is_ids(value[0], vocabulary) and _is_number(value[1])


def _whole(least: int) -> _Kind:
    return _Kind(f"an integer, {least} or more, of 64 bits", lambda value, _: _is_int(value, least))


def _between(least: float, most: float) -> _Kind:
    return _Kind(f"a number from {least:g} to {most:g}", lambda value, _: _is_number(value) and least <= value <= most)


_FLAG = _Kind("true or false", lambda value, _: type(value) in (bool, int) and value in (0, 1))
_POSITIVE = _Kind("a number above 0, up to 1e9", lambda value, _: _is_number(value) and value > 0)
_TOKENS = _Kind("ids of tokens, in a list", lambda value, vocabulary: value in ([], ()) or _is_ids(value, vocabulary))
# -1 is no token: never an end, nothing to fill with.
_END = _Kind(
    "the id of a token, -1, or a list of such",
    lambda value, vocabulary: _is_id(value, vocabulary, -1) or _is_ids(value, vocabulary, -1),
)

GENERATION: dict[str, _Kind] = {
    **dict.fromkeys(("min_new_tokens", "min_length", "top_k"), _whole(0)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), _whole(0)),
    "max_length": _whole(1),
    "max_new_tokens": _Kind(
        f"an integer, 1 to {MOST_NEW_TOKENS:,}", lambda value, _: _is_int(value, 1, MOST_NEW_TOKENS)
    ),
    **dict.fromkeys(("max_time", "repetition_penalty", "encoder_repetition_penalty"), _POSITIVE),
    "temperature": _between(0, 1e9),
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), _between(0, 1)),
    **dict.fromkeys(("length_penalty", "guidance_scale"), _between(-1e9, 1e9)),
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values"), _FLAG),
    "early_stopping": _Kind("true, false or never", lambda value, _: value == "never" or _FLAG.holds(value, 0)),
    "stop_strings": _Kind(
        "a text, or a list of texts, none of them empty",
        lambda value, _: all(isinstance(text, str) and text for text in (value if _is_list(value) else [value])),
    ),
    "bad_words_ids": _Kind(
        "lists of ids of tokens, in a list",
        lambda value, vocabulary: _is_list(value) and all(_is_ids(ids, vocabulary) for ids in value),
    ),
    "sequence_bias": _Kind(
        "pairs of ids of tokens and a number, in a list",
        lambda value, vocabulary: _is_list(value) and all(_is_bias(pair, vocabulary) for pair in value),
    ),
    "exponential_decay_length_penalty": _Kind(
        "an integer and a number, in a list",
        lambda value, _: _is_list(value) and len(value) == 2 and _is_int(value[0], 0) and _is_number(value[1]),
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _TOKENS),
    **dict.fromkeys(("bos_token_id", "forced_bos_token_id"), _Kind("the id of a token", _is_id)),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), _END),
    "pad_token_id": _Kind("the id of a token, or -1", lambda value, vocabulary: _is_id(value, vocabulary, -1)),
}

Error = type[ArgumentError] | type[FileFormatError]


def check_generation(generation: Mapping[str, Any], where: str, vocabulary: int, error: Error) -> None:
    """Raise ``error`` unless all options of ``generate`` are of those that a file may hold; None is always allowed.

    Args:
        where: what the message begins with.
        vocabulary: how many tokens there are.
    """
    for name, value in generation.items():
        kind = GENERATION.get(name)
        if kind is None:
            raise error(
                f"{where}: {shown(name)}: cannot be saved or loaded with a session; allowed settings that choose "
                "tokens, such as max_new_tokens, temperature and stop_strings (text.settings.GENERATION)"
            )
        if value is not None and not kind.holds(value, vocabulary):
            raise error(f"{where}: {name}: got {shown(value)}, allowed {kind.allowed}")


def check_values(generation: Mapping[str, Any], where: str) -> None:
    """Raise ArgumentError for a number, text or list that an option of ``generate`` cannot have.

    Other kinds (tensors, objects) and other options are left to ``generate``; whether there are such tokens, too.
    """
    for name, value in generation.items():
        kind = GENERATION.get(name)
        looked_at = kind is not None and type(value) in (bool, int, float, str, list, tuple)
        if looked_at and not kind.holds(value, MOST_64 + 1):
            raise ArgumentError(f"{where}: {name}: got {shown(value)}, allowed {kind.allowed}")


def checked_template(template: Any, owner: str) -> dict[str, Any]:
    """A copy of the chat template's arguments that a caller gives.

    Raises:
        TypeError, ValueError: no mapping, or with an argument that ``owner`` decides.
    """
    check_type(template, "template", Mapping, "a dict or None")
    for name in template:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"template: got {shown(name)}, allowed names of a chat template's arguments")
    for argument in RESERVED_TEMPLATE:
        if argument in template:
            raise ArgumentError(f"template: got {argument}, which {owner} itself decides; allowed the template's")
    return dict(template)


def check_template(template: Mapping[str, Any], where: str, error: Error) -> None:
    """Raise ``error`` unless all arguments of the chat template are data: no template, and nothing of the tokenizer's.

    ``tools`` and ``documents`` are lists of objects; others are scalars, lists and objects, for the template to read.
    """
    for name, value in template.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise error(f"{where}: got {shown(name)}, allowed names of a chat template's arguments")
        if name == "chat_template":
            raise error(
                f"{where}: chat_template: a template is a program, and is neither saved nor loaded with a session; "
                "set the tokenizer's chat_template"
            )
        if name in RESERVED_TEMPLATE:
            raise error(f"{where}: {name}: the session itself decides it; allowed what the chat template reads")
        objects = isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value)
        if name in ("tools", "documents") and value is not None and not objects:
            raise error(f"{where}: {name}: got {shown(value)}, allowed a list of objects")
        check_json(value, f"{where}: {name}", error)


def check_json(value: Any, where: str, error: Error, depth: int = MOST_DEPTH) -> None:
    """Raise ``error`` unless a value is JSON: null, booleans, finite numbers, texts, lists, objects; not too deep."""
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise error(f"{where}: got {value}, allowed finite numbers")
        return
    if not isinstance(value, dict | list | tuple):
        raise error(f"{where}: got {type(value).__name__}, allowed JSON")
    if depth == 0:
        raise error(f"{where}: nested too deeply, allowed {MOST_DEPTH} lists and objects in one another")
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise error(f"{where}: got keys that are no texts, allowed JSON")
    for item in value.values() if isinstance(value, dict) else value:
        check_json(item, where, error, depth - 1)
