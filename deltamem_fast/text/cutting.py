"""A long text in pieces that fit a context: whole messages or sentences, else lines, words, characters.

The limit holds: it counts what the chat template adds, and each piece is looked at as it goes through the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import ArgumentError
from .messages import Message
from .segments import SENTENCE_END, spans_to

Text = str | Sequence[Message]
Span = tuple[int, int]

_LINE_END = re.compile(r"\n+")
_WORD_END = re.compile(r"(?<=\S)(?=\s)|[，、]+")  # the space goes with the next word, as in most vocabularies
_SAMPLE = "a"


def pieces_of(
    text: Text, tokens: int, count: Callable[[list[str]], list[int]], encode: Callable[[Text, str], Any]
) -> list[tuple[Text, Any]]:
    """The pieces of a text, in order, each with what ``encode`` makes of it.

    Args:
        text: a string, or messages whose contents are strings.
        tokens: at most in a piece.
        count: how many tokens each of some strings has alone.
        encode: (a text or messages, what an error calls them) → something whose length is its tokens, with those of the
            chat template.

    Raises:
        ValueError: ``tokens`` is too little for the template, for one character, or for what cannot be cut (thinking
            and tool calls); or ``encode`` refuses a piece.
    """
    if isinstance(text, str):
        return list(_cut(text, "text", "", lambda part: part, tokens, count, encode))
    return list(_groups(text, tokens, count, encode))


def _groups(messages: Sequence[Message], tokens: int, count, encode) -> Iterator[tuple[list[Message], Any]]:
    """Runs of messages, each as long as fits; a message that is too long is cut."""
    waiting = list(messages)
    lengths = count([message.get("content") or "" for message in waiting])
    each = 0  # what the template adds to a message, as far as it is known
    place = 0
    while place < len(waiting):
        size = _fitting(waiting, lengths, place, tokens, each)
        while True:
            group = waiting[place : place + size]
            last = place + size - 1
            named = f"text[{place}]" + (f" to text[{last}]" if size > 1 else "")
            whole_text = size == len(waiting)
            found = encode(group, "text" if whole_text else f"{named}, a piece of its own within tokens={tokens}")
            if len(found) <= tokens:
                yield group, found
                place += size
                break
            if size == 1:
                parts = _parts(group[0], named, tokens, count, encode)
                yield from parts[:-1]
                # The end of a message may share a context with the next one. Nothing but white space has no parts.
                rest = [message for (message,), _ in parts[-1:]]
                waiting[place : place + 1] = rest
                lengths[place : place + 1] = count([message["content"] for message in rest])
                break
            each = max(each, math.ceil((len(found) - sum(lengths[place : place + size])) / size))
            size = min(size - 1, _fitting(waiting, lengths, place, tokens, each))


def _fitting(messages: list[Message], lengths: list[int], place: int, tokens: int, each: int) -> int:
    """How many messages from ``place`` on should fit, at least one; a user's follows them if that can be."""
    total = size = 0
    while place + size < len(messages):
        total += lengths[place + size] + each
        if total > tokens:
            break
        size += 1
    for shorter in range(size, 0, -1):
        if place + shorter == len(messages) or messages[place + shorter]["role"] == "user":
            return shorter
    return max(1, size)


def _parts(message: Message, name: str, tokens: int, count, encode) -> list[tuple[list[Message], Any]]:
    """One message in several: its thinking stays with the first, its tool calls with the last of them."""
    whole = [key for key in ("reasoning_content", "tool_calls") if message.get(key)]
    beside = f" and {' and '.join(whole)}" if whole else ""

    def build(part: str) -> list[Message]:
        return [{**message, "content": part}]

    cut = [part for part, _ in _cut(message.get("content") or "", name, beside, build, tokens, count, encode)]
    plain = {key: value for key, value in message.items() if key not in whole}
    parts = [{**plain, "content": part} for part in cut or [""] * bool(whole)]
    if "reasoning_content" in whole:
        parts[0]["reasoning_content"] = message["reasoning_content"]
    if "tool_calls" in whole:
        parts[-1]["tool_calls"] = message["tool_calls"]
    return [([part], encode([part], name)) for part in parts]


def _cut(
    content: str, name: str, beside: str, build: Callable[[str], Text], tokens: int, count, encode
) -> Iterator[tuple[str, Any]]:
    """A string's parts, and what ``encode`` makes of each as ``build`` builds it."""
    whole = encode(build(content), name)
    if len(whole) <= tokens:
        yield content, whole
        return
    frame = len(encode(build(_SAMPLE), name)) - count([_SAMPLE])[0]
    waiting = [(content, tokens - frame)]
    while waiting:
        part, room = waiting.pop()
        if room < 1:
            raise ArgumentError(
                f"tokens: got {tokens}, allowed more: the chat template{beside} of {name} alone are {frame}"
            )
        cut = [part[begin:end].strip() for begin, end in _runs(part, room, tokens, count)]
        cut = [piece for piece in cut if piece]
        for number, piece in enumerate(cut):
            found = encode(build(piece), name)
            if len(found) > tokens:
                # Together they are more tokens than apart: again, tighter.
                waiting += [(later, room) for later in reversed(cut[number + 1 :])]
                waiting.append((piece, room - (len(found) - tokens)))
                break
            yield piece, found


def _runs(text: str, room: int, tokens: int, count) -> Iterator[Span]:
    """Runs of units that have at most ``room`` tokens together."""
    begin = total = 0
    for first, _, length in _units(text, 0, len(text), room, tokens, count, (SENTENCE_END, _LINE_END, _WORD_END)):
        if total and total + length > room:
            yield begin, first
            begin, total = first, 0
        total += length
    yield begin, len(text)


def _units(text, begin: int, end: int, room: int, tokens: int, count, levels) -> Iterator[tuple[int, int, int]]:
    """(begin, end, tokens) of what is kept together: the largest of sentence, line, word, characters that fits."""
    spans = spans_to(levels[0], text[begin:end]) if levels else _shares(text[begin:end], room, tokens, count)
    spans = [(begin + first, begin + last) for first, last in spans]
    for (first, last), length in zip(spans, count([text[first:last] for first, last in spans])):
        if length <= room:
            yield first, last, length
        else:
            yield from _units(text, first, last, room, tokens, count, levels[1:])


def _shares(word: str, room: int, tokens: int, count) -> list[Span]:
    """Equal shares of a word that is too long."""
    size = len(word)
    (length,) = count([word])
    if size == 1:
        raise ArgumentError(f"tokens: got {tokens}, allowed more: the character {word!r} alone takes {length}")
    share = max(1, min(size - 1, size * room // length))
    return [(first, min(size, first + share)) for first in range(0, size, share)]
