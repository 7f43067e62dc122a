"""What a caller says and asks for in a turn, checked before anything happens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..arguments import check_text, check_type, shown
from ..errors import ArgumentError, ArgumentTypeError
from ..text.answering import check_reserved
from ..text.messages import Message, plain_messages
from ..text.settings import check_values
from .forgetting import strings_of

_ROLES = ("user", "tool")


def checked_options(options: Mapping[str, Any], name: str, *, own: Sequence[str] = ()) -> dict[str, Any]:
    """A copy of options of ``generate``; raises for those that no turn can have, and for the session's ``own``."""
    check_type(options, name, Mapping, "a dict or None")
    check_reserved(options, name, "the session", own)
    check_values(options, name)
    return dict(options)


def check_operators_options(operator: Callable, options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that an operator of the memory (``ingest``, ``revise``, …) does not have."""
    parameters = inspect.signature(operator).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in allowed:
            raise ArgumentTypeError(f"options: got {shown(name)}, allowed {', '.join(allowed)}")


def check_encodable(texts: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the place, for half a surrogate pair in what a turn begins with."""
    for place, value in strings_of(texts):
        check_text(value, place)


def checked_messages(text: str | Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """What is said in a turn as messages of its own.

    Raises:
        ValueError, TypeError: naming what is not allowed.
    """
    check_text(text, "text")
    if isinstance(text, str):
        if not text.strip():
            raise ArgumentError("text: got nothing but white space, allowed something to say")
        return ({"role": "user", "content": text},)
    if not isinstance(text, Sequence) or not all(isinstance(message, Mapping) for message in text):
        raise ArgumentTypeError(f"text: got {type(text).__name__}, allowed a string or a list of messages")
    if not text:
        raise ArgumentError("text: got no message, allowed one or more")
    for place, message in enumerate(text):
        if message.get("role") not in _ROLES:
            raise ArgumentError(f"text[{place}]: got role {message.get('role')!r:.80}, allowed {', '.join(_ROLES)}")
    messages = plain_messages(text)
    try:  # the caller may go on with its lists, of tool calls or documents
        return tuple(copy.deepcopy(messages))
    except Exception as error:  # of whatever class it is that cannot be copied
        raise ArgumentTypeError(f"text: holds something that cannot be copied: {error}") from error
