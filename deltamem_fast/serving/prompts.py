"""A request's messages as blocks of tokens: what stands before them, what a memory may have read, what is new."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..session.blocks import Block, Renderer, joined_ids, joined_segments
from ..session.turns import answer_block
from ..text.messages import Message, plain_messages

_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Forwards:
    """The blocks of a prompt in the order in which they go through the model, each in one forward.

    Attributes:
        seen: is read, and not written.
        ahead: are written, before the answer is generated.
        shown: is what ``generate`` begins with.
        after: are written when the answer is there, before the answer.
    """

    seen: Block
    ahead: tuple[Block, ...]
    shown: Block
    after: tuple[Block, ...]

    @property
    def shape(self) -> tuple[bool | None, ...]:
        """What prompts have in common that can go through the model as the rows of one batch."""
        parts = (self.seen, *self.ahead, None, *self.after)
        return tuple(None if part is None else bool(part.ids) for part in parts)


@dataclass(frozen=True)
class Prompt:
    """A request's messages, rendered.

    Attributes:
        renderer: what has rendered them.
        messages: all but the system's.
        preamble: what the template puts in front of the first of them, the system message included.
        earlier: the blocks up to the last answer: a memory that was there has read them, or was meant not to.
        new: the blocks after it.
        header: the beginning of the answer.
    """

    renderer: Renderer
    messages: tuple[Message, ...]
    preamble: Block
    earlier: tuple[Block, ...]
    new: tuple[Block, ...]
    header: Block

    def __len__(self) -> int:
        return len(self.whole)

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """All blocks but the header."""
        return (self.preamble, *self.earlier, *self.new)

    @functools.cached_property
    def whole(self) -> Block:
        """All of it as one block."""
        return joined((*self.all_blocks, self.header))

    def forwards(self, known: bool) -> Forwards:
        """How it goes through the model; ``known``: the memory has read what stands before the new messages."""
        segmented = self.renderer.granularity != "token"
        seen = (self.preamble, *self.earlier) if known else ()
        before = () if known else (self.preamble, *self.earlier)
        if segmented:
            # Each message by itself, as its segments are written. The new ones only when the answer is there: SSW reads
            # the memory from before them, and a question would be written over what it asks for.
            return Forwards(joined(seen), before, joined((*self.new, self.header)), self.new)
        if not self.header.ids:  # generate needs a token that is not fed yet
            return Forwards(joined(seen), (joined(before),), joined(self.new), (joined(self.new),))
        return Forwards(joined(seen), (joined((*before, *self.new)),), self.header, ())

    def answer(self, reply: Message) -> Block:
        """The block of an answer, as the template shows it once a question follows it."""
        place = len(self.earlier)
        return answer_block(self.renderer, self.messages[:place], [*self.messages[place:], reply])


def rendered(
    tokenizer,
    granularity: str,
    messages: Sequence[Message],
    template: Mapping[str, Any],
    check: Callable[[int], None] = lambda tokens: None,
) -> Prompt:
    """The messages of a request.

    Args:
        tokenizer: fast, with a chat template.
        granularity: of the adapter's writes.
        messages: a system message or none, then the chat; the last is of role ``user`` or ``tool``.
        template: arguments of the chat template.
        check: is given the number of tokens before they are taken apart, which takes far longer; may raise.

    Raises:
        ValueError, TypeError: naming the message that is not allowed, or that the template refuses.
    """
    said = plain_messages(messages, "messages")
    system = None
    if said[0]["role"] in _SYSTEM:
        system, said = said[0].get("content"), said[1:]
        if system is None:
            raise ArgumentError("messages[0]: has no content, allowed a string or a list of text parts")
    for place, message in enumerate(said, len(messages) - len(said)):
        if message["role"] in _SYSTEM:
            raise ArgumentError(f"messages[{place}]: got role {message['role']!r}, allowed for the first message alone")
        if message["role"] not in ("user", "assistant", "tool"):
            raise ArgumentError(
                f"messages[{place}]: got role {message['role']!r:.80}, allowed system, developer, user, assistant, tool"
            )
    if not said or said[-1]["role"] == "assistant":
        got = repr(said[-1]["role"]) if said else "no message after the system's"
        raise ArgumentError(f"messages: got {got} at the end, allowed a message of role user or tool")
    renderer = Renderer(tokenizer, system, granularity, template)
    check(len(renderer.ids(said)))
    chat = renderer.chat(said)
    last = max((place for place, message in enumerate(said) if message["role"] == "assistant"), default=-1)
    earlier, new = chat.messages[: last + 1], chat.messages[last + 1 :]
    return Prompt(renderer, tuple(said), chat.preamble, earlier, new, chat.header)


def joined(blocks: Sequence[Block]) -> Block:
    """Blocks as one, for one forward."""
    blocks = [block for block in blocks if block.ids]
    segmented = any(block.segments is not None for block in blocks)
    return Block(joined_ids(blocks), joined_segments(blocks) if segmented else None)
