"""Where a chat is shown: plain text for pipes and files. The terminal's screen (``terminal``) has the same methods."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from ..display import columns_of, harmless, style_of, table, terminal_columns


class Answer(Protocol):
    """An answer as it comes."""

    def piece(self, text: str) -> None:
        """More of the answer."""

    def thinking(self, text: str) -> None:
        """More of the thinking before it."""


class Screen(Protocol):
    """What a chat shows.

    Attributes:
        columns: how wide it is.
        style: of heat maps, see ``inspection.pictures.STYLES``.
    """

    columns: int
    style: str

    def answering(self) -> contextlib.AbstractContextManager[Answer]:
        """An answer comes, and is over at the end of the context."""

    def say(self, text: str) -> None:
        """What a command has done or found."""

    def said(self, role: str, text: str) -> None:
        """A message of earlier."""

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> None:
        """Rows of cells; the columns numbered in ``left`` hold text, the others figures."""

    def picture(self, lines: Sequence[str]) -> None:
        """Lines that may hold escape sequences."""

    def hint(self, text: str) -> None:
        """A remark beside the conversation."""

    def error(self, text: str) -> None:
        """What went wrong, in one line."""


class PlainScreen:
    """Answers, and what commands find, on stdout; hints and errors on stderr; thinking nowhere."""

    def __init__(self) -> None:
        self.columns = terminal_columns()
        self.style = "unicode" if style_of(sys.stdout) != "ascii" else "ascii"
        # A pipe gets what the model said, to the letter; a terminal would act upon its control characters.
        self._shown = harmless if sys.stdout.isatty() else str
        self._begun = False

    @contextlib.contextmanager
    def answering(self) -> Iterator[PlainScreen]:
        """The answer's pieces, then the end of the line: after an error, too, if something stands there."""
        self._begun = False
        try:
            yield self
        except Exception:
            if self._begun:
                self._print("")
            raise
        self._print("")

    def piece(self, text: str) -> None:
        self._begun = True
        self._print(text, end="")

    def thinking(self, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        self._print(text)

    def said(self, role: str, text: str) -> None:
        self._print(f"{role}: {text}")

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> None:
        self._print(table(headings, rows, left))

    def picture(self, lines: Sequence[str]) -> None:
        self._print("\n".join(lines))

    def hint(self, text: str) -> None:
        self._tell(text)

    def error(self, text: str) -> None:
        self._tell(f"error: {text}")

    def _print(self, text: str, end: str = "\n") -> None:
        print(self._shown(text), end=end, flush=True)

    def _tell(self, text: str) -> None:
        print(f"deltamem: {harmless(' '.join(text.split()))}", file=sys.stderr, flush=True)


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
