"""A language model as judge, behind any endpoint that speaks OpenAI's API, for scores that only a reader can give."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import check_choice, check_integer
from ..display import shortened
from ..errors import ArgumentError, MissingPackageError, StateError
from ..storage.files import naming_files
from .data import Question
from .records import field, numbered_lines

KEY_VARIABLE = "OPENAI_API_KEY"
_VERDICT_TOKENS = 1024  # a judge may think before it says yes or no

_ASK = "\n\nQuestion: {question}\n\n{label}: {accepted}\n\nThe model's answer: {answer}\n\n{end}"
_RIGHT = (
    "Below are a question, the right answer to it, and a model's answer. Is the model's answer right? It is if it has "
    "the right answer, says the same in other words, or has every step that leads there; it is not if it has only a "
    "part of what was asked for."
)
_END = "Reply with yes or no alone."

# What the judge is told for each kind, after LongMemEval's protocol, in our words.
# Kind → (instruction, label of what is accepted).
_YES_OR_NO = {
    "single-session-user": (_RIGHT, "Right answer"),
    "single-session-assistant": (_RIGHT, "Right answer"),
    "multi-session": (_RIGHT, "Right answer"),
    "temporal-reasoning": (
        f"{_RIGHT} A number of days, weeks, months or the like may be off by one: it is right all the same.",
        "Right answer",
    ),
    "knowledge-update": (
        "Below are a question, the right answer to it, and a model's answer. The right answer has changed in the "
        "meantime. Is the model's answer right? It is if it gives the newest one, even if it tells the earlier, too.",
        "Right answer",
    ),
    "single-session-preference": (
        "Below are a question, what a good answer to this user is like, and a model's answer. Is the model's answer "
        "good? It need not do all that is described; it has to recall what the user told of themselves, and use it.",
        "A good answer",
    ),
    "abstention": (
        "Below are a question that cannot be answered, the reason why, and a model's answer. Does the model's answer "
        "see that? It does if it says that something is not known, or that only something else is.",
        "Reason",
    ),
}
# InfBench's summaries, as HELMET judges them: fluency × F1 of the key points found and of the sentences supported.
_SUMMARY = {
    "fluency": (
        "Judge whether the following text is fluent: 1 if it is coherent, does not repeat itself and is grammatical (a "
        'cut-off last sentence does not matter), else 0. Reply with JSON alone: {{"fluency": 0 or 1}}.\n\n'
        "Text:\n{answer}"
    ),
    "recall": (
        "Here are numbered key points of a novel, and a summary. Count the key points that the summary supports; one "
        "of several facts counts if most of them are there, and one with a wrong name or fact does not. "
        'End your reply with JSON: {{"recall": the count}}.\n\nKey points:\n{key_points}\n\nSummary:\n{answer}'
    ),
    "precision": (
        "Here are an expert's summary of a novel, and another. Count the sentences of the other, and those of them "
        "whose main facts the expert's supports. End your reply with JSON: "
        '{{"precision": the supported, "sentence_count": all}}.\n\n'
        "Expert's summary:\n{accepted}\n\nThe other summary:\n{answer}"
    ),
}
KINDS = (*_YES_OR_NO, "summary")


@dataclass(frozen=True)
class Endpoint:
    """Where a judge answers.

    Attributes:
        url: up to and with ``/v1``; ``/chat/completions`` is asked there.
        model: its name there.
        seconds: that one request may take.
        retries: of a request that fails for a reason that passes (no connection, 408, 409, 429, 500 and above), after
            waits that grow.
    """

    url: str
    model: str
    seconds: float = 60.0
    retries: int = 4

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise ArgumentError(f"judge: got {self.url!r:.120}, allowed a URL, http://… or https://…")
        if not self.model:
            raise ArgumentError("judge's model: got an empty name, allowed one that the endpoint knows")
        check_integer(self.retries, "judge's retries", 0)
        if not self.seconds > 0:
            raise ArgumentError(f"judge's seconds: got {self.seconds!r}, allowed more than 0")


def judge(question: Question, answer: str, endpoint: Endpoint) -> float:
    """What the judge at ``endpoint`` makes of an answer, 0 to 1.

    The key is the environment's ``OPENAI_API_KEY``; local endpoints need none.

    Args:
        question: ``more["judge"]`` is its kind, one of ``KINDS``.
        answer: of the model that is judged.

    Raises:
        ArgumentError: a question of no such kind.
        MissingPackageError: there is no package openai.
        StateError: the endpoint could not be reached, refused, or replied with nothing that can be read; names it.
    """
    kind = question.more.get("judge")
    check_choice(kind, f"judge: the kind of question {question.id}", KINDS)
    if kind == "summary":
        return _summary(question, answer, endpoint)
    if not answer.strip():
        return 0.0
    instruction, label = _YES_OR_NO[kind]
    given = {"question": question.query or question.text, "accepted": " or ".join(question.answers)}
    reply = _reply(endpoint, instruction + _ASK.format(**given, label=label, answer=answer.strip(), end=_END))
    verdict = re.search(r"\b(yes|no)\b", reply.lower())
    if verdict is None:
        raise StateError(f"judge: {endpoint.url}: {endpoint.model} said neither yes nor no: {shortened(reply)!r}")
    return float(verdict[0] == "yes")


def _summary(question: Question, answer: str, endpoint: Endpoint) -> float:
    points = question.more.get("key_points") or ()
    if not answer.strip() or not points:
        return 0.0
    given = {
        "answer": answer.strip(),
        "accepted": question.answers[0],
        "key_points": "\n".join(f"{i}. {point}" for i, point in enumerate(points, 1)),
    }
    found: dict[str, Any] = {}
    for name, text in _SUMMARY.items():
        wanted = (name, "sentence_count") if name == "precision" else (name,)
        found |= _numbers(_reply(endpoint, text.format(**given)), wanted, endpoint)
    recall = min(1.0, found["recall"] / len(points))
    precision = min(1.0, found["precision"] / found["sentence_count"]) if found["sentence_count"] else 0.0
    both = recall + precision
    return min(1.0, found["fluency"]) * 2 * recall * precision / both if both else 0.0


def _numbers(reply: str, wanted: tuple[str, ...], endpoint: Endpoint) -> dict[str, float]:
    """The wanted numbers of the last JSON object in a reply."""
    try:
        value = json.loads(re.findall(r"\{[^{}]*\}", reply)[-1])
        found = {name: float(value[name]) for name in wanted}
    except (IndexError, KeyError, TypeError, ValueError):
        found = {}
    if not found or not all(0 <= number < float("inf") for number in found.values()):
        raise StateError(
            f"judge: {endpoint.url}: {endpoint.model} gave no JSON with {' and '.join(wanted)}: {shortened(reply)!r}"
        )
    return found


def _reply(endpoint: Endpoint, text: str) -> str:
    """What the endpoint's model says to ``text``, without its thoughts."""
    try:
        import openai
    except ImportError as error:
        raise MissingPackageError(f"judge: needs the package openai ({error}); pip install openai") from error
    key = os.environ.get(KEY_VARIABLE) or "none"
    try:
        with openai.OpenAI(
            base_url=endpoint.url, api_key=key, timeout=endpoint.seconds, max_retries=endpoint.retries
        ) as client:
            made = client.chat.completions.create(
                model=endpoint.model,
                messages=[{"role": "user", "content": text}],
                temperature=0,
                max_tokens=_VERDICT_TOKENS,
            )
        said = made.choices[0].message.content or ""
    except openai.OpenAIError as error:
        reason = shortened(error, 200).replace(key, "…") if key != "none" else shortened(error, 200)
        raise StateError(f"judge: {endpoint.url}: {endpoint.model}: {reason}") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:  # JSON of another shape, or none
        raise StateError(f"judge: {endpoint.url}: not a reply of OpenAI's API: {shortened(error, 200)}") from error
    said = re.sub(r"<think>.*?</think>", "", said, flags=re.DOTALL).strip()
    if not said:
        raise StateError(f"judge: {endpoint.url}: {endpoint.model} replied with nothing")
    return said


def keeping(endpoint: Endpoint, path: Path) -> Callable[[Question, str], float]:
    """``judge`` at an endpoint, whose scores are kept in a JSON lines file, so that nothing is judged twice.

    A score is taken from the file where question, accepted answers, answer, kind and the judge's model are the same.

    Args:
        path: of the file, beside the answers; made with the first score, and only added to.

    Raises:
        FileAccessError, FileFormatError: it cannot be read; a last line that a killed process left unfinished is cut
            off.
    """
    known: dict[str, float] = {}
    if path.exists():
        with naming_files("kept scores", path):
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                data = data[: data.rfind(b"\n") + 1]
                os.truncate(path, len(data))
        for number, line in numbered_lines(data, path, "kept scores"):
            where = f"kept scores: {path}: line {number}"
            known[field(line, "key", str, where)] = float(field(line, "score", (int, float), where))

    def judged(question: Question, answer: str) -> float:
        key = _key(question, answer, endpoint)
        if key not in known:
            known[key] = judge(question, answer, endpoint)
            line = {"id": question.id, "score": known[key], "judge": endpoint.model, "key": key}
            with naming_files("kept scores", path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return known[key]

    return judged


def _key(question: Question, answer: str, endpoint: Endpoint) -> str:
    parts = (question.id, question.text, question.answers, question.more.get("judge"), answer, endpoint.model)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
