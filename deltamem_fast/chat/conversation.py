"""A chat behind its screen: each line is a turn or a command, and whatever changed the session can be undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch

from ..errors import ArgumentError
from ..session import MemorySession, SessionSnapshot
from . import small_world
from .commands import run_command
from .screens import Screen
from .wording import shortened, without_surrogates

KEPT = 8  # changes that can be undone


@dataclass(frozen=True)
class Change:
    """A change that can be undone: what it was, in words, and the session before it."""

    what: str
    session: MemorySession
    before: SessionSnapshot


class Chat:
    """One chat.

    Args:
        session: where it starts.
        screen: where answers, tables and errors go.
        small_world: the model is the shipped backbone; words that it does not know are pointed out.
        seed: of sampling, if one was set.

    Attributes:
        session: ``/load`` and ``/reset`` put another in its place.
        ended: ``/quit`` was said.
        unsaved: something changed since the session was last written or read.
        directory: where it was last written or read, as it was named.
        history: the file that keeps what is typed, or None.
        changes: how many changes there were.
    """

    def __init__(self, session: MemorySession, screen: Screen, *, small_world: bool = False, seed: int | None = None):
        self.session = session
        self.screen = screen
        self.small_world = small_world
        self.random = Random(seed)
        self.set_seed(seed)
        self.ended = self.unsaved = False
        self.directory: str | None = None
        self.history: Path | None = None
        self.changes = 0
        self._past: list[Change] = []

    def line(self, text: str) -> bool:
        """Have a turn, or run a command. Whether it went well; what did not is told on the screen, and undone."""
        # What a terminal or a pipe could not decode is replaced: no tokenizer takes it.
        text = without_surrogates(text).strip()
        if self.session.generation.get("do_sample") and not self._seeded:
            torch.seed()  # otherwise each process would draw the same
            self._seeded = True
        try:
            if text.startswith("/") and not text.startswith("//"):
                run_command(self, text)
            elif text:
                self.say(text.removeprefix("/") if text.startswith("//") else text)
        except BrokenPipeError:
            raise
        except Exception as error:
            # Whatever it was, the conversation is as it was, and goes on.
            known = isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError)
            self.screen.error(str(error) if known else f"{type(error).__name__}: {error}")
            return False
        return True

    def set_seed(self, seed: int | None) -> None:
        """What sampling begins from, from here on; None: each chat from somewhere else."""
        self.seed, self._seeded = seed, seed is not None
        if seed is not None:
            torch.manual_seed(seed)

    def say(self, text: str) -> None:
        """Have a turn."""
        hint = small_world.hint(text) if self.small_world else None
        if hint:
            self.screen.hint(hint)
        with self.change("the turn", text), self.screen.answering() as answer:
            with contextlib.closing(self.session.send(text, on_thinking=answer.thinking)) as pieces:
                for piece in pieces:
                    answer.piece(piece)

    @contextlib.contextmanager
    def change(self, what: str, about: str = "") -> Iterator[None]:
        """Something that changes the session: it happens wholly or, after an error or interrupt, not at all."""
        session, before, past = self.session, self.session.snapshot(), list(self._past)
        try:
            yield
            what = f"{what} ({shortened(about)})" if about else what
            self._past = [*past, Change(what, session, _light(before))][-KEPT:]
            self.unsaved = True
            self.changes += 1
        except BaseException:
            session.restore(before)
            self.session, self._past = session, past
            raise

    def undo(self) -> str:
        """Take the last change back; what it was.

        Raises:
            ValueError: there is none.
        """
        if not self._past:
            raise ArgumentError(f"/undo: nothing left to undo (the last {KEPT} changes can be)")
        change = self._past.pop()
        remembers = self.session.remembers
        self.session = change.session
        self.session.restore(change.before)
        self.session.remembers = remembers
        self.unsaved = True
        self.changes += 1
        return change.what

    def saved(self, directory: str) -> None:
        """The session was written to, or read from, ``directory``."""
        self.directory, self.unsaved = directory, False


def _light(snapshot: SessionSnapshot) -> SessionSnapshot:
    """Without keys and values, which are computed again should it be gone back to: several caches may be gigabytes."""
    return replace(snapshot, now=replace(snapshot.now, cache=None, mark=None))
