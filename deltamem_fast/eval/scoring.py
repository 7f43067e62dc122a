"""Scores of answers that are already there: no model is needed, and anyone can check or repeat them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..display import counted, without_surrogates
from ..errors import ArgumentError, FileFormatError, StateError
from .answers import read_answer_file
from .data import Document, Question, Task
from .metrics import mean
from .tasks import digest_of

# A question and an answer to it → 0 to 1, or a text, why there is no score: judge.keeping(endpoint, path), or any
# function of one's own.
Judge = Callable[[Question, str], float | str]
_ONLY_A_JUDGE = "only a judge can tell"


def read_answers(path: Path) -> dict[str, str]:
    """Question id → answer, from a JSON lines file with an object ``id``, ``answer`` a line; other keys are let be.

    So are the first line of a file that a run of ours wrote, which says what answered, and a last line there that the
    run was killed in.

    Raises:
        FileMissingError, FileAccessError: it cannot be read.
        FileFormatError: a line is no such object, or has the id of an earlier one; names the line. Or there is none.
    """
    answers = read_answer_file(path, "answers")[1]
    if not answers:
        raise FileFormatError(f"answers: {path}: holds no answer, allowed an object with id and answer a line")
    return {id: without_surrogates(answer.answer) for id, answer in answers.items()}


def score_answers(
    task: Task, documents: Sequence[Document], answers: Mapping[str, str], judge: Judge | None = None
) -> dict[str, Any]:
    """What answers are worth, as a JSON object.

    Args:
        documents: of ``task.load``, or some of them.
        answers: question id → answer. Questions without one are counted as missing and left out of every figure but
            ``missing_as_zero``.
        judge: scores the questions that name a kind of judgement (``more["judge"]``) and need nothing else, in place of
            ``task.score``; a text from it is the reason why one has no score.

    Returns:
        ``task``, ``title``, ``notes`` of the task, and ``metric``, which says what a judge has scored; ``data``, the
        SHA-256 of the documents; ``questions``, ``answered``, ``missing``, ``judged`` and ``unscored``, counts;
        ``unscored_for``, reason → count; ``complete``, whether every question has a score, without which ``overall`` is
        of those that have; ``overall``, the task's figures by name (0 to 1, or None); ``missing_as_zero``, the same
        figures, each missing answer scored 0; ``categories``, category → ``questions``, ``answered``, ``scored`` and
        ``mean``; ``scores``, question id → 0 to 1, or None where an answer could not be scored.

    Raises:
        ArgumentError: an answer to no question of ``documents``, two questions of one id, or no answer at all.
        StateError: a judge's trouble; the scores that it has kept are kept.
    """
    questions = [question for document in documents for question in document.questions]
    known = {question.id: question for question in questions}
    if len(known) < len(questions):
        raise ArgumentError("documents: two questions have one id")
    for one in answers:
        if one not in known:
            raise ArgumentError(
                f"answers: got one to {one!r:.120}, allowed those to {counted(len(known), 'question')} of {task.name}, "
                f"such as {next(iter(known), '')!r:.80}"
            )
    if not answers:
        raise ArgumentError("answers: got none, allowed one or more")
    scores: dict[str, float | None] = {}
    reasons: dict[str, int] = {}
    judged = 0
    for question in questions:
        if question.id not in answers:
            continue
        by_judge = judge is not None and "judge" in question.more and "needs" not in question.more
        given = (judge if by_judge else task.score)(question, answers[question.id])
        reason = _ONLY_A_JUDGE if "needs" not in question.more else f"needs {question.more['needs']}"
        if isinstance(given, str):
            given, reason = None, given
        if given is not None and not (math.isfinite(given) and 0 <= given <= 1):
            raise StateError(f"score of {question.id}: got {given!r}, allowed 0 to 1")
        scores[question.id] = given
        judged += by_judge and given is not None
        if given is None:
            reasons[reason] = reasons.get(reason, 0) + 1
    by_category = _by_category(questions, scores)
    zeros = {one.id: 0.0 for one in questions if one.id not in answers}
    return {
        "task": task.name,
        "title": task.title,
        "metric": f"a judge's verdict for {judged} of {len(scores)}, else {task.metric}" if judged else task.metric,
        "notes": list(task.notes),
        "data": digest_of(documents),
        "questions": len(questions),
        "answered": len(scores),
        "missing": len(zeros),
        "complete": len(scores) == len(questions) and not reasons,
        "judged": judged,
        "unscored": sum(reasons.values()),
        "unscored_for": reasons,
        "overall": _figures(task, by_category),
        "missing_as_zero": _figures(task, _by_category(questions, scores | zeros)),
        "categories": {
            category: {
                "questions": sum(one.category == category for one in questions),
                "answered": sum(one.category == category and one.id in scores for one in questions),
                "scored": len(values),
                "mean": mean(values),
            }
            for category, values in by_category.items()
        },
        "scores": scores,
    }


def _by_category(questions: Sequence[Question], scores: Mapping[str, float | None]) -> dict[str, list[float]]:
    """The scores that there are, by category, in the order of the questions; every category is there."""
    found: dict[str, list[float]] = {question.category: [] for question in questions}
    for question in questions:
        given = scores.get(question.id)
        if given is not None:
            found[question.category].append(given)
    return found


def _figures(task: Task, scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    if task.overall is not None:
        return task.overall(scores)
    return {"overall": mean(value for values in scores.values() for value in values)}
