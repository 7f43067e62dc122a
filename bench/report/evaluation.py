"""The page of ``python -m bench.evaluation``'s runs, from their own reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltamem_fast.display import counted
from deltamem_fast.eval.report_tables import COLUMNS, markdown_published, markdown_task
from deltamem_fast.storage.files import read_json

NOT_YET = "Not measured yet."
# Folder under bench/results/eval: its heading, and what has to be known before its figures are read.
RUNS = {
    "locomo-smollm2": (
        "LoCoMo on SmolLM2-135M-Instruct",
        "Ten whole conversations of 15,000 to 26,000 tokens; {questions} questions of each, drawn by a seed and the "
        "same in every row. Told in windows of {window:,} tokens. The adapters are those that ship: trained on short "
        "texts of facts, on no conversation. The model is more than twenty times smaller than the paper's smallest.",
    ),
    "changes-small": (
        "What changed, on the small backbone",
        "Generated texts in the small world of the recall proof, about names that were never trained on: facts, other "
        "talk, then updates of some of the facts. Its backbone has a million parameters and answers from its context.",
    ),
}


def found_runs(directory: Path) -> dict[str, dict[str, Any]]:
    """Folder → report of the runs under ``directory`` that are there.

    Raises:
        ValueError, OSError: a report cannot be read.
    """
    paths = {name: directory / name / "report.json" for name in RUNS}
    return {name: read_json(path) for name, path in paths.items() if path.is_file()}


def sections(runs: Mapping[str, dict[str, Any]], pictures: str) -> list[str]:
    """Of each run its heading, on what it was measured, its picture and tables; last what others have reported.

    Args:
        pictures: where ``bench/results/eval`` lies, seen from the page.
    """
    parts = []
    for name, (title, text) in RUNS.items():
        parts.append(f"## {title}")
        if name not in runs:
            parts.append(NOT_YET)
            continue
        report = runs[name]
        parts.append(text.format(questions=report["run"]["questions"], **report["run"]["settings"]))
        parts += [measured_on(report), f"![score against cost]({pictures}/{name}/cost.svg)"]
        parts += [markdown_task(report, task["name"]) for task in report["tasks"]]
    return [*parts, "## What the columns say", COLUMNS, "## What others have reported", markdown_published({})]


def measured_on(report: Mapping[str, Any]) -> str:
    """One line: device, software, commits and times of the rows."""
    run = report["run"]
    versions = run["versions"]
    on = run["device"] if run["device"] != "cpu" else run.get("processor", "cpu")
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "numba") if name in versions)
    rows = [row["measured"] for task in report["tasks"] for row in task["rows"] if row.get("measured")]
    found: dict[str, list[str]] = {}
    for one in rows or [run]:
        changed = " (changed)" if one.get("dirty") else ""
        commit = f"{one['commit']}{changed}" if one.get("commit") else "not recorded"
        found.setdefault(commit, []).append(one["time"])
    on = f"{on}, {counted(run['threads'], 'thread')}, {run['dtype']}"
    said = [f"commit {commit}, {' to '.join(sorted({min(times), max(times)}))}" for commit, times in found.items()]
    return f"Measured on {on}; {software}; {'; '.join(said)}."
