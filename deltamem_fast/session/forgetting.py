"""Taking a text out of the messages that a session keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unicodedata import normalize

from ..memory.operators import WriteResult
from ..memory.state import MemoryState
from ..text.messages import Message
from .turns import Now, Turn

_WORD = re.compile(r"\w+")
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|([bfnrt"\\/]))')  # of JSON
# The keys that messages are made of; they and the values of the first two are nobody's words.
_NAMES = ("role", "type", "arguments", "content", "function", "id", "name", "reasoning_content", "text", "tool_calls")
_UNSEEN = re.compile(r"[\u00ad\u034f\u061c\u115f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")
# Scripts without spaces between words, or with particles at them: Thai, Lao, Tibetan, Burmese, Khmer, Tai, kana and
# ideographs (with their extensions and compatibility forms), Hangul.
_UNSPACED = re.compile(
    r"[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3005-\u318f\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


class Forgotten(WriteResult):
    """What ``MemorySession.forget`` has done: the ``WriteResult`` of ``operators.forget``, and more.

    Attributes:
        messages: how many kept messages the text was taken out of.
        turns: how many turns left the context for it.
        remains: where the text, or all of its words, still stand, such as ``messages[3].content`` or ``system``.
    """

    messages: int
    turns: int
    remains: tuple[str, ...]

    def __new__(cls, tokens: int, *, messages: int = 0, turns: int = 0, remains: tuple[str, ...] = (), **result: int):
        made = super().__new__(cls, tokens, **result)
        made.messages, made.turns, made.remains = messages, turns, remains
        return made


def forgotten(
    now: Now,
    text: str | Sequence[Message],
    erase: Callable[[MemoryState], WriteResult],
    settings: Mapping[str, Any],
    *,
    messages: bool,
) -> tuple[Now, Forgotten]:
    """The conversation without ``text`` in its memory, nor in those that its turns were told under; its cache goes.

    Args:
        erase: takes the text out of a memory, in place.
        settings: what else of the session may hold the text.
        messages: take it out of the kept messages, too.
    """
    memory = now.memory.clone()
    result = erase(memory)
    turns = tuple(_told_without(turn, erase) for turn in now.turns)
    made, changed = replace(now, memory=memory, turns=turns, cache=None, mark=None), 0
    if messages:
        made, changed = without_text(made, text)
    remains = places_of({"messages": made.messages, **settings}, text)
    gone = len(turns) - len(made.turns)
    return made, Forgotten(result, messages=changed, turns=gone, remains=remains, **vars(result))


def _told_without(turn: Turn, erase: Callable[[MemoryState], WriteResult]) -> Turn:
    before = turn.before.clone()
    before.frozen = False  # whether it may be written, the memory of now says
    erase(before)
    before.frozen = turn.before.frozen
    return replace(turn, before=before)


def without_text(now: Now, text: str | Sequence[Message]) -> tuple[Now, int]:
    """The conversation without ``text`` in its messages, and how many changed; turns that held it leave the context.

    The cache has to be built anew afterwards.
    """
    patterns = _patterns(normalize("NFC", part) for part in _texts(text))

    def cut(value: str) -> str:
        found = normalize("NFC", value)  # é is one character, or two
        if not any(pattern.search(found) for pattern in patterns):
            return value
        for pattern in patterns:
            while pattern.search(found):
                found = " ".join(part.strip() for part in pattern.split(found)).strip()
        return found

    messages = tuple(_changed(message, cut) for message in now.messages)
    count = sum(new != old for new, old in zip(messages, now.messages))
    kept = tuple(turn for turn in now.turns if all(_changed(message, cut) == message for message in turn.messages))
    written = now.written and bool(kept) and kept[0] is now.turns[0]
    return replace(now, messages=messages, turns=kept, written=written, cache=None, mark=None), count


def places_of(kept: Mapping[str, Any], text: str | Sequence[Message]) -> tuple[str, ...]:
    """Where in ``kept`` a text stands, or all of its words together, in any order; however they are written.

    As ``_folded`` has it: half-width or wide, with soft hyphens, or in JSON (a tool call's arguments) by its escapes.
    """
    texts = [folded for folded in map(_folded, _texts(text)) if folded.strip()]
    patterns, wanted = _patterns(texts), [words for words in map(_words, texts) if words]

    def stands(value: str) -> bool:
        return any(words <= _words(value) for words in wanted) or any(pattern.search(value) for pattern in patterns)

    # What looks like an escape may be none: a path on Windows.
    return tuple(
        place
        for place, value in strings_of(kept, names=False)
        if stands(_folded(value)) or ("\\" in value and stands(_folded(_ESCAPE.sub(_unescaped, value))))
    )


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 16)) if found[1] else " " if found[2] in "bfnrt" else found[2]


def _folded(text: str) -> str:
    """A text in which characters that say the same are the same, and those that nobody sees are left out."""
    text = text.encode("utf-16", "surrogatepass")
    text = normalize("NFKC", _UNSEEN.sub("", text.decode("utf-16", "replace")))
    return normalize("NFKC", text.casefold())


def _patterns(texts: Iterable[str]) -> list[re.Pattern[str]]:
    """What finds these texts, however their white space and their upper and lower case are."""
    found = []
    for words in map(str.split, texts):
        first, last = _edge(words[0][0], "(?<!{})"), _edge(words[-1][-1], "(?!{})")
        found.append(re.compile(first + r"\s+".join(map(re.escape, words)) + last, re.IGNORECASE))
    return found


def _edge(char: str, look: str) -> str:
    """Where a text begins or ends with a letter or digit, the word has to begin or end, too.

    Not in scripts that put no spaces between words.
    """
    return "" if _UNSPACED.match(char) or not _WORD.match(char) else look.format(rf"(?!{_UNSPACED.pattern})\w")


def _texts(text: str | Sequence[Message]) -> list[str]:
    """The texts of a str, or of messages, whose contents may be in parts."""
    found: list[str] = []
    for content in [text] if isinstance(text, str) else [message.get("content") for message in text]:
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        found += [part.get("text") for part in parts if isinstance(part, Mapping)]
    return [part for part in found if isinstance(part, str) and part.strip()]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with all texts in it changed, but for names: keys, roles and types."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: item if key in _NAMES[:2] else _changed(item, change) for key, item in value.items()}
    return type(value)(_changed(item, change) for item in value) if type(value) in (list, tuple) else value


def strings_of(value: Any, place: str = "", names: bool = True) -> Iterator[tuple[str, str]]:
    """(place, text) for all texts in a value, keys included; without ``names`` not what makes it a message."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            name = f"{place}.{key}".removeprefix(".")
            if isinstance(key, str) and place and (names or key not in _NAMES):
                yield name, key
            if names or key not in _NAMES[:2] or not isinstance(item, str):
                yield from strings_of(item, name, names)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from strings_of(item, f"{place}[{index}]", names)
