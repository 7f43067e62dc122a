"""Generated suites about what changes: facts are told, then others, then some of the first are overwritten.

In the manner of STALE (arXiv 2605.06527) and other benchmarks of memory updates: is the newer value given, is the older
still claimed, and does a question that presupposes the older mislead. ``changes`` is plain English for chat models,
``changes-small`` the small world of the small backbone. Every score is a rule:

- ``newer value``: 1 if the newer value is named as whole words, whatever else is.
- ``older value``: 1 if the older is not claimed: it is not named, or only in clauses that say that it is over
  (``_OVER``). An answer that says nothing claims nothing: read it beside ``newer value``.
- ``false premise``: the question takes the older value for granted; 1 if the answer names the newer, or denies
  (``_DENIES``) and does not claim the older. That something is not known denies nothing.
- ``kept``: 1 if the value of a fact that did not change is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

from ..arguments import check_integer
from ..errors import ArgumentError
from ..recall.task import Fact, changed, draw_facts, grouped
from ..recall.world import QUESTIONS, sentence
from .data import BETWEEN, Document, Question, Task
from .metrics import mean, named
from .relations import FILLERS, PEOPLE, RELATIONS

NEWER, OLDER, PREMISE, KEPT = "newer value", "older value", "false premise", "kept"

_CLAUSES = re.compile(r"[.;,:!?\n]|\b(?:but|and|now)\b", re.IGNORECASE)
# That something is not known: neither says that it is over nor denies it.
_UNKNOWN = re.compile(
    r"\b(?:not (?:known|sure|certain|clear|mentioned|specified|stated|said|provided|given|enough)"
    r"|no (?:information|idea|mention))\b",
    re.IGNORECASE,
)
# Words by which a clause says that something is over, or not so.
_OVER = (
    "no longer",
    "not",
    "isnt",
    "wasnt",
    "doesnt",
    "anymore",
    "used to",
    "before",
    "formerly",
    "previously",
    "earlier",
    "was",
    "were",
    "instead of",
    "rather than",
    "moved from",
    "changed from",
    "switched from",
    "until",
)
_DENIES = ("no", "not", "no longer", "isnt", "doesnt", "anymore", "actually", "wrong", "incorrect", "never")


def documents_in_english(
    documents: int = 16, facts: int = 8, updates: int = 4, others: int = 8, seed: int = 0
) -> list[Document]:
    """Conversations in plain English; the same arguments give the same ones.

    Args:
        documents: how many.
        facts: told in each, of a person and a relation each.
        updates: how many of them are overwritten later.
        others: sentences between the facts and the updates that state none of them.
        seed: of everything that is drawn.

    Raises:
        ArgumentError: a number that is not possible.
    """
    _check(documents, facts, updates, others, most=len(PEOPLE) * len(RELATIONS))
    return [
        _english(Random(f"changes {seed} {i}"), f"changes-{seed}-{i}", facts, updates, others) for i in range(documents)
    ]


def documents_of_the_small_world(
    documents: int = 32, facts: int = 4, updates: int = 2, others: int = 2, seed: int = 0
) -> list[Document]:
    """Messages of the small backbone's world, about names that it was never trained on; arguments as in English.

    A false premise is a sentence there that states the older value, before the question.
    """
    _check(documents, facts, updates, others, most=64)
    return [_small(Random(f"small {seed} {i}"), f"small-{seed}-{i}", facts, updates, others) for i in range(documents)]


def _check(documents: int, facts: int, updates: int, others: int, most: int) -> None:
    check_integer(documents, "documents", 1)
    check_integer(facts, "facts", 1, most)
    check_integer(updates, "updates", 0, facts)
    check_integer(others, "others", 0)


def _english(random: Random, name: str, facts: int, updates: int, others: int) -> Document:
    pairs = random.sample([(person, relation) for person in PEOPLE for relation in RELATIONS], facts)
    told, after, questions = [], [], []
    # Of each fact its older and newer value; both differ from those of the same relation while there are enough.
    drawn = {relation: random.sample(relation.values, len(relation.values)) for relation in dict.fromkeys(RELATIONS)}
    changes = set(random.sample(range(facts), updates))
    for i, (person, relation) in enumerate(pairs):
        older, newer = _next_two(drawn[relation])
        told.append(relation.told.format(person=person, value=older))
        asked = [text.format(person=person) for text in relation.questions]
        here = f"{name}-f{i}"
        if i not in changes:
            questions.append(_asked(here, asked[0], KEPT, older))
            continue
        after.append(relation.updated.format(person=person, value=newer))
        premise = relation.premise.format(person=person, value=older)
        questions.append(_asked(f"{here}-new", asked[0], NEWER, newer, older))
        questions.append(_asked(f"{here}-old", asked[1], OLDER, newer, older))
        questions.append(_asked(f"{here}-premise", premise, PREMISE, newer, older))
    random.shuffle(after)
    between = [random.choice(FILLERS) for _ in range(others)]
    parts = (*_messages(told), *_messages(between), *_messages(after))
    return Document(name, parts, tuple(questions))


def _next_two(values: list[str]) -> tuple[str, str]:
    """The next two of a shuffled list, which goes round."""
    first, second = values.pop(0), values.pop(0)
    values += [first, second]
    return first, second


def _messages(sentences: list[str], size: int = 3) -> list[str]:
    return [" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size)]


def _asked(name: str, text: str, category: str, answer: str, older: str | None = None) -> Question:
    return Question(name, text, (answer,), category, text, {"older": older} if older is not None else {})


def _small(random: Random, name: str, facts: int, updates: int, others: int) -> Document:
    drawn = draw_facts(random, facts, held_out=True)
    changes = set(random.sample(range(facts), updates))
    newer = {i: changed(random, fact) for i, fact in enumerate(drawn) if i in changes}
    questions: list[Question] = []
    for i, fact in enumerate(drawn):
        questions += _small_questions(f"{name}-f{i}", fact, newer.get(i))
    groups = (
        [fact.statement(random) for fact in drawn],
        [sentence(random, True) for _ in range(others)],
        [fact.update(random) for fact in random.sample(list(newer.values()), len(newer))],
    )
    parts = tuple(message["content"] for group in groups for message in grouped(random, group, 3))
    return Document(name, parts, tuple(questions))


def _small_questions(name: str, fact: Fact, newer: Fact | None) -> list[Question]:
    asked = fact.question()
    if newer is None:
        return [_asked(name, asked, KEPT, fact.value)]
    again = QUESTIONS[fact.kind][1].format(key=fact.key)
    texts = (("new", NEWER, asked), ("old", OLDER, again), ("premise", PREMISE, f"{fact.statement()} {asked}"))
    return [_asked(f"{name}-{end}", text, category, newer.value, fact.value) for end, category, text in texts]


def claims(value: str, answer: str) -> bool:
    """Whether ``answer`` names ``value`` in a clause that does not say that it is over."""
    clauses = _CLAUSES.split(_UNKNOWN.sub(" ", answer))
    return any(named(value, clause) and not any(named(word, clause) for word in _OVER) for clause in clauses)


def score(question: Question, answer: str) -> float:
    """1 or 0, by the rule of the question's category (the head of this file)."""
    given = named(question.answers[0], answer)
    if question.category == OLDER:
        return float(not claims(question.more["older"], answer))
    if question.category == PREMISE:
        denies = any(named(word, _UNKNOWN.sub(" ", answer)) for word in _DENIES)
        return float(given or (denies and not claims(question.more["older"], answer)))
    return float(given)


def overall(scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """``overall``: the mean over the categories but ``OLDER``; two shares: ``older still claimed``, ``misled …``."""
    means = {category: mean(values) for category, values in scores.items() if values}

    def left(category: str) -> float | None:
        return 1 - means[category] if category in means else None

    return {
        "overall": mean([found for category, found in means.items() if category != OLDER]),
        "older still claimed": left(OLDER),
        "misled by a false premise": left(PREMISE),
    }


_NOTES = (
    "Generated: explicit updates in short sentences, far easier than STALE's 400 scenarios; not its figures.",
    "An answer that says nothing claims no older value: that category is reported apart, and no part of the score.",
    "Whether an older value is claimed, or a premise denied, is told by rules about words, which a twisted answer can "
    "mislead.",
)


def _generated(
    name: str, title: str, make: Callable[[], list[Document]], prompt: str, new_tokens: int, between: str
) -> Task:
    def load(path: Path | None) -> list[Document]:
        if path is not None:
            raise ArgumentError(f"data of {name}: got {str(path)!r:.120}, allowed none: it is generated")
        return make()

    return Task(name, title, load, score, prompt, new_tokens, "right", _NOTES, (OLDER,), overall, between)


TASK = _generated("changes", "Changes, in plain English", documents_in_english, "{context}\n\n{question}", 40, BETWEEN)
# The small world has no lines: a line's end would be letters that its backbone has never seen.
SMALL_TASK = _generated(
    "changes-small", "Changes, in the small world", documents_of_the_small_world, "{context} {question}", 8, " "
)
