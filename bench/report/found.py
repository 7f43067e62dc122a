"""The newest results, and where the pictures of them lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamem_fast.storage.files import read_json

from ..instrument import machine, results
from ..instrument.results import Result
from ..instrument.rows import Row
from .evaluation import found_runs

PICTURES = machine.ROOT / "docs" / "results" / "plots"


@dataclass(frozen=True)
class Found:
    """The newest results: of each machine (GPUs first), and of the other benchmarks; None: not measured yet."""

    machines: Sequence[Result] = ()
    emulated: Result | None = None
    operators: Result | None = None
    sessions: Result | None = None
    bank: Result | None = None
    recall: Result | None = None
    released: Result | None = None
    trust: Result | None = None
    trust_before: Result | None = None  # with the small adapters from before they were made to last
    guard: Result | None = None
    smollm2: Sequence[Result] = ()  # one a part, and one a part of adapters that were measured by themselves
    vllm: Result | None = None
    load: Sequence[Result] = ()  # one an engine
    kills: Sequence[Result] = ()
    fuzz: Sequence[dict[str, Any]] = ()  # one a run
    life: Mapping[str, Result | None] = field(default_factory=dict)  # of a long life, by command
    evaluations: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # reports of runs, by folder
    pictures: Path = PICTURES  # a page shows those that are there


def find(directory: Path = results.DIRECTORY, pictures: Path = PICTURES) -> Found:
    """The results that lie in ``directory``.

    Raises:
        ValueError, OSError: a file there cannot be read.
    """
    names = ("emulated", "operators", "sessions", "bank", "recall", "released", "vllm", "trust", "guard")
    parts = [results.latest(folder) for folder in sorted((directory / "smollm2").glob("*"))]
    single = {name: results.latest(directory / name) for name in names}
    for name in ("load", "kills"):
        engines = [results.latest(directory / "serving" / f"{name}{engine}") for engine in ("", "-vllm")]
        single[name] = tuple(filter(None, engines))
    single["life"] = {name: results.latest(directory / "life" / name) for name in ("tokens", "session", "bank")}
    single["trust_before"] = results.latest(directory / "trust-before")
    single["fuzz"] = [read_json(path) for path in sorted((directory / "fuzz").glob("*.json"))]
    single["evaluations"] = found_runs(directory / "eval")
    return Found(results.newest(directory), smollm2=tuple(filter(None, parts)), pictures=pictures, **single)


def newest_rows(several: Sequence[Result]) -> list[Row]:
    """The rows of several results; of two of one name and parameters the newer one, in the older one's place."""
    rows = {}
    for result in sorted(several, key=lambda result: result.head["time"]):
        for row in result.rows:
            if row.status == "measured" or row.key not in rows:  # what could not be measured again stays
                rows[row.key] = row
    return list(rows.values())
