"""A chat without a terminal: lines from a pipe, a file, or the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..model.threads import fitting_threads
from .opening import Opening, open_chat, quiet_library
from .screens import PlainScreen
from .standard_input import typed_lines


def converse_over_pipe(opening: Opening, said: Sequence[str] | None) -> bool:
    """Have what is ``said``, or else the lines of stdin, until they end or one is ``/quit``; whether all went well."""
    with quiet_library():
        chat = open_chat(opening, PlainScreen())
        well = True
        with fitting_threads(chat.session.model, opening.threads):
            for text in said if said is not None else whole_lines(typed_lines()):
                well = chat.line(text) and well
                if chat.ended:
                    break
        return well


def whole_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines without their ends; one that ends in a backslash goes on in the next."""
    parts: list[str] = []
    for line in lines:
        line = line.rstrip("\r\n")
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []
    if parts:
        yield "\n".join(parts)
