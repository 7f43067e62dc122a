"""What several commands are given: a text, as an argument or in a file, and a memory file."""

from __future__ import annotations

import argparse
import os

from ..display import without_surrogates
from ..errors import ArgumentError, FileMissingError
from ..memory.state import MemoryState
from ..storage.files import as_path, naming_files


def add_text(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add ``--text`` and ``--text-file``, of which one may be given."""
    given = parser.add_mutually_exclusive_group(required=required)
    given.add_argument("--text", help="a text, one user message if the model has a chat template")
    given.add_argument("--text-file", metavar="FILE", help="a file that holds the text, UTF-8")


def given_text(arguments: argparse.Namespace) -> str:
    """The text of ``--text``, or of the file in ``--text-file``.

    Raises:
        ValueError, OSError: there is no such file, or it is not UTF-8.
    """
    if arguments.text is not None:
        return without_surrogates(arguments.text)
    path = as_path(arguments.text_file, "--text-file")
    if not path.exists():
        raise FileMissingError(f"--text-file: {path}: no such file")
    try:
        with naming_files("--text-file", path):  # a pipe is as good as a file
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--text-file: {path}: not UTF-8: {error}") from error


def given_memory(path: str | os.PathLike, model) -> MemoryState:
    """The memory in the file MEMORY, for a patched model.

    Raises:
        ValueError, OSError: the file holds no memory of this model and adapter.
    """
    try:
        return MemoryState.load(path, model)
    except ValueError as error:
        raise ArgumentError(f"MEMORY: {str(error).removeprefix('path: ')}") from error
