"""Training data: JSON lines of chat messages, and the episodes' parts in them.

One line is one JSON object of either form::

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"write": [messages], "read": [messages], "answer": "…"}

A content is a string or a list of ``{"type": "text", "text": "…"}``, whose texts are joined by line breaks: most
templates would print the list itself. A write context with nothing but white space in it counts as empty.

In the first the last message is the answer; of what precedes it the last user turn (``visible_turns`` of them) is the
read part, and all before that the write context. ``"targets": [3, 5]`` names other answers by their place in
``messages``: one line then gives several episodes. In the second the parts are spelt out, and ``write`` may be empty.
System messages at the beginning of a chat go with both parts. ``"id"`` may hold anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError, FileFormatError
from ..storage.files import as_path, opened, unique_keys
from ..text.encode import says_something
from ..text.messages import is_text_part, plain_content

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
CHAT_KEYS = ("messages", "targets", "id")
PARTS_KEYS = ("write", "read", "answer", "id")


@dataclass(frozen=True)
class Example:
    """One target of a line: what is written, what is read, what is to be answered.

    Attributes:
        where: file and line, ``train.jsonl:7``.
        write: messages of the write context; empty = the memory starts empty.
        read: messages of the read part, a user's among them.
        answer: the assistant's message.
    """

    where: str
    write: tuple[dict, ...]
    read: tuple[dict, ...]
    answer: dict

    def state_only(self) -> Example:
        """The same target with the last user turn alone in view; the turns before it are written instead."""
        system, moved, visible = _parts(self.read, 1)
        if not moved or not visible:
            return self
        return dataclasses.replace(self, write=(self.write or system) + moved, read=system + visible)


class ExampleFiles(Sequence):
    """The examples of one or more JSONL files, read again line by line as they are asked for.

    Making one reads and checks every line; what stays in memory is where the lines begin.

    Args:
        paths: the files.
        visible_turns: how many user turns of a ``messages`` line the read part shows.

    Attributes:
        digest: SHA-256 of the files' bytes.

    Raises:
        OSError: no such file, or one that is none (a directory, a pipe: it is read more than once).
        ValueError: a line that is not as described, by file and line, and how many more there are; or no example.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], visible_turns: int = 1):
        self.paths = [as_path(path, "data") for path in paths]
        self.visible_turns = visible_turns
        self._places: list[tuple[int, int, int, int]] = []  # file, byte, line, target
        errors: list[str] = []
        digest = hashlib.sha256()
        for number, path in enumerate(self.paths):
            self._index(number, path, digest, errors)
        if errors:
            more = f" (and {len(errors) - 1} more lines that cannot be used)" if len(errors) > 1 else ""
            raise FileFormatError(errors[0] + more)
        if not self._places:
            raise FileFormatError(f"data: {', '.join(map(str, self.paths))}: holds no example")
        self.digest = digest.hexdigest()

    def _index(self, number: int, path: Path, digest, errors: list[str]) -> None:
        offset = 0
        with opened(path, "data") as file:
            for line, raw in enumerate(file, 1):
                digest.update(raw)
                if raw.strip():
                    try:
                        targets = len(parse_line(raw, f"{path}:{line}", self.visible_turns))
                        self._places += [(number, offset, line, target) for target in range(targets)]
                    except ValueError as error:
                        errors.append(str(error))
                offset += len(raw)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        number, offset, line, target = self._places[index]
        path = self.paths[number]
        with open(path, "rb") as file:
            file.seek(offset)
            return parse_line(file.readline(), f"{path}:{line}", self.visible_turns)[target]


def parse_line(raw: bytes, where: str, visible_turns: int = 1) -> list[Example]:
    """The examples of one line.

    Raises:
        ValueError: beginning with ``where``: what is wrong, and what is allowed.
    """
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_keys)
        if not isinstance(value, dict):
            raise ArgumentError(f"got a JSON {type(value).__name__}, allowed an object")
        if "messages" in value:
            return _from_chat(value, where, visible_turns)
        if "write" in value or "read" in value:
            return [_from_parts(value, where)]
        raise ArgumentError(f"got keys {sorted(value)}, allowed messages, or write, read and answer")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise FileFormatError(f"{where}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise FileFormatError(f"{where}: {error}") from error


def _from_chat(value: dict, where: str, visible_turns: int) -> list[Example]:
    _only(value, CHAT_KEYS)
    messages = _messages(value["messages"], "messages")
    targets = value.get("targets", [len(messages) - 1])
    if not isinstance(targets, list) or not targets or any(type(t) is not int for t in targets):
        raise ArgumentError(f"targets: got {targets!r:.80}, allowed a list of places in messages, counted from 0")
    return [_from_target(messages, target, where, visible_turns) for target in targets]


def _from_target(messages: tuple[dict, ...], target: int, where: str, visible_turns: int) -> Example:
    if not 0 <= target < len(messages):
        raise ArgumentError(f"targets: got {target}, allowed 0 to {len(messages) - 1}")
    answer = _answer(messages[target], f"messages[{target}]")
    system, before, visible = _parts(messages[:target], visible_turns)
    if not visible:
        raise ArgumentError(f"messages: got no user message before messages[{target}], which is the answer")
    return Example(where, system + before if says_something(before) else (), system + visible, answer)


def _from_parts(value: dict, where: str) -> Example:
    _only(value, PARTS_KEYS)
    for key in PARTS_KEYS[:3]:
        if key not in value:
            raise ArgumentError(f"{key}: is missing, allowed write, read and answer together")
    write = _messages(value["write"], "write", empty=True)
    read = _messages(value["read"], "read")
    if not any(message["role"] == "user" for message in read):
        raise ArgumentError("read: got no user message, allowed at least one")
    answer = value["answer"]
    answer = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    (answer,) = _messages([answer], "answer")
    return Example(where, write if says_something(write) else (), read, _answer(answer, "answer"))


def _only(value: dict, allowed: tuple[str, ...], name: str = "") -> None:
    unknown = sorted(value.keys() - set(allowed))
    if unknown:
        raise ArgumentError(f"{name}{unknown[0]!r:.80}: unknown key, allowed {', '.join(allowed)}")


def _messages(value, name: str, empty: bool = False) -> tuple[dict, ...]:
    if not isinstance(value, list) or not (value or empty):
        got = "an empty list" if value == [] else type(value).__name__
        raise ArgumentError(f"{name}: got {got}, allowed a list of messages")
    found = []
    for place, message in enumerate(value):
        part = name if name == "answer" else f"{name}[{place}]"
        if not isinstance(message, dict):
            raise ArgumentError(f"{part}: got {type(message).__name__}, allowed an object with role and content")
        _only(message, MESSAGE_KEYS, f"{part}: ")
        if message.get("role") not in ROLES:
            raise ArgumentError(f"{part}.role: got {message.get('role')!r:.80}, allowed {', '.join(ROLES)}")
        content = message.get("content")
        allowed = isinstance(content, str) or (isinstance(content, list) and all(map(is_text_part, content)))
        if content is None:
            allowed = message.get("tool_calls") or message.get("reasoning_content")
        if not allowed:
            raise ArgumentError(
                f'{part}.content: got {content!r:.80}, allowed a string or a list of {{"type": "text", "text": "…"}}'
            )
        if isinstance(content, list):
            message = {**message, "content": plain_content(content, part)}
        found.append(message)
    return tuple(found)


def _answer(message: dict, name: str) -> dict:
    if message["role"] != "assistant":
        raise ArgumentError(f"{name}.role: got {message['role']!r:.80}, allowed assistant: it is the answer")
    if not (message.get("content") or "").strip() and not message.get("tool_calls"):
        raise ArgumentError(f"{name}.content: got an empty answer, allowed one with text (or tool_calls)")
    return message


def _parts(messages: tuple[dict, ...], visible: int) -> tuple[tuple[dict, ...], tuple[dict, ...], tuple[dict, ...]]:
    """System messages at the beginning, the turns before the last ``visible``, and those (all, if there are fewer).

    A turn is everything from one user message to the next; without a user message none is visible.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages))
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"]
    cut = (starts[-visible] if visible <= len(starts) else first) if starts else len(messages)
    return messages[:first], messages[first:cut], messages[cut:]
