"""MemorySession: one conversation, its context and its memory."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..adapter.record import identity_of, memory_disabled
from ..arguments import MOST_64, check_integer, check_text, check_type
from ..errors import ArgumentError, ArgumentTypeError, StateError
from ..memory.operators import WriteResult, forget, ingest, retrieve, revise
from ..memory.state import MemoryState
from ..memory.trusting import check_trust
from ..text.answering import answer_options, check_names
from ..text.messages import Message
from ..text.settings import checked_template
from . import saving
from .asked import check_encodable, check_operators_options, checked_messages, checked_options
from .audit import Audit, Move, checked_source, checked_trust
from .blocks import Renderer
from .forgetting import Forgotten, forgotten
from .turns import HISTORY, Limits, Mark, Now, have_turn, rolled_back


@dataclass(frozen=True)
class SessionSnapshot:
    """A session at one time, to go back to (``MemorySession.restore``). Holds the cache's tensors, not copies."""

    now: Now
    remembers: bool
    owner: str = ""


class MemorySession:
    """A conversation on a patched model: the newest turns stay in its context, the memory keeps what it read of all.

    ::

        session = MemorySession(model, tokenizer, context_turns=4)
        for piece in session.send("My name is Ada."):
            print(piece, end="", flush=True)
        session.save("ada")  # MemorySession.load("ada", model, tokenizer) in another process

    A turn is what was said and the answer. Each of its blocks goes through the model once, as the chat template shows
    it to later turns, and is written into the memory as the adapter's strategy says (TSW, SSW or MSW). Older turns
    leave the KV cache at the next ``send``: then the cache is built anew, positions from 0, from the turns that stay,
    each read under the memory as it was before it; nothing is written twice. A system message, and what else the
    template puts in front, stays in sight.

    A turn happens wholly or not at all: after an error, an interrupt, or a closed iterator, messages, cache and memory
    are those from before it. One turn at a time; sessions share a model, also from several threads.

    Args:
        model: patched; in eval mode.
        tokenizer: a fast tokenizer with a chat template.
        system: a system message, or None.
        context_turns: turns in the context, the one that is being answered included (1 or more); None: all.
        context_tokens: tokens of a prompt; the oldest turns leave until it fits. The newest turn always stays, so that
            a longer one exceeds it; answers come on top. None: no limit.
        memory: where the memory starts, one row (copied); None = empty.
        trust: by role (``system``, ``user``, ``assistant``, ``tool``), how far a message may move the memory towards
            what it makes of it: 1 (where nothing is said) the whole way, 0 not at all. ``{"tool": 0.25}``
        budget: how far one message or text may move it at most, head by head, in the norm of what was there (an empty
            head takes it whole); None = no limit.
        history: how many turns can be rolled back, for a state of each.
        template: arguments of the chat template, such as ``{"enable_thinking": False}``.
        generation: options of ``model.generate`` for every turn; ``max_new_tokens`` is 512 unless given.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        *,
        system: str | None = None,
        context_turns: int | None = None,
        context_tokens: int | None = None,
        memory: MemoryState | None = None,
        trust: Mapping[str, float] | None = None,
        budget: float | None = None,
        history: int = HISTORY,
        template: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ):
        check_type(model, "model", nn.Module, "a patched model")
        identity = identity_of(model)
        check_type(memory, "memory", MemoryState | None, "a MemoryState or None")
        if memory is not None and memory.batch_size != 1:
            raise ArgumentError(f"memory: got {memory.batch_size} rows, allowed 1: a session is one conversation")
        check_type(system, "system", str | None, "a str or None")
        if not getattr(tokenizer, "chat_template", None):
            raise ArgumentError("tokenizer: has no chat template, which a session renders its messages with")
        # Not a processor either, which would open the files and addresses that messages name.
        if not getattr(tokenizer, "is_fast", False):
            raise ArgumentError(f"tokenizer: got {type(tokenizer).__name__}, allowed a fast tokenizer")
        if memory is not None:
            identity.check(memory.identity)
        check_text(system, "system")
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        check_integer(history, "history", 0)
        self._history = history
        self.limit_context(context_turns, context_tokens)
        check_trust(1.0, budget)
        self._trust, self._budget = checked_trust(trust), budget
        self.template = checked_template({} if template is None else template, "the session")
        self.generation = checked_options({} if generation is None else generation, "generation")
        check_names(model, self.generation, "generation")
        self._renderer = Renderer(
            tokenizer, system, identity.config.memory_write_granularity, self.template, self._trust, budget
        )
        self._now = self._with_point(Now(MemoryState.zeros(model) if memory is None else memory.clone()))
        self._remembers = True
        self._turn = threading.Lock()
        self._name = secrets.token_hex(16)  # its snapshots have it
        # Of the files that this session was loaded from or saved to: sha256 of the manifest → generation.
        self._known: dict[str, int] = {}

    # --- what it is

    @property
    def memory(self) -> MemoryState:
        """The memory after the last turn. A turn puts another in its place, and leaves this one as it is."""
        return self._now.memory

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages of the conversation, in or out of the context; an answer's thinking is ``reasoning_content``."""
        return copy.deepcopy(list(self._now.messages))

    @property
    def context(self) -> list[dict[str, Any]]:
        """The messages that are still in the context."""
        return copy.deepcopy([message for turn in self._now.turns for message in turn.messages])

    @property
    def limits(self) -> Limits:
        """How much the context may hold; see ``limit_context``."""
        return self._limits

    @property
    def trust(self) -> dict[str, float]:
        """How far messages are trusted, by role; set when the session is made or loaded."""
        return dict(self._trust)

    @property
    def budget(self) -> float | None:
        """How far one message or text may move the memory; set when the session is made or loaded."""
        return self._budget

    @property
    def context_tokens(self) -> int:
        """How many tokens the KV cache holds, or will hold once it is built anew."""
        return len(self._now.ids)

    @property
    def turns(self) -> int:
        """How many turns there were."""
        return self._now.turn_count

    @property
    def last_finish(self) -> str | None:
        """How the last answer ended: ``stop``, ``length`` (cut off by ``max_new_tokens``), ``thinking`` (cut off before
        its thinking had ended, so that there is no answer); None: no turn since this session was made or loaded.
        """
        return self._now.finish

    @property
    def remembers(self) -> bool:
        """False: the bare backbone answers, and nothing is read from the memory or written to it. May be set."""
        return self._remembers

    @remembers.setter
    def remembers(self, value: bool) -> None:
        with self._alone():
            if bool(value) != self._remembers:
                self._now = replace(self._now, cache=None, mark=None)  # computed with a memory, or without
                self._remembers = bool(value)

    def __repr__(self) -> str:
        return (
            f"MemorySession(turns={self.turns}, in context {len(self._now.turns)} turns, {self.context_tokens} tokens, "
            f"limits {self.limits.turns} turns, {self.limits.tokens} tokens)"
        )

    def __reduce_ex__(self, protocol):
        raise ArgumentTypeError("a session cannot be pickled or copied; save it, and load it again")

    # --- turns

    def send(
        self,
        text: str | Sequence[Message],
        *,
        on_thinking: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Say something; the pieces of the answer as they come. The turn is over when the iterator is exhausted.

        Args:
            text: what the user says, or messages of role ``user`` or ``tool``.
            on_thinking: is called with each piece of thinking; the answer is without it.
            options: of ``model.generate``, over those of the session (``max_new_tokens``, ``do_sample``,
                ``temperature``, ``stop_strings``, …).

        Raises:
            ValueError, TypeError: naming the argument, before anything happens.
            RuntimeError: another turn is under way.
        """
        said = checked_messages(text)
        check_encodable({"text": said, "system": self.system})
        options = {**self.generation, **checked_options(options, "options")}
        return self._send(said, on_thinking, answer_options(self.model, self.tokenizer, options))

    def answer(self, text: str | Sequence[Message], **options: Any) -> str:
        """Say something; the whole answer. See ``send``.

        One that was cut off before its thinking had ended is "": ``last_finish`` is then ``thinking``, and a warning
        goes to the logger ``deltamem_fast``.
        """
        return "".join(self.send(text, **options))

    def _send(self, said, on_thinking, options) -> Iterator[str]:
        with self._alone(), self._steps() as steps:
            before = self._now
            try:
                for item in steps(
                    have_turn(self.model, self._renderer, before, said, self.limits, options, self._history)
                ):
                    if isinstance(item, Now):
                        self._now = item
                    elif not item[1]:
                        yield item[0]
                    elif on_thinking is not None:
                        on_thinking(item[0])
            finally:
                if self._now is before:
                    before.window()  # what the broken turn left in the cache goes

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise StateError("session: a turn is under way; exhaust or close its iterator first")
        try:
            yield
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def _steps(self) -> Iterator[Callable[[Iterator], Iterator]]:
        """Runs a generator in a context of its own: what is set for it must not hold for who reads it, in between."""
        context = contextvars.copy_context()
        with contextlib.ExitStack() as inside:
            if not self._remembers:
                context.run(inside.enter_context, memory_disabled(self.model))
            try:
                yield lambda generator: _in_context(context, generator)
            finally:
                context.run(inside.close)

    # --- going back

    def snapshot(self) -> SessionSnapshot:
        """The session as it is now: messages, context and memory. Keeps the cache's tensors alive."""
        with self._alone():
            now = self._now
            cache = now.window()
            mark = None if cache is None else Mark(cache, hold=True)
            return SessionSnapshot(replace(now, memory=now.memory.clone(), mark=mark), self._remembers, self._name)

    def restore(self, snapshot: SessionSnapshot) -> None:
        """Go back to ``snapshot``, of this session; it can be gone back to again.

        Raises:
            TypeError: no snapshot of a session.
            ValueError: of another session, whose cache it shares.
        """
        check_type(snapshot, "snapshot", SessionSnapshot, "a SessionSnapshot")
        if snapshot.owner != self._name:
            raise ArgumentError("snapshot: of another session, allowed one that this session's snapshot() made")
        with self._alone():
            now = snapshot.now
            self._now = replace(now, memory=now.memory.clone())
            self._remembers = snapshot.remembers

    def rollback(self, turns: int) -> None:
        """Go back to how the conversation was at the end of turn ``turns`` (0: the beginning): messages, memory, audit.

        What ``ingest`` and ``revise`` wrote after that turn is gone, too, also if it is the last one. Turns that had
        left the context then, or have since, stay out of it. Not past a ``forget``, nor to before it was loaded.

        Raises:
            ValueError: the memory from then is not kept; ``history`` says of how many turns it is.
        """
        with self._alone():
            check_integer(turns, "turns", 0)
            self._now = rolled_back(self._now, turns)

    def audit(self) -> Audit:
        """Which messages and texts have moved the memory how far, the newest 1,024; ``print`` it to read it."""
        return self._now.audit

    def drop_context(self) -> None:
        """All turns leave the context; messages and memory stay."""
        with self._alone():
            self._now = replace(self._now, turns=(), written=False, cache=None, mark=None)

    def limit_context(self, turns: int | None = None, tokens: int | None = None) -> None:
        """How much the context may hold from the next turn on: ``context_turns`` and ``context_tokens`` of the class.

        Raises:
            ValueError: naming the argument; the limits stay as they were.
        """
        for name, value in (("context_turns", turns), ("context_tokens", tokens)):
            check_integer(value, name, 1, MOST_64, or_none=True)
        self._limits = Limits(turns, tokens)

    def anew(self) -> MemorySession:
        """A new session of the same settings, with an empty memory; it may replace the files that this one may."""
        new = type(self)(self.model, self.tokenizer, **self._settings())
        vars(new).update(_remembers=self._remembers, _known=self._known)
        return new

    # --- the memory's operators

    def ingest(self, text: str | Sequence[Message], *, source: str = "", **options: Any) -> WriteResult:
        """Write a text into the memory without answering; see ``operators.ingest``. The context stays as it is.

        Args:
            source: the text's name, for the audit.
            options: ``tokens``, ``trust``, ``budget`` and ``progress`` of ``operators.ingest``.

        Raises:
            ValueError, TypeError: naming the argument, before anything is written.
        """
        return self._change("ingest", ingest, text, source, options)

    def revise(self, text: str | Sequence[Message], *, source: str = "", **options: Any) -> WriteResult:
        """Write what holds from now on; see ``operators.revise`` and ``ingest``. The context stays as it is."""
        return self._change("revise", revise, text, source, options)

    def forget(
        self, text: str | Sequence[Message], *, strength: float | None = None, messages: bool = False
    ) -> Forgotten:
        """Erase from the memory what a text has written; see ``operators.forget``.

        Turns that are still in the context are told under memories from before them, which forget it, too; the words
        themselves are still in sight until they leave or ``drop_context`` is called.

        Args:
            text, strength: see ``operators.forget``.
            messages: take the text out of the kept messages as well (answers, thinking and tool calls included; upper
                and lower case and white space do not matter). Turns in the context that it was in leave the context.
                ``save`` then writes none of it; directories and snapshots from before hold it as ever.

        Returns:
            What changed, and where all words of the text still stand.
        """

        def erase(memory: MemoryState) -> WriteResult:
            return forget(self.model, self.tokenizer, memory, text, strength=strength)

        settings = {"system": self.system, "template": self.template, "generation": self.generation}
        with self._alone():
            now, result = forgotten(self._now, text, erase, settings, messages=messages)
            # What was forgotten cannot be rolled back to.
            self._now = self._with_point(self._moved(now, "forget", result, 1.0))
            return result

    def retrieve(self, question: str | Sequence[Message], **options: Any) -> str:
        """An answer from the memory alone; nothing is written, and the conversation does not go on.

        See ``operators.retrieve``.
        """
        options = {**self.generation, **checked_options(options, "options", own=("model", "template", "tokenizer"))}
        return retrieve(self.model, self.tokenizer, self._now.memory, question, template=self.template, **options)

    def _change(self, what: str, write: Callable[..., WriteResult], text, source: str, options) -> WriteResult:
        name = f"{what}: {checked_source(source)}" if checked_source(source) else what
        check_operators_options(write, options)
        with self._alone():
            memory = self._now.memory.clone()
            result = write(self.model, self.tokenizer, memory, text, **{"budget": self._budget, **options})
            self._now = self._moved(replace(self._now, memory=memory), name, result, options.get("trust", 1.0))
            return result

    def _with_point(self, now: Now) -> Now:
        """A conversation that can be rolled back to now and no further."""
        return replace(now, history=(now.point(),) if self._history else ())

    def _moved(self, now: Now, source: str, result: WriteResult, trust: float) -> Now:
        move = Move(now.turn_count, source, None, int(result), float(trust), result.moved)
        return replace(now, audit=now.audit.with_moves(move))

    # --- files

    def save(self, directory: str | os.PathLike, *, cache: bool = True, overwrite: bool = False) -> Path:
        """Write the session into ``directory``: JSON and safetensors, atomically, for this user alone.

        An earlier snapshot there is replaced, if this session was loaded from it or has saved it. New files can be read
        by nobody else; where there are earlier ones, they keep their mode.

        Args:
            cache: with the KV cache. Without, the file is some kilobytes, and loading computes the cache again from
                the memories before its turns; both go on token for token as this session would.
            overwrite: replace also a snapshot that this session does not know, or one that is damaged.

        Returns:
            The directory.

        Raises:
            ConflictError: the snapshot there is another one: somebody else has saved meanwhile.
            ValueError, TypeError: something that cannot be saved (messages that are not JSON, a setting of generation
                or template that chooses code), or files there that are not a session's, or a newer version's.
            OSError: it cannot be written; the earlier snapshot stands.
        """
        with self._alone():
            settings = self._settings() | {"remembers": self._remembers}
            return saving.save(
                self.model, self._now, settings, directory, with_cache=cache, known=self._known, overwrite=overwrite
            )

    def _settings(self) -> dict[str, Any]:
        """The arguments that make such a session."""
        return {
            "system": self.system,
            "context_turns": self.limits.turns,
            "context_tokens": self.limits.tokens,
            "trust": self.trust,
            "budget": self.budget,
            "history": self._history,
            "template": self.template,
            "generation": self.generation,
        }

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        model: nn.Module,
        tokenizer,
        *,
        template: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        trust: Mapping[str, float] | None = None,
        budget: float | None = None,
        history: int | None = None,
        adopt: bool = False,
    ) -> MemorySession:
        """Read a session that ``save`` wrote.

        A file decides nothing but values: which settings of generation it may hold is listed in
        ``text.settings.GENERATION``, and a chat template, or anything that loads code, is refused.

        Args:
            template, generation, trust, budget, history: in place of those that were saved; None = those. They hold
                from the next turn on.
            adopt: True takes a session of another adapter or backbone too, if its shapes fit: for one that you know to
                be the same. Its cache is computed anew.

        Raises:
            FileNotFoundError: no session there.
            ValueError: damaged, of a newer format, with settings that no file may hold, or made under another adapter
                or backbone; the message names the file.
        """
        check_type(model, "model", nn.Module, "a patched model")
        now, settings, known = saving.load(directory, model, template=template, generation=generation, adopt=adopt)
        remembers = settings.pop("remembers")
        given = {"trust": trust, "budget": budget, "history": history}
        settings |= {name: value for name, value in given.items() if value is not None}
        session = cls(model, tokenizer, **settings)
        session._now, session._remembers, session._known = session._with_point(now), remembers, known
        return session


def _in_context(context: contextvars.Context, generator: Iterator) -> Iterator:
    end = object()
    try:
        while (item := context.run(next, generator, end)) is not end:
            yield item
    finally:
        context.run(generator.close)
