"""Several requests in one ``generate``: their prompts, answers and memories as the rows of one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

from ..adapter.record import identity_of, memory_disabled, record_of
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..memory.state import MemoryState
from ..session.blocks import NOTHING, Block
from ..session.turns import Mark, is_recurrent, new_cache
from ..text.answering import as_ids
from ..text.stops import StoppedText
from ..text.thinking import TextStream, Tokens
from .prompts import Prompt

STOP, LENGTH = "stop", "length"


@dataclass(eq=False)
class Row:
    """One request's answer while it comes.

    Attributes:
        prompt: what is answered.
        most: tokens of the answer at most.
        stops: texts that end it.
        say: is called with each piece, and whether it is thinking.
        gone: says whether nobody waits for it any more.
        rendering: is held while the tokenizer is used, which is not for several threads.
        finish: how it ended: ``stop`` or ``length``; None: it has not, or was gone.
        error: why the answer cannot be written; the memory's row is then of no use.
    """

    prompt: Prompt
    most: int
    stops: tuple[str, ...] = ()
    say: Callable[[str, bool], None] = lambda piece, thinking: None
    gone: Callable[[], bool] = lambda: False
    rendering: contextlib.AbstractContextManager = field(default_factory=contextlib.nullcontext)
    finish: str | None = None
    answer: str = ""
    thinking: str = ""
    tokens: int = 0
    ended: bool = False
    error: Exception | None = None
    _stream: TextStream | None = field(default=None, repr=False)
    _text: StoppedText | None = field(default=None, repr=False)

    def begin(self) -> None:
        """Before the first token."""
        tokenizer = self.prompt.renderer.tokenizer
        with self.rendering:
            self._stream = TextStream(tokenizer, tokenizer.decode(list(self.prompt.header.ids)))
        self._text = StoppedText(self.stops)

    def add(self, token: int, ends: Sequence[int]) -> None:
        """One more token."""
        if self.ended:
            return
        self.tokens += 1
        for piece, thinking in self._stream.add(token):
            self._tell(piece, thinking)
        if token in ends or self._text.found:
            self.finish = STOP
        elif self.tokens >= self.most:
            self.finish = LENGTH
        self.ended = self.finish is not None or self.gone()

    def end(self) -> None:
        """What waited for more text that never came."""
        if not self._text.found:
            for piece, thinking in self._stream.end():
                self._tell(piece, thinking)
            self._say(self._text.rest())

    def message(self) -> dict[str, Any]:
        """The answer as a message."""
        thought = {"reasoning_content": self.thinking} if self.thinking else {}
        return {"role": "assistant", "content": self.answer, **thought}

    def block(self) -> Block:
        """The answer as the chat template shows it to later turns; nothing, and an ``error``, if it cannot."""
        with self.rendering:
            try:
                return self.prompt.answer(self.message())
            except Exception as error:  # templates refuse chats with errors of any kind
                self.error = error
                return NOTHING

    def _tell(self, piece: str, thinking: bool) -> None:
        if not thinking:
            self._say(self._text.add(piece))
        else:
            self.thinking += piece
            self.say(piece, True)

    def _say(self, text: str) -> None:
        if text:
            self.answer += text
            self.say(text, False)


def answer_rows(model: nn.Module, rows: Sequence[Row], options: dict[str, Any]) -> None:
    """Answers of the bare model: no memory is read or written.

    Args:
        options: of ``generate``, for all rows.
    """
    with memory_disabled(model):
        batch = _Batch(model, len(rows))
        batch.show([row.prompt.whole for row in rows])
        _generate(model, batch, rows, options)


def answer_rows_from(
    model: nn.Module,
    rows: Sequence[Row],
    memory: MemoryState,
    known: bool,
    options: dict[str, Any],
    *,
    write: bool,
    untrusted: bool = False,
) -> MemoryState:
    """Answers, each from its row of ``memory``; the memory as it is after them.

    What a memory has read before is read again and not written; then what is new is written, then the answer, as the
    chat template shows it to later turns: on a copy of the memory it is generated, so that thinking and what follows a
    stop are not remembered. As a turn of ``MemorySession`` is had, for several conversations at once.

    Args:
        memory: a row for each of ``rows``; not changed.
        known: the memories have read what stands before the new messages; otherwise everything is new. Under it the
            rows' ``Forwards`` have one ``shape``.
        options: of ``generate``, for all rows.
        write: False: nothing is written, and ``memory`` itself is returned.
        untrusted: what is written is under the model's guard, as what is less than wholly trusted (``MemoryState``).
    """
    batch = _Batch(model, len(rows), memory.clone() if write else memory.read_only(), untrusted)
    parts = [row.prompt.forwards(known) for row in rows]
    batch.read([part.seen for part in parts])
    for blocks in zip(*(part.ahead for part in parts), strict=True):
        batch.write(blocks)
    batch.show([part.shown for part in parts])
    end = Mark(batch.cache)
    _generate(model, batch, rows, options)
    if not write:
        return memory
    end.restore(batch.cache)
    batch.take_back()
    for blocks in zip(*(part.after for part in parts), strict=True):
        batch.write(blocks)
    batch.write([row.block() for row in rows])
    return batch.memory


class _Batch:
    """Rows in one cache, padded on the left of each part that is fed.

    Attributes:
        ids, mask: int64 [B, T], all columns so far; those behind the cache's are shown and not fed yet.
        segments: int64 [B, T] where the adapter writes segments, else None.
    """

    def __init__(self, model: nn.Module, rows: int, memory: MemoryState | None = None, untrusted: bool = False):
        self.model, self.memory, self._untrusted = model, memory, untrusted
        self.cache: Cache = new_cache(model)
        self.device = input_device(model)
        nothing = torch.zeros(rows, 0, dtype=torch.int64, device=self.device)
        self.ids, self.mask = nothing, nothing
        self.segments = nothing if memory is not None and identity_of(model).config.segmented else None
        self.fed = 0

    def show(self, blocks: Sequence[Block]) -> None:
        """Put columns behind those that are there, for ``generate`` to feed."""
        width = max(map(len, blocks))
        pad = [[0] * (width - len(block)) for block in blocks]
        # The row's own token, which a penalty of repetitions then counts anyway.
        filled = [block.ids[:1] * len(left) for left, block in zip(pad, blocks)]
        self.ids = self._with(self.ids, [[*left, *block.ids] for left, block in zip(filled, blocks)])
        self.mask = self._with(self.mask, [[*left, *[1] * len(block)] for left, block in zip(pad, blocks)])
        if self.segments is not None:
            segments = [
                [-1] * len(left) + list(block.segments or [-1] * len(block)) for left, block in zip(pad, blocks)
            ]
            self.segments = self._with(self.segments, segments)

    def guarded(self, memory: MemoryState | None) -> contextlib.AbstractContextManager:
        """Inside, what is written into ``memory`` is guarded, if what the rows say is not wholly trusted."""
        return memory.untrusted() if self._untrusted else contextlib.nullcontext()

    def take_back(self) -> None:
        """Forget the columns that the cache does not hold."""
        self._keep(self.fed)

    def read(self, blocks: Sequence[Block]) -> None:
        """Feed blocks that are read and not written; nothing, if they are empty, which all are or none is."""
        before = self.memory.frozen
        self.memory.frozen = True
        try:
            self.write(blocks)
        finally:
            self.memory.frozen = before

    @torch.no_grad()
    def write(self, blocks: Sequence[Block]) -> None:
        """Feed blocks: the cache gets their keys and values, the memory reads and writes (unless it is frozen).

        Rows whose block is empty are left as they are; the cache must not be used again if others' are not.
        """
        there = [place for place, block in enumerate(blocks) if block.ids]
        if not there:
            return
        if len(there) < len(blocks):
            return self._write_some(blocks, there)
        self.show(blocks)
        model = unwrap(self.model)
        first, last = self.fed, self.ids.shape[1]
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, first:last]
        arguments: dict[str, Any] = {record_of(model).cache_name: self.cache, "memory": self.memory}
        if self.segments is not None and not self.memory.frozen:
            arguments["segment_ids"] = self.segments[:, first:last]
        with self.guarded(self.memory):
            decoder_of(model)(
                input_ids=self.ids[:, first:last], attention_mask=self.mask, position_ids=positions, use_cache=True,
                **arguments,
            )  # fmt: skip
        self.fed = last

    def _write_some(self, blocks: Sequence[Block], there: list[int]) -> None:
        places = torch.tensor(there, device=self.device)
        self._keep(self.fed)
        self.cache.batch_select_indices(places)
        part = _Batch(self.model, len(there), self.memory.select(there), self._untrusted)
        part.cache, part.fed = self.cache, self.fed
        part.ids, part.mask = self.ids[places], self.mask[places]
        part.segments = None if self.segments is None else self.segments[places]
        part.write([blocks[place] for place in there])
        order = [there.index(n) if n in there else len(there) + n for n in range(len(blocks))]
        self.memory = MemoryState.cat([part.memory, self.memory]).select(order)

    def _keep(self, columns: int) -> None:
        self.ids, self.mask = self.ids[:, :columns], self.mask[:, :columns]
        self.segments = None if self.segments is None else self.segments[:, :columns]

    def _with(self, columns: torch.Tensor, more: list[list[int]]) -> torch.Tensor:
        return torch.cat([columns, torch.tensor(more, dtype=torch.int64, device=self.device)], 1)


def _generate(model: nn.Module, batch: _Batch, rows: Sequence[Row], options: dict[str, Any]) -> None:
    ends = as_ids(options.get("eos_token_id"))
    for row in rows:
        row.begin()

    def hand_out(tokens: list[int]) -> None:
        for row, token in zip(rows, tokens):
            row.add(token, ends)

    def ended(input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.tensor([row.ended for row in rows], device=input_ids.device)

    arguments = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "past_key_values": batch.cache,
        "max_new_tokens": max(row.most for row in rows),
        "streamer": Tokens(hand_out),
        "stopping_criteria": StoppingCriteriaList([ended]),
    }
    memory = None if batch.memory is None else batch.memory.clone()
    if memory is not None:
        # Of what it generates nothing stays: the answer is fed as the template shows it.
        arguments |= {"memory": memory, "answer_is_fed": True}
        if batch.segments is not None:
            arguments["segment_ids"] = batch.segments
    with batch.guarded(memory):
        model.generate(**(options | arguments))
    for row in rows:
        row.end()


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, what is sampled follows from ``seed``; outside, the generators are as they were. None: nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def can_be_padded(model: nn.Module) -> bool:
    """Whether rows of a batch may have padding between their parts: no layer sees a window of columns, or a state."""
    cache = new_cache(model)
    return all(not getattr(layer, "is_sliding", False) and not is_recurrent(layer) for layer in cache.layers)
