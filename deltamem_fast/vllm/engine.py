"""The HTTP contract's requests answered by vLLM: each with its user's memory out of a bank.

A turn is two requests of vLLM's. The first generates the answer, from the memory that the request brings along. The
second is fed the answer as the chat template shows it to later turns, and leaves the memory that is committed; nearly
all of it is in the prefix cache by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..adapter.record import identity_of
from ..errors import StateError, UnsupportedError
from ..memory.bank import BankConflict, MemoryBank
from ..memory.state import MemoryState
from ..memory.trusting import hold_back
from ..serving.contract import ChatRequest
from ..serving.fair_queue import QueueFullError
from ..serving.jobs import ChatJob, Intake, Limits, version_of
from ..serving.metrics import Metrics
from ..session.blocks import joined_ids
from .given import arguments_of, salt_of

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class VllmEngine:
    """One engine of vLLM's, its tokenizer and the bank of its users' memories; see ``serving.app.Engine``.

    Args:
        llm: with a delta-mem adapter.
        loop: that it runs in, of another thread.
        tokenizer: fast, with a chat template.
        ends: ids of tokens that end an answer.
        bank: of ``offline.stand_in``.
        name: of the model, as requests call it.
        limits: what is taken.

    Raises:
        ValueError: the tokenizer has no chat template, or a limit is beyond the engine's.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        loop: asyncio.AbstractEventLoop,
        tokenizer,
        ends: Sequence[int],
        bank: MemoryBank,
        model,
        name: str,
        limits: Limits,
        metrics: Metrics,
    ):
        self.bank, self.name, self.limits, self.metrics = bank, name, limits, metrics
        self._llm, self._loop, self._ends = llm, loop, tuple(ends)
        config = llm.vllm_config.model_config
        granularity = identity_of(model).config.memory_write_granularity
        self._intake = Intake(tokenizer, granularity, config.get_vocab_size(), limits, config.max_model_len)
        self._turns: dict[Hashable, tuple[asyncio.Lock, int]] = {}  # by memory: who waits for its turn, and how many
        self._under_way = 0
        self._counting = threading.Lock()
        self._closed = False
        metrics.waiting.set_function(lambda: self.waiting)

    @property
    def waiting(self) -> int:
        """Requests that wait or are under way: which of them vLLM has begun, it does not say."""
        return self._under_way

    @property
    def sound(self) -> bool:
        """Whether requests are answered."""
        return not self._llm.errored

    def refuse(self) -> None:
        """Take nothing more; what vLLM has is answered."""
        self._closed = True

    def close(self) -> None:
        """Take nothing more, and wait for what is under way."""
        self.refuse()
        asyncio.run_coroutine_threadsafe(self._emptied(), self._loop).result()

    async def _emptied(self) -> None:
        while self._under_way:
            await asyncio.sleep(0.01)

    # --- asking

    def chat(
        self,
        request: ChatRequest,
        say: Callable[[str, bool], None],
        peer: str = "",
        gone: threading.Event | None = None,
    ) -> ChatJob:
        """Let a request wait for its memory's turn; arguments and errors as of ``serving.engine.Engine.chat``."""
        job = self._intake.job(request, say, peer, gone)
        self._start(self._turn(job), job.done)
        return job

    def call(self, call: Callable[[], Any], memory_id: str) -> Future[Any]:
        """Run something while no turn of a memory is under way."""
        done: Future[Any] = Future()

        async def settle() -> None:
            async with self._order(("memory", memory_id)):
                found = await asyncio.to_thread(call)
            done.set_result(found)

        self._start(settle(), done)
        return done

    def forget(self, memory_id: str, text: str, strength: float | None) -> tuple[int, int]:
        """Not here: what a text has written is found by its keys and values, which vLLM's workers do not hand out.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "forget: not supported by vLLM's engine; allowed: export the memory, forget in it with transformers "
            "(deltamem_fast.forget, or deltamem serve without --engine vllm), and import it"
        )

    def _start(self, work: Coroutine[Any, Any, None], done: Future) -> None:
        most = self.limits.waiting + self.limits.rows
        with self._counting:
            if self._closed or self._under_way >= most:
                work.close()
                if self._closed:
                    raise StateError("server: is going down, and takes nothing more")
                raise QueueFullError(f"queue: {most} requests wait, which is as many as may; try again later")
            self._under_way += 1
        asyncio.run_coroutine_threadsafe(self._told(work, done), self._loop)

    async def _told(self, work: Coroutine[Any, Any, None], done: Future) -> None:
        try:
            await work
        except BaseException as error:
            if not done.done():
                done.set_exception(error)
        finally:
            with self._counting:
                self._under_way -= 1

    @contextlib.asynccontextmanager
    async def _order(self, owner: Hashable) -> AsyncIterator[None]:
        """Inside, no other turn of the same memory is under way; they come in the order in which they asked."""
        lock, count = self._turns.get(owner, (asyncio.Lock(), 0))
        self._turns[owner] = lock, count + 1
        try:
            async with lock:
                yield
        finally:
            lock, count = self._turns.pop(owner)
            if count > 1:
                self._turns[owner] = lock, count - 1

    # --- answering, in the loop's thread

    async def _turn(self, job: ChatJob) -> None:
        if job.request.memory_id is None:
            await self._answer(job)
        else:
            async with self._order(job.owner):
                await self._answer(job)

    async def _answer(self, job: ChatJob) -> None:
        if job.gone.is_set():
            job.done.cancel()
            return
        mode, name = job.request.memory, job.request.memory_id
        memory = None
        if mode != "none" and name is not None:
            memory = await asyncio.to_thread(self.bank.gather, [name], "cpu")
        loaded = version = 0 if memory is None else version_of(memory)
        state = _numbers(memory) if loaded else None
        first = len(job.prompt.forwards(bool(loaded)).seen) if mode == "write" else 0
        await self._generate(job, arguments_of(state, mode, first=first))
        if job.gone.is_set():
            job.done.cancel()
            return
        if job.writes:
            block = await asyncio.to_thread(job.row.block)
            if job.row.error is not None:
                raise job.row.error
            ids = joined_ids((*job.prompt.all_blocks, block))
            written = await self._written(ids, state, first)
            version = await asyncio.to_thread(self._commit, job, memory, written)
        self.metrics.tokens.labels("prompt").inc(len(job.prompt))
        self.metrics.tokens.labels("answer").inc(job.row.tokens)
        job.done.set_result(job.answered(loaded, version))

    async def _generate(self, job: ChatJob, arguments: dict[str, Any]) -> None:
        row, chosen = job.row, job.request.sampling
        await asyncio.to_thread(row.begin)  # another request's rendering may be under way
        sampling = {"temperature": 0.0}
        if chosen["do_sample"]:
            sampling = {"temperature": chosen["temperature"], "top_p": chosen["top_p"], "seed": job.request.seed}
        async with contextlib.aclosing(self._tokens(job.prompt.whole.ids, row.most, arguments, sampling)) as tokens:
            async for token in tokens:
                row.add(token, self._ends)
                if row.ended:
                    break
        row.end()

    async def _tokens(
        self, ids: Sequence[int], most: int, arguments: dict[str, Any], sampling: dict[str, Any]
    ) -> AsyncIterator[int]:
        """Tokens that vLLM chooses; when this is closed, its request ends."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if (salt := salt_of(arguments)) is not None:
            prompt["cache_salt"] = salt
        params = SamplingParams(
            **sampling, max_tokens=most, stop_token_ids=list(self._ends), ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, extra_args=arguments,
        )  # fmt: skip
        async with contextlib.aclosing(self._llm.generate(prompt, params, uuid.uuid4().hex)) as outputs:
            async for output in outputs:
                for token in output.outputs[0].token_ids:
                    yield token

    async def _written(self, ids: Sequence[int], state: np.ndarray | None, first: int) -> np.ndarray:
        """The memory, float32 [L, H, r, r], that has read tokens."""
        key = uuid.uuid4().hex
        arguments = arguments_of(state, "write", key, first)
        async for _ in self._tokens(ids, 1, arguments, {"temperature": 0.0}):
            pass
        [found] = (await self._llm.collective_rpc("delta_mem_take", args=([key],)))[0]
        if found is None or found[0] != len(ids):
            what = "has none" if found is None else f"has written {found[0]} of them"
            raise StateError(f"memory: {len(ids)} tokens were to be written, the engine {what}; it is as it was")
        return np.frombuffer(found[1], "<f4").astype(np.float32)

    def _commit(self, job: ChatJob, memory: MemoryState, written: np.ndarray) -> int:
        """Store what a turn has written, as far as it is trusted; the memory's version then."""
        before = memory.clone() if job.untrusted else None
        states = torch.from_numpy(written).view(len(memory), 1, *next(iter(memory.items()))[1].shape[1:])
        for place, (layer, _) in enumerate(sorted(memory.items())):
            memory.put(layer, states[place], in_place=True)
        if before is not None:
            hold_back(memory, before, job.trust, job.budget)
        try:
            self.bank.commit([job.request.memory_id], memory)
        except BankConflict:
            self.metrics.conflicts.inc()
            raise
        return version_of(memory)


def _numbers(memory: MemoryState) -> np.ndarray:
    """float32 [L, H, r, r] of a memory of one row, its layers in ascending order."""
    return torch.cat([state for _, state in sorted(memory.items())]).numpy()
