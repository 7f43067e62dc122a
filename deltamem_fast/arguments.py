"""Checks of arguments that several public functions take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any

from .errors import ArgumentError, ArgumentTypeError

MOST = 2**31 - 1
MOST_64 = 2**63 - 1
MOST_DEPTH = 100  # of lists and mappings in one another, in a message


def check_integer(value: Any, name: str, least: int, most: int | None = MOST, *, or_none: bool = False) -> Any:
    """``value``, if it is an integer from ``least`` to ``most`` (None: without end), or None where that is allowed.

    Raises:
        ValueError: it is not.
    """
    if value is None and or_none:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        got = "an integer of many digits" if isinstance(value, int) and abs(value) > 10 * MOST else shown(value)
        allowed = f"{least} or more" if most in (None, MOST, MOST_64) else f"{least} to {most:,}"
        end = f" (up to {most:,})" if most in (MOST, MOST_64) else ""
        raise ArgumentError(f"{name}: got {got}, allowed an integer, {allowed}{', or None' * or_none}{end}")
    return value


def check_choice(value: Any, name: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name}: got {shown(value, 200)}, allowed {', '.join(choices)}")


def check_share(value: Any, name: str) -> float:
    """``value``, if it is a number from 0 to 1. Raises: ValueError if it is not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ArgumentError(f"{name}: got {shown(value)}, allowed a number from 0 to 1")
    return float(value)


def check_type(value: Any, name: str, kind: type | UnionType, allowed: str) -> None:
    """Raise TypeError unless ``value`` is of ``kind``, which ``allowed`` puts in words."""
    if not isinstance(value, kind):
        raise ArgumentTypeError(f"{name}: got {type(value).__name__}, allowed {allowed}")


def shown(value: Any, most: int = 80) -> str:
    """A value for a message: at most so many characters, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits; lists in one another; an object whose repr is broken
        return f"one {type(value).__name__} too large to show"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def check_text(value: Any, name: str, depth: int = MOST_DEPTH) -> None:
    """Raise ValueError for a text, or one in messages, that holds half of a surrogate pair: no tokenizer takes it.

    So it does for what is nested without end, which no chat template takes.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"{name}: got half of a surrogate pair, {value[error.start]!r}, at character {error.start}, allowed "
                "text; what could not be decoded can be replaced before: .encode('utf-8', 'replace').decode()"
            ) from error
    elif isinstance(value, Mapping | list | tuple):
        if depth == 0:
            raise ArgumentError(f"{name}: nested too deeply, allowed {MOST_DEPTH} lists and mappings in one another")
        for part in (*value, *value.values()) if isinstance(value, Mapping) else value:
            check_text(part, name, depth - 1)


def check_tokenizer(value: Any) -> None:
    """Raise TypeError for what is no tokenizer."""
    if isinstance(value, type) or not callable(value) or not hasattr(value, "convert_ids_to_tokens"):
        kind = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise ArgumentTypeError(f"tokenizer: got {kind}, allowed a tokenizer of transformers")
