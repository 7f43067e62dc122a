"""The errors of this package: each is a DeltaMemError, and the built-in error that fits.

Standard library alone.
"""

from __future__ import annotations

import os

from deltamem_kernels.errors import ArgumentError as ArgumentError
from deltamem_kernels.errors import ArgumentIndexError as ArgumentIndexError
from deltamem_kernels.errors import ArgumentKeyError as ArgumentKeyError
from deltamem_kernels.errors import ArgumentTypeError as ArgumentTypeError
from deltamem_kernels.errors import DeltaMemError as DeltaMemError
from deltamem_kernels.errors import MissingPackageError as MissingPackageError
from deltamem_kernels.errors import UnsupportedError as UnsupportedError


class MessageTypeError(ArgumentTypeError, ValueError):
    """A message of a chat, or a part of one, is of a type that is not allowed."""


class FileFormatError(DeltaMemError, ValueError):
    """A file does not hold what it should: damaged, of another or a newer format, or made for another model."""


class FileAccessError(DeltaMemError, OSError):
    """A file cannot be read or written: a full disk, a missing right, a file where a directory should be."""

    def __str__(self) -> str:
        # OSError would put its number in front, and the file's name behind.
        return str(self.args[-1]) if self.args else ""


class FileMissingError(FileAccessError, FileNotFoundError):
    """There is no such file."""


class FilePermissionError(FileAccessError, PermissionError):
    """There is no right to read or write this file."""


class WrongPathKindError(FileAccessError, IsADirectoryError, NotADirectoryError):
    """A directory where a file should be, or the other way round."""


class PathExistsError(FileAccessError, FileExistsError):
    """There is something already under this path."""


class WaitedTooLongError(FileAccessError, TimeoutError):
    """Others held a file for too long."""


class StateError(DeltaMemError, RuntimeError, ValueError):
    """This object cannot do that now: it is in use, was closed, or was left half-written by an error."""


class ConflictError(StateError):
    """Somebody else has written meanwhile; nothing was written."""


# Each has the operating system's own kind among its bases.
_KINDS = (FileMissingError, FilePermissionError, WrongPathKindError, PathExistsError, WaitedTooLongError)


def file_error(error: OSError, name: str, path) -> FileAccessError:
    """The operating system's ``error`` as one of ours, which names the argument and the path."""
    if isinstance(error, FileAccessError):
        return error
    kind = next((ours for ours in _KINDS if isinstance(error, ours.__bases__[1:])), FileAccessError)
    reason = error.strerror or str(error)
    made = kind(f"{name}: {path}: {reason}")
    made.errno, made.strerror, made.filename = error.errno, reason, os.fspath(path)
    return made
