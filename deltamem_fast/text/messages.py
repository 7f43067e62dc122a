"""Messages of a chat as they are given: checked, and their contents as strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import check_text
from ..errors import ArgumentError, MessageTypeError

Message = Mapping[str, Any]


def plain_messages(messages: Sequence[Message], name: str = "text") -> list[dict[str, Any]]:
    """Messages whose contents are strings: text parts are joined by line breaks, because most templates print a list.

    Args:
        messages: each with a ``role``, and a ``content`` that is a string or a list of ``{"type": "text", "text": …}``;
            it may be None or missing where there are ``tool_calls`` or ``reasoning_content``.
        name: of the argument, for errors.

    Raises:
        ValueError, TypeError: a message is not as described; which one is named.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise MessageTypeError(f"{name}: got {type(messages).__name__}, allowed a string or a list of messages")
    if not messages:
        raise ArgumentError(f"{name}: got no message, allowed one or more")
    return [_plain(message, f"{name}[{place}]") for place, message in enumerate(messages)]


def _plain(message: Message, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise MessageTypeError(f"{name}: got {type(message).__name__}, allowed a dict with role and content")
    check_text(message, name)  # its role, thinking and tool calls, too
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ArgumentError(f"{name}: got role {role!r:.80}, allowed a string that is not empty")
    if content is not None:
        return {**message, "content": plain_content(content, name)}
    if not message.get("tool_calls") and not message.get("reasoning_content"):
        raise ArgumentError(
            f"{name}: has no content, and neither tool_calls nor reasoning_content; allowed a string or a list of text "
            "parts"
        )
    return dict(message)


def plain_content(content: Any, name: str) -> str:
    """A message's content as a string; text parts are joined by line breaks.

    Raises:
        ValueError: parts that are not text.
        TypeError: neither a string nor a list.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise MessageTypeError(
            f"{name}: got content of type {type(content).__name__}, allowed a str or a list of parts"
        )
    for part in content:
        if not is_text_part(part):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ArgumentError(
                f'{name}: got a content part of type {kind!r:.80}, allowed {{"type": "text", "text": "…"}} only'
            )
    return "\n".join(part["text"] for part in content)


def is_text_part(part: Any) -> bool:
    """Whether a part of a message's content is ``{"type": "text", "text": "…"}``."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
