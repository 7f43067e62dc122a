"""What others have reported: the paper's table, and today's memory systems by their own reports. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

NOT_YET = "not measured yet"
PAPER = "https://arxiv.org/abs/2605.12357"  # δ-mem: Efficient Online Memory for Large Language Models
PAPER_MODEL = "Qwen3-4B-Instruct"
PAPER_ROWS = ("frozen", "BM25", "TSW", "SSW", "MSW")  # as the paper has them: without memory, retrieval, δ-mem
# Scores, 0 to 100. The average is of LoCoMo, MemoryAgentBench, HotpotQA, IFEval and GPQA Diamond.
PAPER_SCORES: Mapping[str, Mapping[str, float]] = {
    "average of five": {"frozen": 46.79, "BM25": 44.56, "TSW": 51.66, "SSW": 51.44, "MSW": 50.74},
    "LoCoMo": {"frozen": 40.79, "TSW": 46.53, "SSW": 47.05, "MSW": 49.12},
    "MemoryAgentBench": {"frozen": 29.54, "TSW": 36.48, "SSW": 37.84, "MSW": 38.85},
}
PAPER_NOTE = (
    f"Scores of the paper ({PAPER}) on {PAPER_MODEL}, 0 to 100. The adapter that was released with it is TSW. Its "
    "frozen model has the whole conversation in context, as the row everything without a memory has it here; its BM25 "
    "is bm25-K, and its TSW, SSW and MSW are everything with a memory."
)
# What is asked for the paper's average, by the names of tasks here.
PAPER_BENCHMARKS = {
    "locomo": "LoCoMo",
    "memory-agent-bench-paper": "MemoryAgentBench",
    "hotpotqa": "HotpotQA",
    "ifeval": "IFEval",
    "gpqa": "GPQA Diamond",
}
PAPER_CHECKPOINT = "Qwen3-4B-Instruct-2507"


@dataclass(frozen=True)
class Reported:
    """What a memory system's makers have reported of it.

    Attributes:
        system: its name.
        benchmark: what it was asked.
        low, high: the least and the most that they name, 0 to 100.
        source: where they do, or where the system is at home.
        note: what a reader has to know of the figure, or "".
    """

    system: str
    benchmark: str
    low: float
    high: float
    source: str
    note: str = ""


SYSTEMS = (
    Reported(
        "Mem0 v3",
        "LoCoMo",
        91.6,
        92.5,
        "https://docs.mem0.ai/core-concepts/memory-evaluation",
        "91.6 in their README, 92.5 later",
    ),
    Reported(
        "MemOS",
        "LoCoMo",
        88.8,
        88.8,
        "https://github.com/MemTensor/MemOS",
        "their README at commit 0b66a7e says 75.80; the higher figure was not found there",
    ),
    Reported("Hindsight", "BEAM, 10 M tokens", 64.1, 64.1, "https://hindsight.vectorize.io/blog/2026/04/02/beam-sota"),
)
SYSTEMS_NOTE = (
    "By their own reports, and not comparable with the rows above: their answers come from other, mostly far larger "
    "models behind an API, and a language model judges them, where ours are compared with the key."
)
NOT_CLAIMED = (
    "δ-mem does not claim to solve what these systems are built for: to find, word for word, what was said once in a "
    "long history, and to have a strong closed model answer from it. It changes how a small frozen model attends, in "
    "a state of a few kilobytes."
)


def paper_scores_of(run: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What a run measured of the paper's table: benchmark → row → score, 0 to 100; {} on another model, or on a part.

    Benchmarks without a document (IFEval, GPQA) have one prompt whatever the policy, and no row of retrieval. The
    average is there where all five are.

    Args:
        run: ``run.json``.
        tasks: a report's, see ``build_report``.
    """
    model = run.get("model")
    if not isinstance(model, str) or model.rstrip("/").rpartition("/")[2] != PAPER_CHECKPOINT:
        return {}
    if run.get("documents") is not None or run.get("questions") is not None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for task in tasks:
        for row in task["rows"] if task["name"] in PAPER_BENCHMARKS else ():
            name = _paper_row(row, {one["policy"] for one in task["rows"]})
            if name and row["score"] and row["answered"] == row["questions"]:
                found.setdefault(PAPER_BENCHMARKS[task["name"]], {}).setdefault(name, 100 * row["score"]["mean"])
    for name in PAPER_ROWS:
        scores = [found[benchmark][name] for benchmark in PAPER_BENCHMARKS.values() if name in found.get(benchmark, {})]
        if len(scores) == len(PAPER_BENCHMARKS):
            found.setdefault("average of five", {})[name] = sum(scores) / len(scores)
    return found


def _paper_row(row: Mapping[str, Any], policies: Set[str]) -> str | None:
    """Which row of the paper's one of ours is."""
    if row["policy"].startswith("bm25-"):
        return "BM25" if row["memory"] == "off" else None
    if row["policy"] != "everything" and policies != {"nothing"}:  # a benchmark without a document has that policy only
        return None
    names = {"off": "frozen", "tsw": "TSW", "ssw": "SSW", "msw": "MSW"}
    return names.get(row["memory"])


def paper_table(ours: Mapping[str, Mapping[str, float]] | None = None) -> list[list[str]]:
    """The paper's table, a heading line first: a line a benchmark, a column a row of the paper's, and ours behind.

    Args:
        ours: by benchmark and row, as ``PAPER_SCORES`` has them, what was measured here on the paper's model; None or
            {}: the heading says that nothing was.
    """
    measured = {benchmark: scores for benchmark, scores in (ours or {}).items() if scores}
    heading = [PAPER_MODEL, *PAPER_ROWS, "ours" if measured else f"ours: {NOT_YET}"]
    lines = []
    for benchmark, scores in PAPER_SCORES.items():
        theirs = [f"{scores[row]:.2f}" if row in scores else "" for row in PAPER_ROWS]
        own = ", ".join(f"{row} {score:.2f}" for row, score in measured.get(benchmark, {}).items())
        lines.append([benchmark, *theirs, own])
    return [heading, *lines]


def systems_table() -> list[list[str]]:
    """The memory systems, a heading line first."""
    lines = [["system", "benchmark", "their score, 0 to 100", "their report", ""]]
    for one in SYSTEMS:
        score = f"{one.low:g}" if one.low == one.high else f"{one.low:g} to {one.high:g}"
        lines.append([one.system, one.benchmark, score, one.source, one.note])
    return lines
