"""Figures and texts for people: columns that stand under each other, short words, what a stream can show."""

from __future__ import annotations

import math
import os
import re
import shutil
import unicodedata
from collections.abc import Sequence

PIPE_COLUMNS = 110  # six states of rank 8 side by side

# All control characters but line breaks and tabs: a terminal acts upon them, and a model may write them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Rows of cells under their headings, as ``columns`` of them."""
    return "\n".join(columns([headings, *rows], left))


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows of cells as lines, two spaces between columns; the columns numbered in ``left`` start left."""
    widths = [max(map(columns_of, cells)) for cells in zip(*rows)]
    return ["  ".join(_padded(cell, widths[i], i in left) for i, cell in enumerate(row)).rstrip() for row in rows]


def _padded(cell: str, width: int, left: bool) -> str:
    room = " " * (width - columns_of(cell))
    return cell + room if left else room + cell


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: two for a wide character, none for a combining one."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def number(value: float | None) -> str:
    """Four significant digits; ``-`` for None, so that a table without a figure has no hole."""
    if value is None:
        return "-"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def plain(value: float) -> float | None:
    """A number that JSON has: None where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def printable(text: str) -> str:
    """``text`` with line breaks, escape sequences and whatever else a terminal acts upon written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def harmless(text: str) -> str:
    """``text`` with control characters written out, but for line breaks and tabs."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def without_surrogates(text: str) -> str:
    """Text whose undecodable bytes, which no tokenizer takes, are question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def shortened(text, most: int = 40) -> str:
    """``text`` (of anything: its str) on one line, cut to at most ``most`` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def counted(count: int, noun: str) -> str:
    """``1 turn``, ``2 turns``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_bytes(size: int) -> str:
    """A size for people: ``4,096 bytes``, ``36.1 kB``, ``2.4 MB``."""
    if size < 10_000:
        return f"{size:,} bytes"
    return next(f"{size / unit:.1f} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit)


def style_of(stream) -> str:
    """The richest style of pictures that ``stream`` can show: ``colour``, ``unicode`` or ``ascii``.

    Colours only in a terminal (not if NO_COLOR is set).
    """
    try:
        "·░▒▓█▀".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "ascii"
    uncoloured = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return "unicode" if uncoloured else "colour"


def terminal_columns() -> int:
    """How wide the terminal is; PIPE_COLUMNS where there is none."""
    return shutil.get_terminal_size((PIPE_COLUMNS, 24)).columns
