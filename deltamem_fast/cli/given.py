"""What several commands are given: a text, as an argument or in a file, a memory file, and how far it may be moved."""

from __future__ import annotations

import argparse
import os

from ..display import without_surrogates
from ..errors import ArgumentError, FileMissingError
from ..memory.state import MemoryState
from ..storage.files import as_path, naming_files

GUARD_HELP = "gates and values within bounds: on, off, or for what is not wholly trusted (%(default)s)"


def add_trust(parser, what: str, more: str = "") -> None:
    """Add ``--trust`` and ``--budget``, which ``check_trust`` checks; ``what`` may move the memory so far."""
    told = f"0 to 1: with {what} the memory goes this share of the way (1){more}"
    parser.add_argument("--trust", type=float, metavar="X", default=1.0, help=told)
    told = f"how far {what} may move each head of the memory at most, ÷ the norm of what is there (no limit)"
    parser.add_argument("--budget", type=float, metavar="X", help=told)


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
