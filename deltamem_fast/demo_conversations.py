"""The demo's conversations: a plain text file of turns, read and checked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path


@dataclass
class Conversation:
    """What one user says, turn by turn, and what is asked at the end."""

    name: str
    turns: list[str] = field(default_factory=list)
    question: str | None = None


_LINE = re.compile(r"([^\W\d_]\w*)\s*([:?])\s*(\S.*)")


def read_conversations(path: str | os.PathLike | None = None) -> list[Conversation]:
    """Read conversations from a text file, by default the demo's own, whose head describes the format.

    Raises:
        ValueError: a line that is not of the format (named by file and line number), or conversations without a
            question or with differing numbers of turns.
        FileNotFoundError: no such file.
    """
    source = resources.files("deltamem_fast") / "data" / "conversation.txt" if path is None else Path(path)
    name = source.name if path is None else str(path)
    if not source.is_file():
        raise FileNotFoundError(f"conversation: {name}: no such file")
    found: dict[str, Conversation] = {}
    for number, raw in enumerate(source.read_bytes().splitlines(), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            _read_line(line, found)
        except ValueError as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{name}:{number}: {reason}") from error
    return _checked(list(found.values()), name)


def _read_line(line: str, found: dict[str, Conversation]) -> None:
    if not line or line.startswith("#"):
        return
    match = _LINE.fullmatch(line)
    if match is None:
        shown = line if len(line) <= 40 else line[:39] + "…"
        raise ValueError(f"got {shown!r}, allowed 'NAME: a turn', 'NAME? the question at the end' or '# a comment'")
    name, sign, text = match.groups()
    conversation = found.setdefault(name, Conversation(name))
    if sign == ":":
        conversation.turns.append(text)
    elif conversation.question is None:
        conversation.question = text
    else:
        raise ValueError(f"a second question for conversation {name}, allowed one")


def _checked(conversations: list[Conversation], name: str) -> list[Conversation]:
    if not conversations:
        raise ValueError(f"{name}: holds no conversation")
    for conversation in conversations:
        if conversation.question is None:
            raise ValueError(f"{name}: conversation {conversation.name} has no question ('{conversation.name}? …')")
    turns = {conversation.name: len(conversation.turns) for conversation in conversations}
    if len(set(turns.values())) > 1 or 0 in turns.values():
        told = ", ".join(f"{key} has {count}" for key, count in turns.items())
        raise ValueError(f"{name}: each conversation needs the same number of turns, 1 or more: {told}")
    return conversations
