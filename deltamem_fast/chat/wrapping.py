"""Text that arrives piece by piece, broken between words at the edge of a terminal."""

from __future__ import annotations

import re

from ..display import columns_of

# All control characters but line breaks and tabs: a terminal acts upon them, and a model may write them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """``text`` with control characters written out, but for line breaks and tabs."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class Wrap:
    """Breaks lines between words, although a word is shown as it grows: one that no longer fits moves down whole.

    Args:
        columns: of the terminal; the last one stays free, where terminals differ in what comes next.
    """

    def __init__(self, columns: int):
        self._room = max(1, columns - 1)
        self._column = 0
        self._word = ""  # what has been shown of the word at the cursor

    def add(self, piece: str) -> str:
        """What to write to the terminal for ``piece``."""
        return "".join(map(self._add, piece.expandtabs(4)))

    def _add(self, char: str) -> str:
        if char == "\n":
            self._column, self._word = 0, ""
            return char
        width = columns_of(char)
        before = ""
        if self._column + width > self._room:
            if char == " ":
                self._column, self._word = 0, ""
                return "\n"
            before = self._break()
        self._column += width
        self._word = "" if char == " " else self._word + char
        return before + char

    def _break(self) -> str:
        length = columns_of(self._word)
        if not 0 < length < self._column:  # nothing of it stands here, or it began at the edge: cut it
            self._column, self._word = 0, ""
            return "\n"
        self._column = length
        return f"\x1b[{length}D\x1b[K\n{self._word}"
