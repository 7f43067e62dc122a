"""What is asked of an engine: requests that were checked and rendered, whichever engine answers them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..arguments import shown
from ..errors import ArgumentError, ArgumentKeyError
from ..memory.state import MemoryState
from ..memory.trusting import holds_back
from ..storage.bank_ids import check_id
from ..text.encode import check_below
from ..text.settings import check_template
from .contract import ChatRequest
from .prompts import Prompt, rendered
from .rows import LENGTH, Row

MOST_MESSAGES = 1024  # taking a chat apart takes time that grows with their square


class TooLongError(ArgumentError):
    """A request's prompt and answer are longer than a request may be."""


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        rows: requests in one batch.
        batch: tokens of one, the longest prompt with its answer times the rows; a longer request goes alone.
        waiting: requests that may wait.
        tokens: of prompt and answer together; None: what the model was trained for.
        answer: tokens of an answer, where the request does not say.
        body: bytes of a request.
        trust: the share of the way that a turn may move a memory, 0 to 1.
        budget: how far at most, see ``memory.trusting.hold_back``; None: as far as it goes.
    """

    rows: int = 16
    batch: int = 32_768
    waiting: int = 256
    tokens: int | None = None
    answer: int = 512
    body: int = 4 * 2**20
    trust: float = 1.0
    budget: float | None = None


@dataclass(frozen=True)
class Answered:
    """What came of a request.

    Attributes:
        message: the answer.
        finish: ``stop`` or ``length``.
        prompt, tokens: of the prompt and of the answer.
        loaded: the version of the memory that was read, 0: there was none.
        version: the version that is there now.
    """

    message: dict[str, Any]
    finish: str
    prompt: int
    tokens: int
    loaded: int
    version: int


class ChatJob:
    """A chat completion that waits or is under way.

    Args:
        request, prompt: what is asked.
        owner: who takes turns with others; see ``FairQueue``.
        fits: which go with it.
        row: its answer while it comes.
        gone: see ``done``.
        limits: of the server.

    Attributes:
        trust, budget: how far what it writes may move the memory; see ``memory.trusting.hold_back``.
        done: is set to what came of it; cancelled, if ``gone`` was set: nobody waits any more, and nothing is kept.
    """

    def __init__(
        self,
        request: ChatRequest,
        prompt: Prompt,
        row: Row,
        owner: Hashable,
        fits: Hashable | None,
        gone: threading.Event | None = None,
        *,
        limits: Limits,
    ):
        self.request, self.prompt, self.row, self.owner, self.fits = request, prompt, row, owner, fits
        self.trust = limits.trust if request.trust is None else min(limits.trust, request.trust)
        self.budget = limits.budget
        self.ordered = request.memory_id is not None
        self.size = len(prompt) + row.most
        self.gone = threading.Event() if gone is None else gone
        row.gone = self.gone.is_set
        self.done: Future[Answered] = Future()

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more."""
        return self.gone.is_set()

    @property
    def untrusted(self) -> bool:
        """Whether what it writes is held back."""
        return holds_back(self.trust, self.budget)

    @property
    def writes(self) -> bool:
        """Whether a memory is another when it is answered."""
        return self.request.memory == "write" and self.request.memory_id is not None and self.trust > 0

    def answered(self, loaded: int, version: int) -> Answered:
        """What came of it; ``loaded`` and ``version`` as in ``Answered``."""
        row = self.row
        return Answered(row.message(), row.finish or LENGTH, len(self.prompt), row.tokens, loaded, version)


class Intake:
    """Makes jobs of requests.

    Args:
        tokenizer: fast, with a chat template.
        granularity: of the adapter's writes.
        vocabulary: token ids are below it.
        limits: what is taken.
        trained: positions that the model was trained for, or None.

    Attributes:
        tokens: of a prompt and its answer at most, or None.
        rendering: is held while the tokenizer is used, which is not for several threads.

    Raises:
        ValueError: the tokenizer has no chat template, or a limit is beyond what the model was trained for.
    """

    def __init__(self, tokenizer, granularity: str, vocabulary: int, limits: Limits, trained: int | None):
        if not getattr(tokenizer, "chat_template", None) or not getattr(tokenizer, "is_fast", False):
            raise ArgumentError("tokenizer: allowed a fast tokenizer with a chat template, which shows the messages")
        if limits.tokens and trained and limits.tokens > trained:
            raise ArgumentError(f"--max-tokens: got {limits.tokens}, allowed 1 to {trained}, the model's positions")
        self.tokens = limits.tokens or trained
        self.rendering = threading.Lock()
        self._tokenizer, self._granularity, self._vocabulary = tokenizer, granularity, vocabulary
        self._limits = limits

    def job(
        self, request: ChatRequest, say: Callable[[str, bool], None], peer: str, gone: threading.Event | None = None
    ) -> ChatJob:
        """A request as one that can be answered.

        Args:
            say: is called with each piece of the answer, and whether it is thinking.
            peer: who asks, where neither ``memory_id`` nor ``user`` says so.

        Raises:
            TooLongError: prompt and answer are longer than is allowed.
            ValueError, TypeError: naming the field.
        """
        template = request.chat_template_kwargs or {}
        check_template(template, "chat_template_kwargs", ArgumentError)
        if request.memory_id is not None:
            check_id(request.memory_id, "memory_id")
        if len(request.messages) > MOST_MESSAGES:
            raise TooLongError(f"messages: got {len(request.messages)}, allowed {MOST_MESSAGES}")

        def check(tokens: int) -> None:
            self._room(request, tokens)

        with self.rendering:
            prompt = rendered(self._tokenizer, self._granularity, request.messages, template, check)
        check_below(self._vocabulary, prompt.whole.ids)
        row = Row(prompt, self._most(request, len(prompt)), request.stops, say, rendering=self.rendering)
        owner = ("memory", request.memory_id) if request.memory_id is not None else ("user", request.user or peer)
        alone = request.seed is not None and request.sampling["do_sample"]
        job = ChatJob(request, prompt, row, owner, None, gone, limits=self._limits)
        if not alone:  # a guard is of a whole forward, and those that are trusted have none
            job.fits = (request.memory, job.untrusted, *sorted(request.sampling.items()))
        return job

    def check_text(self, text: str) -> None:
        """Raise TooLongError for a text that is longer than a request may be."""
        with self.rendering:
            tokens = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.tokens is not None and tokens > self.tokens:
            raise TooLongError(f"text: got {tokens} tokens, allowed {self.tokens}")

    def _room(self, request: ChatRequest, prompt: int) -> int | None:
        """How many tokens an answer may have behind a prompt, or None: any number."""
        room = None if self.tokens is None else self.tokens - prompt
        if room is not None and room < (request.limit or 1):
            asked = "" if request.limit is None else f" and {request.limit} of the answer"
            raise TooLongError(f"messages: got {prompt} tokens{asked}, allowed {self.tokens} together")
        return room

    def _most(self, request: ChatRequest, prompt: int) -> int:
        """Tokens of a request's answer at most."""
        room = self._room(request, prompt)
        most = self._limits.answer if request.limit is None else request.limit
        return most if room is None else min(most, room)


def unknown(memory_id: str) -> ArgumentKeyError:
    """The error of a memory that is not there."""
    return ArgumentKeyError(f"memory_id: got {shown(memory_id)}, allowed one that is in the bank")


def version_of(memory: MemoryState) -> int:
    """The version that a memory of one row was gathered or committed at; 0: it is in no bank."""
    row = memory.bank_rows[0]
    return 0 if row is None else row[1]
