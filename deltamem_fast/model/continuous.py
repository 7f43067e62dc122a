"""transformers' continuous batching with a memory: each request has its own, whichever batch its tokens come in.

A forward of a ``ContinuousBatchingManager`` has the tokens of many requests in one row, and says where each begins
(``cu_seq_lens_q``). Here it gets a memory of as many rows, in the requests' order, of which each has read its request's
tokens so far. Nothing of transformers is replaced but methods of the one manager, its scheduler and its runner.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from torch import nn

from ..adapter.identity import Identity
from ..adapter.record import identity_of, is_disabled, memory_disabled
from ..arguments import check_type
from ..errors import ArgumentError, StateError, UnsupportedError
from ..memory.state import MemoryState, taken_back

_FOLLOWED = "_delta_memory_followed"
_CREATE = "_create_batch_processor"  # of a manager: what its thread runs the batches with


@dataclasses.dataclass
class _Asked:
    """What ``generate_batch`` was given, and what the manager makes of it that it asks for."""

    memory: MemoryState | None
    requests: Requests | None = None


_asked: contextvars.ContextVar[_Asked | None] = contextvars.ContextVar("deltamem_asked", default=None)


class Requests:
    """The memories of a manager's requests, from the first token to the last; used by its thread alone.

    Args:
        identity: of the model's memory.
        given: what requests start from, a row each in the order in which they are added; None: from zero.
    """

    def __init__(self, identity: Identity, given: MemoryState | None):
        self.identity = identity
        self.given = given
        self.starts: dict[str, int] = {}
        self.ended: dict[str, MemoryState] = {}
        self._rows: dict[str, MemoryState] = {}
        self._tokens: dict[str, int] = {}
        self._batch: tuple[tuple[str, ...], MemoryState | None] = ((), None)

    def add(self, request: str) -> None:
        """A request is going to come; it starts from the next row of what was given."""
        self.starts[request] = len(self.starts)

    def start(self, request: str) -> MemoryState:
        """What a request starts from, one row that is its own."""
        if request in self.starts:
            return self.given.select([self.starts[request]])
        return MemoryState(
            {i: spec.zeros(1) for i, spec in self.identity.layer_specs().items()}, identity=self.identity
        )

    def memory_of(self, parts: Sequence[tuple[str, int, int]]) -> MemoryState:
        """The memory of a batch.

        Args:
            parts: of each sequence its request, how many tokens of that came before, and how many come now.

        Raises:
            ValueError: of a request's tokens some came before, and its memory has not read just those.
        """
        for request, before, _ in parts:
            if before and self._tokens.get(request) != before:
                raise StateError(
                    f"generate_batch: request {request} goes on behind {before} tokens, of which its memory has read "
                    f"{self._tokens.get(request, 0)}"
                )
        names, memory = tuple(request for request, _, _ in parts), self._batch[1]
        # One that has been thrown out and starts again, and one whose first part this is, has a new row.
        if names != self._batch[0] or not all(before for _, before, _ in parts):
            self._set_down()
            rows = [self._rows.pop(r) if before else self.start(r) for r, before, _ in parts]
            memory = MemoryState.cat(rows)
            self._batch = names, memory
        return memory

    def have_read(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """The forward of a batch is over."""
        self._tokens |= {request: before + now for request, before, now in parts}

    def end(self, request: str) -> None:
        """A request has all its tokens, was cancelled, or has failed; nothing happens if it is not known."""
        self._set_down()
        memory, read = self._rows.pop(request, None), self._tokens.pop(request, None)
        if request in self.starts and memory is not None and read is not None:
            self.ended[request] = memory

    def lose(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """The forward of a batch has failed: nobody knows what its requests' memories have read."""
        self._batch = ((), None)
        for request, _, _ in parts:
            self._tokens.pop(request, None)

    def _set_down(self) -> None:
        names, memory = self._batch
        self._batch = ((), None)
        for row, request in enumerate(names):
            self._rows[request] = memory.select([row])


def init_continuous_batching(self, *args, original: Callable, **kwargs):
    """transformers' ``init_continuous_batching``; each request of the manager has a memory, which starts from zero.

    Raises:
        ValueError: what a memory cannot follow; the message names the argument.
    """
    if is_disabled(self):
        manager = original(*args, **kwargs)
        _in_each_processor(manager, lambda processor: _disable(self, processor))
        return manager
    asked, identity = _asked.get(), identity_of(self)
    given = None if asked is None else asked.memory
    names = ("generation_config", "continuous_batching_config", "workload_hints")
    kwargs = dict(zip(names, args)) | kwargs
    _check(self, kwargs.get("generation_config") or self.generation_config, given)
    kwargs["continuous_batching_config"] = _config(kwargs.get("continuous_batching_config"))
    manager = original(**kwargs)
    if manager.batch_processor is not None:
        raise StateError(
            "init_continuous_batching: there is a manager from before; call destroy_cached_continuous_batching_manager "
            "first"
        )
    requests = Requests(identity, given)
    if given is not None:
        asked.requests, add_request = requests, manager.add_request

        def add(*args, request_id, **kwargs):  # as add_requests calls it, in the order of the inputs
            requests.add(request_id)
            return add_request(*args, request_id=request_id, **kwargs)

        manager.add_request = add
    _in_each_processor(manager, lambda processor: _follow(processor, requests))
    return manager


def generate_batch(self, inputs, *args, original: Callable, memory: MemoryState | None = None, **kwargs):
    """transformers' ``generate_batch`` with a memory for each prompt.

    Args:
        memory: a row for each of ``inputs``, read and written, or read alone if it is frozen; None: each starts from
            zero, and what it has at the end is dropped. Unchanged if any request fails.

    Raises:
        ValueError, TypeError: naming the argument, before anything is generated.
    """
    for name in ("segment_ids", "token_mask", "trust"):  # transformers' own drops what it does not know
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{name}: generate_batch takes none; allowed with generate, and with a forward")
    if memory is not None:
        check_type(memory, "memory", MemoryState, "a MemoryState")
        identity_of(self).check(memory.identity)
        if memory.batch_size != len(inputs):
            raise ArgumentError(
                f"memory: got {memory.batch_size} row(s), allowed {len(inputs)}: one for each of inputs"
            )
    if is_disabled(self):
        return original(inputs, *args, **kwargs)
    if kwargs.get("persistent_manager"):
        raise ArgumentError("persistent_manager: got True, allowed False: a manager keeps no memory between calls")
    if memory is None:
        return original(inputs, *args, **kwargs)
    memory.check_whole()
    asked = _Asked(memory)
    token = _asked.set(asked)
    try:
        results = original(inputs, *args, **kwargs)
    finally:
        _asked.reset(token)
    requests = asked.requests
    if memory.frozen or requests is None:
        return results
    failed = [r for r in requests.starts if r not in results or results[r].error is not None or r not in requests.ended]
    if failed or len(requests.starts) != len(inputs):
        raise StateError(f"generate_batch: {len(failed)} request(s) failed ({failed[:3]}); memory is what it was")
    rows = MemoryState.cat([requests.ended[request] for request in requests.starts])
    with taken_back(memory):
        for layer in memory:
            memory.count(layer, rows.counter(layer) - memory.counter(layer))
            memory.put(layer, rows[layer], in_place=True)
    return results


def _check(model: nn.Module, generation_config: Any, given: MemoryState | None) -> None:
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < (5, 17):
        raise UnsupportedError(f"generate_batch: transformers is {version}, allowed 5.17 or newer; use generate")
    if getattr(generation_config, "num_return_sequences", 1) not in (None, 1):
        raise UnsupportedError(
            f"num_return_sequences: got {generation_config.num_return_sequences}, allowed 1: a request's memory is not "
            "copied to its children; not supported"
        )
    if identity_of(model).config.segmented and not (given is not None and given.frozen):
        raise UnsupportedError(
            "generate_batch: the adapter writes segments, and a prompt may come in several parts; allowed with a "
            "frozen memory, or an adapter that writes every token; not supported"
        )
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise UnsupportedError("generate_batch: not supported under tensor parallelism; use generate")
    if getattr(generation_config, "compile_config", None) is not None:
        raise UnsupportedError("compile_config: allowed None: compiled batches are padded with sequences of no request")


# What a memory cannot follow: keys and values that others have computed, batches that are prepared before the last one
# is over, and padding with sequences of no request.
_OFF = ("allow_block_sharing", "use_async_batching", "use_cuda_graph")
_NONE = ("varlen_compile_config", "decode_compile_config", "use_default_compile_configs")


def _config(given: Any) -> Any:
    if given is None:
        return transformers.ContinuousBatchingConfig(**dict.fromkeys(_OFF, False))
    for name in _OFF:
        if getattr(given, name, None) not in (None, False, (False, False)):
            raise ArgumentError(f"continuous_batching_config: {name} is {getattr(given, name)!r}, allowed False")
    for name in _NONE:
        if getattr(given, name, None) not in (None, False):
            raise ArgumentError(f"continuous_batching_config: {name} is given, allowed None")
    return dataclasses.replace(given, **dict.fromkeys(_OFF, False))


def _in_each_processor(manager: Any, change: Callable[[Any], None]) -> None:
    """Have ``change`` done to what runs a manager's batches; its thread makes that."""
    create = getattr(manager, _CREATE)

    def create_changed():
        processor = create()
        if _FOLLOWED not in vars(processor):  # a manager may use one again
            setattr(processor, _FOLLOWED, True)
            change(processor)
        return processor

    setattr(manager, _CREATE, create_changed)


def _disable(model: nn.Module, processor: Any) -> None:
    runner = processor.model_runner
    compute = runner.compute_batch

    def compute_batch(*args, **kwargs):
        with memory_disabled(model):  # for the manager's thread, which has a context of its own
            return compute(*args, **kwargs)

    runner.compute_batch = compute_batch


def _follow(processor: Any, requests: Requests) -> None:
    """Give each batch of a processor the memories of its requests."""
    runner, scheduler = processor.model_runner, processor.scheduler
    compute, finish, cancel = runner.compute_batch, scheduler.finish_request, scheduler.clear_cancelled_requests

    def compute_batch(model, batch_data):
        batch = runner.inputs_and_outputs.requests_in_batch
        parts = [(f.state.request_id, f.state.position_offset - f.query_length, f.query_length) for f in batch]
        memory = requests.memory_of(parts)
        if batch_data["cu_seq_lens_q"].numel() - 1 != len(parts):
            raise StateError("generate_batch: this batch is padded with sequences of no request")
        batch_data |= {"memory": memory, "token_mask": True}
        try:
            compute(model, batch_data)
        except BaseException:
            requests.lose(parts)
            raise
        requests.have_read(parts)

    def finish_request(request_id):
        requests.end(request_id)
        finish(request_id)

    def clear_cancelled_requests():
        states = cancel()
        for state in states or ():
            requests.end(state.request_id)
        return states

    runner.compute_batch = compute_batch
    scheduler.finish_request, scheduler.clear_cancelled_requests = finish_request, clear_cancelled_requests
