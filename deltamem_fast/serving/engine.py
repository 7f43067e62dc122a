"""Requests answered by one model in this process: batches of rows, each with its user's memory out of a bank."""

from __future__ import annotations

import itertools
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
from ..notices import logger
from ..storage.bank_ids import check_id
from ..text.answering import answer_options
from ..text.encode import vocabulary_size
from .contract import ChatRequest
from .fair_queue import FairQueue, Worker
from .jobs import ChatJob, Intake, Limits, unknown, version_of
from .metrics import Metrics
from .rows import answer_rows, answer_rows_from, can_be_padded, seeded


class CallJob:
    """Something else that the model is needed for, in its turn."""

    fits, ordered = None, True

    def __init__(self, call: Callable[[], Any], owner: Hashable):
        self.call, self.owner = call, owner
        self.done: Future[Any] = Future()


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
        self.queue = FairQueue(limits.waiting)
        self._worker = Worker(self.queue, self._run, rows)
        metrics.waiting.set_function(lambda: len(self.queue))

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self.queue)

    def close(self) -> None:
        """Take nothing more, end what is under way, and say so to those that wait."""
        for job in self.queue.close():
            job.done.set_exception(StateError("server: is going down"))
        self._worker.join()

    # --- asking

    def chat(self, request: ChatRequest, say: Callable[[str, bool], None], peer: str = "") -> ChatJob:
        """Let a request wait for its turn; ``done`` of what is returned is its answer.

        Args:
            say: is called, in another thread, with each piece of the answer, and whether it is thinking.
            peer: who asks, where neither ``memory_id`` nor ``user`` says so.

        Raises:
            TooLongError: prompt and answer are longer than is allowed.
            ValueError, TypeError: naming the field.
            QueueFullError: as many wait as may.
        """
        job = self._intake.job(request, say, peer)
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
        with self._intake.rendering:
            told = forget(self.model, self.tokenizer, memory, text, strength=strength)
        self.bank.commit([memory_id], memory)
        return int(told), version_of(memory)

    # --- answering, in the worker's thread

    def _run(self, jobs: Sequence[ChatJob | CallJob]) -> None:
        if isinstance(jobs[0], CallJob):
            return _settle(jobs[0].done, jobs[0].call)
        try:
            self._answer([job for job in jobs if not job.gone.is_set()])
        except BaseException as error:
            for job in jobs:
                if not job.done.done():
                    job.done.set_exception(error)

    def _answer(self, jobs: list[ChatJob]) -> None:
        if not jobs:
            return
        request = jobs[0].request
        options = answer_options(self.model, self.tokenizer, dict(request.sampling))
        with seeded(request.seed if jobs[0].fits is None else None, input_device(self.model)):
            if request.memory == "none":
                self.metrics.rows.observe(len(jobs))
                answer_rows(self.model, [job.row for job in jobs], options)
                for job in jobs:
                    self._tell(job, 0, 0)
                return
            memory = self._memory(jobs)
            loaded = [0 if row is None else row[1] for row in memory.bank_rows]
            groups: dict[Hashable, list[int]] = {}
            for place, (job, version) in enumerate(zip(jobs, loaded)):
                shape = job.prompt.forwards(bool(version)).shape
                groups.setdefault((bool(version), shape), []).append(place)
            for (known, _), places in groups.items():
                self._answer_group([jobs[n] for n in places], memory.select(places), known, options)

    def _memory(self, jobs: Sequence[ChatJob]) -> MemoryState:
        """The memory of each job: its user's, or an empty one."""
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
        after = answer_rows_from(self.model, [job.row for job in jobs], memory, known, options, write=write)
        for place, (job, version) in enumerate(zip(jobs, loaded)):
            name = job.request.memory_id
            if job.gone.is_set():
                job.done.cancel()
                continue
            now = version
            if write and name is not None:
                row = after.select([place])
                try:
                    self.bank.commit([name], row)
                except Exception as error:
                    self.metrics.conflicts.inc(isinstance(error, BankConflict))
                    job.done.set_exception(error)
                    continue
                now = version_of(row)
            self._tell(job, version, now)

    def _tell(self, job: ChatJob, loaded: int, version: int) -> None:
        row = job.row
        self.metrics.tokens.labels("prompt").inc(len(job.prompt))
        self.metrics.tokens.labels("answer").inc(row.tokens)
        job.done.set_result(job.answered(loaded, version))


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
