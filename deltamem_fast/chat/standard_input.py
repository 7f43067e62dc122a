"""Lines of standard input, whatever a program has put in front of them."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator

from ..errors import FileFormatError

_OTHERS = {"UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-32": (codecs.BOM_UTF32_BE,)}


def typed_lines() -> Iterator[str]:
    """The lines. A byte order mark is no text; a byte that is no text becomes a mark, and ends nothing.

    Raises:
        ValueError: the input is UTF-16 or UTF-32, which its byte order mark says.
    """
    start = _start()
    for name, marks in _OTHERS.items():
        if start.startswith(marks):
            raise FileFormatError(f"standard input: {name}, allowed UTF-8")
    marked = start.startswith(codecs.BOM_UTF8)
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdin.reconfigure(errors="replace", **({"encoding": "utf-8"} if marked else {}))
    for number, line in enumerate(sys.stdin):
        yield line.removeprefix("\ufeff") if number == 0 else line


def _start() -> bytes:
    """The first bytes, which stay to be read."""
    try:
        return sys.stdin.buffer.peek(4)[:4]
    except (AttributeError, OSError, ValueError):  # no file of bytes behind it
        return b""
