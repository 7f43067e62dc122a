"""``deltamem eval run``: every task under every policy, without a memory and with each adapter, into one directory.

Each row's answers are on disk as soon as they are there; a run that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from deltamem_kernels.dispatch import resolve_backend

from ..adapter.files import AdapterSource, read_adapter
from ..adapter.record import identity_of, is_patched
from ..arguments import check_integer, shown
from ..display import counted
from ..errors import ArgumentError
from ..inspection.facts import versions
from ..memory.telling import WRITE_TOKENS
from ..model.libraries import require
from ..model.loading import device_for, found_model, load_model, usable_device
from ..model.patch import patch_model, unpatch_model
from ..model.threads import fitting_threads
from ..storage.files import check_format, check_version, make_directory, read_bytes, read_json, write_json
from .answering import DoesNotFit, Remembered, Settings, answer_documents
from .answers import Answer, AnswerFile, differing
from .checking import Equality, verify
from .data import Document, Task
from .extension import extended, trained_length
from .paper import PAPER_TASKS, check_packages, check_rows
from .policies import Policy
from .report import write_report
from .report_tables import NO_MEMORY
from .retrieval import MODEL as EMBEDDER
from .retrieval import load_embedder
from .scoring import Judge, score_answers
from .tasks import TASKS, digest_of
from .telling import windows_of

RUN_FORMAT, RUN_VERSION = "deltamem evaluation run", 1
VERIFIED = "verified"
VERIFIED_QUESTIONS = 4  # of each document
FLAGS = {"batch": "batch_size", "chunk_tokens": "retrieval_chunk"}  # settings that the command line calls otherwise
_PACKAGES = ("lm_eval", "bm25s", "nltk", "sentence-transformers")


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        model: a directory, a hub id or a known name.
        output: the run's directory.
        tasks: names with the file of their data, or None = where the task has it from.
        policies: of the rows.
        adapters: label → a directory, hub id or shipped name; the label stands behind the + of a row's name.
        frozen: rows without a memory, too.
        documents, questions: how many of a task, and of each document (drawn by ``seed``); None = all.
        verify: documents of each row that are compared with plain forwards, up to ``VERIFIED_QUESTIONS`` of each.
        settings: how documents are told and questions asked.
        judge: the name of the model that judges, for the record.
        shown: what records call the model or an adapter that lies in the package, by its path.
        device, dtype, backend, attention, threads: see ``load_model``, ``patch_model`` and ``fitting_threads``.
    """

    model: str
    output: Path
    tasks: tuple[tuple[str, Path | None], ...]
    policies: tuple[Policy, ...]
    adapters: dict[str, str] = field(default_factory=dict)
    frozen: bool = True
    documents: int | None = None
    questions: int | None = None
    seed: int = 0
    verify: int = 0
    settings: Settings = field(default_factory=Settings)
    judge: str | None = None
    shown: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    dtype: str = "auto"
    backend: str = "auto"
    attention: str | None = None
    threads: int | None = None

    def check(self) -> None:
        """Raise ValueError, naming the argument, for what is out of range, twice there, or has nothing to run."""
        for name in ("documents", "questions"):
            check_integer(getattr(self, name), name, 1, or_none=True)
        check_integer(self.verify, "verify", 0)
        for name, least in (("window", 0), ("chunk", 1), ("batch", 1), ("chunk_tokens", 1), ("new_tokens", 0)):
            check_integer(getattr(self.settings, name), FLAGS.get(name, name), least)
        for name, values in (
            ("task", [name for name, _ in self.tasks]), ("policy", [policy.name for policy in self.policies]),
        ):  # fmt: skip
            if not values or len(set(values)) < len(values):
                raise ArgumentError(f"{name}: got {', '.join(values) or 'none'}, allowed one or more, each once")
        for name, _ in self.tasks:
            if name not in TASKS and name not in PAPER_TASKS:
                raise ArgumentError(f"task: got {name!r}, allowed {', '.join((*TASKS, *PAPER_TASKS))}")
        for label in self.adapters:
            if not label.replace("-", "").replace("_", "").isalnum() or label == NO_MEMORY:
                raise ArgumentError(
                    f"adapter: label: got {label!r}, allowed letters, digits, - and _, not {NO_MEMORY!r}"
                )
        if not self.frozen and not self.adapters:
            raise ArgumentError("adapter: got none without the frozen rows, allowed one or more")
        for kind, package in (("bm25", "bm25s"), ("dense", "sentence_transformers")):
            if any(policy.kind == kind for policy in self.policies):
                require((package,), f"policy {kind}")
        for name, path in self.tasks:
            if name in PAPER_TASKS:
                require(("lm_eval",), f"task {name}")
                check_packages(name)
                if path is not None:
                    check_rows(name, path)


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
    common = _common(plan, documents)
    _read_before(plan.output / "run.json", common)
    make_directory(plan.output)
    options = {"device": device, "dtype": plan.dtype, "attention": plan.attention, "quiet": True}
    model, tokenizer = load_model(plan.model, **options)
    with fitting_threads(model, plan.threads):
        _check_loaded(plan, model, tokenizer, sources)
        record = _Record(plan, model, common, measured or {})
        for label, source in {**({NO_MEMORY: None} if plan.frozen else {}), **sources}.items():
            try:
                with _patched(model, source, plan.backend):
                    _Rows(plan, model, tokenizer, label, documents, record).run(judge, say)
            except Exception:  # what was answered until then is worth a look
                write_report(plan.output)
                raise
    return write_report(plan.output)


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
            windows_of(model, tokenizer, ["A sentence that is told.", "Another."], plan.settings.window or WRITE_TOKENS)


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


# --- what is recorded


def _common(plan: Plan, documents: Mapping[str, Sequence[Document]]) -> dict[str, Any]:
    """What all rows of a directory have in common."""
    files = {
        name: PAPER_TASKS[name].data if path is None else hashlib.sha256(read_bytes(path, f"task {name}")).hexdigest()
        for name, path in plan.tasks
        if name in PAPER_TASKS
    }
    return {
        "model": plan.shown.get(plan.model, plan.model),
        "adapters": {label: plan.shown.get(name, name) for label, name in plan.adapters.items()},
        "documents": plan.documents,
        "questions": plan.questions,
        "seed": plan.seed,
        "settings": asdict(plan.settings),
        "data": {name: digest_of(found) for name, found in documents.items()} | files,
        "attention": plan.attention,
        "judge": plan.judge,
    }


def _read_before(path: Path, common: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` has of an earlier run into the same directory; {} = there was none.

    Raises:
        ArgumentError: it was run otherwise: rows of two models or data sets are no comparison.
    """
    if not path.exists():
        return {}
    before = read_json(path)
    check_format(before.get("format"), RUN_FORMAT, str(path), "not the record of a run")
    check_version(before.get("format_version"), RUN_VERSION, str(path))
    for name, here, there in differing(common, {key: before.get(key) for key in common}):
        added = name.partition(".")[0] in ("data", "adapters") and None in (here, there)  # a task or adapter more
        if not added and name not in ("settings.batch", "settings.chunk"):
            raise ArgumentError(
                f"{name}: got {shown(here)}, but {path} has {shown(there)}; give another --output, or what it has"
            )
    return before


class _Record:
    """run.json: what ran on what, which rows were left out and why, and what was verified."""

    def __init__(self, plan: Plan, model: nn.Module, common: dict[str, Any], measured: Mapping[str, Any]):
        self.path = plan.output / "run.json"
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        before = _read_before(self.path, common | {"dtype": dtype})
        titles = {name: TASKS[name].title if name in TASKS else PAPER_TASKS[name].title for name, _ in plan.tasks}
        device = next(model.parameters()).device
        more = {name: {**before.get(name, {}), **common[name]} for name in ("adapters", "data")}
        self.found: dict[str, Any] = {
            "format": RUN_FORMAT,
            "format_version": RUN_VERSION,
            **common,
            **more,
            "dtype": dtype,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tasks": {**before.get("tasks", {}), **titles},
            "policies": list(dict.fromkeys([*before.get("policies", []), *(policy.name for policy in plan.policies)])),
            "versions": versions() | {package: _version(package) for package in _PACKAGES},
            "backend": plan.backend,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            **measured,
            "time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "left_out": before.get("left_out", {}),
            VERIFIED: before.get(VERIFIED, {}),
        }
        self.write()

    def head(self, task: str, row: str, policy: Policy, model: nn.Module) -> dict[str, Any]:
        """Of a file of answers."""
        adapter = identity_of(model).fingerprints() if is_patched(model) else None
        deciding = ("model", "dtype", "seed", "attention")
        head = {"task": task, "row": row, "policy": policy.name, "adapter": adapter}
        head |= {name: self.found[name] for name in deciding} | {"data": self.found["data"].get(task)}
        settings = {name: value for name, value in self.found["settings"].items() if name not in ("batch", "chunk")}
        described = {name: self.found[name] for name in ("versions", "device", "threads", "time")}
        return head | {"settings": settings} | described

    def leave_out(self, task: str, row: str, reason: str) -> None:
        """Note why a row has no figures."""
        self.found["left_out"].setdefault(task, {})[row] = reason
        self.write()

    def verified(self, task: str, row: str, found: Equality) -> None:
        """Note how far a row's way of feeding lies from plain forwards."""
        self.found[VERIFIED].setdefault(task, {})[row] = asdict(found) | {"holds": found.holds}
        self.write()

    def write(self) -> None:
        """To disk."""
        write_json(self.path, self.found)


# --- the rows


@dataclass(frozen=True)
class _Rows:
    """The rows of one model, patched or bare."""

    plan: Plan
    model: nn.Module
    tokenizer: Any
    label: str
    documents: dict[str, list[Document]]
    record: _Record

    def run(self, judge: Judge | None, say: Callable[[str], None]) -> None:
        """All of them, task by task."""
        for name, path in self.plan.tasks:
            remembered: dict[str, Remembered] = {}
            for policy in self.plan.policies:
                if name in TASKS:
                    self._ours(TASKS[name], policy, remembered, judge, say)
                else:
                    self._harness(name, path, policy, say)

    def _ours(self, task: Task, policy: Policy, remembered: dict, judge: Judge | None, say) -> None:
        row, documents = f"{policy.name}+{self.label}", self.documents[task.name]
        head = self.record.head(task.name, row, policy, self.model)
        options = {"memory": self.label != NO_MEMORY, "settings": self.plan.settings}
        with AnswerFile(self.plan.output / "answers" / task.name / f"{row}.jsonl", head) as file:
            left = [_without(document, file.answers) for document in documents]
            left = [document for document in left if document.questions]
            too_long: dict[str, str] = {}

            def leave_out(document: Document, error: DoesNotFit) -> None:
                too_long[document.id] = str(error)
                bar.update(len(document.questions))

            with _bar(sum(len(document.questions) for document in left), f"{task.name} {row}") as bar:

                def keep(answer: Answer) -> None:
                    file.append(answer)
                    bar.update()

                answer_documents(
                    self.model, self.tokenizer, task, left, policy, keep=keep, remembered=remembered,
                    leave_out=leave_out, **options,
                )  # fmt: skip
            if too_long:
                reason = (
                    f"{len(too_long)} of {len(documents)} documents, such as {': '.join(next(iter(too_long.items())))}"
                )
                self.record.leave_out(task.name, row, reason)
                say(f"{task.name} {row}: left out: {reason}")
            if not file.answers:
                return
            fits = [document for document in documents if document.id not in too_long]
            self._verify(task, row, policy, fits[: self.plan.verify], options, say)
            answers = {id: answer.answer for id, answer in file.answers.items()}
        write_scores(self.plan.output, task, documents, row, answers, judge)
        say(f"{task.name} {row}: {len(answers):,} answers")

    def _verify(self, task: Task, row: str, policy: Policy, documents: list[Document], options, say) -> None:
        """Unless an earlier run into this directory has looked at as many documents, and they were equal."""
        before = self.record.found[VERIFIED].get(task.name, {}).get(row, {"documents": 0, "holds": True})
        if before["holds"] and before["documents"] >= len(documents):
            return
        some = [replace(document, questions=document.questions[:VERIFIED_QUESTIONS]) for document in documents]
        found = verify(self.model, self.tokenizer, task, some, policy, **options)
        self.record.verified(task.name, row, found)
        if not found.holds:
            say(f"{task.name} {row}: chunks, batches and padding do not equal plain forwards: {found}")

    def _harness(self, name: str, path: Path | None, policy: Policy, say) -> None:
        from .harness_run import harness_row  # lm_eval takes seconds to import

        row = f"{policy.name}+{self.label}"
        head = self.record.head(name, row, policy, self.model)
        with AnswerFile(self.plan.output / "answers" / name / f"{row}.jsonl", head) as file:
            scores = harness_row(
                self.model, self.tokenizer, name, path, policy, file, pretrained=self.plan.model,
                settings=self.plan.settings, seed=self.plan.seed, limit=self.plan.questions,
            )  # fmt: skip
        write_json(self.plan.output / "scores" / name / f"{row}.json", scores)
        say(f"{name} {row}: {len(file.answers):,} answers")


def write_scores(
    output: Path, task: Task, documents: Sequence[Document], row: str, answers: dict[str, str], judge: Judge | None
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _without(document: Document, answered) -> Document:
    return replace(document, questions=tuple(one for one in document.questions if one.id not in answered))


def _bar(total: int, title: str):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="question", disable=not sys.stderr.isatty(), leave=False)
