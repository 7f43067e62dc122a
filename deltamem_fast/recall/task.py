"""Facts, and the conversations that state them and ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from . import world


@dataclass(frozen=True)
class Fact:
    """One fact: ``kind`` ("code" or "place"), the key it is asked for by, and its value."""

    kind: str
    key: str
    value: str

    def statement(self, random: Random | None = None) -> str:
        """A sentence that states it; the first of its kind without ``random``."""
        return self._say(world.STATEMENTS, random)

    def update(self, random: Random | None = None) -> str:
        """A sentence that overwrites an earlier value of the key."""
        return self._say(world.UPDATES, random)

    def question(self, random: Random | None = None) -> str:
        """A question whose answer is the value."""
        return self._say(world.QUESTIONS, random)

    def _say(self, texts: dict[str, tuple[str, ...]], random: Random | None) -> str:
        choices = texts[self.kind]
        text = choices[0] if random is None else random.choice(choices)
        return text.format(key=self.key, value=self.value)


def user(content: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """An assistant's message."""
    return {"role": "assistant", "content": content}


def draw_facts(random: Random, count: int, *, held_out: bool, kinds: tuple[str, ...] = world.KINDS) -> list[Fact]:
    """``count`` facts with keys of their own; values of one kind differ while there are enough.

    Args:
        random: where the draws come from.
        count: 0 or more.
        held_out: names that occur in no training text, else names of the training texts.
        kinds: of the facts, drawn evenly.
    """
    drawn = [random.choice(kinds) for _ in range(count)]
    facts = []
    for kind in world.KINDS:
        wanted = drawn.count(kind)
        keys = random.sample(world.people(held_out) if kind == "code" else world.objects(held_out), wanted)
        values = list(world.VALUES[kind])
        values = random.sample(values, wanted) if wanted <= len(values) else random.choices(values, k=wanted)
        facts += [Fact(kind, key, value) for key, value in zip(keys, values)]
    random.shuffle(facts)
    return facts


def changed(random: Random, fact: Fact) -> Fact:
    """The same key with another value."""
    others = [value for value in world.VALUES[fact.kind] if value != fact.value]
    return Fact(fact.kind, fact.key, random.choice(others))


def grouped(random: Random, sentences: list[str], most: int) -> list[dict[str, str]]:
    """The sentences, in order, as users' messages of 1 to ``most`` sentences."""
    messages, first = [], 0
    while first < len(sentences):
        size = random.randint(1, most)
        messages.append(user(" ".join(sentences[first : first + size])))
        first += size
    return messages


def telling(
    random: Random, facts: list[Fact], *, held_out: bool, distractors: float, updates: float
) -> tuple[list[dict[str, str]], list[Fact]]:
    """Messages that state ``facts``, and what holds after them.

    Args:
        distractors: sentences without a fact per fact, on average.
        updates: share of the facts that are overwritten by a later sentence.
    """
    sentences: list[str] = []
    holds = {fact: fact for fact in facts}
    for place, fact in enumerate(facts):
        sentences.append(fact.statement(random))
        if random.random() < updates:
            earlier = random.choice(facts[: place + 1])
            holds[earlier] = changed(random, holds[earlier])
            sentences.append(holds[earlier].update(random))
        while random.random() < distractors / (1 + distractors):
            sentences.append(world.sentence(random, held_out))
    return grouped(random, sentences, 4), [holds[fact] for fact in facts]


def asking(random: Random, facts: list[Fact]) -> list[dict[str, str]]:
    """Questions for ``facts`` with their answers."""
    return [m for fact in facts for m in (user(fact.question(random)), assistant(fact.value))]


def small_talk(random: Random, held_out: bool, most: int = 3) -> list[dict[str, str]]:
    """A request without a fact in it, and one to ``most`` sentences for an answer."""
    answer = " ".join(world.sentence(random, held_out) for _ in range(random.randint(1, most)))
    return [user(random.choice(world.SMALL_TALK)), assistant(answer)]


TEXTS = ("conversation", "telling", "small talk")


def text(random: Random, kind: str, *, held_out: bool) -> list[dict[str, str]]:
    """A text of one of the kinds in ``TEXTS``: a conversation, messages that state facts, or small talk."""
    if kind == "conversation":
        return conversation(random, 4, held_out=held_out)
    if kind == "telling":
        facts = draw_facts(random, 8, held_out=held_out)
        return telling(random, facts, held_out=held_out, distractors=0.5, updates=0.15)[0]
    return [message for _ in range(4) for message in small_talk(random, held_out)]


def conversation(random: Random, most_facts: int, *, held_out: bool = False) -> list[dict[str, str]]:
    """A conversation in which facts are stated and asked for, in one or two rounds, with small talk between."""
    messages: list[dict[str, str]] = []
    known: list[Fact] = []
    for _ in range(random.randint(1, 2)):
        facts = draw_facts(random, random.randint(1, most_facts), held_out=held_out)
        facts = [fact for fact in facts if fact.key not in {other.key for other in known}]
        told, holds = telling(random, facts, held_out=held_out, distractors=0.2, updates=0.15)
        messages += told
        known += holds
        if random.random() < 0.3:
            messages += small_talk(random, held_out)
        asked = known + random.choices(known, k=len(known) // 2)
        random.shuffle(asked)
        messages += asking(random, asked)
    if random.random() < 0.15:
        # A question that nothing answers: what comes then is a guess of the right kind.
        stranger = draw_facts(random, 1, held_out=held_out)
        messages[:0] = asking(random, stranger)
    return messages
