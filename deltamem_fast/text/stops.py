"""Where an answer's text ends: at the first of some texts, which is not part of it."""

from __future__ import annotations

from collections.abc import Sequence


class StoppedText:
    """Text that comes in pieces, up to the first of ``stops``.

    Attributes:
        found: one of them has come; what comes after it is no part of the text.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._waiting = ""  # may be the beginning of one
        self.found = False

    def add(self, piece: str) -> str:
        """The text that has become certain by one more piece."""
        if self.found:
            return ""
        text = self._waiting + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._waiting = True, ""
            return text[: min(places)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._waiting = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What waited for the rest of a text that ends it, and never came."""
        text, self._waiting = self._waiting, ""
        return text


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``mark``."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
