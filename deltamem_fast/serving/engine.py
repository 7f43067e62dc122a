"""Requests answered by one model in this process: batches of rows, each with its user's memory out of a bank."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
import traceback
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import nn

from ..adapter.record import identity_of
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..errors import StateError
from ..memory.bank import BankConflict, MemoryBank
from ..memory.operators import forget
from ..memory.state import MemoryState
from ..memory.trusting import hold_back
from ..notices import logger
from ..storage.bank_ids import check_id
from ..text.answering import answer_options
from ..text.encode import vocabulary_size
from .contract import ChatRequest
from .failures import log_failure
from .fair_queue import FairQueue, Worker
from .jobs import ChatJob, Intake, Limits, unknown, version_of
from .metrics import Metrics
from .rows import answer_rows, answer_rows_from, can_be_padded, seeded


class CallJob:
    """Something else that the model is needed for, in its turn."""

    fits, ordered, size = None, True, 0

    def __init__(self, call: Callable[[], Any], owner: Hashable):
        self.call, self.owner = call, owner
        self.done: Future[Any] = Future()

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more."""
        return self.done.cancelled()


class Engine:
    """One model, its tokenizer and the bank of its users' memories.

    Args:
        model: patched; in eval mode.
        tokenizer: fast, with a chat template.
        bank: of the model.
        name: of the model, as requests call it.
        limits: what is taken.

    Raises:
        ValueError: the tokenizer has no chat template, or a limit is beyond what the model was trained for.
    """

    def __init__(
        self, model: nn.Module, tokenizer, bank: MemoryBank, name: str, limits: Limits, metrics: Metrics
    ):  # fmt: skip
        self.model, self.tokenizer, self.bank, self.name = model, tokenizer, bank, name
        self.limits, self.metrics = limits, metrics
        granularity = identity_of(model).config.memory_write_granularity
        trained = getattr(decoder_of(unwrap(model)).config, "max_position_embeddings", None)
        self._intake = Intake(tokenizer, granularity, vocabulary_size(model), limits, trained)
        rows = limits.rows if can_be_padded(model) else 1
        if rows < limits.rows:
            logger.warning("%s sees a window of columns, padding included: each request is answered by itself", name)
        self.queue = FairQueue(limits.waiting, limits.batch)
        self._own_tokenizer = copy.deepcopy(tokenizer)  # of the worker's thread
        self._worker = Worker(self.queue, self._run, rows)
        metrics.waiting.set_function(lambda: len(self.queue))

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self.queue)

    @property
    def sound(self) -> bool:
        """Whether requests are answered."""
        return self._worker.alive

    def refuse(self) -> None:
        """Take nothing more, and say so to those that wait; what is under way goes on."""
        for job in self.queue.close():
            if not job.done.cancelled():
                job.done.set_exception(StateError("server: is going down, and the request was not begun"))

    def close(self) -> None:
        """Take nothing more, and wait for what is under way."""
        self.refuse()
        self._worker.join()

    # --- asking

    def chat(
        self,
        request: ChatRequest,
        say: Callable[[str, bool], None],
        peer: str = "",
        gone: threading.Event | None = None,
    ) -> ChatJob:
        """Let a request wait for its turn; ``done`` of what is returned is its answer.

        Args:
            say: is called, in another thread, with each piece of the answer, and whether it is thinking.
            peer: who asks, where neither ``memory_id`` nor ``user`` says so.
            gone: is set when nobody waits any more: nothing of it is kept then.

        Raises:
            TooLongError: prompt and answer are longer than is allowed.
            ValueError, TypeError: naming the field.
            QueueFullError: as many wait as may.
        """
        job = self._intake.job(request, say, peer, gone)
        self.queue.put(job)
        return job

    def call(self, call: Callable[[], Any], memory_id: str) -> Future[Any]:
        """Run something that needs the model or the memory at rest, in the memory's turn."""
        job = CallJob(call, ("memory", memory_id))
        self.queue.put(job)
        return job.done

    def forget(self, memory_id: str, text: str, strength: float | None) -> tuple[int, int]:
        """Erase from a memory what a text has written: (tokens of the text, the memory's version). See ``forget``.

        Raises:
            KeyError: there is no such memory.
            BankConflict: it has moved on meanwhile.
            ValueError, TypeError: naming the argument.
        """
        memory = self.bank.gather([check_id(memory_id, "memory_id")])
        if not version_of(memory):
            raise unknown(memory_id)
        self._intake.check_text(text)
        told = forget(self.model, self._own_tokenizer, memory, text, strength=strength)
        self.bank.commit([memory_id], memory)
        return int(told), version_of(memory)

    # --- answering, in the worker's thread

    def _run(self, jobs: Sequence[ChatJob | CallJob]) -> None:
        if isinstance(jobs[0], CallJob):
            return _settle(jobs[0].done, jobs[0].call)
        try:
            self._answer(list(jobs))
        except BaseException as error:
            left = [job for job in jobs if not job.done.done()]
            if len(left) > 1:
                # Whose fault it is, nobody knows; what it says may be of anybody's request.
                log_failure(f"a batch of {len(left)} has failed", error)
                told: BaseException = StateError(f"server: its batch has failed ({type(error).__name__}); try again")
            else:
                told = error
            _free_frames(error)
            for job in left:
                job.done.set_exception(told)
        for job in jobs:  # those that were told by themselves, of what is not at work any more
            if job.done.done():
                _free_frames(job.row.error if job.done.cancelled() else job.done.exception())

    def _answer(self, jobs: list[ChatJob]) -> None:
        request = jobs[0].request
        options = answer_options(self.model, self.tokenizer, dict(request.sampling))
        with seeded(request.seed if jobs[0].fits is None else None, input_device(self.model)):
            if request.memory == "none":
                self.metrics.rows.observe(len(jobs))
                answer_rows(self.model, [job.row for job in jobs], options)
                for job in jobs:
                    self._tell(job, 0, 0)
                return
            jobs, memory = self._memory(jobs)
            if not jobs:
                return
            loaded = [0 if row is None else row[1] for row in memory.bank_rows]
            groups: dict[Hashable, list[int]] = {}
            for place, (job, version) in enumerate(zip(jobs, loaded)):
                shape = job.prompt.forwards(bool(version)).shape
                groups.setdefault((bool(version), shape), []).append(place)
            for (known, _), places in groups.items():
                self._answer_group([jobs[n] for n in places], memory.select(places), known, options)

    def _memory(self, jobs: list[ChatJob]) -> tuple[list[ChatJob], MemoryState | None]:
        """The memory of each job: its user's, or an empty one; without the jobs whose memory cannot be read."""
        try:
            return jobs, self._gathered(jobs)
        except Exception:
            whole = []
            for job in jobs:
                try:
                    self._gathered([job])
                    whole.append(job)
                except Exception as error:
                    job.done.set_exception(error)
            return whole, self._gathered(whole) if whole else None

    def _gathered(self, jobs: Sequence[ChatJob]) -> MemoryState:
        names = [job.request.memory_id for job in jobs]
        known = [name for name in names if name is not None]
        parts = [self.bank.gather(known)] if known else []
        if len(known) < len(names):
            parts.append(MemoryState.zeros(self.model, len(names) - len(known)))
        named, others = itertools.count(), itertools.count(len(known))
        return MemoryState.cat(parts).select([next(others if name is None else named) for name in names])

    def _answer_group(self, jobs: list[ChatJob], memory: MemoryState, known: bool, options: dict[str, Any]) -> None:
        write = jobs[0].request.memory == "write"
        loaded = [0 if row is None else row[1] for row in memory.bank_rows]
        self.metrics.rows.observe(len(jobs))
        after = answer_rows_from(
            self.model, [job.row for job in jobs], memory, known, options, write=write, untrusted=jobs[0].untrusted
        )
        kept = []
        for place, job in enumerate(jobs):
            if job.gone.is_set():
                job.done.cancel()
            elif job.row.error is not None:
                job.done.set_exception(job.row.error)
            elif job.writes:
                kept.append(place)
            else:
                self._tell(job, loaded[place], loaded[place])
        rows = [after.select([n]) for n in kept]
        for place, row in zip(kept, rows):
            if jobs[place].untrusted:
                hold_back(row, memory.select([place]), jobs[place].trust, jobs[place].budget)
        versions = self._committed([jobs[n] for n in kept], rows)
        for place, version in zip(kept, versions):
            if version is not None:
                self._tell(jobs[place], loaded[place], version)

    def _committed(self, jobs: list[ChatJob], rows: list[MemoryState]) -> list[int | None]:
        """The versions of memories that are stored; None: it could not be, and its job knows why."""
        if not jobs:
            return []
        try:
            together = MemoryState.cat(rows)
            self.bank.commit([job.request.memory_id for job in jobs], together)
            return [row[1] for row in together.bank_rows]
        except Exception as error:
            if len(jobs) > 1:  # one of them is to blame, and none is stored
                return [version for job, row in zip(jobs, rows) for version in self._committed([job], [row])]
            self.metrics.conflicts.inc(isinstance(error, BankConflict))
            jobs[0].done.set_exception(error)
            return [None]

    def _tell(self, job: ChatJob, loaded: int, version: int) -> None:
        row = job.row
        self.metrics.tokens.labels("prompt").inc(len(job.prompt))
        self.metrics.tokens.labels("answer").inc(row.tokens)
        job.done.set_result(job.answered(loaded, version))


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:
        _free_frames(error)
        future.set_exception(error)


def _free_frames(error: BaseException | None) -> None:
    """Let go of what the frames hold that an error and those behind it came through: the tensors of a batch.

    Those that called the one where it was caught, too: a traceback leads to them. Frames at work are left as they are.
    """
    while error is not None:
        # Not the traceback's other end, to which another thread may add its own frames once it is told.
        frame = None
        for frame, _ in traceback.walk_tb(error.__traceback__):  # noqa: B007, the last one
            pass
        while frame is not None:
            caller = frame.f_back
            with contextlib.suppress(RuntimeError):  # it is at work
                frame.clear()
            frame = caller
        error = error.__cause__ or error.__context__
