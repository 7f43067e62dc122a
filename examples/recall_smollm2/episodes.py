"""Episodes: somebody tells facts between small talk, and asks for them in contexts of their own."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .facts import NAMES, RELATIONS, Fact, Words, changed, draw_facts, part

TALK = Path(__file__).with_name("talk.jsonl")
# What may stand before a statement; the test has others.
OPENINGS = ("", "", "", "", "Also, ", "You should know that ", "I wanted to say that ", "Well, ", "One more thing: ")
NEW_OPENINGS = ("By the way, ", "Just so you know, ", "I forgot to mention that ")
ACKNOWLEDGED = ("Got it.", "Okay, noted.", "Thanks for telling me.", "I will remember that.", "That's good to know!")
HELD_OUT_TALK = 5  # every fifth exchange is the test's


@dataclass(frozen=True)
class Question:
    """A question, its answer as a sentence, and the value that it must name, without an article."""

    text: str
    answer: str
    value: str


@dataclass(frozen=True)
class Episode:
    """Messages that are told, in one context or in several, and what is asked afterwards, each in one of its own."""

    contexts: list[list[dict[str, str]]]
    questions: list[Question]

    @property
    def told(self) -> list[dict[str, str]]:
        """All messages that are told."""
        return [told for context in self.contexts for told in context]


def message(role: str, content: str) -> dict[str, str]:
    """One message of a chat."""
    return {"role": role, "content": content}


@functools.cache
def small_talk(held_out: bool) -> tuple[tuple[str, str], ...]:
    """Exchanges without a fact: requests, and what the frozen model itself answered to them.

    Those of training name no place, language or person that is held out.
    """
    values = {value for relation in RELATIONS for value in part(relation.values, held_out=True) if value[0].isupper()}
    refused = re.compile(rf"\b({'|'.join(map(re.escape, values))})\b")
    lines = [json.loads(line) for line in TALK.read_text(encoding="utf-8").splitlines()]
    pairs = [(line["user"], line["assistant"]) for line in lines]
    chosen = [pair for i, pair in enumerate(pairs) if (i % HELD_OUT_TALK == 0) is held_out]
    return tuple(pair for pair in chosen if held_out or not refused.search(" ".join(pair)))


def talk(random: Random, *, held_out: bool) -> list[dict[str, str]]:
    """One exchange without a fact in it: small talk, or an essay begun on request."""
    asked, answered = random.choice(small_talk(held_out))
    return [message("user", asked), message("assistant", answered)]


def opened(random: Random, sentence: str, openings: Sequence[str]) -> str:
    """The sentence behind one of ``openings``."""
    opening, first = random.choice(openings), sentence.partition(" ")[0].removesuffix("'s")
    if opening and first != "I" and first not in NAMES:
        sentence = sentence[0].lower() + sentence[1:]
    return opening + sentence


def draw_episode(
    random: Random, count: int, *, held_out: bool = False, new_words: bool = False, talks: float = 0.5,
    updates: float = 0.15, questions: int | None = None, words: Words | None = None,
    known_values: bool = False, contexts: int = 1,
) -> Episode:  # fmt: skip
    """``count`` facts in messages of one to three sentences, and questions for them.

    Args:
        held_out: names, values and small talk that training lacks.
        new_words: statements and questions in words that training lacks.
        talks: exchanges of small talk per message, on average.
        updates: share of the facts whose value a later sentence overwrites.
        known_values, words: see ``draw_facts``.
        contexts: the sentences are told in so many, as evenly as they go; ``count`` at most.
        questions: how many, of which no fact has two before each has one; None = one for each fact.
    """
    openings = NEW_OPENINGS if new_words else OPENINGS
    facts = draw_facts(random, count, held_out=held_out, known_values=known_values, words=words)
    sentences = [opened(random, fact.statement(random, new=new_words), openings) for fact in facts]
    holds: list[Fact] = list(facts)
    for place in range(count):
        if random.random() < updates:
            holds[place] = changed(random, facts[place], held_out=held_out)
            sentences.append(holds[place].update(random))
    ends = [len(sentences) * (i + 1) // contexts for i in range(contexts)]
    told = [_told(random, sentences[a:b], talks, held_out) for a, b in zip([0, *ends], ends)]
    random.shuffle(holds)
    asked = [holds[i % count] for i in range(count if questions is None else questions)]
    return Episode(told, [Question(f.question(random, new=new_words), f.answer(), f.bare_value) for f in asked])


def _told(random: Random, sentences: list[str], talks: float, held_out: bool) -> list[dict[str, str]]:
    """Messages of one to three of the sentences, and small talk between them."""
    told: list[dict[str, str]] = []
    sentences = list(sentences)
    while sentences:
        if random.random() < talks / (1 + talks):
            told += talk(random, held_out=held_out)
            continue
        size = random.choice((1, 1, 2, 3))
        told.append(message("user", " ".join(sentences[:size])))
        del sentences[:size]
        if random.random() < 0.3:
            told.append(message("assistant", random.choice(ACKNOWLEDGED)))
    if random.random() < talks / (1 + talks):
        told += talk(random, held_out=held_out)
    return told
