"""Columns of text that stand under each other, and text that a terminal shows as it is."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Rows of cells under their headings, two spaces between columns; the columns numbered in ``left`` start left."""
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(columns_of(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(_padded(cell, widths[i], i in left) for i, cell in enumerate(line)).rstrip() for line in lines
    )


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
