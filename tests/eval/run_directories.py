"""Runs made by hand for the report's tests."""

import json

from deltamem_fast.eval.answers import Answer, AnswerFile

RUN = {
    "model": "smollm2",
    "adapters": {"msw": "sha256:9"},
    "policies": ["nothing", "bm25-4"],
    "tasks": ["locomo", "ifeval"],
    "seed": 0,
    "versions": {"torch": "2.13.0"},
    "data": {"locomo": "sha256:2"},
    "commit": None,
    "device": "cpu",
    "threads": 2,
    "time": "2026-11-29T11:00:00Z",
}


def write_run(directory, rows, *, run=RUN, answers=None):
    """Write ``run.json``, scores/TASK/ROW.json for {(task, row): what it says}, and answers/TASK/ROW.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps(run))
    for (task, row), scores in rows.items():
        path = directory / "scores" / task / f"{row}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores))
    for (task, row), kept in (answers or {}).items():
        with AnswerFile(directory / "answers" / task / f"{row}.jsonl", {"task": task, "row": row}) as file:
            file.append(kept)
    return directory


def answer(id, answer, **costs):
    """One line of the answers."""
    return Answer(id, answer, **costs)


def scores(values, documents, categories=None, **more):
    """What the runner writes for one row."""
    return {
        "scores": values,
        "documents": documents,
        "categories": categories or {},
        "metric": "F1",
        "title": "LoCoMo",
        "notes": [],
        "aggregate": {},
        **more,
    }
