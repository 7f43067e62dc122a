"""Our benchmarks as tasks of lm-evaluation-harness, for any of its models: ``hf``, ``vllm``, an API, ``deltamem``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from ..errors import ArgumentError
from .data import Document, Question, Task

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

PREFIX = "deltamem_"  # of the names that lm_eval knows our tasks by
_KEY = "deltamem_task"  # in a doc of ours: under what its task was opened


@dataclass(frozen=True)
class _Opened:
    """What a task of lm_eval's that is ours was made of."""

    task: Task
    documents: dict[str, Document]
    questions: dict[str, Question]


# lm_eval's docs are small and many, documents large and few: a doc names its document, which is looked up here, as long
# as lm_eval's task is there.
_OPENED: WeakValueDictionary[str, _Opened] = WeakValueDictionary()
_NUMBERS = count(1)


def harness_task(
    task: Task, data: Path | None = None, *, documents: Sequence[Document] | None = None
) -> ConfigurableTask:
    """A benchmark of ours as lm_eval's, to be handed to ``lm_eval.simple_evaluate(tasks=[…])``.

    Its name is ``deltamem_`` and that of the task. Each question is a request of its own: the whole document in the
    task's prompt, answered greedily. The score is the task's, its mean is reported as the task's metric, that of each
    category as metric and category, joined by ``_``, and as ``overall`` what the benchmark is known by, where that is
    another mean (NaN = a part of it has no score). A question that only a judge can score is left out of all.

    Args:
        data: a local file or directory; None = where the task has it from.
        documents: loaded already; ``data`` is not read then.

    Raises:
        ValueError, OSError: of ``task.load``; or there is no question, or two documents or questions have one id.
        ImportError: lm_eval is not installed.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = task.load(data) if documents is None else list(documents)
    asked = [question for document in documents for question in document.questions]
    if not asked:
        raise ArgumentError(f"documents: {task.name}: got no question, allowed one or more")
    for what, ids in (("documents", [one.id for one in documents]), ("questions", [one.id for one in asked])):
        twice = [id for id, times in Counter(ids).items() if times > 1]
        if twice:
            raise ArgumentError(f"documents: {task.name}: got two {what} with the id {twice[0]!r:.80}, allowed one")
    questions = {question.id: question for question in asked}
    key = f"{task.name} {next(_NUMBERS)}"  # another call may have other documents
    opened = _Opened(task, {document.id: document for document in documents}, questions)
    _OPENED[key] = opened
    docs = [
        {_KEY: key, "document": document.id, "question": question.id, "answers": list(question.answers)}
        for document in documents
        for question in document.questions
    ]
    categories = dict.fromkeys(question.category for question in questions.values() if question.category)
    names = [task.metric, *(f"{task.metric}_{category}" for category in categories)]
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
    if task.overall is not None:
        metrics.append({"metric": "overall", "aggregation": partial(_overall, task), "higher_is_better": True})
    config = {
        "task": PREFIX + task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": prompt_of,
        "doc_to_target": _target_of,
        "process_results": _scores_of,
        "metric_list": metrics,
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": task.new_tokens},
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }

    class OurTask(ConfigurableTask):
        deltamem = opened  # which is known as long as this task is

        def construct_requests(self, doc, ctx, **options):
            request = super().construct_requests(doc, ctx, **options)
            if self.config.generation_kwargs.get("max_gen_toks") == task.new_tokens:  # nobody wants it otherwise
                request.arguments[1]["max_gen_toks"] = task.new_tokens_of(questions[doc["question"]])
            return request

    return OurTask(config=config)


def is_ours(doc: Any) -> bool:
    """Whether a request's ``doc`` is a question of ``harness_task``."""
    return isinstance(doc, Mapping) and doc.get(_KEY) in _OPENED


def question_of(doc: Mapping[str, Any]) -> tuple[Task, Document, Question]:
    """What a request's ``doc`` of ours stands for."""
    opened = _OPENED[doc[_KEY]]
    return opened.task, opened.documents[doc["document"]], opened.questions[doc["question"]]


def by_document(
    places: Sequence[int], requests: Sequence[Any]
) -> Iterator[tuple[list[int], Task, list[Document], int]]:
    """Requests of ours that are answered together: their places, the task, its documents, tokens of an answer (or 0).

    A document has those of its questions that are asked.

    Args:
        places: in ``requests``, of the ones meant.
    """
    together: dict[tuple[str, int], list[int]] = {}
    for place in places:
        doc, options = requests[place].doc, requests[place].args[1]
        together.setdefault((doc[_KEY], int(options.get("max_gen_toks", 0))), []).append(place)
    for (key, tokens), some in together.items():
        opened = _OPENED[key]
        asked = {requests[place].doc["question"] for place in some}
        cut = [
            replace(document, questions=tuple(one for one in document.questions if one.id in asked))
            for document in opened.documents.values()
        ]
        yield some, opened.task, [document for document in cut if document.questions], tokens


def prompt_of(doc: Mapping[str, Any]) -> str:
    """The task's prompt with the whole document in it."""
    task, document, question = question_of(doc)
    return task.prompt_with(task.between.join(document.parts), question.text)


def fields_of(doc: Any) -> Mapping[str, str] | None:
    """Where ``prompt_parts`` finds the document of a prompt of ours; None: the request is of another's task."""
    if not is_ours(doc):
        return None
    task, document, question = question_of(doc)
    return {"document": task.between.join(document.parts), "query": question.query or question.text}


def _target_of(doc: Mapping[str, Any]) -> str:
    return "; ".join(doc["answers"])


def _scores_of(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    task, _, question = question_of(doc)
    score = task.score(question, results[0])
    if score is None:
        return {}
    found: dict[str, Any] = {task.metric: score}
    if question.category:
        found[f"{task.metric}_{question.category}"] = score
    if task.overall is not None:
        found["overall"] = (question.category, score)
    return found


def _overall(task: Task, scores: Sequence[tuple[str, float]]) -> float:
    by_category: dict[str, list[float]] = {}
    for category, score in scores:
        by_category.setdefault(category, []).append(score)
    figure = task.overall(by_category)["overall"]
    return float("nan") if figure is None else figure
