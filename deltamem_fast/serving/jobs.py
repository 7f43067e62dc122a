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
from ..storage.bank_ids import check_id
from ..text.settings import check_template
from .contract import ChatRequest
from .prompts import Prompt, rendered
from .rows import LENGTH, Row


class TooLongError(ArgumentError):
    """A request's prompt and answer are longer than a request may be."""


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        rows: requests in one batch.
        waiting: requests that may wait.
        tokens: of prompt and answer together; None: what the model was trained for.
        answer: tokens of an answer, where the request does not say.
        body: bytes of a request.
    """

    rows: int = 16
    waiting: int = 256
    tokens: int | None = None
    answer: int = 512
    body: int = 4 * 2**20


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

    Attributes:
        done: is set to what came of it; cancelled: nobody waits any more, and nothing of it is kept.
    """

    def __init__(self, request: ChatRequest, prompt: Prompt, row: Row, owner: Hashable, fits: Hashable | None):
        self.request, self.prompt, self.row, self.owner, self.fits = request, prompt, row, owner, fits
        self.ordered = request.memory_id is not None
        self.gone = threading.Event()
        row.gone = self.gone.is_set
        self.done: Future[Answered] = Future()

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
            raise ArgumentError(f"max_tokens: got {limits.tokens}, allowed 1 to {trained}, the model's positions")
        self.tokens = limits.tokens or trained
        self.rendering = threading.Lock()
        self._tokenizer, self._granularity, self._vocabulary = tokenizer, granularity, vocabulary
        self._answer = limits.answer

    def job(self, request: ChatRequest, say: Callable[[str, bool], None], peer: str) -> ChatJob:
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
        with self.rendering:
            prompt = rendered(self._tokenizer, self._granularity, request.messages, template)
        highest = max(prompt.whole.ids)
        if highest >= self._vocabulary:
            raise ArgumentError(f"tokenizer: gives token id {highest}, the model knows 0 to {self._vocabulary - 1}")
        row = Row(prompt, self._most(request, len(prompt)), request.stops, say, rendering=self.rendering)
        owner = ("memory", request.memory_id) if request.memory_id is not None else ("user", request.user or peer)
        alone = request.seed is not None and request.sampling["do_sample"]
        fits = None if alone else (request.memory, *sorted(request.sampling.items()))
        return ChatJob(request, prompt, row, owner, fits)

    def _most(self, request: ChatRequest, prompt: int) -> int:
        """Tokens of a request's answer at most."""
        room = None if self.tokens is None else self.tokens - prompt
        if room is not None and room < (request.limit or 1):
            asked = "" if request.limit is None else f" and {request.limit} of the answer"
            raise TooLongError(f"messages: got {prompt} tokens{asked}, allowed {self.tokens} together")
        most = self._answer if request.limit is None else request.limit
        return most if room is None else min(most, room)


def unknown(memory_id: str) -> ArgumentKeyError:
    """The error of a memory that is not there."""
    return ArgumentKeyError(f"memory_id: got {shown(memory_id)}, allowed one that is in the bank")


def version_of(memory: MemoryState) -> int:
    """The version that a memory of one row was gathered or committed at; 0: it is in no bank."""
    row = memory.bank_rows[0]
    return 0 if row is None else row[1]
