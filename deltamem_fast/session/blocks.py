"""A chat as blocks of tokens: what stands before it, each message, and the header of the next answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..memory.trusting import holds_back
from ..text.encode import chat_ids
from ..text.messages import Message
from ..text.segments import refused_by_template, segment_ids_under

# Stands for whatever the user says next: thinking templates render an answer otherwise once a question follows it.
NEXT = {"role": "user", "content": "Probe"}


@dataclass(frozen=True)
class Block:
    """Tokens that go through the model in one forward.

    Attributes:
        ids: token ids.
        segments: SSW: the segment of each token, −1 = not written; None: every token is written.
        trust: the memory goes this share of the way to what the whole block makes of it.
        budget: at most so far (``memory.trusting.hold_back``); None = as far as it goes.
    """

    ids: tuple[int, ...] = ()
    segments: tuple[int, ...] | None = None
    trust: float = 1.0
    budget: float | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def held_back(self) -> bool:
        """Whether it may not move the memory as far as it would."""
        return holds_back(self.trust, self.budget)


NOTHING = Block()


def joined_ids(blocks: Iterable[Block]) -> tuple[int, ...]:
    """The token ids of blocks, one after another."""
    return tuple(itertools.chain.from_iterable(block.ids for block in blocks))


def joined_segments(blocks: Sequence[Block]) -> tuple[int, ...]:
    """The segments of blocks that go through the model in one forward, numbered on from block to block."""
    found: list[int] = []
    for block in blocks:
        first = max(found, default=-1) + 1
        found += [segment if segment < 0 else first + segment for segment in block.segments]
    return tuple(found)


@dataclass(frozen=True)
class Chat:
    """A rendered chat.

    Attributes:
        preamble: what the template puts before the first message that is no system message.
        messages: a block for each other message.
        header: the beginning of the assistant's next message (the generation prompt); may be empty.
    """

    preamble: Block
    messages: tuple[Block, ...]
    header: Block


class _SystemInUser:
    """A tokenizer whose chat template gets a system message at the beginning of the first user's."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(self, messages: Sequence[Message], **kwargs):
        """The tokenizer's own, of those messages."""
        first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
        if messages[0]["role"] == "system" and first is not None:
            said = messages[first]
            joined = {**said, "content": f"{messages[0]['content']}\n\n{said['content']}"}
            messages = [*messages[1:first], joined, *messages[first + 1 :]]
        return self._tokenizer.apply_chat_template(messages, **kwargs)


def _stays_in_front(tokenizer, system: Message, template: Mapping[str, Any]) -> bool:
    """Whether a chat template takes a system message, and leaves it where it is when the chat goes on."""
    said = {"role": "assistant", "content": "Probe"}
    try:
        short, long = (
            tokenizer.apply_chat_template([system, *chat], tokenize=False, **template)
            for chat in ([NEXT], [NEXT, said, NEXT])
        )
    except Exception:  # templates refuse chats with errors of any kind
        return False
    place = short.find(system["content"].strip())
    return place < 0 or long.startswith(short[: place + len(system["content"].strip())])


class Renderer:
    """A tokenizer's chat template, with what it is always given.

    Where the template refuses a system message, or moves it on to the newest question (Gemma's and Mistral's do), the
    system message stands at the beginning of the first message that a user says.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        system: the system message, or None.
        granularity: SSW's ``message_mean`` or ``sentence_mean``; ``token`` otherwise.
        template: arguments of the template, such as ``enable_thinking``.
        trust: of messages by role; 1 where it says nothing.
        budget: of every message, or None.
    """

    def __init__(
        self,
        tokenizer,
        system: str | None,
        granularity: str,
        template: Mapping[str, Any],
        trust: Mapping[str, float] | None = None,
        budget: float | None = None,
    ):
        self.trust = dict(trust or {})
        self.budget = budget
        self.system = [] if system is None else [{"role": "system", "content": system}]
        if self.system and not _stays_in_front(tokenizer, self.system[0], template):
            tokenizer = _SystemInUser(tokenizer)
            with refused_by_template("system"):
                tokenizer.apply_chat_template([*self.system, NEXT], tokenize=False, **template)
        self.tokenizer = tokenizer
        self.granularity = granularity
        self.template = dict(template)

    def ids(self, messages: Sequence[Message], *, header: bool = True) -> tuple[int, ...]:
        """Token ids of a chat, rendered once."""
        template = {**self.template, "add_generation_prompt": header}
        return tuple(chat_ids(self.tokenizer, [*self.system, *messages], "messages", template))

    def chat(self, messages: Sequence[Message]) -> Chat:
        """A chat in blocks.

        Raises:
            ValueError: the template renders a message so that its block cannot be found, or leaves one out.
        """
        ids, owners = self._owners(messages, "message")
        segments = owners
        if self.granularity.startswith("sentence"):
            _, segments = self._owners(messages, "sentence")
        written = [place for place, owner in enumerate(owners) if owner >= 0]
        numbers = {owners[place] for place in written}
        # Some templates leave out a message without content: an answer that is empty.
        said = [str(message.get("content") or "").strip() or message.get("tool_calls") for message in messages]
        empty = [place for place, something in enumerate(said) if not something]
        shown = list(range(len(messages)))
        if len(numbers) == len(messages) - len(empty):
            shown = [place for place in shown if place not in empty]
        if not numbers or len(numbers) != len(shown):
            raise ArgumentError(
                f"messages: got {len(messages)}, but the chat template renders {len(numbers)} of them to tokens"
            )
        first, last = written[0], written[-1] + 1
        starts = [owners.index(number) for number in sorted(numbers)]
        cuts = [*starts, last]
        roles = [messages[place]["role"] for place in shown]
        blocks = [self._block(ids, segments, *ends, role) for ends, role in zip(itertools.pairwise(cuts), roles)]
        found, nothing = dict(zip(shown, blocks)), self._block(ids, segments, 0, 0)
        return Chat(
            self._block(ids, segments, 0, first, "system"),
            tuple(found.get(place, nothing) for place in range(len(messages))),
            self._block(ids, segments, last, len(ids)),
        )

    def _owners(self, messages: Sequence[Message], granularity: str) -> tuple[list[int], list[int]]:
        ids, owners = segment_ids_under(
            self.tokenizer, [*self.system, *messages], granularity, self.template, add_generation_prompt=True
        )
        return ids[0].tolist(), owners[0].tolist()

    def _block(self, ids: list[int], segments: list[int], begin: int, end: int, role: str = "") -> Block:
        part, budget = tuple(ids[begin:end]), self.budget if role else None
        trust = self.trust.get(role, 1.0)
        if self.granularity == "token":
            return Block(part, None, trust, budget)
        # Numbered from 0 in each block, so that a block is the same wherever it stands.
        first = min((segment for segment in segments[begin:end] if segment >= 0), default=0)
        return Block(part, tuple(max(segment - first, -1) for segment in segments[begin:end]), trust, budget)
