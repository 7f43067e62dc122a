"""Answers on disk: one JSON object a line, so that a killed run goes on, and a new score needs no new run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..arguments import MOST_64, check_type, shown
from ..errors import ArgumentError, FileFormatError, StateError
from ..storage.files import as_path, check_format, check_version, make_directory, naming_files, parse_json, read_bytes
from ..storage.locks import HAS_LOCKS, lock_until, open_lock, unlock

FORMAT = "deltamem answers"
FORMAT_VERSION = 1
# Of a head: who answered, when and on what, which a run that goes on may have otherwise. All else decides the answers.
DESCRIBING = ("versions", "commit", "dirty", "processor", "cores", "device", "threads", "time", "fed")


@dataclass(frozen=True)
class Answer:
    """What one row (a context policy with a memory, or without) answered to one question, and what that cost.

    Attributes:
        id: of the question.
        answer: the text, without special tokens.
        context_tokens: how many more a prompt has than its question alone.
        question_tokens: of the question as it was fed.
        answer_tokens: generated.
        told_tokens: of the document that went through the model for the memory alone, shared by its questions.
        tell_seconds: of telling those, the document's whole; each of its questions repeats it.
        context_seconds: of reading the shared context, the document's whole, likewise; 0 = it is each question's own.
        prefill_seconds: from the question to its first token, with the context where it is the question's own.
        decode_seconds: of all further tokens.
        peak_bytes: the most memory that the process (on a GPU: the device) held while it answered.
    """

    id: str
    answer: str
    context_tokens: int = 0
    question_tokens: int = 0
    answer_tokens: int = 0
    told_tokens: int = 0
    tell_seconds: float = 0.0
    context_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_bytes: int = 0

    def to_dict(self) -> dict:
        """As a line of the file has it."""
        return asdict(self)


KINDS = {field.name: field.type for field in fields(Answer)}  # "str", "int" or "float"


class AnswerFile:
    """The answers of one row to one task, which grow while it runs and are there again after it was killed.

    Its first line, the head, says what was asked of what; each further line is an ``Answer``. Only one process writes
    a file at a time. Close it, or use it in a ``with`` statement.

    Attributes:
        path: of the file.
        head: as the file has it: that of the run that began it.
        answers: by the question's id, in the order in which they came.
        dropped: bytes of a last line that was half written when its process was killed, and is gone now.
    """

    def __init__(self, path: str | os.PathLike, head: Mapping[str, Any]) -> None:
        """Begin a file, or go on with one.

        Args:
            path: its directory is made if needed; a new file is this user's alone.
            head: JSON: task, row, model, adapter, policy, seed, digest of the data, settings, and whatever else
                decides the answers; ``DESCRIBING`` names what does not.

        Raises:
            ArgumentError: ``head`` is not JSON, or the file's differs in something that decides the answers.
            WaitedTooLongError (an OSError): another process, or another ``AnswerFile`` of this one, writes it.
            FileFormatError: the file is no file of answers, or a line in it is damaged.
            FileAccessError: it cannot be read or written.
        """
        self.path = as_path(path, "path")
        wanted = _as_json(head)
        with contextlib.ExitStack() as after_an_error, naming_files("path", self.path):
            make_directory(self.path.parent)
            self._file: int | None = open_lock(self.path, "path", os.O_RDWR | os.O_CREAT)
            after_an_error.callback(self.close)
            if HAS_LOCKS:
                late = f"path: {self.path}: another process writes these answers; wait for it, or give another --output"
                lock_until(time.monotonic(), self._file, 0.0, late)
            data = read_bytes(self.path)
            whole = data.rpartition(b"\n")[0] + b"\n" if b"\n" in data else b""
            first = _line(wanted)
            if not whole and not first.startswith(data):
                raise FileFormatError(f"{self.path}: not a file of answers (no line of it is whole)")
            self.dropped = len(data) - len(whole)
            self._size = len(whole)
            self.head, self.answers = _parsed(whole, self.path) if whole else (wanted, {})
            if whole:
                _check_same(wanted, self.head, self.path)
            if self.dropped:
                os.ftruncate(self._file, self._size)
            if not whole:
                self._write(first)
            after_an_error.pop_all()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, answers: Answer | Sequence[Answer]) -> None:
        """Add one answer, or a batch of them; they are on disk when this returns, and after an error none of them is.

        Raises:
            ArgumentError: one has no value that a line can hold, or its question was answered before.
            FileAccessError: they cannot be written, such as on a full disk.
            StateError: the file is closed.
        """
        batch = [answers] if isinstance(answers, Answer) else list(answers)
        if self._file is None:
            raise StateError(f"{self.path}: closed, allowed an open file of answers")
        new: dict[str, Answer] = {}
        for answer in batch:
            check_type(answer, "answers", Answer, "answers")
            for name, kind in KINDS.items():
                if not _fits(getattr(answer, name), kind):
                    raise ArgumentError(f"answers: {name}: got {shown(getattr(answer, name))}, allowed {_WORDS[kind]}")
            if not answer.id:
                raise ArgumentError("answers: id: got '', allowed a question's id")
            if answer.id in self.answers or answer.id in new:
                raise ArgumentError(f"answers: id: got {shown(answer.id)}, which has an answer, allowed a new one")
            new[answer.id] = answer
        with naming_files("path", self.path):
            self._write(b"".join(_line(answer.to_dict()) for answer in new.values()))
        self.answers |= new

    def close(self) -> None:
        """Let others write the file; a second time does nothing."""
        file, self._file = self._file, None
        if file is not None:
            if HAS_LOCKS:
                with contextlib.suppress(OSError):  # a file system without locks
                    unlock(file)
            os.close(file)

    def _write(self, data: bytes) -> None:
        try:
            left = memoryview(data)
            while left:
                left = left[os.pwrite(self._file, left, self._size + len(data) - len(left)) :]
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):  # else the half line is dropped when the file is opened again
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)


def read_answer_file(path: str | os.PathLike, name: str = "path") -> tuple[dict, dict[str, Answer]]:
    """The head, and the answers by the question's id, of a file that ``AnswerFile`` wrote; nothing is changed.

    A last line that its process was killed in is left out. So is what ``Answer`` has no name for in a file without a
    head, such as one that another program wrote: of its lines only ``id`` and ``answer`` are needed, and {} is its
    head.

    Raises:
        FileMissingError, FileAccessError: there is none, or it cannot be read; ``name`` is the argument that is named.
        FileFormatError: a line is damaged; names the file and the line.
    """
    return _parsed(read_bytes(path, name), path)


def differing(head: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, in ``head``, in ``other``) of what two heads have otherwise, with dots in names of what lies deeper.

    What only one of them has is None in the other.
    """
    for name in dict.fromkeys([*head, *other]):
        here, there = head.get(name), other.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from ((f"{name}.{deeper}", *values) for deeper, *values in differing(here, there))
        elif here != there or type(here) is not type(there):
            yield name, here, there


def _check_same(wanted: dict, head: dict, path: Path) -> None:
    for name, here, there in differing(wanted, head):
        if name.partition(".")[0] not in DESCRIBING:
            raise ArgumentError(
                f"{name:.200}: got {shown(here)}, but {path} has answers with {shown(there)}; give another --output, "
                "or the same arguments as before"
            )


def _as_json(head: Mapping[str, Any]) -> dict:
    check_type(head, "head", Mapping, "a mapping")
    try:
        text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **head}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"head: got what is not JSON ({error}), allowed JSON") from error
    found = json.loads(text)
    check_format(found["format"], FORMAT, "head", "not that of a file of answers")
    check_version(found["format_version"], FORMAT_VERSION, "head")
    return found


def _line(value: dict) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, as a tokenizer may leave one
        return json.dumps(value, allow_nan=False).encode() + b"\n"


def _parsed(data: bytes, path: str | os.PathLike) -> tuple[dict, dict[str, Answer]]:
    *lines, rest = every = data.split(b"\n")
    begins = next((place for place, line in enumerate(every) if line.strip()), 0)  # behind empty lines
    first = parse_json(every[begins], f"{path}, line {begins + 1}")
    has_head = begins == 0 and not first.keys() & {"id", "answer"}
    if has_head:
        check_format(first.get("format"), FORMAT, f"{path}, line 1", "neither an answer nor the head of a file of them")
        check_version(first.get("format_version"), FORMAT_VERSION, f"{path}, line 1")
    elif rest.strip():
        lines.append(rest)  # nobody was killed in a line that was written by hand
    answers: dict[str, Answer] = {}
    for number, line in enumerate(lines[has_head:], 1 + has_head):
        where = f"{path}, line {number}"
        if not has_head and not line.strip():
            continue
        answer = _answer(parse_json(line, where), where, strict=has_head)
        if answer.id in answers:
            raise FileFormatError(f"{where}: id {shown(answer.id)} stands there twice, allowed once")
        answers[answer.id] = answer
    return first if has_head else {}, answers


def _answer(found: dict, where: str, *, strict: bool) -> Answer:
    for name in ("id", "answer"):
        if name not in found:
            raise FileFormatError(f"{where}: has no {name}")
    unknown = found.keys() - KINDS.keys()
    if strict and unknown:
        raise FileFormatError(f"{where}: unknown: {', '.join(sorted(map(shown, unknown)))}")
    values = {name: value for name, value in found.items() if name in KINDS}
    for name, value in values.items():
        if not _fits(value, KINDS[name]):
            raise FileFormatError(f"{where}: {name}: got {shown(value)}, allowed {_WORDS[KINDS[name]]}")
    if not values["id"]:
        raise FileFormatError(f"{where}: id: got '', allowed a question's id")
    return Answer(**values)


_WORDS = {"str": "text", "int": "an integer, 0 or more, of 64 bits", "float": "a number, 0 or more, up to 2^63"}


def _fits(value: Any, kind: str) -> bool:
    if kind == "str":
        return isinstance(value, str)
    kinds = (int,) if kind == "int" else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value <= MOST_64  # no NaN either
