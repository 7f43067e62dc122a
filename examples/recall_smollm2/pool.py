"""Episodes as token ids: a pool of each size, drawn from again and again, and what a step takes of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from deltamem_fast import DeltaMemConfig, segment_ids_from_messages

from .episodes import Episode, Question, draw_episode, message, talk
from .facts import Words, place_of

COUNTS = (1, 2, 4, 8)  # facts of an episode
CONTEXTS = {1: (1,), 2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4)}  # in which they are told
# Episodes of a step: its tokens are about as many whatever the count. Questions are asked one behind another.
ROWS = {1: 32, 2: 24, 4: 16, 8: 10}
QUESTIONS = {1: 1, 2: 2, 4: 3, 8: 4}
OTHER = 0.1  # what a token of an answer counts that is not its value's
TEXT_TOKENS = 128


@dataclass(frozen=True)
class Told:
    """What is told: token ids, and in SSW the segment of each (−1 = not written)."""

    ids: list[int]
    segments: list[int] | None


@dataclass(frozen=True)
class Asked:
    """Questions with their answers as one chat: token ids, and what each counts in the loss, 0 to 1."""

    ids: list[int]
    weights: list[float]


class Encoder:
    """Chats as token ids, by the tokenizer's chat template."""

    def __init__(self, tokenizer, config: DeltaMemConfig):
        self.tokenizer, self.config = tokenizer, config

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are such, and none is added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(self, messages: Sequence[dict], prompt: bool = False) -> str:
        """A chat as the template writes it; ``prompt``: with the header of an answer behind it."""
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)

    @functools.cached_property
    def system(self) -> str:
        """What the template puts before the first message: its default system message."""
        return self.render([message("user", "x")]).partition("<|im_start|>user")[0]

    def told(self, messages: Sequence[dict], *, system: bool = True) -> Told:
        """What is told, as ``ingest`` would write it; ``system``: with the template's default system message."""
        if self.config.segmented:
            found = segment_ids_from_messages(self.tokenizer, messages, self.config.memory_write_granularity)
            ids, segments = (row[0].tolist() for row in found)
        else:
            ids, segments = self.ids(self.render(messages)), None
        first = 0 if system else len(self.ids(self.system))
        return Told(ids[first:], None if segments is None else segments[first:])

    def asked(self, questions: Sequence[Question], *, system: bool = True) -> Asked:
        """Questions and answers in one chat, whose answers count."""
        ids: list[int] = []
        weights: list[float] = []
        chat: list[dict] = []
        end = [self.tokenizer.eos_token_id, *self.ids("\n")]
        for question in questions:
            before = self.render(chat) if chat else ""
            chat.append(message("user", question.text))
            header = self.ids(self.render(chat, prompt=True)[len(before) :])
            chat.append(message("assistant", question.answer))
            found = self.tokenizer(question.answer, add_special_tokens=False, return_offsets_mapping=True)
            start, stop = place_of(question.value, question.answer, 0, len(question.answer))
            ids += header + found["input_ids"] + end
            weights += [0.0] * len(header)
            weights += [1.0 if b > start and a < stop else OTHER for a, b in found["offset_mapping"]]
            weights += [OTHER] + [0.0] * (len(end) - 1)
        first = 0 if system else len(self.ids(self.system))
        return Asked(ids[first:], weights[first:])


class Pool:
    """``size`` episodes of each count of facts, and texts without one; each a function of the seed and its place.

    Args:
        held_out: names, values and texts that training lacks.
        any_word: most of training's values are any word at all; otherwise all are of the relations' own lists.
    """

    def __init__(self, encoder: Encoder, size: int, seed: int, *, held_out: bool = False, any_word: bool = True):
        self.encoder, self.size, self.seed, self.held_out = encoder, size, seed, held_out
        self.words = Words.of(encoder.tokenizer) if any_word and not held_out else None

    @functools.cache  # noqa: B019 (a pool lives as long as its run)
    def episode(self, count: int, place: int, system: bool, contexts: int = 1) -> tuple[list[Told], Asked]:
        """An episode.

        Args:
            count: facts.
            place: below ``size``.
            system: with the default system message.
            contexts: in which the facts are told.
        """
        random = Random(f"{self.seed} {self.held_out} {count} {place}")
        updates = 0.0 if self.held_out else 0.1
        found: Episode = draw_episode(
            random, count, held_out=self.held_out, talks=0.0, updates=updates, questions=QUESTIONS[count],
            words=self.words, contexts=contexts,
        )  # fmt: skip
        told = [self.encoder.told(context, system=system) for context in found.contexts]
        return told, self.encoder.asked(found.questions, system=system)

    def step(self, step: int, count: int, system: bool) -> list[tuple[list[Told], Asked]]:
        """The episodes of a step, all of ``count`` facts told in as many contexts."""
        ways = len(CONTEXTS[count])
        turn = step // 2 % ways  # every other step tells a text, too: each number of contexts has both
        contexts = CONTEXTS[count][turn]
        # An episode is always told in the same contexts: what the lower layers make of it is kept.
        allowed = range(turn, self.size, ways)
        places = Random(f"{self.seed} {step}").sample(allowed, min(ROWS[count], len(allowed)))
        return [self.episode(count, place, system, contexts) for place in places]

    def texts(self, step: int, rows: int) -> list[Told]:
        """Texts of a step without a fact: small talk or an essay's beginning, as a chat or its answer as plain text."""
        random = Random(f"text {self.seed} {step}")
        return [self._text(random) for _ in range(rows)]

    def _text(self, random: Random) -> Told:
        chat = talk(random, held_out=self.held_out)
        if random.random() < 0.5:
            found = self.encoder.told(chat)
        else:
            ids = self.encoder.ids(chat[-1]["content"])
            found = Told(ids, [0] * len(ids) if self.encoder.config.segmented else None)
        segments = None if found.segments is None else found.segments[:TEXT_TOKENS]
        return Told(found.ids[:TEXT_TOKENS], segments)
