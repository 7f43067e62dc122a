"""What a caller says and asks for in a turn, checked before anything happens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import check_text, check_type
from ..errors import ArgumentError, ArgumentTypeError
from ..text.answering import check_reserved
from ..text.messages import Message, plain_messages
from ..text.settings import check_values
from .forgetting import strings_of

_ROLES = ("user", "tool")


def checked_options(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of options of ``generate``; raises for those that no turn can have."""
    check_type(options, name, Mapping, "a dict or None")
    check_reserved(options, name, "the session")
    check_values(options, name)
    return dict(options)


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
