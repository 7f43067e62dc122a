"""LoCoMo (Maharana et al. 2024): ten conversations of two people over months, and 1,986 questions about them.

The protocol is that of its authors' code (task_eval) as the δ-mem paper's code runs it: the instructions say the same
in our words; categories, options, how an answer is read and how it is scored are theirs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import ArgumentError, FileFormatError
from .data import Document, Question, Task
from .metrics import mean, parts_f1, stemmed_f1
from .records import field, read_records

# Numbers of the file → the paper's names.
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
_ADVERSARIAL = CATEGORIES[5]
_NOT_THERE = "No information available"
_NOT_SAID = ("no information available", "not mentioned")

_WHERE = (
    "LoCoMo's data is locomo10.json of https://github.com/snap-research/locomo (data/, CC BY-NC 4.0, 2.8 MB); download "
    "it and give it as --task locomo=FILE (deltamem eval run) or --data FILE (deltamem eval score)"
)
_INSTRUCTION = (
    "Answer the following question about the conversations in a few words, not in a long sentence. "
    "Use the very words of the conversations wherever you can.\n\nQuestion: {question}"
)
_DATED = " Go by the DATE of the CONVERSATION, and answer with an approximate date."
_OPTIONS = " (a) {a} (b) {b}. Choose the right answer by writing (a) or (b)."
_PROMPT = "These conversations of two people took place on the dates before them.\n\n{context}\n\n{question}"


def load(path: Path | None) -> list[Document]:
    """The conversations of a file in the format of locomo10.json: sessions as parts, all questions.

    A question's id is the conversation's with ``-q`` and its place in the file, from 0.

    Args:
        path: the file; None raises, as the data may not be shipped.

    Raises:
        ArgumentError: no path; says where the data is.
        FileMissingError, FileAccessError, FileFormatError: it cannot be read or is of another format; names the record.
    """
    if path is None:
        raise ArgumentError(f"data of locomo: got no file, and the package may not ship it: {_WHERE}")
    samples = read_records(path, "data of locomo")
    if not samples:
        raise FileFormatError(f"data of locomo: {path}: has no conversation; {_WHERE}")
    documents = [_document(sample, f"data of locomo: {path}: conversation {i}") for i, sample in enumerate(samples)]
    if len({document.id for document in documents}) < len(documents):
        raise FileFormatError(f"data of locomo: {path}: two conversations have one sample_id")
    return documents


def _document(sample: dict[str, Any], where: str) -> Document:
    name = field(sample, "sample_id", str, where)
    conversation = field(sample, "conversation", dict, where)
    asked = field(sample, "qa", list, where)
    parts = tuple(
        _session(conversation, number, f"{where}: session_{number}")
        for number in _session_numbers(conversation)
        if field(conversation, f"session_{number}", list, where)
    )
    if not parts or not asked:
        raise FileFormatError(f"{where} ({name:.80}): has no session or no question")
    questions = tuple(_question(one, f"{name}-q{i}", f"{where}: question {i}") for i, one in enumerate(asked))
    return Document(name, parts, questions)


def _session_numbers(conversation: Mapping[str, Any]) -> list[int]:
    return sorted(int(key[8:]) for key in conversation if re.fullmatch(r"session_[0-9]{1,9}", key))


def _session(conversation: Mapping[str, Any], number: int, where: str) -> str:
    date = field(conversation, f"session_{number}_date_time", str, where)
    turns = (_turn(turn, f"{where}, turn {i}") for i, turn in enumerate(conversation[f"session_{number}"]))
    return "\n".join((f"DATE: {date}", "CONVERSATION:", *turns))


def _turn(turn: dict[str, Any], where: str) -> str:
    """What somebody said, and what was on the picture that they sent with it, if they did."""
    said = f'{field(turn, "speaker", str, where)} said, "{field(turn, "text", str, where)}"'
    return f"{said} and shared {field(turn, 'blip_caption', str, where)}." if turn.get("blip_caption") else said


def _question(one: dict[str, Any], name: str, where: str) -> Question:
    asked = field(one, "question", str, where)
    number = field(one, "category", int, where)
    if number not in CATEGORIES:
        raise FileFormatError(f"{where}: category: got {shown(number)}, allowed 1 to {len(CATEGORIES)}")
    category, text, more, answers = CATEGORIES[number], asked, {}, (_NOT_THERE,)
    if category == _ADVERSARIAL:
        # Older copies of the data have the misleading answer under "answer".
        key = "adversarial_answer" if "adversarial_answer" in one else "answer"
        options = _options(name, str(field(one, key, (str, int, float), where)))
        text, more = asked + _OPTIONS.format(**options), {"options": options}
    else:
        answers = (str(field(one, "answer", (str, int, float), where)),)
        text += _DATED if category == "temporal" else ""
    return Question(name, _INSTRUCTION.format(question=text), answers, category, asked, more)


def _options(name: str, misleading: str) -> dict[str, str]:
    """Which letter says that nothing is known: the authors' code draws it, here a hash of the question's id decides."""
    first = hashlib.sha256(name.encode()).digest()[0] % 2 == 0
    return {"a": _NOT_THERE, "b": misleading} if first else {"a": misleading, "b": _NOT_THERE}


def score(question: Question, answer: str) -> float:
    """The published score, 0 to 1, of the first line that is not empty.

    Categories 2, 3, 4: F1 of Porter's stems; 3: the accepted answer ends before ";". 1: both are split at commas, the
    mean over the accepted parts of the best F1. 5: the letter that is chosen stands for its option; 1 if what is said
    has "no information available" or "not mentioned" in it.
    """
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "").lower()
    if question.category == _ADVERSARIAL:
        chosen = _chosen(line, question.more["options"])
        return float(any(words in chosen.lower() for words in _NOT_SAID))
    for mark in ("(a)", "(b)", "a)", "b)", "answer:"):
        line = line.replace(mark, "")
    accepted = question.answers[0]
    if question.category == "multi-hop":
        return parts_f1(line, accepted)
    return stemmed_f1(line, accepted.split(";")[0] if question.category == "open-domain" else accepted)


def _chosen(line: str, options: Mapping[str, str]) -> str:
    for letter, option in options.items():
        if f"({letter})" in line or line == letter or line.startswith(f"{letter})"):
            return option
    return line


def overall(scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """``overall``: the mean over the questions of categories 1 to 4, as the δ-mem paper's code does by default; and
    ``with_adversarial``: over all five, as LoCoMo's own paper does."""
    main = [one for category, found in scores.items() if category != _ADVERSARIAL for one in found]
    return {"overall": mean(main), "with_adversarial": mean([*main, *scores.get(_ADVERSARIAL, ())])}


TASK = Task(
    name="locomo",
    title="LoCoMo",
    load=load,
    score=score,
    prompt=_PROMPT,
    new_tokens=50,
    metric="stemmed F1",
    notes=(
        "A public audit found 99 of the 1,540 answers of categories 1 to 4 wrong "
        "(https://github.com/dial481/locomo-audit): who answers all of them rightly matches at most 93.6 % of the "
        "keys, and an F1 that is close to 100 says that wrong keys were matched, too.",
        "The δ-mem paper's code draws answers (temperature 0.4, top-p 0.9, top-k 10); here the likeliest token is "
        "taken.",
        "Scores are F1 of Porter's stems; of adversarial questions, whether the answer says that nothing is known.",
        "The data is under CC BY-NC 4.0 and not part of this package.",
        "The overall score is the mean over the questions of categories 1 to 4; adversarial questions, which the δ-mem "
        "paper's code leaves out by default, are reported apart.",
        "Instructions are in our words and say what the authors' say; which option of an adversarial question comes "
        "first is decided by a hash of its id.",
    ),
    apart=(_ADVERSARIAL,),
    overall=overall,
)
