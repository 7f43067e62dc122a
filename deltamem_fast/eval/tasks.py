"""The benchmarks of ours, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from ..arguments import check_choice
from . import agent_bench, changes, locomo, longmemeval
from .data import Document, Task

TASKS = {
    task.name: task
    for task in (
        locomo.TASK,
        agent_bench.TASK,
        agent_bench.AS_PAPER,
        longmemeval.TASK,
        changes.TASK,
        changes.SMALL_TASK,
    )
}


def task_named(name: str) -> Task:
    """The benchmark called so.

    Raises:
        ArgumentError: there is none; names those there are.
    """
    check_choice(name, "task", TASKS)
    return TASKS[name]


def digest_of(documents: Sequence[Document]) -> str:
    """SHA-256 over ids, parts, questions and accepted answers, in hexadecimal: the same for the same data alone."""
    digest = hashlib.sha256()
    for document in documents:
        asked = [(one.id, one.text, one.answers, one.category) for one in document.questions]
        digest.update(json.dumps((document.id, document.parts, asked)).encode() + b"\n")
    return digest.hexdigest()
