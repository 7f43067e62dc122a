"""What a session is between two turns, and how a turn is had: plain values, nothing of it is changed in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..adapter.record import is_disabled
from ..adapter.wrappers import input_device, unwrap
from ..memory.state import MemoryState
from ..model.cache import is_outdated
from ..text.answering import warn_if_cut_off
from ..text.encode import Message, check_known
from ..text.thinking import TextStream, stream_tokens
from .blocks import NEXT, NOTHING, Block, Chat, Renderer, joined_ids, joined_segments
from .window import Mark, Turn, build, feed, feed_preamble, new_cache


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
    """

    memory: MemoryState
    messages: tuple[Message, ...] = ()
    preamble: Block = NOTHING
    turns: tuple[Turn, ...] = ()
    written: bool = False
    cache: Cache | None = None
    mark: Mark | None = None
    finish: str | None = None

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


def _answer(renderer: Renderer, kept: tuple[Turn, ...], messages: Sequence[Message]) -> Block:
    """The block of an answer, the last of a turn's messages, as the template shows it once a question follows."""
    chat = _alone(renderer, [*messages, NEXT])
    if chat is None:
        chat = renderer.chat([*(message for turn in kept for message in turn.messages), *messages, NEXT])
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
    model: nn.Module, renderer: Renderer, now: Now, said: Sequence[Message], limits: Limits, options: dict[str, Any]
) -> Iterator[tuple[str, bool] | Now]:
    """Text of the answer, (piece, whether it is thinking), then what the conversation is after it.

    The answer is generated on a copy of the memory. Then cache and copy go back to the question's end, and the
    answer's block is fed as the template shows it to later turns: what it drops (thinking) is neither seen nor
    remembered, and keys, values and memory follow from the blocks alone, however they were generated.
    """
    plan = plan_turn(renderer, now, said, limits)
    check_known(model, joined_ids((*plan.prompt, plan.header)))
    before, memory = now.memory.clone(), now.memory.clone()
    cache, written = _window(model, now, plan, memory)
    # SSW reads the state from before the whole prompt: fed ahead, a question would be written over what it asks for.
    ahead = bool(plan.header.ids) and plan.header.segments is None
    if ahead:
        for block in plan.prompt:
            feed(model, cache, memory, block)
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
    answer = _answer(renderer, plan.kept, messages)
    for block in (*(() if ahead else plan.prompt), answer):
        feed(model, cache, memory, block)
    turn = Turn(messages, plan.prompt, answer, before)
    yield Now(
        memory, (*now.messages, *messages), plan.preamble, (*plan.kept, turn), written, cache, Mark(cache),
        _finish(stream, options),
    )  # fmt: skip


def _finish(stream: TextStream, options: dict[str, Any]) -> str:
    if stream.thinks:
        return "thinking"
    limit, ends = options.get("max_new_tokens"), options.get("eos_token_id") or ()
    ends = ends if isinstance(ends, list | tuple) else (ends,)
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
    yield from stream_tokens(model, options | arguments)
