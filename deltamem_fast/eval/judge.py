"""A language model as judge, behind any endpoint that speaks OpenAI's API, for scores that only a reader can give."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import check_choice, check_integer, shown
from ..display import shortened
from ..errors import ArgumentError, FileFormatError, StateError
from ..model.libraries import require
from ..storage.files import naming_files, read_bytes
from ..storage.locks import HAS_LOCKS, closed_afterwards, lock_until, open_lock, unlock
from .data import Question
from .records import field, numbered_lines

KEY_VARIABLE = "OPENAI_API_KEY"
_VERDICT_TOKENS = 1024  # a judge may think before it says yes or no
_DECIDING = ("judge", "key_points")  # of a question's ``more``: what the judge is told
_READING = 2  # of how a reply is read: kept scores that were read otherwise are no longer taken
_LOCK_SECONDS = 60.0  # that another process may need for one line
_TOO_MUCH = ("context_length_exceeded", "content_filter")  # codes of refusals that are of one prompt alone

# Why an answer has no score.
NO_VERDICT = "the judge's reply has no clear verdict; the same command asks again"
CUT_OFF = f"the judge's reply was cut off at {_VERDICT_TOKENS:,} tokens; the same command asks again"
REFUSED = "the judge does not take so long or such a text; the same command asks again"
NO_KEY_POINTS = "needs key points of the text, which the data does not have"

_NAME = r"(?:(?:my|the|final)\W+)*(?:answer|verdict|judge?ment)\b\W*(?:is\b\W*)?"
# "no" alone may begin a sentence ("No mention of it"), so that a mark or the end has to follow.
_BEGINS = re.compile(rf"\W*(?:{_NAME})?(?:(yes)\b|(no)\b(?=\s*(?:[^\w\s]|$)))")
_ENDS = re.compile(r"(?:^|[:={*\"'(\[]|\bis)\W*(yes|no)\W*$")
_BOTH = re.compile(r"\b(?:yes\W+(?:(?:and|or|nor)\W+)?no|no\W+(?:(?:and|or|nor)\W+)?yes)\b")

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


class _NoVerdict(Exception):
    """A reply that gives no score; its text is the reason."""


def judge(question: Question, answer: str, endpoint: Endpoint) -> float | str:
    """What the judge at ``endpoint`` makes of an answer, 0 to 1, or in a few words why it gives no score.

    The key is the environment's ``OPENAI_API_KEY``; local endpoints need none.

    Thoughts are what stands before the last ``</think>``; a reply in which they do not end, or that was cut off, has no
    verdict. Of the rest the beginning of its first and of its last line count, and its end, each with or without
    "Answer:" or the like before it: one of them has to be yes or no, and all of them that are have to be the same.
    A yes or no elsewhere ("there is no mention") does not count, and "yes and no" is none.

    Args:
        question: ``more["judge"]`` is its kind, one of ``KINDS``.
        answer: of the model that is judged.

    Raises:
        ArgumentError: a question of no such kind.
        MissingPackageError: there is no package openai.
        StateError: the endpoint could not be reached or refused; names it.
    """
    kind = question.more.get("judge")
    check_choice(kind, f"judge: the kind of question {question.id}", KINDS)
    if kind == "summary" and not question.more.get("key_points"):
        return NO_KEY_POINTS
    if not answer.strip():
        return 0.0
    try:
        return (_summary if kind == "summary" else _verdict)(question, answer.strip(), endpoint)
    except _NoVerdict as reason:
        return str(reason)


def _verdict(question: Question, answer: str, endpoint: Endpoint) -> float:
    instruction, label = _YES_OR_NO[question.more["judge"]]
    given = {"question": question.query or question.text, "accepted": " or ".join(question.answers)}
    reply = _reply(endpoint, instruction + _ASK.format(**given, label=label, answer=answer, end=_END)).lower()
    lines = [line for line in reply.splitlines() if line.strip()]
    found = [_BEGINS.match(lines[0]), _BEGINS.match(lines[-1]), _ENDS.search(lines[-1])]
    said = {next(filter(None, match.groups())) for match in found if match}
    if len(said) != 1 or _BOTH.search(reply):
        raise _NoVerdict(NO_VERDICT)
    return float(said == {"yes"})


def _summary(question: Question, answer: str, endpoint: Endpoint) -> float:
    points = question.more["key_points"]
    given = {
        "answer": answer,
        "accepted": question.answers[0],
        "key_points": "\n".join(f"{i}. {point}" for i, point in enumerate(points, 1)),
    }
    found: dict[str, Any] = {}
    for name, text in _SUMMARY.items():
        wanted = (name, "sentence_count") if name == "precision" else (name,)
        found |= _numbers(_reply(endpoint, text.format(**given)), wanted)
    recall = min(1.0, found["recall"] / len(points))
    precision = min(1.0, found["precision"] / found["sentence_count"]) if found["sentence_count"] else 0.0
    both = recall + precision
    return min(1.0, found["fluency"]) * 2 * recall * precision / both if both else 0.0


def _numbers(reply: str, wanted: tuple[str, ...]) -> dict[str, float]:
    """The wanted numbers of the last JSON object in a reply."""
    try:
        value = json.loads(re.findall(r"\{[^{}]*\}", reply)[-1])
        found = {name: float(value[name]) for name in wanted}
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        found = {}
    if not found or not all(0 <= number < float("inf") for number in found.values()):
        raise _NoVerdict(NO_VERDICT)
    return found


def _reply(endpoint: Endpoint, text: str) -> str:
    """What the endpoint's model says to ``text``, without its thoughts."""
    require(("openai",), "judge")
    import openai

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
        said, end = made.choices[0].message.content or "", made.choices[0].finish_reason
    except openai.OpenAIError as error:
        if getattr(error, "code", None) in _TOO_MUCH:
            raise _NoVerdict(REFUSED) from error
        raise StateError(_trouble(endpoint, f"{endpoint.model}: {error}", key)) from _without(key, error)
    except (AttributeError, IndexError, TypeError, ValueError) as error:  # JSON of another shape, or none
        trouble = _trouble(endpoint, f"not a reply of OpenAI's API: {error}", key)
        raise StateError(trouble) from _without(key, error)
    if end == "length":
        raise _NoVerdict(CUT_OFF)
    said = said.rpartition("</think>")[2].strip()  # templates may begin the thoughts, so that only their end is said
    if not said or "<think>" in said:
        raise _NoVerdict(NO_VERDICT)
    return said


def _without(key: str, error: Exception) -> Exception | None:
    """What an error came from, for its traceback; None where the key stands in it, as some endpoints repeat it."""
    return None if key != "none" and key in f"{error!r}{error}" else error


def _trouble(endpoint: Endpoint, reason: str, key: str) -> str:
    """An error's text, in which no key stands, not even a part of one that shortening would leave."""
    text = f"judge: {endpoint.url}: {shortened(reason if key == 'none' else reason.replace(key, '…'), 200)}"
    return f"{text}; answers and scores so far are kept, and the same command goes on from there"


def keeping(endpoint: Endpoint, path: Path) -> Callable[[Question, str], float | str]:
    """``judge`` at an endpoint, whose scores are kept in a JSON lines file, so that nothing is judged twice.

    A score is taken from the file where question, accepted answers, key points, answer, kind and the judge's model are
    the same. What got no score is not kept, so that it is asked again.

    Args:
        path: of the file, beside the answers; made with the first score, and only added to: several processes may.
            Until then nothing there is changed.

    Raises:
        MissingPackageError: there is no package openai.
        FileAccessError, FileFormatError: the file cannot be read; a last line that a killed process left unfinished is
            passed over, and cut off before the next score is added.
    """
    require(("openai",), "judge")
    known: dict[str, float] = {}
    if path.exists():
        data = read_bytes(path, "kept scores")
        for number, line in numbered_lines(data[: data.rfind(b"\n") + 1], path, "kept scores"):
            where = f"kept scores: {path}: line {number}"
            score = field(line, "score", (int, float), where)
            if not 0 <= score <= 1:
                raise FileFormatError(f"{where}: 'score': got {shown(score)}, allowed 0 to 1")
            known[field(line, "key", str, where)] = float(score)

    def judged(question: Question, answer: str) -> float | str:
        key = _key(question, answer, endpoint)
        if key not in known:
            found = judge(question, answer, endpoint)
            if isinstance(found, str):
                return found
            _keep(path, {"id": question.id, "score": found, "judge": endpoint.model, "key": key})
            known[key] = found
        return known[key]

    return judged


def _keep(path: Path, line: dict[str, Any]) -> None:
    """Add a line, alone in the file: half a line that is there then is a dead process's."""
    late = f"kept scores: {path}: another process has it locked"
    with naming_files("kept scores", path):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        with closed_afterwards(open_lock(path, "kept scores", flags)) as file:
            locked = HAS_LOCKS and lock_until(time.monotonic() + _LOCK_SECONDS, file, 0.05, late)
            try:
                data = path.read_bytes()
                if not data.endswith(b"\n"):
                    os.ftruncate(file, data.rfind(b"\n") + 1)
                with open(file, "ab", closefd=False) as appended:
                    appended.write(json.dumps(line).encode() + b"\n")
            finally:
                if locked:
                    unlock(file)


def _key(question: Question, answer: str, endpoint: Endpoint) -> str:
    asked = (question.id, question.text, question.query, question.answers, *map(question.more.get, _DECIDING))
    return hashlib.sha256(json.dumps((_READING, *asked, answer, endpoint.model)).encode()).hexdigest()
