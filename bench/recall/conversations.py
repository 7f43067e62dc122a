"""The conversations behind the curves: what is told, what stays in sight, and what is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from deltamem_fast.recall import forms, world
from deltamem_fast.recall.task import Fact, changed, draw_facts, grouped

Messages = list[dict[str, str]]
ASKED = 8  # facts of one conversation that are asked for, at most
SENTENCES = 4  # of one message, at most


@dataclass(frozen=True)
class Question:
    """A fact that is asked for.

    Attributes:
        fact: with the value that holds now.
        part: which facts of the conversation it belongs to, such as "older"; "" = there is one kind only.
        before: values that it had earlier.
    """

    fact: Fact
    part: str = ""
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """``told`` is out of sight when a question comes, ``visible`` is not; ``told`` holds ``sentences``, in order."""

    sentences: list[str]
    told: Messages
    questions: list[Question]
    visible: Messages = field(default_factory=list)


def plain(random: Random, tokenizer, *, facts: int) -> Conversation:
    """``facts`` facts, nothing else; all names are new to backbone and adapter here and below."""
    known = draw_facts(random, facts, held_out=True)
    sentences = [fact.statement(random) for fact in known]
    told = grouped(random, sentences, SENTENCES)
    return Conversation(sentences, told, [Question(fact) for fact in random.sample(known, min(facts, ASKED))])


def distant(random: Random, tokenizer, *, facts: int, distance: int) -> Conversation:
    """``facts`` facts, then ``distance`` tokens of small talk."""
    near = plain(random, tokenizer, facts=facts)
    talk, messages = filler(random, tokenizer, distance)
    return Conversation(near.sentences + talk, near.told + messages, near.questions)


def filler(random: Random, tokenizer, tokens: int) -> tuple[list[str], Messages]:
    """Sentences without a fact, and the messages of exactly ``tokens`` tokens that they make.

    Raises:
        ValueError: ``tokens`` is neither 0 nor 16 or more.
    """
    if tokens != 0 and tokens < 16:
        raise ValueError(f"tokens: got {tokens}, allowed 0, or 16 or more")
    sentences, messages = [], []
    while tokens:
        more = [world.sentence(random, held_out=True) for _ in range(random.randint(1, SENTENCES))]
        message = grouped(random, more, len(more))
        used = sum(2 + len(tokenizer(m["content"], add_special_tokens=False)["input_ids"]) for m in message)
        # What would leave a rest too short for a sentence is drawn again.
        if used == tokens or used <= tokens - 16:
            sentences, messages, tokens = sentences + more, messages + message, tokens - used
    return sentences, messages


# What is told behind the facts of a hostile conversation.
HOSTILE = ("random", "contradictions", "other facts", "talk", "new talk", "drawn talk")


def hostile(random: Random, tokenizer, *, facts: int, text: str, tokens: int) -> Conversation:
    """``facts`` facts, then at least ``tokens`` tokens of one of ``HOSTILE``, the last sentence whole; the facts count.

    ``random``: words in any order, names and values among them. ``contradictions``: the same keys with other values,
    stated as facts are (not as updates). ``other facts``: about others. ``talk``: states no fact, in the forms of the
    training texts; ``new talk``: in the forms of ``forms.HELD_OUT``; ``drawn talk``: in drawn forms that are held out.
    """
    near = plain(random, tokenizer, facts=facts)
    known = [question.fact for question in near.questions]
    sentences: list[str] = []
    while _tokens(tokenizer, sentences) < tokens:
        sentences.append(_hostile_sentence(random, known, text))
    more = grouped(random, sentences, SENTENCES)
    return Conversation(near.sentences + sentences, near.told + more, near.questions)


def _hostile_sentence(random: Random, known: list[Fact], text: str) -> str:
    if text == "talk":
        return world.sentence(random, held_out=True)
    if text == "new talk":
        return forms.fill(random, random.choice(forms.HELD_OUT), held_out=True)
    if text == "drawn talk":
        return forms.sentence(random, held_out=True)
    if text == "contradictions":
        return changed(random, random.choice(known)).statement(random)
    if text == "other facts":
        taken = {fact.key for fact in known}
        return next(f for f in draw_facts(random, len(known) + 1, held_out=True) if f.key not in taken).statement(
            random
        )
    names = [random.choice(world.people(True)), random.choice(world.objects(True))]
    words = [*names, *random.choices((*world.PLACES, *world.CODES), k=3), *random.choices(_said(), k=5)]
    return " ".join(random.sample(words, len(words))) + "."


def _said() -> list[str]:
    return [word for text in (*world.SUBJECTS, *world.VERBS, *world.MANNERS) for word in text.split()]


def _tokens(tokenizer, sentences: list[str]) -> int:
    return sum(map(len, tokenizer(sentences, add_special_tokens=False)["input_ids"])) if sentences else 0


def revised(random: Random, tokenizer, *, facts: int, revisions: int) -> Conversation:
    """``facts`` facts, of which one is overwritten ``revisions`` times; it is asked for, and three of the others."""
    known = draw_facts(random, facts, held_out=True)
    sentences = [fact.statement(random) for fact in known]
    history = [random.choice(known)]
    others = [fact for fact in known if fact is not history[0]]
    for _ in range(revisions):
        history.append(changed(random, history[-1]))
        sentences.append(history[-1].update(random))
    before = tuple(sorted({fact.value for fact in history} - {history[-1].value}))
    questions = [Question(history[-1], "newest", before)]
    questions += [Question(fact, "kept") for fact in random.sample(others, min(len(others), 3))]
    return Conversation(sentences, grouped(random, sentences, SENTENCES), questions)


def in_sight(random: Random, tokenizer, *, facts: int, sight: str) -> Conversation:
    """``facts`` facts, and a newer value of one of them; it is asked for, and three of the others.

    ``sight``: "newer" = that sentence alone is in sight, and was not told; "everything" = all was told and is in sight.
    """
    known = draw_facts(random, facts, held_out=True)
    old = random.choice(known)
    newest = changed(random, old)
    stated = [fact.statement(random) for fact in known]
    update = newest.update(random)
    others = random.sample([fact for fact in known if fact is not old], min(facts - 1, 3))
    questions = [Question(newest, "newest", (old.value,)), *(Question(fact, "kept") for fact in others)]
    sentences = stated if sight == "newer" else [*stated, update]
    told = grouped(random, sentences, SENTENCES)
    return Conversation(sentences, told, questions, grouped(random, [update], 1) if sight == "newer" else told)


def halved(random: Random, tokenizer, *, facts: int) -> Conversation:
    """The newer half of ``facts`` facts stays in sight, the older one does not; all are asked for."""
    known = draw_facts(random, facts, held_out=True)
    older, newer = known[: facts - facts // 2], known[facts - facts // 2 :]
    sentences = [fact.statement(random) for fact in older]
    visible = grouped(random, [fact.statement(random) for fact in newer], SENTENCES)
    questions = [Question(fact, "older") for fact in older] + [Question(fact, "newer") for fact in newer]
    return Conversation(sentences, grouped(random, sentences, SENTENCES), questions, visible)
