"""The screen of a terminal, drawn by rich."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from ..display import harmless, style_of
from .screens import Wrap

_WAITING = "…"
_QUIET, _REMARK, _WRONG = "dim", "yellow", "red"


class TerminalScreen:
    """Answers as they come, thinking dimmed; tables, remarks and errors.

    Args:
        markdown: answers are rendered as Markdown.
    """

    def __init__(self, *, markdown: bool = False):
        # Whatever stands in brackets in an answer is text, no markup.
        self.console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self.markdown = markdown
        self.style = style_of(sys.stdout)

    @property
    def columns(self) -> int:
        return self.console.width

    @contextlib.contextmanager
    def waiting(self, what: str, *, bars: bool) -> Iterator[None]:
        """Something takes a while. ``bars``: it draws progress bars of its own, which a spinner would disturb."""
        if bars or self.console.is_dumb_terminal:
            self.console.print(f"{what} …", style=_QUIET)
            yield
        else:
            with self.console.status(f"{what} …"):
                yield

    def title(self, name: str, facts: str) -> None:
        """The first line."""
        self.console.print(Text.assemble((harmless(name), "bold"), (f"  {harmless(facts)}", _QUIET)))

    @contextlib.contextmanager
    def answering(self) -> Iterator[TerminalAnswer]:
        """An answer, then an empty line."""
        answer = TerminalAnswer(self)
        try:
            yield answer
        finally:
            answer.end()
        if not answer.any:
            self.console.print("(no answer)", style=_QUIET)
        self.console.print()

    def say(self, text: str) -> None:
        self.console.print(Text(harmless(text)), end="\n\n")

    def said(self, role: str, text: str) -> None:
        prefix = "> " if role == "user" else "  "
        self.console.print(Text(prefix + harmless(text).replace("\n", "\n  ")), style=_QUIET)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
        for place, heading in enumerate(headings):
            is_text = place in left
            table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text)
        for row in rows:
            table.add_row(*(Text(harmless(cell)) for cell in row))
        self.console.print(table)

    def picture(self, lines: Sequence[str]) -> None:
        self.console.file.write("\n".join(["", *lines, "", ""]))

    def hint(self, text: str) -> None:
        self.console.print(Text(harmless(text)), style=_QUIET)

    def remark(self, text: str) -> None:
        """Something about the turn that has just ended."""
        self.console.print(Text(harmless(text)), style=_REMARK, end="\n\n")

    def error(self, text: str) -> None:
        self.console.print(Text(harmless(" ".join(text.split()))), style=_WRONG, end="\n\n")


class TerminalAnswer:
    """One answer: plain text that grows, or Markdown that is drawn anew as it grows.

    Attributes:
        any: something was said.
    """

    def __init__(self, screen: TerminalScreen):
        self._console = screen.console
        self._wrap = Wrap(screen.columns)
        self._markdown = screen.markdown
        self._live: Live | None = None
        self._text = ""
        self._thinks = False
        self.any = self._open = False
        self._waits = not self._console.is_dumb_terminal
        if self._waits:
            self._write(_WAITING, dim=True)

    def thinking(self, text: str) -> None:
        self._thinks = True
        self._show(text, dim=True)

    def piece(self, text: str) -> None:
        if self._thinks:
            self._close()
            self._write("\n")
        self._thinks, self.any = False, True
        if not self._markdown:
            self._show(text)
            return
        self._text += text
        if self._live is None:
            self._clear()
            # While it grows no more than a screenful can be drawn anew; the whole is printed at the end.
            self._live = Live(console=self._console, transient=True, refresh_per_second=8, vertical_overflow="crop")
            self._live.start()
        self._live.update(Markdown(harmless(self._text)))

    def end(self) -> None:
        """The answer is over, or was stopped."""
        self._clear()
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._console.print(Markdown(harmless(self._text)))
        self._close()

    def _show(self, text: str, *, dim: bool = False) -> None:
        self._clear()
        self._write(self._wrap.add(harmless(text)), dim=dim)
        self._open = True

    def _close(self) -> None:
        """End the line that is being written."""
        if self._open:
            self._write(self._wrap.add("\n"))
            self._open = False

    def _clear(self) -> None:
        if self._waits:
            self._waits = False
            self._write("\r\x1b[K")

    def _write(self, text: str, *, dim: bool = False) -> None:
        # Past rich, which would take out what moves the cursor.
        file = self._console.file
        file.write(f"\x1b[2m{text}\x1b[0m" if dim and not self._console.is_dumb_terminal else text)
        file.flush()
