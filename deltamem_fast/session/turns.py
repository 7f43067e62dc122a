"""What a session is between two turns, its KV cache, and how a turn is had: plain values, never changed in place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ..adapter.record import is_disabled, record_of
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..errors import ArgumentError
from ..memory.state import MemoryState
from ..memory.trusting import held_back, moved
from ..model.cache import is_outdated, rewound
from ..text.answering import as_ids, warn_if_cut_off
from ..text.encode import check_known
from ..text.messages import Message
from ..text.thinking import TextStream, stream_tokens
from .audit import NOTHING_MOVED, Audit, Move
from .blocks import NEXT, NOTHING, Block, Chat, Renderer, joined_ids, joined_segments

HISTORY = 256  # turns that can be rolled back unless told otherwise


@dataclass(frozen=True)
class Turn:
    """One turn whose keys and values are in the cache.

    Attributes:
        messages: the messages of the turn, its answer last.
        prompt, answer: their blocks; each is one forward.
        before: the memory before the turn. Keys and values of the turn follow from it, from the blocks, and from what
            stands before them in the cache.
    """

    messages: tuple[Message, ...]
    prompt: tuple[Block, ...]
    answer: Block
    before: MemoryState

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its blocks, in order."""
        return *self.prompt, self.answer


@dataclass(frozen=True)
class Point:
    """A conversation at the end of a turn: how many turns and messages it had, its memory, and what had moved that."""

    turns: int
    messages: int
    memory: MemoryState
    audit: Audit


@dataclass(frozen=True)
class Now:
    """A conversation between two turns.

    Attributes:
        memory: its memory, one row.
        messages: all of them, as they were said.
        preamble: the block before the first turn in the cache.
        turns: the turns in the cache, oldest first.
        written: the preamble was written (the cache begins at the conversation's start).
        cache: keys and values of preamble and turns; None: to be built from them.
        mark: where the cache ends. A turn that failed may have left more in it.
        finish: how the last turn's answer ended: ``stop``, ``length`` or ``thinking``.
        audit: what has moved the memory how far.
        history: the ends of the newest turns, to roll back to, and the beginning.
        turn_count: how many turns there were; None = counted. It is handed on, as a long conversation takes
            milliseconds to count.
    """

    memory: MemoryState
    messages: tuple[Message, ...] = ()
    preamble: Block = NOTHING
    turns: tuple[Turn, ...] = ()
    written: bool = False
    cache: Cache | None = None
    mark: Mark | None = None
    finish: str | None = None
    audit: Audit = NOTHING_MOVED
    history: tuple[Point, ...] = ()
    turn_count: int | None = None

    def __post_init__(self) -> None:
        if self.turn_count is None:
            count = sum(message["role"] == "assistant" for message in self.messages)
            object.__setattr__(self, "turn_count", count)

    def point(self) -> Point:
        """What there is now, to roll back to."""
        return Point(self.turn_count, len(self.messages), self.memory.clone(), self.audit)

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids whose keys and values are in the cache."""
        return joined_ids((self.preamble, *all_blocks(self.turns)))

    def window(self) -> Cache | None:
        """The cache, at its mark."""
        if self.cache is not None:
            self.mark.restore(self.cache)
        return self.cache


@dataclass(frozen=True)
class Limits:
    """How much stays in the cache; None = everything."""

    turns: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a turn feeds: ``kept`` of the turns in the cache, then ``prompt``; ``fresh``: the cache is built anew."""

    preamble: Block
    kept: tuple[Turn, ...]
    prompt: tuple[Block, ...]
    header: Block
    fresh: bool


def plan_turn(renderer: Renderer, now: Now, said: Sequence[Message], limits: Limits) -> Plan:
    """Which turns stay for the next one, and its blocks."""
    kept = now.turns
    if limits.turns is not None:
        kept = kept[max(0, len(kept) + 1 - limits.turns) :]
    while True:
        plan = _plan(renderer, now, kept, said)
        if limits.tokens is None or not kept or _length(plan) <= limits.tokens:
            return plan
        # At least one has to go; as many as the known lengths say.
        over, gone = _length(plan) - limits.tokens, 0
        while over > 0 and gone < len(kept):
            over -= len(kept[gone])
            gone += 1
        kept = kept[gone:]


def _length(plan: Plan) -> int:
    return len(plan.preamble) + sum(map(len, (*plan.kept, *plan.prompt, plan.header)))


def _plan(renderer: Renderer, now: Now, kept: tuple[Turn, ...], said: Sequence[Message]) -> Plan:
    earlier = [message for turn in kept for message in turn.messages]
    wanted = renderer.ids([*earlier, *said])
    # Rendered alone a turn nearly always looks as it does in the whole chat, which takes far longer to take apart.
    chat = _alone(renderer, said)
    if chat is None or joined_ids((chat.preamble, *all_blocks(kept), *chat.messages, chat.header)) != wanted:
        whole = renderer.chat([*earlier, *said])
        kept = _cut(whole, kept)
        chat = Chat(whole.preamble, whole.messages[len(earlier) :], whole.header)
    fresh = now.cache is None or len(kept) != len(now.turns) or chat.preamble != now.preamble
    fresh = fresh or any(old.blocks != new.blocks for old, new in zip(now.turns, kept))
    return Plan(chat.preamble, kept, chat.messages, chat.header, fresh)


def _alone(renderer: Renderer, messages: Sequence[Message]) -> Chat | None:
    # Templates refuse chats (one that begins with a tool's result, say) with errors of any kind.
    try:
        return renderer.chat(messages)
    except Exception:
        return None


def answer_block(renderer: Renderer, earlier: Sequence[Message], messages: Sequence[Message]) -> Block:
    """The block of an answer, the last of a turn's messages, as the template shows it once a question follows.

    Args:
        earlier: the messages before the turn's, without which some templates refuse it.
    """
    chat = _alone(renderer, [*messages, NEXT])
    if chat is None:
        chat = renderer.chat([*earlier, *messages, NEXT])
    return chat.messages[-2]


def all_blocks(turns: Sequence[Turn]) -> Iterator[Block]:
    """The blocks of turns, in order."""
    return (block for turn in turns for block in turn.blocks)


def _cut(chat: Chat, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with the blocks that they have in ``chat``, which begins with them."""
    found, place = [], 0
    for turn in turns:
        blocks = chat.messages[place : place + len(turn.messages)]
        found.append(replace(turn, prompt=blocks[:-1], answer=blocks[-1]))
        place += len(turn.messages)
    return tuple(found)


def have_turn(
    model: nn.Module,
    renderer: Renderer,
    now: Now,
    said: Sequence[Message],
    limits: Limits,
    options: dict[str, Any],
    history: int = 0,
) -> Iterator[tuple[str, bool] | Now]:
    """Text of the answer, (piece, whether it is thinking), then what the conversation is after it.

    The answer is generated on a copy of the memory. Then cache and copy go back to the question's end, and the
    answer's block is fed as the template shows it to later turns: what it drops (thinking) is neither seen nor
    remembered, and keys, values and memory follow from the blocks alone, however they were generated.

    Args:
        history: how many turns can be rolled back.
    """
    plan = plan_turn(renderer, now, said, limits)
    check_known(model, joined_ids((*plan.prompt, plan.header)))
    before, memory = now.memory.clone(), now.memory.clone()
    cache, written = _window(model, now, plan, memory)
    opening = moved(before, memory)  # by the preamble, where a conversation begins
    # SSW reads the state from before the whole prompt: fed ahead, a question would be written over what it asks for.
    ahead = bool(plan.header.ids) and plan.header.segments is None
    moves: list[float] = []
    if ahead:
        moves += [write(model, cache, memory, block) for block in plan.prompt]
    end = Mark(cache)
    stream = TextStream(renderer.tokenizer, renderer.tokenizer.decode(list(plan.header.ids)))
    with contextlib.closing(_generate(model, cache, memory.clone(), plan, options)) as tokens:
        for token in tokens:
            yield from stream.add(token)
    yield from stream.end()
    warn_if_cut_off("session", stream)
    end.restore(cache)

    reply = {"role": "assistant", "content": stream.answer}
    if stream.thinking:
        reply["reasoning_content"] = stream.thinking
    messages = (*said, reply)
    earlier = [message for kept in plan.kept for message in kept.messages]
    answer = answer_block(renderer, earlier, messages)
    moves += [write(model, cache, memory, block) for block in (*(() if ahead else plan.prompt), answer)]
    turn = Turn(messages, plan.prompt, answer, before)
    turns, mark, finish = (*plan.kept, turn), Mark(cache), _finish(stream, options)
    first = plan.preamble
    opened = [Move(now.turn_count, "system", None, len(first), first.trust, opening)] if opening else []
    audit = now.audit.with_moves(*opened, *_moves_of(now, turn, moves))
    told = (*now.messages, *messages)
    after = Now(memory, told, plan.preamble, turns, written, cache, mark, finish, audit, turn_count=now.turn_count + 1)
    points = (*now.history, after.point())[-history - 1 :] if history else ()
    yield replace(after, history=points)


def _moves_of(now: Now, turn: Turn, moves: Sequence[float]) -> Iterator[Move]:
    for place, (message, block, far) in enumerate(zip(turn.messages, turn.blocks, moves, strict=True)):
        yield Move(now.turn_count, message["role"], len(now.messages) + place, len(block), block.trust, far)


def rolled_back(now: Now, turns: int) -> Now:
    """The conversation as it was at the end of turn ``turns``; the context keeps those turns that it holds.

    Raises:
        ValueError: the memory from then is not kept.
    """
    point = next((point for point in now.history if point.turns == turns), None)
    if point is None:
        kept = [point.turns for point in now.history]
        allowed = f"{kept[0]} to {kept[-1]}" if kept else "none"
        raise ArgumentError(f"turns: got {turns}, allowed {allowed}: of no others a memory is kept; see history")
    left = now.turns[: max(0, len(now.turns) - (now.turn_count - turns))]
    messages = now.messages[: point.messages]
    return Now(
        point.memory.clone(), messages, now.preamble, left, now.written and bool(left), audit=point.audit,
        history=tuple(each for each in now.history if each.turns <= turns), turn_count=point.turns,
    )  # fmt: skip


def _finish(stream: TextStream, options: dict[str, Any]) -> str:
    if stream.thinks:
        return "thinking"
    limit, ends = options.get("max_new_tokens"), as_ids(options.get("eos_token_id"))
    cut = limit is not None and len(stream.ids) >= limit and stream.ids[-1] not in ends
    return "length" if cut else "stop"


def _window(model: nn.Module, now: Now, plan: Plan, memory: MemoryState) -> tuple[Cache, bool]:
    """The cache that holds what is kept, and whether its preamble was written (into ``memory``, if it is now)."""
    if not plan.fresh and not is_outdated(now.cache):
        return now.window(), now.written
    if not now.messages:
        cache = new_cache(model)
        feed_preamble(model, cache, memory, plan.preamble, written=True)
        return cache, True
    written = now.written and bool(plan.kept) and plan.kept[0].before is now.turns[0].before
    return build(model, plan.preamble, plan.kept, memory, written=written), written


def _generate(
    model: nn.Module, cache: Cache, memory: MemoryState, plan: Plan, options: dict[str, Any]
) -> Iterator[int]:
    device = input_device(model)
    ids = joined_ids((plan.preamble, *all_blocks(plan.kept), *plan.prompt, plan.header))
    input_ids = torch.tensor([ids], device=device)
    arguments = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "past_key_values": cache}
    if not is_disabled(unwrap(model)):
        arguments |= {"memory": memory, "answer_is_fed": True}
        if plan.header.segments is not None:
            own = joined_segments((*plan.prompt, plan.header))
            # Those before are in the cache, and not fed again.
            segments = (-1,) * (len(ids) - len(own)) + own
            arguments["segment_ids"] = torch.tensor([segments], device=device)
            trust = [block.trust for block in (*plan.prompt, plan.header) for _ in block.ids]
            if min(trust) < 1:
                trust = [1.0] * (len(ids) - len(own)) + trust
                arguments["trust"] = torch.tensor([trust], dtype=torch.float32, device=device)
    yield from stream_tokens(model, options | arguments)


# --- the KV cache: feeding blocks, going back to where it was, building it anew


def write(model: nn.Module, cache: Cache, memory: MemoryState, block: Block) -> float:
    """``feed``, and how far it moved the memory."""
    before = memory.clone()
    feed(model, cache, memory, block)
    return moved(before, memory)


@torch.no_grad()
def feed(model: nn.Module, cache: Cache, memory: MemoryState, block: Block) -> None:
    """One forward of a block: the cache gets its keys and values, the memory reads and writes (unless frozen)."""
    if not block.ids:
        return
    inner = unwrap(model)
    device = input_device(inner)
    arguments: dict[str, Any] = {}
    if not is_disabled(inner):
        arguments["memory"] = memory
        if block.segments is not None:
            arguments["segment_ids"] = torch.tensor([block.segments], device=device)
    ids = torch.tensor([block.ids], device=device)
    arguments |= {"use_cache": True, record_of(inner).cache_name: cache}
    if "memory" not in arguments or memory.frozen:
        decoder_of(inner)(input_ids=ids, **arguments)
        return
    with held_back(memory, None, block.trust, block.budget):
        decoder_of(inner)(input_ids=ids, **arguments)


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for one conversation."""
    return DynamicCache(config=decoder_of(unwrap(model)).config)


def build(
    model: nn.Module, preamble: Block, turns: Sequence[Turn], memory: MemoryState, *, written: bool
) -> DynamicCache:
    """A cache that holds ``turns``, each computed from the memory before it; ``memory`` is not changed.

    The same forwards in the same order as when the turns were had, so that it is the same cache to the bit.

    Args:
        preamble: what stands before them.
        memory: what the preamble reads where there is no turn.
        written: the preamble was written, at the conversation's start; otherwise it is read-only here.
    """
    cache = new_cache(model)
    scratch = (turns[0].before if turns else memory).clone()
    feed_preamble(model, cache, scratch, preamble, written=written)
    for place, turn in enumerate(turns):
        scratch = scratch if place == 0 else turn.before.clone()
        for block in turn.blocks:
            feed(model, cache, scratch, block)
    return cache


def feed_preamble(model: nn.Module, cache: Cache, memory: MemoryState, preamble: Block, *, written: bool) -> None:
    """The preamble is written once, at the start of a conversation; later windows show it and write nothing."""
    before = memory.frozen
    memory.frozen = before or not written
    try:
        feed(model, cache, memory, preamble)
    finally:
        memory.frozen = before


class Mark:
    """Where a cache was, to go back to: lengths where a layer only grows, else its tensors (windows, linear attention).

    Args:
        cache: as it is now.
        hold: keep the tensors of every layer: it then can be gone back to even if others have gone on from here, for
            as much memory as the cache takes.
    """

    def __init__(self, cache: Cache, *, hold: bool = False):
        self._layers = [_mark(layer, hold) for layer in cache.layers]

    def restore(self, cache: Cache) -> None:
        """Go back; once more does no harm, and neither does a cache whose layers were left at different lengths."""
        del cache.layers[len(self._layers) :]
        for layer, mark in zip(cache.layers, self._layers):
            if isinstance(mark, dict):
                vars(layer).clear()
                vars(layer).update(copy.deepcopy(mark) if is_recurrent(layer) else mark)
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys[..., :mark, :], layer.values[..., :mark, :]
        rewound(cache)


def is_recurrent(layer) -> bool:
    """Whether a layer holds states that are written in place (linear attention, convolutions)."""
    return hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states")


def _mark(layer, hold: bool) -> int | dict[str, Any]:
    if is_recurrent(layer):
        return copy.deepcopy(vars(layer))
    if hold or layer.is_sliding or not layer.is_initialized:
        return dict(vars(layer))
    return layer.get_seq_length()
