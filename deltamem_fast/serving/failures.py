"""Errors in a server's log: what kind, and where; not what they say, which may be of anybody's text."""

from __future__ import annotations

import traceback

from ..errors import FileFormatError
from ..notices import logger


def log_failure(what: str, error: BaseException) -> None:
    """Log an error that nobody has foreseen, and those behind it.

    What is said of a damaged file (the bank's) is logged as it is; of others their classes and the places that they
    came through alone: ours too may quote a request, or what a template, a tokenizer or a library says of one.

    Args:
        what: has failed.
    """
    logger.error("serving: %s: %s", what, "; because of ".join(_described(error)))


def _described(error: BaseException | None) -> list[str]:
    found: list[str] = []
    while error is not None and len(found) < 8:
        said = f": {error}" if isinstance(error, FileFormatError) else ""
        places = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(
            error.__traceback__, limit=-12)]  # fmt: skip
        found.append("\n    ".join([f"{type(error).__name__}{said}", *places]))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found
