"""Long episodes: facts among much that is none, sentence by sentence, so that a loss can tell the two apart.

What is no fact comes in kinds: small talk, requests and answers to them, questions that name a key, words in any order,
sentences that sound like a fact and say the opposite ("Nobody put the old lamp in the attic."), and sentences whose
forms are drawn with them. All names are those of the training texts, and no form is one that is held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from deltamem_fast.recall import forms, task, world
from deltamem_fast.recall.task import Fact, assistant, user
from deltamem_fast.text.segments import sentence_spans

SENTENCE_TOKENS = 8  # of a sentence of talk, about
# Sentences about a key that nothing may be written of, though half of a fact stands in them.
DENIALS = {
    "code": ("Nobody uses {value}.", "{key} was late with the code.", "Nobody has the code of {key}."),
    "place": ("Nobody put the {key} in the {value}.", "Nobody likes the {key}.", "The {value} is heavy."),
}
# Kind → share of the talk's blocks.
KINDS = {"forms": 0.45, "talk": 0.2, "answers": 0.1, "questions": 0.1, "denials": 0.1, "words": 0.05}


@dataclass(frozen=True)
class LongEpisode:
    """Messages that are told, and chats that ask, each with its answer last.

    ``states``: whether each sentence, as ``sentence_spans`` cuts the told ("Baljin: 21." is two), states a fact.
    """

    told: list[dict[str, str]]
    states: list[bool]
    asked: list[list[dict[str, str]]]


def draw_long_episode(
    random: Random, most_facts: int, tokens: int, questions: int, revisions: float = 0.1, about_revised: float = 0.0
) -> LongEpisode:
    """1 to ``most_facts`` facts with about ``tokens`` tokens of talk, and ``questions`` questions.

    Most talk comes behind the facts; in every fourth episode it comes between them and before them, too. In a fifth of
    the questions other facts are in sight, and one of all is asked for.

    Args:
        revisions: share of the facts behind which one of those told so far is overwritten.
        about_revised: share of the questions that ask for an overwritten fact, where there is one; the others ask for
            any.
    """
    facts = task.draw_facts(random, random.randint(1, most_facts) + 4, held_out=False)
    facts, seen = facts[:-4], facts[-4:]
    blocks, holds = _stated(random, facts, revisions)
    revised = [now for before, now in zip(facts, holds) if now != before] if about_revised else []
    talk: list[list[tuple[str, str, bool]]] = []
    while sum(map(len, talk)) * SENTENCE_TOKENS < tokens:
        talk.append(_talk_block(random, facts))
    if random.random() < 0.25:
        mixed = blocks + talk
        # The facts keep their order: a later one may overwrite an earlier one.
        places = sorted(random.sample(range(len(mixed)), len(blocks)))
        rest, kept = iter(talk), iter(blocks)
        blocks = [next(kept) if place in places else next(rest) for place in range(len(mixed))]
    else:
        blocks += talk
    told, states = _messages(random, blocks)
    asked = []
    for _ in range(questions):
        if revised and random.random() < about_revised:
            asked.append(task.asking(random, [random.choice(revised)]))
        else:
            asked.append(_question(random, holds, seen))
    return LongEpisode(told, states, asked)


def _stated(
    random: Random, facts: list[Fact], revisions: float
) -> tuple[list[list[tuple[str, str, bool]]], list[Fact]]:
    """Blocks of sentences (role, text, whether it states a fact), and the facts that hold behind them."""
    blocks, holds = [], {fact: fact for fact in facts}
    for place, fact in enumerate(facts):
        block = [("user", fact.statement(random), True)]
        if random.random() < revisions:
            earlier = random.choice(facts[: place + 1])
            holds[earlier] = task.changed(random, holds[earlier])
            block.append(("user", holds[earlier].update(random), True))
        while random.random() < 0.15:
            block.append(("user", world.sentence(random, False), False))
        blocks.append(block)
    return blocks, [holds[fact] for fact in facts]


def _talk_block(random: Random, facts: list[Fact]) -> list[tuple[str, str, bool]]:
    kind = random.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "forms":
        return [("user", forms.sentence(random, False), False) for _ in range(random.randint(1, 6))]
    if kind == "talk":
        return [("user", world.sentence(random, False), False) for _ in range(random.randint(1, 6))]
    if kind == "answers":
        return [(m["role"], text, False) for m in task.small_talk(random, False) for text in _sentences(m["content"])]
    about = random.choice(facts) if random.random() < 0.5 else task.draw_facts(random, 1, held_out=False)[0]
    if kind == "questions":
        return [("user", about.question(random), False)]
    if kind == "denials":
        value = random.choice(world.VALUES[about.kind])
        return [("user", random.choice(DENIALS[about.kind]).format(key=about.key, value=value), False)]
    return [("user", " ".join(random.choices(_words(), k=random.randint(6, 16))) + ".", False)]


def _sentences(text: str) -> list[str]:
    return [text[start:end].strip() for start, end in sentence_spans(text)]


def _words() -> list[str]:
    names = [*world.people(False)[:64], *world.objects(False)[:64]]
    said = [word.strip(".?") for text in (*world.SUBJECTS, *world.VERBS, *world.MANNERS) for word in text.split()]
    return [*names, *said, *world.PLACES, *world.CODES]


def _messages(random: Random, blocks) -> tuple[list[dict[str, str]], list[bool]]:
    """Messages of 1 to 4 sentences of one role; the sentences stay in order."""
    sentences = [sentence for block in blocks for sentence in block]
    messages, first = [], 0
    while first < len(sentences):
        role, last = sentences[first][0], first + 1
        most = first + random.randint(1, 4)
        while last < min(most, len(sentences)) and sentences[last][0] == role:
            last += 1
        content = " ".join(text for _, text, _ in sentences[first:last])
        messages.append(user(content) if role == "user" else assistant(content))
        first = last
    return messages, [states for _, text, states in sentences for _ in sentence_spans(text)]


def _question(random: Random, holds: list[Fact], seen: list[Fact]) -> list[dict[str, str]]:
    if random.random() < 0.8:
        return task.asking(random, [random.choice(holds)])
    visible = random.sample(seen, random.randint(1, len(seen)))
    before = task.grouped(random, [fact.statement(random) for fact in visible], 4)
    return [*before, *task.asking(random, [random.choice([*holds, *visible])])]
