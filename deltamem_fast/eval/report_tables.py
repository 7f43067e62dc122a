"""A report's tables as rows of cells, which the page, the Markdown and others show; and the Markdown."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..display import counted, in_bytes, number, printable
from ..errors import ArgumentError
from . import published
from .published import NOT_YET

Cell = tuple[str, float | None]  # what it says, and by what it is sorted
NOTHING: Cell = ("", None)
NO_MEMORY = "off"
FROZEN = f"nothing+{NO_MEMORY}"
MEMORIES = ("tsw", "ssw", "ssw-sentence", "msw")  # labels that are strategies
# Of run.json: what stands above the tables, in this order; whatever else is there follows, but for ``tasks``.
_FACTS = ("model", "adapters", "policies", "seed", "device", "threads", "time", "commit", "versions", "data")
_ELSEWHERE = (
    "tasks",
    "format",
    "format_version",
    "left_out",
    "verified",
)  # said at the tasks, or of no use to a reader
COLUMNS = (
    "*Score*: mean of what the metric gives, in percent, over the questions that it gives something for, but those "
    "that the benchmark reports apart, with its 95 % interval. *− frozen*: minus the frozen model that sees nothing "
    "but the question, in points, on the questions that both rows have a score for; *above 0*: the share of "
    "resamples in which the row is the better one. *− without memory*: minus the same policy without a memory. "
    "*Told*: tokens of a document that went through the model for its memory alone. *Prefill*: from the question to "
    "the first token, median. *Shared*: telling the document, and reading the context that its questions share, for "
    "each question answered. *Decode*: each token after the first. *In all*: prefill, decoding and the shared part, "
    "mean. Questions that were answered together, in a batch, share its seconds: none of them is a latency. A row of "
    "which only *a part* was answered has other questions than the rest. Of lm-evaluation-harness's own tasks the "
    "whole prompt counts as context."
)


def row_name(policy: str, memory: str) -> str:
    """A row as files have it: ``bm25-4+msw``; without a memory ``bm25-4+off``."""
    return f"{policy}+{memory}"


def split_row(row: str) -> tuple[str, str]:
    """Policy and memory of a row's name; "" for a memory that it does not name."""
    policy, plus, memory = row.rpartition("+")
    return (policy, memory) if plus else (row, "")


def in_capitals(memory: str) -> str:
    """A strategy as people write it, TSW; another label as it is."""
    return memory.upper() if memory in MEMORIES else memory


def label(row: Mapping[str, Any]) -> str:
    """A row's name for people: ``bm25-4 + MSW``; ``state only, MSW`` where nothing is in context but the question."""
    policy, memory = row["policy"], row["memory"]
    memory = in_capitals(memory)
    if memory in (NO_MEMORY, ""):
        name = "frozen, nothing in context" if row["row"] == FROZEN else policy
    else:
        name = f"state only, {memory}" if policy == "nothing" else f"{policy} + {memory}"
    return name if row.get("answered") == row.get("questions") else f"{name} (a part)"


def task_cells(report: Mapping[str, Any], task: str) -> tuple[list[str], list[list[Cell]]]:
    """Headings, and a line of cells for each row of a task; a column in which no row has anything is left out.

    Raises:
        ArgumentError: the report has no such task.
    """
    found = task_of(report, task)
    headings = [
        "row", f"{found['metric'] or 'score'}, % (95 % interval)", "− frozen, points", "− without memory, points",
        "answered", "tokens in context", "told, tokens a document", "prefill", "shared, a question",
        "decode, a token", "in all, a question", "peak memory",
    ]  # fmt: skip
    lines = [_cells(row) for row in found["rows"]]
    kept = [place for place in range(len(headings)) if place == 0 or any(line[place][0] for line in lines)]
    return [headings[place] for place in kept], [[line[place] for place in kept] for line in lines]


def task_table(report: Mapping[str, Any], task: str) -> list[list[str]]:
    """The table of a task, a heading line first; the heading alone where nothing was measured."""
    headings, lines = task_cells(report, task)
    return [headings, *([text for text, _ in line] for line in lines)]


def category_cells(report: Mapping[str, Any], task: str) -> tuple[list[str], list[list[Cell]]]:
    """Means of the categories, a line a row; a column also says of how many questions where all rows agree."""
    found = task_of(report, task)
    headings = ["row"]
    for category in found["categories"]:
        counts = {row["categories"][category]["questions"] for row in found["rows"] if category in row["categories"]}
        headings.append(f"{category} ({counted(*counts, 'question')})" if len(counts) == 1 else category)
    lines: list[list[Cell]] = []
    for row in found["rows"]:
        means = [row["categories"].get(category) for category in found["categories"]]
        cells = [NOTHING if mean is None else (f"{100 * mean['mean']:.1f}", mean["mean"]) for mean in means]
        lines.append([(label(row), None), *cells])
    return headings, lines if found["categories"] else []


def category_table(report: Mapping[str, Any], task: str) -> list[list[str]]:
    """The categories of a task, a heading line first."""
    headings, lines = category_cells(report, task)
    return [headings, *([text for text, _ in line] for line in lines)]


def aggregate_cells(report: Mapping[str, Any], task: str) -> tuple[list[str], list[list[Cell]]]:
    """What else the task's scorer gives of a whole row, as it gives it, a line a row."""
    rows = task_of(report, task)["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["aggregate"]))
    lines: list[list[Cell]] = []
    for row in rows:
        values = [row["aggregate"].get(name) for name in names]
        lines.append([(label(row), None), *(NOTHING if value is None else (number(value), value) for value in values)])
    return ["row", *names], lines if names else []


def task_of(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A task of a report.

    Raises:
        ArgumentError: there is none of that name.
    """
    for task in report["tasks"]:
        if task["name"] == name:
            return task
    raise ArgumentError(f"task: got {name!r}, allowed {', '.join(task['name'] for task in report['tasks']) or 'none'}")


def interval_note(report: Mapping[str, Any], task: str) -> str:
    """How the intervals of a task's scores were made."""
    scores = [row["score"] for row in task_of(report, task)["rows"] if row["score"]]
    if not scores:
        return "No row has a score."
    resamples = f"{report['intervals']['resamples']:,} resamples"
    if all(score["resampled"] == "questions" for score in scores):
        return f"One document: {resamples} of its questions, whose intervals say nothing of other documents."
    documents = sorted({score["documents"] for score in scores})
    said = " to ".join(f"{count:,}" for count in dict.fromkeys((documents[0], documents[-1])))
    return f"Intervals: {resamples} of whole documents ({said} of them)."


def run_notes(report: Mapping[str, Any], task: str) -> list[str]:
    """Which rows of a task were left out and why, and how far chunks, batches and padding are from plain forwards."""
    left_out = _of(report["run"], "left_out", task)
    notes = [f"Left out: {row}: {_in_words(reason)}" for row, reason in left_out.items()]
    notes += _differences(task_of(report, task)["rows"])
    verified = [one for one in _of(report["run"], "verified", task).values() if isinstance(one, Mapping)]
    if verified:
        states, logits = (max(one.get(name) or 0 for one in verified) for name in ("states", "logits"))
        apart = sum(one.get("tokens") or 0 for one in verified)
        holds = "equal" if all(one.get("holds") for one in verified) else "DO NOT EQUAL"
        notes.append(
            f"Chunks on a warm cache, batches and padding {holds} plain forwards, one a prompt, and with a memory one "
            f"a window, a shared context and a question ({counted(len(verified), 'row')}, "
            f"{counted(max(one.get('documents') or 0 for one in verified), 'document')} each): the largest difference "
            f"is {states:.1g} of a layer's largest state and {logits:.1g} of a first token's largest logit; "
            f"{counted(apart, 'answer')} begin with another token."
        )
    return notes


# Of where and how a row was measured what its figures depend on, in words.
_MEASURED = {
    "commit": "commit", "processor": "processor", "device": "device", "threads": "threads", "batch": "batch size",
    "chunk": "chunk", "judge": "judge",
}  # fmt: skip


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """In what rows of one table were measured otherwise than others, and which."""
    notes = []
    for name, word in _MEASURED.items():
        found: dict[str, list[str]] = {}
        for row in rows:
            value = row.get("judge") if name == "judge" else row.get("measured", {}).get(name)
            found.setdefault("not recorded" if value is None and name != "judge" else _in_words(value), []).append(
                row["row"]
            )
        if len(found) > 1:
            said = "; ".join(f"{value}: {', '.join(names)}" for value, names in found.items())
            notes.append(f"Rows differ in {word}: {said}.")
    return notes


def _of(run: Mapping[str, Any], name: str, task: str) -> Mapping[str, Any]:
    """What a run's record has of one task under ``name``; {} where it has nothing, or something else."""
    found = run.get(name)
    found = found.get(task) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ran, on what, as names and texts."""
    names = [name for name in _FACTS if name in run]
    names += [name for name in run if name not in (*_FACTS, *_ELSEWHERE)]
    return [(name.replace("_", " "), _in_words(run[name])) for name in names]


def duration(seconds: float) -> str:
    """Seconds with a unit that fits."""
    if not seconds:
        return "0"
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.0f} {unit}" if seconds >= 100 else f"{seconds * scale:.3g} {unit}"


def score_text(score: Mapping[str, Any]) -> str:
    """A mean with its interval, in percent."""
    return f"{100 * score['mean']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def difference_text(found: Mapping[str, Any], questions: int) -> str:
    """A paired difference in points; says on how many questions where these are not all ``questions`` of the row."""
    mean, low, high = (_signed(100 * found[name]) for name in ("mean", "low", "high"))
    on = "" if found["questions"] == questions else f"; on {counted(found['questions'], 'question')}"
    return f"{mean} ({low} to {high}; above 0: {100 * found['above_zero']:.0f} %{on})"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _cells(row: Mapping[str, Any]) -> list[Cell]:
    score, cost = row["score"], row["cost"] or {}

    def difference(name: str) -> Cell:
        found = row["against"].get(name)
        return NOTHING if found is None else (difference_text(found, score["questions"] if score else 0), found["mean"])

    def of(name: str, text) -> Cell:
        value = cost.get(name)
        return NOTHING if value is None else (text(value), value)

    without = row_name(row["policy"], NO_MEMORY)
    answered = f"{row['answered']:,} of {row['questions']:,}"
    if row["scored"] != row["answered"]:
        answered += f" ({row['scored']:,} with a score)"
    return [
        (label(row), None),
        NOTHING if score is None else (score_text(score), score["mean"]),
        difference(FROZEN),
        NOTHING if without == FROZEN else difference(without),
        (answered, row["answered"]),
        of("context_tokens", _count),
        of("told_tokens", _count),
        of("prefill_seconds", duration),
        of("shared_seconds", duration),
        of("decode_seconds_per_token", duration),
        of("seconds_per_question", duration),
        of("peak_bytes", in_bytes),
    ]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_in_words, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


# --- Markdown


def plain(text: str) -> str:
    """``text`` so that Markdown shows it as it is, on one line: no markup, no HTML, no end of a cell."""
    text = html.escape(printable(" ".join(text.split())), quote=False)
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A heading line and the lines under it; "" for a heading alone."""
    if len(lines) < 2:
        return ""
    heading, *rest = [[plain(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heading, ["---"] * len(heading), *rest))


def markdown_task(report: Mapping[str, Any], task: str) -> str:
    """The section of a task, without its heading; one line where nothing was measured."""
    found = task_of(report, task)
    if not found["rows"]:
        return "\n\n".join([f"{NOT_YET.capitalize()}.", *map(plain, run_notes(report, task))])
    categories, aggregates = category_table(report, task), aggregate_cells(report, task)
    parts = [
        *map(plain, found["notes"]),
        markdown_table(task_table(report, task)),
        interval_note(report, task),
        *map(plain, run_notes(report, task)),
        "By category, %:" if len(categories) > 1 else "",
        markdown_table(categories),
        "As the task's own scorer gives them:" if aggregates[1] else "",
        markdown_table([aggregates[0], *([text for text, _ in line] for line in aggregates[1])]),
    ]
    return "\n\n".join(part for part in parts if part)


def ours_of(report: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """What a report has of the paper's table."""
    return report["published"]["paper"].get("ours") or {}


def markdown_published(ours: Mapping[str, Mapping[str, float]]) -> str:
    """The paper's table with ``ours``, and today's memory systems, with what makes them not comparable."""
    parts = (
        plain(published.PAPER_NOTE),
        markdown_table(published.paper_table(ours)),
        published.SYSTEMS_NOTE,
        markdown_table(published.systems_table()),
        published.NOT_CLAIMED,
    )
    return "\n\n".join(parts)


def title_of(report: Mapping[str, Any]) -> str:
    """Of the whole report."""
    return f"Does the memory help {_in_words(report['run'].get('model') or 'this model')}?"


def markdown_report(report: Mapping[str, Any], *, picture: str = "", without: str = "") -> str:
    """The whole report.

    Args:
        picture: the file of the plot of score against cost, beside the report; "" = there is none.
        without: why there is none, or "".
    """
    parts = [
        f"# {plain(title_of(report))}",
        "\n".join(f"- {plain(name)}: {plain(text)}" for name, text in facts(report["run"])),
    ]
    parts += [f"![Score against cost]({picture})" if picture else without]
    for task in report["tasks"]:
        parts += [f"## {plain(task['title'])}", markdown_task(report, task["name"])]
    parts += [f"## What the columns say\n\n{COLUMNS}" if any(task["rows"] for task in report["tasks"]) else ""]
    parts += ["## What others have reported", markdown_published(ours_of(report))]
    return "\n\n".join(part for part in parts if part) + "\n"
