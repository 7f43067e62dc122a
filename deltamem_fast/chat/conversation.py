"""A chat behind its screen: turns, and whatever else changes the session can be undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from ..adapter.record import identity_of
from ..display import shortened
from ..errors import ArgumentError
from ..model.loading import load_patched
from ..notices import logger
from ..recall import hints
from ..session import MemorySession, SessionSnapshot
from ..storage.files import as_path
from .options import CONTEXT_TURNS, Opening, generation_with
from .screens import PlainScreen

KEPT = 8  # changes that can be undone


class Chat:
    """One chat.

    Args:
        session: where it starts.
        screen: where answers, tables and errors go: a PlainScreen, or what has the same methods.
        small_world: the model is the shipped backbone; words that it does not know are pointed out.
        seed: of sampling, if one was set.
        trust: ``trust`` and ``budget`` as they were asked for; a session that is loaded gets them.

    Attributes:
        session: ``/load`` and ``/reset`` put another in its place.
        ended: ``/quit`` was said.
        unsaved: something changed since the session was last written or read.
        directory: where it was last written or read, as it was named.
        history: the file that keeps what is typed, or None.
        changes: how many changes there were.
    """

    def __init__(
        self,
        session: MemorySession,
        screen: PlainScreen,
        *,
        small_world: bool = False,
        seed: int | None = None,
        trust: Mapping[str, Any] | None = None,
    ):
        self.session = session
        self.trust = dict(trust or {})
        self.screen = screen
        self.small_world = small_world
        self.random = Random(seed)
        self.set_seed(seed)
        self.ended = self.unsaved = False
        self.directory: str | None = None
        self.history: Path | None = None
        self.changes = 0
        # Changes that can be undone: what it was, in words, the session, and how it was before.
        self._past: list[tuple[str, MemorySession, SessionSnapshot]] = []

    @property
    def strategy(self) -> str:
        """How the adapter writes: ``tsw``, ``ssw`` or ``msw``."""
        config = identity_of(self.session.model).config
        return "ssw" if config.segmented else "msw" if config.num_state_heads > 1 else "tsw"

    @property
    def turns_in_context(self) -> int:
        """How many turns are in sight."""
        return sum(message["role"] == "assistant" for message in self.session.context)

    def set_seed(self, seed: int | None) -> None:
        """What sampling begins from, from here on; None: each chat from somewhere else."""
        self.seed, self._seeded = seed, seed is not None
        if seed is not None:
            torch.manual_seed(seed)

    def draw_anew(self) -> None:
        """Answers that are sampled, without a seed, are others than those of the last process."""
        if self.session.generation.get("do_sample") and not self._seeded:
            torch.seed()
            self._seeded = True

    def say(self, text: str) -> None:
        """Have a turn."""
        hint = hints.hint(text) if self.small_world else None
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
            self._past = [*past, (what, session, _light(before))][-KEPT:]
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
        what, session, before = self._past.pop()
        remembers = self.session.remembers
        self.session = session
        self.session.restore(before)
        self.session.remembers = remembers
        self.unsaved = True
        self.changes += 1
        return what

    def saved(self, directory: str) -> None:
        """The session was written to, or read from, ``directory``."""
        self.directory, self.unsaved = directory, False


def load_session(name: str, model: nn.Module, tokenizer, argument: str = "/load", **trust: Any) -> MemorySession:
    """The session in the directory ``name``; greedy if it does not say otherwise, as every chat.

    Args:
        trust: ``budget`` in place of its own, ``trust`` in place of what it has of these roles.
    """
    directory = as_path(name, argument)
    session = MemorySession.load(directory, model, tokenizer)
    if trust:
        trust["trust"] = session.trust | trust.get("trust", {})
        session = MemorySession.load(directory, model, tokenizer, **trust)
    session.generation = generation_with(session.generation, {})
    return session


def _light(snapshot: SessionSnapshot) -> SessionSnapshot:
    """Without keys and values, which are computed again should it be gone back to: several caches may be gigabytes."""
    return replace(snapshot, now=replace(snapshot.now, cache=None, mark=None))


def can_chat(tokenizer) -> None:
    """Raise ValueError, naming the model, if its tokenizer cannot chat."""
    where = f"MODEL: {tokenizer.name_or_path}: its tokenizer"
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(f"{where}: a slow one, allowed one with a tokenizer.json")
    if not tokenizer.chat_template:
        raise ArgumentError(f"{where}: has no chat template, allowed that of a chat (instruct) model")


def open_chat(opening: Opening, screen: PlainScreen) -> Chat:
    """Load the model and make, or load, the session.

    Raises:
        ValueError, OSError, ImportError: see ``load_patched`` and ``MemorySession``.
    """
    model, tokenizer = load_patched(check_tokenizer=can_chat, **opening.loading)
    if opening.loading["adapter"] is None:
        logger.warning(
            "no --adapter: the memory's parameters are fresh and untrained; they disturb answers rather than remember "
            "(/off: without them)"
        )
    if opening.directory is None:
        session = MemorySession(model, tokenizer, context_turns=CONTEXT_TURNS, **opening.settings, **opening.trust)
    else:
        session = load_session(opening.directory, model, tokenizer, "--load", **opening.trust)
    session.limit_context(**(vars(session.limits) | opening.limits))
    session.generation = generation_with(session.generation, opening.options)
    chat = Chat(session, screen, small_world=opening.small_world, seed=opening.seed, trust=opening.trust)
    if opening.directory is not None:
        chat.saved(opening.directory)
    return chat
