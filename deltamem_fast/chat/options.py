"""Options of the answers: on the command line, and by ``/set``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..text.settings import GENERATION

Value = int | float


@dataclass(frozen=True)
class Option:
    """One option: how a text is read, which values are allowed (tested, and in words), and what it does."""

    read: Callable[[str], Value]
    holds: Callable[[Value], bool]
    allowed: str
    help: str


OPTIONS = {
    "temperature": Option(
        float,
        lambda value: GENERATION["temperature"].holds(value, 0),  # so that the session can be saved
        "a number, 0 (greedy) or more, up to 1e9",
        "0: always the likeliest token (greedy); more: samples",
    ),
    "top_p": Option(
        float,
        lambda value: 0 < value <= 1,
        "a number above 0, up to 1",
        "samples from the likeliest tokens that make up this share",
    ),
    "max_new_tokens": Option(
        int,
        lambda value: GENERATION["max_new_tokens"].holds(value, 0),
        "an integer, 1 or more, up to 1,048,576",
        "tokens of an answer at most",
    ),
    "seed": Option(int, lambda value: 0 <= value < 2**63, "an integer, 0 or more", "of sampling, set anew"),
}


def read_option(name: str, text: str, label: str | None = None) -> Value:
    """The value of option ``name`` that ``text`` stands for.

    Raises:
        ValueError: no such option, or not a value of it; ``label`` (default: the name) is what the message names.
    """
    if name not in OPTIONS:
        raise ArgumentError(f"{label or name}: no such option, allowed {', '.join(OPTIONS)}")
    option = OPTIONS[name]
    try:
        value = option.read(text)
    except ValueError:
        value = None
    if value is None or not option.holds(value):
        raise ArgumentError(f"{label or name}: got {text!r}, allowed {option.allowed}")
    return value


def read_limit(text: str, label: str, allowed: str = "an integer, 1 or more, or all") -> int | None:
    """How many turns or tokens ``text`` allows; None: ``all``.

    Raises:
        ValueError: neither; the message begins with ``label``.
    """
    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise ArgumentError(f"{label}: got {text!r}, allowed {allowed}")
    return int(text)


def generation_with(generation: Mapping[str, Any], changes: Mapping[str, Value]) -> dict[str, Any]:
    """Options for ``model.generate``: ``generation`` with ``changes`` (of OPTIONS, without the seed).

    Greedy unless a temperature above 0 or a top_p is given; what is not given is the model's own.
    """
    found = dict(generation) | dict(changes)
    if "temperature" in changes:
        found["do_sample"] = changes["temperature"] > 0
    elif "top_p" in changes:
        found["do_sample"] = True
    found.setdefault("do_sample", False)
    if not found["do_sample"]:
        found.pop("temperature", None)
        found.pop("top_p", None)
    elif "temperature" not in found:
        found["temperature"] = 1.0
    return found


def shown_options(generation: Mapping[str, Any], defaults: Mapping[str, Any], seed: int | None) -> dict[str, str]:
    """Option → its value as text; ``defaults`` hold where ``generation`` says nothing."""
    found = dict(defaults) | dict(generation)
    values = {name: found.get(name) for name in ("temperature", "top_p", "max_new_tokens")}
    if not found.get("do_sample"):
        values |= {"temperature": 0, "top_p": None}
    values["seed"] = seed
    return {name: "-" if value is None else f"{value}" for name, value in values.items()}
