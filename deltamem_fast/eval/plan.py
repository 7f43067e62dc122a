"""What an evaluation runs: a model, tasks, policies, adapters, and how much of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import check_integer
from ..errors import ArgumentError
from ..model.libraries import require
from .answering import Settings
from .paper import PAPER_TASKS, check_hub, check_packages, check_rows
from .policies import Policy
from .report_tables import NO_MEMORY, row_name
from .tasks import TASKS

FLAGS = {"batch": "batch_size", "chunk_tokens": "retrieval_chunk"}  # settings that the command line calls otherwise


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

    def labels(self) -> tuple[str, ...]:
        """Of the memories, without one first."""
        return (*((NO_MEMORY,) if self.frozen else ()), *self.adapters)

    def rows(self) -> list[str]:
        """Their names."""
        return [row_name(policy.name, label) for label in self.labels() for policy in self.policies]

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
                raise ArgumentError(f"task: got {name!r:.80}, allowed {', '.join((*TASKS, *PAPER_TASKS))}")
        for label in self.adapters:
            if not label.replace("-", "").replace("_", "").isalnum() or label == NO_MEMORY:
                raise ArgumentError(
                    f"adapter: label: got {label!r:.80}, allowed letters, digits, - and _, not {NO_MEMORY!r:.80}"
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
                elif not PAPER_TASKS[name].made:
                    check_hub(name)
