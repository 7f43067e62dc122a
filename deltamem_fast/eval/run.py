"""``deltamem eval run``: every task under every policy, without a memory and with each adapter, into one directory.

Each row's answers are on disk as soon as they are there; a run that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from deltamem_kernels.dispatch import resolve_backend

from ..adapter.files import AdapterSource, read_adapter
from ..display import counted
from ..errors import ArgumentError, StateError
from ..model.libraries import one_line
from ..model.loading import device_for, found_model, load_model, usable_device
from ..model.patch import patch_model, unpatch_model
from ..model.threads import fitting_threads
from ..storage.files import make_directory, naming_files, read_json, write_json
from ..storage.locks import HAS_LOCKS, closed_afterwards, lock_until
from .answering import DoesNotFit, answer_documents
from .answers import Answer, AnswerFile, read_answer_file
from .checking import verify
from .data import Document, Task
from .defaults import EMBEDDER
from .extension import extended, trained_length
from .paper import PAPER_TASKS, open_task
from .plan import Plan
from .policies import Policy, policy_named
from .record import VERIFIED, Record, common_facts, read_before
from .report import write_report
from .report_tables import NO_MEMORY, row_name
from .retrieval import load_embedder
from .scoring import Judge, score_answers
from .tasks import TASKS
from .telling import Remembered, window_for, windows_of

VERIFIED_QUESTIONS = 4  # of each document


def run(
    plan: Plan,
    *,
    judge: Judge | None = None,
    say: Callable[[str], None] = lambda text: None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Run a plan, or what of it is left to run, and write its report.

    Args:
        judge: of questions that only a judge can score.
        say: told what is being done.
        measured: what a caller knows of where it runs (processor, commit), for the record.

    Returns:
        The report's files by name.

    Raises:
        ValueError, OSError, ImportError: naming the argument; what was answered until then is kept.
    """
    plan.check()
    device = device_for(plan.backend) if plan.device is None else usable_device(plan.device)
    resolve_backend(plan.backend, device.type)
    found_model(plan.model)
    sources = {label: read_adapter(name) for label, name in plan.adapters.items()}
    if any(policy.kind == "dense" for policy in plan.policies):
        load_embedder(plan.settings.embedder or EMBEDDER)
    documents = {name: _chosen(plan, TASKS[name], path) for name, path in plan.tasks if name in TASKS}
    for name, found in documents.items():  # what scoring needs is missing before hours are spent, or never
        score_answers(TASKS[name], found, {question.id: "" for one in found[:1] for question in one.questions})
    common = common_facts(plan, documents)
    read_before(plan.output / "run.json", common, plan.judge)
    options = {"device": device, "dtype": plan.dtype, "attention": plan.attention, "quiet": True}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone_in(plan.output))
        model, tokenizer = load_model(plan.model, **options)
        stack.enter_context(fitting_threads(model, plan.threads))
        _check_loaded(plan, model, tokenizer, sources)
        record = Record(plan, model, common, measured or {})
        for label in plan.labels():
            with _reported(plan.output), _patched(model, sources.get(label), plan.backend):
                _Rows(plan, model, tokenizer, label, documents, record).run(say)
        if judge is not None:
            with _reported(plan.output):
                _judge_rows(plan, documents, judge, say)
        return write_report(plan.output)


@contextlib.contextmanager
def _reported(output: Path) -> Iterator[None]:
    """An error leaves a report: what was answered until then is worth a look."""
    try:
        yield
    except Exception:
        write_report(output)
        raise


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Inside, a directory is there, and no other run writes into it; WaitedTooLongError if one does.

    One that was made, and has nothing in it when an error ends the run, is gone afterwards.
    """
    made = not directory.exists()
    make_directory(directory)
    late = f"output: {directory}: another run writes into it; wait for it, or give another --output"
    with contextlib.ExitStack() as stack:
        if made:
            stack.push(lambda kind, *_: kind and _remove_empty(directory))
        if HAS_LOCKS:
            with naming_files("output", directory):
                lock = os.open(directory, os.O_RDONLY)
            stack.enter_context(closed_afterwards(lock))
            lock_until(time.monotonic(), lock, 0.0, late)
        yield


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # something is in it
        directory.rmdir()


@contextlib.contextmanager
def _patched(model: nn.Module, source: AdapterSource | None, backend: str) -> Iterator[None]:
    if source is None:
        yield
        return
    patch_model(model, source, backend=backend)
    try:
        yield
    finally:
        unpatch_model(model)


def _check_loaded(plan: Plan, model: nn.Module, tokenizer, sources: Mapping[str, AdapterSource]) -> None:
    """Raise for what only the loaded model can tell, before its first row: an adapter, a window, yarn."""
    if plan.settings.window > trained_length(model):
        raise ArgumentError(
            f"window: got {plan.settings.window:,}, allowed at most what the model was trained on, "
            f"{trained_length(model):,}, or 0"
        )
    if any(policy.kind == "yarn" for policy in plan.policies):
        with extended(model, trained_length(model) + 1):
            pass
    for source in sources.values():
        with _patched(model, source, plan.backend):
            windows_of(
                model, tokenizer, ["A sentence that is told.", "Another."], window_for(model, plan.settings.window)
            )


def _chosen(plan: Plan, task: Task, path: Path | None) -> list[Document]:
    """The documents and questions of a task that are run, in the data's order."""
    found = task.load(path)[: plan.documents]
    if plan.questions is None:
        return found
    chosen = []
    for document in found:
        places = range(len(document.questions))
        drawn = Random(f"{plan.seed} {document.id}").sample(places, min(plan.questions, len(places)))
        chosen.append(replace(document, questions=tuple(document.questions[place] for place in sorted(drawn))))
    return chosen


# --- the rows


@dataclass(frozen=True)
class _Rows:
    """The rows of one model, patched or bare."""

    plan: Plan
    model: nn.Module
    tokenizer: Any
    label: str
    documents: dict[str, list[Document]]
    record: Record

    def run(self, say: Callable[[str], None]) -> None:
        """All of them, task by task."""
        for name, path in self.plan.tasks:
            remembered: dict[str, Remembered] = {}
            for policy in self.plan.policies:
                with self._memory_left(name, policy):
                    if name in TASKS:
                        self._ours(TASKS[name], policy, remembered, say)
                    else:
                        self._harness(name, path, policy, say)

    @contextlib.contextmanager
    def _memory_left(self, task: str, policy: Policy) -> Iterator[None]:
        """An error of too little memory says of which row, and what helps."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            batch, row = self.plan.settings.batch, row_name(policy.name, self.label)
            raise StateError(
                f"{task} {row}: out of memory with batch_size {batch}; the same command with a smaller --batch-size, "
                f"or without this policy, goes on ({one_line(error)})"
            ) from error

    def _ours(self, task: Task, policy: Policy, remembered: dict, say) -> None:
        row, documents = row_name(policy.name, self.label), self.documents[task.name]
        head = self.record.head(task.name, row, policy, self.model)
        options = {"memory": self.label != NO_MEMORY, "settings": self.plan.settings}
        with AnswerFile(self.plan.output / "answers" / task.name / f"{row}.jsonl", head) as file:
            left = {one.id: sum(asked.id not in file.answers for asked in one.questions) for one in documents}
            too_long: dict[str, str] = {}

            def leave_out(document: Document, error: DoesNotFit) -> None:
                too_long[document.id] = str(error)
                bar.update(left[document.id])

            with _bar(sum(left.values()), f"{task.name} {row}") as bar:

                def keep(answer: Answer) -> None:
                    file.append(answer)
                    bar.update()

                answer_documents(
                    self.model, self.tokenizer, task, documents, policy, keep=keep, remembered=remembered,
                    leave_out=leave_out, skip=set(file.answers), **options,
                )  # fmt: skip
            if too_long:
                reason = (
                    f"{len(too_long)} of {len(documents)} documents, such as {': '.join(next(iter(too_long.items())))}"
                )
                self.record.leave_out(task.name, row, reason)
                say(f"{task.name} {row}: left out: {reason}")
            if not file.answers:
                return
            answers = {id: answer.answer for id, answer in file.answers.items()}
            if not _is_scored(self.plan, task.name, row, answers):
                write_scores(self.plan.output, task, documents, row, answers)  # a judge comes when all is answered
            say(f"{task.name} {row}: {len(answers):,} answers")
            fits = [document for document in documents if document.id not in too_long]
            self._verify(task, row, policy, fits[: self.plan.verify], options, say)

    def _verify(self, task: Task, row: str, policy: Policy, documents: list[Document], options, say) -> None:
        """Unless an earlier run into this directory has looked at as many documents, and they were equal.

        What did not hold stands until as many documents are looked at again.
        """
        before = self.record.found[VERIFIED].get(task.name, {}).get(row, {"documents": 0, "holds": True})
        enough = before["documents"] >= len(documents) if before["holds"] else before["documents"] > len(documents)
        if enough:
            return
        some = [replace(document, questions=document.questions[:VERIFIED_QUESTIONS]) for document in documents]
        found = verify(self.model, self.tokenizer, task, some, policy, **options)
        self.record.verified(task.name, row, found)
        if not found.holds:
            say(f"{task.name} {row}: chunks, batches and padding do not equal plain forwards: {found}")

    def _harness(self, name: str, path: Path | None, policy: Policy, say) -> None:
        from .harness_run import harness_row  # lm_eval takes seconds to import

        if not PAPER_TASKS[name].document:  # all policies are the same: nothing stands beside the prompt
            if policy != self.plan.policies[0]:
                return
            policy = policy_named("nothing")
        row = row_name(policy.name, self.label)
        task, data = open_task(name, path, self.tokenizer, seed=self.plan.seed)
        head = self.record.head(name, row, policy, self.model, data=data)
        with AnswerFile(self.plan.output / "answers" / name / f"{row}.jsonl", head) as file:
            scores = harness_row(
                self.model, self.tokenizer, name, task, policy, file, pretrained=self.plan.model,
                settings=self.plan.settings, seed=self.plan.seed, limit=self.plan.questions,
            )  # fmt: skip
        write_json(self.plan.output / "scores" / name / f"{row}.json", scores)
        say(f"{name} {row}: {len(file.answers):,} answers")


def _judge_rows(plan: Plan, documents: Mapping[str, list[Document]], judge: Judge, say: Callable[[str], None]) -> None:
    """Score all rows of the plan's tasks by its judge, those of earlier runs, too: a table has one judge."""
    for name, found in documents.items():
        for path in sorted((plan.output / "answers" / name).glob("*.jsonl")):
            answers = {id: one.answer for id, one in read_answer_file(path)[1].items()}
            if answers and not _is_scored(plan, name, path.stem, answers):
                write_scores(plan.output, TASKS[name], found, path.stem, answers, judge, plan.judge)
                say(f"{name} {path.stem}: judged by {plan.judge}")


def _is_scored(plan: Plan, task: str, row: str, answers: Collection[str]) -> bool:
    """Whether a row has scores by the plan's judge of just these answers, and each has one."""
    path = plan.output / "scores" / task / f"{row}.json"
    if plan.judge is None or not path.exists():
        return False
    found = read_json(path)
    scores = found.get("scores")
    if not isinstance(scores, dict):
        return False
    return found.get("judge") == plan.judge and scores.keys() == set(answers) and None not in scores.values()


def write_scores(
    output: Path,
    task: Task,
    documents: Sequence[Document],
    row: str,
    answers: Mapping[str, str],
    judge: Judge | None = None,
    judge_name: str | None = None,
) -> dict[str, Any]:
    """Score a row's answers and write ``scores/TASK/ROW.json``; returns what ``score_answers`` does."""
    found = score_answers(task, documents, answers, judge)
    asked = [(document, question) for document in documents for question in document.questions]
    scores = {
        "scores": {question.id: found["scores"].get(question.id) for _, question in asked if question.id in answers},
        "categories": {question.id: question.category for _, question in asked},
        "documents": {question.id: document.id for document, question in asked},
        "apart": sorted(question.id for _, question in asked if question.category in task.apart),
        "metric": found["metric"],
        "title": task.title,
        "judge": judge_name,
        "notes": [*task.notes, *_unscored(found)],
        "aggregate": {name: value for name, value in found["overall"].items() if value is not None},
    }
    write_json(output / "scores" / task.name / f"{row}.json", scores)
    return found


def _unscored(found: Mapping[str, Any]) -> list[str]:
    """A note of answers that have no score, and why."""
    return [
        f"{counted(count, 'answer')} of a row without a score: {why}." for why, count in found["unscored_for"].items()
    ]


def _bar(total: int, title: str):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="question", disable=not sys.stderr.isatty(), leave=False)
