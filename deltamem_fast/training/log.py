"""The record of a training run: one JSON object a line, appended as it goes."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from ..errors import FileFormatError
from ..storage.files import as_path, naming_files, read_bytes, write_text

LOG_NAME = "log.jsonl"


class TrainingLog:
    """Appends entries to a JSONL file; each is on the disk when ``write`` returns.

    A training entry has ``step``, ``loss``, ``answer_loss``, ``penalty``, ``learning_rate``, ``grad_norm``,
    ``mean_beta`` and ``saturated`` (a list with a number a layer), ``tokens``, ``tokens_per_second`` and ``epoch``,
    and ``state_only_loss`` or ``no_memory_loss`` where such episodes were among the step's. An evaluation's entry has
    ``step`` and ``evaluation``: by file, ``loss`` and ``no_memory_loss``.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path, "log")

    def start(self, step: int) -> None:
        """Begin a log, or go on with one after ``step``: what was written later, and a torn last line, go."""
        known = read_log(self.path) if step and self.path.is_file() else []
        kept = [entry for entry in known if entry["step"] <= step]
        text = "".join(_line(entry) for entry in kept)
        write_text(self.path, text, private=False)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry."""
        with naming_files("log", self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(_plain(entry), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value):
    """NaN and infinities are no JSON: they are written as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of a log; a last line that was torn by a crash is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: another line is no entry; by file and line.
    """
    entries = []
    path = as_path(path, "log")
    # Not splitlines: a file's name in an entry may hold U+2028 and the like.
    *lines, torn = read_bytes(path, "log").decode("utf-8", "replace").split("\n")
    for number, line in enumerate([*lines, torn] if torn else lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or type(entry.get("step")) is not int:
                raise FileFormatError("got something else than an object with a step")
        except (ValueError, RecursionError) as error:
            if number > len(lines):
                break
            raise FileFormatError(f"{path}:{number}: not an entry of a training log: {error}") from error
        entries.append(entry)
    return entries
