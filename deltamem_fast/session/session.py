"""MemorySession: one conversation, its context and its memory."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_text
from ..errors import ArgumentError, ArgumentTypeError, StateError
from ..operators import forget, ingest, retrieve, revise
from ..record import identity_of, memory_disabled, unwrap
from ..state import MemoryState
from .blocks import Message, Renderer
from .turns import Limits, Now, have_turn
from .window import Mark

DEFAULT_NEW_TOKENS = 512
# What the session itself hands to generate.
_RESERVED = (
    "assistant_model", "attention_mask", "cache_implementation", "input_ids", "inputs", "inputs_embeds", "memory",
    "num_beams", "num_return_sequences", "past_key_values", "prefill_chunk_size", "prompt_lookup_num_tokens",
    "return_dict_in_generate", "segment_ids", "streamer", "token_mask", "use_cache",
)  # fmt: skip
_ROLES = ("user", "tool")


@dataclass(frozen=True)
class SessionSnapshot:
    """A session at one time, to go back to (``MemorySession.restore``). Holds the cache's tensors, not copies."""

    now: Now
    remembers: bool


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
        template: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ):
        identity = identity_of(model)
        if memory is not None and not isinstance(memory, MemoryState):
            raise ArgumentTypeError(f"memory: got {type(memory).__name__}, allowed a MemoryState or None")
        if memory is not None and memory.batch_size != 1:
            raise ArgumentError(f"memory: got {memory.batch_size} rows, allowed 1: a session is one conversation")
        if system is not None and not isinstance(system, str):
            raise ArgumentTypeError(f"system: got {type(system).__name__}, allowed a str or None")
        if not getattr(tokenizer, "chat_template", None):
            raise ArgumentError("tokenizer: has no chat template, which a session renders its messages with")
        if memory is not None:
            identity.check(memory._identity)
        check_text(system, "system")
        for name, options in (("template", template), ("generation", generation)):
            if options is not None and not isinstance(options, Mapping):
                raise ArgumentTypeError(f"{name}: got {type(options).__name__}, allowed a mapping, or None")
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.limit_context(context_turns, context_tokens)
        self.template = dict(template or {})
        self.generation = _checked_options(generation or {}, "generation")
        self._renderer = Renderer(tokenizer, system, identity.config.memory_write_granularity, self.template)
        self._now = Now(MemoryState.zeros(model) if memory is None else memory.clone())
        self._remembers = True
        self._turn = threading.Lock()

    # --- what it is

    @property
    def memory(self) -> MemoryState:
        """The memory after the last turn. A turn puts another in its place, and leaves this one as it is."""
        return self._now.memory

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages of the conversation, in or out of the context; an answer's thinking is ``reasoning_content``."""
        return [dict(message) for message in self._now.messages]

    @property
    def context(self) -> list[dict[str, Any]]:
        """The messages that are still in the context."""
        return [dict(message) for turn in self._now.turns for message in turn.messages]

    @property
    def limits(self) -> Limits:
        """How much the context may hold; see ``limit_context``."""
        return self._limits

    @property
    def context_tokens(self) -> int:
        """How many tokens the KV cache holds, or will hold once it is built anew."""
        return len(self._now.ids)

    @property
    def turns(self) -> int:
        """How many turns there were."""
        return sum(message["role"] == "assistant" for message in self._now.messages)

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
        said = _checked_messages(text)
        options = self._generate_options(options)
        return self._send(said, on_thinking, options)

    def answer(self, text: str | Sequence[Message], **options: Any) -> str:
        """Say something; the whole answer. See ``send``."""
        return "".join(self.send(text, **options))

    def _send(self, said, on_thinking, options) -> Iterator[str]:
        with self._alone(), self._steps() as steps:
            before = self._now
            try:
                for item in steps(have_turn(self.model, self._renderer, before, said, self.limits, options)):
                    if isinstance(item, Now):
                        self._now = item
                    elif not item[1]:
                        yield item[0]
                    elif on_thinking is not None:
                        on_thinking(item[0])
            finally:
                if self._now is before:
                    before.window()  # what the broken turn left in the cache goes

    def _generate_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        config = unwrap(self.model).generation_config
        found = {**self.generation, **_checked_options(options, "options")}
        limited = {"max_new_tokens", "max_length", "max_time", "generation_config"} & found.keys()
        if not limited and getattr(config, "max_new_tokens", None) is None:
            found["max_new_tokens"] = DEFAULT_NEW_TOKENS
        if "eos_token_id" not in found and "generation_config" not in found:
            # Some chat models' generation_config does not list the token that ends a message.
            ends = config.eos_token_id
            ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
            found["eos_token_id"] = list(dict.fromkeys([*ends, *_one(self.tokenizer.eos_token_id)])) or None
        if found.get("pad_token_id", config.pad_token_id) is None:
            fillers = _one(self.tokenizer.pad_token_id) + _one(found.get("eos_token_id"))
            found["pad_token_id"] = next(iter(fillers), None)
        if "stop_strings" in found:
            found.setdefault("tokenizer", self.tokenizer)
        return found

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
            return SessionSnapshot(replace(now, memory=now.memory.clone(), mark=mark), self._remembers)

    def restore(self, snapshot: SessionSnapshot) -> None:
        """Go back to ``snapshot``, of this session; it can be gone back to again.

        Raises:
            TypeError: no snapshot of a session.
        """
        if not isinstance(snapshot, SessionSnapshot):
            raise ArgumentTypeError(f"snapshot: got {type(snapshot).__name__}, allowed a SessionSnapshot")
        with self._alone():
            now = snapshot.now
            self._now = replace(now, memory=now.memory.clone())
            self._remembers = snapshot.remembers

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
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name}: got {value!r}, allowed an integer, 1 or more, or None")
        self._limits = Limits(turns, tokens)

    # --- the memory's operators

    def ingest(self, text: str | Sequence[Message], **options: Any) -> int:
        """Write a text into the memory without answering; see ``operators.ingest``. The context stays as it is."""
        return self._change(lambda memory: ingest(self.model, self.tokenizer, memory, text, **options))

    def revise(self, text: str | Sequence[Message], **options: Any) -> int:
        """Write what holds from now on; see ``operators.revise``. The context stays as it is."""
        return self._change(lambda memory: revise(self.model, self.tokenizer, memory, text, **options))

    def forget(self, text: str | Sequence[Message], *, strength: float | None = None) -> None:
        """Erase from the memory what a text's keys point to; see ``operators.forget``.

        Turns that are still in the context are told under memories from before them, which forget it, too; the words
        themselves are still in sight until they leave or ``drop_context`` is called.
        """
        with self._alone():
            now = self._now

            def without(memory: MemoryState) -> MemoryState:
                return forget(self.model, self.tokenizer, memory.clone(), text, strength=strength)

            turns = tuple(replace(turn, before=without(turn.before)) for turn in now.turns)
            self._now = replace(now, memory=without(now.memory), turns=turns, cache=None, mark=None)

    def retrieve(self, question: str | Sequence[Message], **options: Any) -> str:
        """An answer from the memory alone; nothing is written, and the conversation does not go on.

        See ``operators.retrieve``.
        """
        options = self._generate_options(options)
        return retrieve(self.model, self.tokenizer, self._now.memory, question, template=self.template, **options)

    def _change(self, write: Callable[[MemoryState], int]) -> int:
        with self._alone():
            memory = self._now.memory.clone()
            count = write(memory)
            self._now = replace(self._now, memory=memory)
            return count

    # --- files

    def save(self, directory: str | os.PathLike, *, cache: bool = True) -> Path:
        """Write the session into ``directory``: JSON and safetensors, atomically; an earlier one there is replaced.

        Args:
            cache: with the KV cache. Without, the file is some kilobytes, and loading computes the cache again from
                the memories before its turns; both go on token for token as this session would.

        Returns:
            The directory.
        """
        from .saving import save

        with self._alone():
            return save(self, directory, with_cache=cache)

    @classmethod
    def load(cls, directory: str | os.PathLike, model: nn.Module, tokenizer) -> MemorySession:
        """Read a session that ``save`` wrote.

        Raises:
            FileNotFoundError: no session there.
            ValueError: damaged, of a newer format, or made under another adapter or backbone; both are named.
        """
        from .saving import load

        return load(cls, directory, model, tokenizer)


def _in_context(context: contextvars.Context, generator: Iterator) -> Iterator:
    end = object()
    try:
        while (item := context.run(next, generator, end)) is not end:
            yield item
    finally:
        context.run(generator.close)


def _one(value) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _checked_options(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    for option in _RESERVED:
        if option in options:
            raise ArgumentError(f"{name}: got {option}, which the session itself decides; allowed generate's others")
    return dict(options)


def _checked_messages(text: str | Sequence[Message]) -> tuple[dict[str, Any], ...]:
    check_text(text, "text")
    if isinstance(text, str):
        if not text.strip():
            raise ArgumentError("text: got nothing but white space, allowed something to say")
        return ({"role": "user", "content": text},)
    if not isinstance(text, Sequence) or not all(isinstance(message, Mapping) for message in text):
        raise ArgumentTypeError(f"text: got {type(text).__name__}, allowed a str or a list of messages")
    if not text:
        raise ArgumentError("text: got no message, allowed one or more")
    for place, message in enumerate(text):
        if message.get("role") not in _ROLES:
            raise ArgumentError(f"text[{place}]: got role {message.get('role')!r}, allowed {', '.join(_ROLES)}")
    return tuple(dict(message) for message in text)
