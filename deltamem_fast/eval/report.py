"""What a run found: quality beside cost for each row, as data, tables, one page and a picture.

A run's directory has ``run.json`` (what ran, on what), ``answers/TASK/ROW.jsonl`` (``AnswerFile``) and
``scores/TASK/ROW.json``: ``scores``, ``categories`` and ``documents`` by the question's id (a score of None: only a
judge can tell), ``apart``, the ids that a row's first figure leaves out, ``metric``, ``title``, ``notes`` and
``aggregate``. A row is ``POLICY+MEMORY``.
"""

from __future__ import annotations

import math
import os
import re
import statistics as middle
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import FileFormatError, FileMissingError
from ..storage.files import as_path, naming_files, read_json, write_atomically, write_json, write_text
from . import published
from .answers import Answer, read_answer_file
from .policies import KINDS
from .report_page import page
from .report_tables import FROZEN, MEMORIES, NO_MEMORY, markdown_report, row_name, split_row
from .statistics import LEVEL, RESAMPLES, estimate, paired_difference

FORMAT = "deltamem evaluation report"
FORMAT_VERSION = 1
SEED = 0  # of the intervals' draws
# The order of rows in a table: without a memory first.
_POLICIES = tuple(KINDS)
_MEMORIES = (NO_MEMORY, *MEMORIES)
_NOT_TASKS = frozenset((".", ".."))


def build_report(run_directory: str | os.PathLike) -> dict:
    """Everything that the report says, ready for JSON: ``run``, ``tasks`` with their ``rows``, and ``published``.

    A row that has not run is absent, and a task without one has no ``rows``.

    Raises:
        FileMissingError: no such directory, or there is no ``run.json`` in it.
        FileFormatError: a file is damaged; names it.
    """
    directory = as_path(run_directory, "run_directory")
    if not (directory / "run.json").is_file():
        raise FileMissingError(f"run_directory: {directory}: has no run.json, allowed the directory of a run")
    run = read_json(directory / "run.json", "run_directory")
    titles = _named_tasks(run.get("tasks"), directory / "run.json")
    with naming_files("run_directory", directory):
        found = {path.name: path for path in sorted((directory / "scores").glob("*")) if path.is_dir()}
    tasks = [_task(directory, name, titles.get(name, name)) for name in dict.fromkeys([*titles, *found])]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "run": run,
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
        "tasks": tasks,
        "published": {
            "paper": {
                "source": published.PAPER,
                "model": published.PAPER_MODEL,
                "scores": {name: dict(scores) for name, scores in published.PAPER_SCORES.items()},
                "ours": published.paper_scores_of(run, tasks),
            },
            "systems": [vars(one).copy() for one in published.SYSTEMS],
        },
    }


def write_report(run_directory: str | os.PathLike) -> dict[str, Path]:
    """Write ``report.json``, ``report.md``, ``report.html`` (which loads nothing), ``cost.svg`` and ``cost.png``.

    The pictures are left out where matplotlib is not installed, or where no row has both a score and a cost; those of
    an earlier report are removed then.

    Returns:
        The paths by those names.

    Raises:
        FileMissingError, FileFormatError: see ``build_report``; nothing is written.
        FileAccessError: a file cannot be written.
    """
    directory = as_path(run_directory, "run_directory")
    report = build_report(directory)
    pictures: dict[str, bytes] = {}
    drawable = find_spec("matplotlib") is not None
    if drawable:
        from .report_plot import draw_cost

        pictures = draw_cost(report)
    for name in ("cost.svg", "cost.png"):
        with naming_files("run_directory", directory / name):
            if name in pictures:
                write_atomically(directory / name, lambda path, data=pictures[name]: path.write_bytes(data))
            else:
                (directory / name).unlink(missing_ok=True)
    svg = pictures.get("cost.svg", b"").decode()
    without = "" if drawable else "No picture: matplotlib is not installed (extra: eval)."
    markdown = markdown_report(report, picture="cost.svg" if svg else "", without=without)
    return {
        "report.json": write_json(directory / "report.json", report),
        "report.md": write_text(directory / "report.md", markdown),
        "report.html": write_text(directory / "report.html", page(report, svg, without)),
        **{name: directory / name for name in pictures},
    }


# --- one task


def _named_tasks(value: Any, path: Path) -> dict[str, str]:
    """Titles of the tasks by name, from ``run.json``: a list of names, or an object whose keys are the names."""
    if value is None:
        return {}
    names = list(value) if isinstance(value, list | dict) else None
    if names is None or not all(map(_is_task_name, names)):
        raise FileFormatError(f"{path}: tasks: got {shown(value)}, allowed names of tasks")
    titles = value if isinstance(value, dict) else {}
    return {name: title if isinstance(title := titles.get(name), str) else name for name in names}


def _is_task_name(name: Any) -> bool:
    """Whether a directory can be called so, and lies beside others."""
    return isinstance(name, str) and 0 < len(name.encode("utf-8", "replace")) <= 255 and name not in _NOT_TASKS


def _task(directory: Path, name: str, title: str) -> dict:
    rows: dict[str, dict] = {}
    files = directory / "scores" / name
    for path in sorted(files.glob("*.json")) if "/" not in name and "\0" not in name else []:
        rows[path.stem] = _scores_of(path)
    order = sorted(rows, key=_place)
    task = {"name": name, "title": title, "metric": "", "notes": [], "categories": [], "rows": []}
    for row in order:
        task["title"], task["metric"] = rows[row]["title"] or task["title"], rows[row]["metric"] or task["metric"]
        task["notes"] += [note for note in rows[row]["notes"] if note not in task["notes"]]
    for row in order:
        path = directory / "answers" / name / f"{row}.jsonl"
        head, answers = read_answer_file(path) if path.exists() else ({}, {})
        task["rows"].append(_row(row, rows, answers) | {"measured": _measured(head)})
    task["categories"] = sorted({category for row in task["rows"] for category in row["categories"]}, key=_natural)
    return task


def _measured(head: Mapping[str, Any]) -> dict[str, str | int | bool]:
    """Where, when and how a row was measured, from the head of its answers."""
    fed = head.get("fed")
    found = {**head, **(fed if isinstance(fed, Mapping) else {})}
    names = ("commit", "dirty", "processor", "device", "threads", "time", "batch", "chunk")
    return {name: found[name] for name in names if isinstance(found.get(name), str | int | bool)}


def _row(row: str, rows: Mapping[str, dict], answers: Mapping[str, Answer]) -> dict:
    policy, memory = split_row(row)
    found = rows[row]
    scored, apart = _scored(found), {id for id in found["apart"] if found["scores"].get(id) is not None}
    asked = found["documents"].keys() | found["scores"].keys()
    answered = answers.keys() & asked if answers else found["scores"].keys()
    without = row_name(policy, NO_MEMORY)
    references = [name for name in dict.fromkeys((FROZEN, without)) if name in rows and name != row]
    return {
        "row": row,
        "policy": policy,
        "memory": memory,
        "answered": len(answered),
        "scored": len(scored) + len(apart),
        "questions": len(asked),
        "score": _estimate(scored, found["documents"]),
        "against": {name: _against(scored, _scored(rows[name]), found["documents"]) for name in references},
        "categories": _categories(scored | {id: found["scores"][id] for id in apart}, found["categories"]),
        "aggregate": found["aggregate"],
        "judge": found["judge"],
        "cost": costs([answers[id] for id in sorted(answered)], found["documents"]) if answers and answered else None,
    }


def _scored(found: dict) -> dict[str, float]:
    """Of the questions that a row's first figure is of: what the benchmark reports apart is not among them."""
    apart = set(found["apart"])
    return {id: score for id, score in found["scores"].items() if score is not None and id not in apart}


def _estimate(scored: Mapping[str, float], documents: Mapping[str, str]) -> dict | None:
    if not scored:
        return None
    return estimate(list(scored.values()), [documents.get(id, id) for id in scored], seed=SEED).to_dict()


def _against(scored: Mapping[str, float], reference: Mapping[str, float], documents: Mapping[str, str]) -> dict | None:
    """The paired difference on the questions that both rows have a score of; None without one."""
    both = [id for id in scored if id in reference]
    if not both:
        return None
    ours, theirs = ([scores[id] for id in both] for scores in (scored, reference))
    return paired_difference(ours, theirs, [documents.get(id, id) for id in both], seed=SEED).to_dict()


def _categories(scored: Mapping[str, float], categories: Mapping[str, str]) -> dict[str, dict]:
    by_category: dict[str, list[float]] = {}
    for id, score in scored.items():
        if categories.get(id):
            by_category.setdefault(categories[id], []).append(score)
    return {
        category: {"mean": math.fsum(scores) / len(scores), "questions": len(scores)}
        for category, scores in sorted(by_category.items(), key=lambda item: _natural(item[0]))
    }


def costs(answers: Sequence[Answer], documents: Mapping[str, str]) -> dict[str, float | None]:
    """What a row's answers took, from one answer or more; None where nothing tells.

    ``context_tokens``, ``question_tokens``, ``answer_tokens``: means over questions. ``told_tokens``: mean over
    documents. ``prefill_seconds``: median over questions. ``shared_seconds``: of telling the documents and reading
    their shared contexts, in sum, for each question answered. ``decode_seconds_per_token``: of the tokens after the
    first. ``seconds_per_question``: mean, with the share of ``shared_seconds``. ``peak_bytes``: the most of all.
    """
    by_document: dict[str, list[Answer]] = {}
    for answer in answers:
        by_document.setdefault(documents.get(answer.id, answer.id), []).append(answer)
    # Each answer repeats what its document took; where the run was killed in between it was told twice: the mean.
    told = [middle.fmean(answer.told_tokens for answer in group) for group in by_document.values()]
    shared = math.fsum(
        middle.fmean(answer.tell_seconds + answer.context_seconds for answer in group) for group in by_document.values()
    ) / len(answers)
    further = sum(max(answer.answer_tokens - 1, 0) for answer in answers)
    decode = math.fsum(answer.decode_seconds for answer in answers)
    own = middle.fmean(answer.prefill_seconds + answer.decode_seconds for answer in answers)
    return {
        "context_tokens": middle.fmean(answer.context_tokens for answer in answers),
        "question_tokens": middle.fmean(answer.question_tokens for answer in answers),
        "answer_tokens": middle.fmean(answer.answer_tokens for answer in answers),
        "told_tokens": middle.fmean(told),
        "prefill_seconds": middle.median(answer.prefill_seconds for answer in answers),
        "shared_seconds": shared,
        "decode_seconds_per_token": decode / further if further else None,
        "seconds_per_question": own + shared,
        "peak_bytes": max(answer.peak_bytes for answer in answers) or None,
    }


def _place(row: str) -> tuple:
    """Where a row stands in its table: by policy, without memory before with it."""
    policy, memory = split_row(row)
    kind = policy.partition("-")[0]
    known = _POLICIES.index(kind) if kind in _POLICIES else len(_POLICIES)
    return known, _natural(policy), _MEMORIES.index(memory) if memory in _MEMORIES else len(_MEMORIES), memory


def _natural(text: str) -> list[tuple[int, int, str]]:
    """For sorting: numbers in a text by their size."""
    parts = re.split(r"([0-9]{1,18})", text)
    return [(1, int(part), "") if place % 2 else (0, 0, part) for place, part in enumerate(parts)]


# --- scores/TASK/ROW.json


def _scores_of(path: Path) -> dict:
    """What the runner wrote, each field there and of its kind."""
    found = read_json(path)
    kinds = {"scores": dict, "categories": dict, "documents": dict, "aggregate": dict}
    kinds |= {"metric": str, "title": str, "notes": list, "apart": list}
    for name, kind in kinds.items():
        value = found.setdefault(name, kind()) if name != "scores" else found.get(name)
        if not isinstance(value, kind):
            words = {dict: "an object", str: "text", list: "a list"}
            raise FileFormatError(f"{path}: {name}: got {shown(value)}, allowed {words[kind]}")
    checks = {
        "scores": (lambda value: value is None or _is_number(value), "a number or null"),
        "aggregate": (_is_number, "a number"),
        "categories": (lambda value: isinstance(value, str), "text"),
        "documents": (lambda value: isinstance(value, str), "text"),
    }
    for name, (fits, allowed) in checks.items():
        for id, value in found[name].items():
            if not fits(value):
                raise FileFormatError(f"{path}: {name}: {shown(id)}: got {shown(value)}, allowed {allowed}")
    if not isinstance(found.setdefault("judge", None), str | None):
        raise FileFormatError(f"{path}: judge: got {shown(found['judge'])}, allowed a name or null")
    for name in ("notes", "apart"):
        if not all(isinstance(note, str) for note in found[name]):
            raise FileFormatError(f"{path}: {name}: got {shown(found[name])}, allowed texts")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300
