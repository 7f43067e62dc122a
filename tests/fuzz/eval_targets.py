"""Targets that read what an evaluation is given: data sets, answers, scores, a judge's replies, runs."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import openai
from mutations import as_text
from places import DATA, Target, folder, model, untouched, whole_text, written

from deltamem_fast.errors import DeltaMemError
from deltamem_fast.eval import agent_bench, judge, locomo, longmemeval
from deltamem_fast.eval.answers import Answer, AnswerFile, read_answer_file
from deltamem_fast.eval.checking import Equality
from deltamem_fast.eval.data import Document, Question
from deltamem_fast.eval.paper import PAPER_TASKS, metric_of
from deltamem_fast.eval.paper_rows import local_rows
from deltamem_fast.eval.plan import Plan
from deltamem_fast.eval.policies import Policy, policy_named
from deltamem_fast.eval.record import Record, common_facts, feeding_holds
from deltamem_fast.eval.records import read_records
from deltamem_fast.eval.report import build_report
from deltamem_fast.eval.report_page import page
from deltamem_fast.eval.report_tables import markdown_report
from deltamem_fast.eval.run import _is_scored
from deltamem_fast.eval.scoring import read_answers, score_answers
from deltamem_fast.eval.tasks import TASKS, digest_of

# --- data sets


def _some(name: str, count: int) -> list[bytes]:
    return [json.dumps(json.loads((DATA / f"{name}.json").read_text())[:count]).encode()]


def _load(task: str, data: bytes, name: str = "data.json") -> None:
    """Documents whose texts a tokenizer takes, and whose questions can be scored."""
    path = written(data, f"{task}/{name}")
    with untouched(path):
        documents = TASKS[task].load(path)
    assert documents
    answers = {}
    for document in documents:
        assert document.parts and document.questions
        whole_text(document.id, *document.parts)
        for question in document.questions:
            whole_text(question.id, question.text, question.query, question.category)
            assert all(isinstance(answer, str) for answer in question.answers)
            assert TASKS[task].new_tokens_of(question) > 0
            answers[question.id] = question.answers[0] if question.answers else "x"
    digest_of(documents)
    score_answers(TASKS[task], documents, answers)


def _load_agent_bench(data: bytes) -> None:
    written((DATA / "entity2id.json").read_bytes(), "memory-agent-bench/entity2id.json")
    _load("memory-agent-bench", data)


def _read_entities(data: bytes) -> None:
    row = next(
        row for row in json.loads((DATA / "agent_bench.json").read_text()) if "recsys" in row["metadata"]["source"]
    )
    path = written(json.dumps([row]).encode(), "entities/data.json")
    written(data, "entities/entity2id.json")
    for document in agent_bench.load(path):
        for question in document.questions:
            found = agent_bench.score(question, "1. Iron Man\n2. " + "x" * 30)
            assert found is None or 0 <= found <= 1


def _of_the_wheel(data: bytes) -> None:
    """Questions, an empty line, chats: as the wheel has them in two files."""
    asked, _, chats = data.partition(b"\n\n")
    written(asked, "wheel/questions.jsonl")
    path = written(chats, "wheel/sessions.jsonl")
    document = longmemeval._of_the_wheel(path.parent)
    whole_text(*document.parts)
    for question in document.questions:
        whole_text(question.text, question.id)


def _wheel() -> list[bytes]:
    asked = {
        "id": "q1",
        "category": "temporal",
        "question": "When?",
        "ground_truth": {"answer": 3, "valid_as_of": "2023"},
    }
    chat = {"timestamp": "2023/05/20 (Sat) 02:21", "turns": [{"role": "user", "content": "It was 3 days ago."}]}
    return [f"{json.dumps(asked)}\n\n{json.dumps(chat)}".encode()]


_ROWS = [name for name in PAPER_TASKS if name in ("ifeval", "gpqa", "hotpotqa", "ruler-niah", "babilong-qa1")]


def _read_rows(data: bytes) -> None:
    path = written(data, "rows.jsonl")
    errors = []
    for name in _ROWS:
        try:
            rows = local_rows(name, path, PAPER_TASKS[name].fields)
            metric_of(name, rows, f"data: {path}: ")
        except DeltaMemError as error:
            errors.append(error)
    if len(errors) == len(_ROWS):
        raise errors[0]


def _rows() -> list[bytes]:
    files = ("ifeval", "gpqa", "hotpotqa", "ruler_niah", "babilong_qa1")
    return [(DATA / f"{name}.jsonl").read_bytes() for name in files]


def _read_csv(data: bytes) -> None:
    path = written(data, "rows.csv")
    local_rows("gpqa", path, PAPER_TASKS["gpqa"].fields)


def _csv() -> list[bytes]:
    row = json.loads((DATA / "gpqa.jsonl").read_text().splitlines()[0])
    heading = ",".join(f'"{key}"' for key in row)
    values = ",".join('"' + str(value).replace('"', '""') + '"' for value in row.values())
    return [f"{heading}\r\n{values}\r\n".encode()]


def _read_parquet(data: bytes) -> None:
    for row in read_records(written(data, "rows.parquet"), "data"):
        assert isinstance(row, dict)


@functools.cache
def _parquet() -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    rows = json.loads((DATA / "agent_bench.json").read_text())[:2]
    table = pyarrow.table({name: [json.dumps(row[name]) for row in rows] for name in rows[0]} | {"n": [1, None]})
    made = io.BytesIO()
    parquet.write_table(table, made)
    return [made.getvalue()]


# --- answers and scores


def _read_answer_file(data: bytes) -> None:
    path = written(data, "answers.jsonl")
    errors = []
    with untouched(path):
        for call in (lambda: read_answer_file(path), lambda: read_answers(path)):
            try:
                call()
            except DeltaMemError as error:
                errors.append(error)
    try:
        with AnswerFile(path, _HEAD) as file:
            file.append(Answer("another one", "x"))
    except DeltaMemError as error:
        assert path.read_bytes() == data, "a file of answers that was refused was written to"
        errors.append(error)
    if errors:
        raise errors[0]


_HEAD = {"task": "locomo", "row": "nothing", "seed": 0, "settings": {"batch": 1}, "commit": None}


@functools.cache
def _answer_files() -> list[bytes]:
    path = folder() / "answers-seed.jsonl"
    path.unlink(missing_ok=True)
    with AnswerFile(path, _HEAD) as file:
        file.append([Answer("a-q0", "Rex", 3, 2, 1, 5, 0.5, 0.0, 0.1, 0.2, 99), Answer("a-q1", "")])
    lines = [{"id": "a", "answer": "x", "more": [1]}, {"id": "b", "answer": "y"}]
    return [path.read_bytes(), "\n".join(map(json.dumps, lines)).encode()]


def _report(data: bytes) -> None:
    """run.json in the first line, a row's scores in the second, its answers in the others."""
    run, scores, answers = [*data.split(b"\n", 2), b"", b""][:3]
    directory = folder() / "report"
    shutil.rmtree(directory, ignore_errors=True)
    written(run, "report/run.json")
    written(scores, "report/scores/locomo/nothing+msw.json")
    written(scores, "report/scores/locomo/nothing.json")
    written(answers, "report/answers/locomo/nothing+msw.jsonl")
    report = build_report(directory)
    json.dumps(report, allow_nan=False)
    markdown_report(report)
    page(report, "", "")


def _reports() -> list[bytes]:
    run = {"model": "Qwen3-4B-Instruct-2507", "tasks": {"locomo": "LoCoMo"}, "seed": 0, "threads": 2, "commit": None}
    run |= {
        "policies": ["nothing"],
        "versions": {"torch": "2"},
        "left_out": {"locomo": {"yarn": "short"}},
        "judge": None,
    }
    run |= {
        "adapters": {"msw": "x"},
        "parameters": 135,
        "device": "cpu",
        "documents": None,
        "verified": {},
        "settings": {},
    }
    scores = {"scores": {"a": 0.5, "b": None, "c": 1}, "documents": {"a": "d", "b": "d", "c": "e"}, "metric": "F1"}
    scores |= {
        "categories": {"a": "x", "b": "y"},
        "title": "LoCoMo",
        "notes": ["n"],
        "apart": ["c"],
        "aggregate": {"o": 0.5},
    }
    answers = [{"format": "deltamem answers", "format_version": 1, "device": "cpu", "fed": {"batch": 2}}]
    answers += [{"id": id, "answer": "x", "told_tokens": 3, "decode_seconds": 0.5, "answer_tokens": 2} for id in "abc"]
    return ["\n".join(map(json.dumps, (run, scores, *answers))).encode(), json.dumps(run).encode() + b"\n{}\n"]


def _score_text(data: bytes) -> None:
    """Any answer has a score from 0 to 1, or none."""
    text = as_text(data).encode("utf-8", "replace").decode()
    for name, document in _questions():
        for question in document.questions:
            found = TASKS[name].score(question, text)
            assert found is None or 0 <= found <= 1, (name, question.id, found)


@functools.cache
def _questions() -> list[tuple[str, Document]]:
    found = []
    for name, task in TASKS.items():
        file = {"locomo": "locomo", "longmemeval-s": "longmemeval"}.get(name, "agent_bench")
        documents = task.load(None if name.startswith("changes") else DATA / f"{file}.json")
        found += [(name, document) for document in documents[: 2 if name.startswith("changes") else 12]]
    return found


# --- a judge


class _Says:
    """In the place of an endpoint and its client: each request has the same reply."""

    def __init__(self, text: str):
        choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="stop")
        create = lambda **asked: SimpleNamespace(choices=[choice])  # noqa: E731
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=create))

    def __enter__(self):
        self.before, openai.OpenAI = openai.OpenAI, lambda **given: contextlib.nullcontext(self)

    def __exit__(self, *_):
        openai.OpenAI = self.before


_ENDPOINT = judge.Endpoint("http://127.0.0.1:9/v1", "judge")


def _judged(data: bytes) -> None:
    for kind in judge.KINDS:
        more = {"judge": kind, "key_points": ["one", "two"]}
        asked = Question("q", "How many?", ("five", "5"), "x", "How many?", more)
        with _Says(as_text(data)):
            found = judge.judge(asked, "There are five.", _ENDPOINT)
        assert isinstance(found, str) or 0 <= found <= 1


def _replies() -> list[bytes]:
    texts = ("yes", "**No**", "It is so.\n\nVerdict: yes", '{"fluency": 1}', 'So:\n{"recall": 2}', "<think>no</think>",
             '{"precision": 1, "sentence_count": 2, "recall": 1.5, "fluency": 1}')  # fmt: skip
    return [text.encode() for text in texts]


def _kept(data: bytes) -> None:
    path = written(data, "kept.jsonl")
    question = Question("q", "How many?", ("five",), "x", "How many?", {"judge": "abstention"})
    with untouched(path):
        judged = judge.keeping(_ENDPOINT, path)
    with _Says("yes"):
        found = judged(question, "five")
    assert isinstance(found, str) or 0 <= found <= 1, found


def _kept_scores() -> list[bytes]:
    question = Question("q", "How many?", ("five",), "x", "How many?", {"judge": "abstention"})
    key = judge._key(question, "five", _ENDPOINT)
    lines = [{"id": "q", "score": 0.5, "judge": "judge", "key": key}, {"id": "r", "score": 1, "judge": "j", "key": "x"}]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode(), (json.dumps(lines[0]) + "\n{").encode()]


# --- a run


@functools.cache
def _plan() -> tuple[Plan, dict]:
    plan = Plan(
        "tiny", folder() / "run-of-eval", (("locomo", DATA / "locomo.json"),), (Policy("nothing"),), {"msw": "x"}
    )
    return plan, common_facts(plan, {"locomo": locomo.load(DATA / "locomo.json")})


def _go_on(data: bytes) -> None:
    """A run that goes on from another's ``run.json`` and scores."""
    plan, common = _plan()
    path = written(data, "run-of-eval/run.json")
    written(data, "run-of-eval/scores/locomo/nothing.json")
    _is_scored(Plan(**(vars(plan) | {"judge": "judge"})), "locomo", "nothing", ["a"])
    try:
        record = Record(plan, model(), common, {})
    except DeltaMemError:
        assert path.read_bytes() == data, "the record of a run that was refused was written to"
        raise
    record.leave_out("locomo", "nothing", "short")
    record.verified("locomo", "nothing", _equality())
    feeding_holds(plan.output, plan)


def _equality() -> Equality:
    values = {"int": 1, "float": 0.0, "bool": True, "str": ""}
    return Equality(**{name: values.get(str(kind), 1) for name, kind in Equality.__annotations__.items()})


@functools.cache
def _run_record() -> list[bytes]:
    plan, common = _plan()
    path = Path(plan.output) / "run.json"
    path.unlink(missing_ok=True)
    Record(plan, model(), common, {"commit": None}).verified("locomo", "nothing", _equality())
    return [path.read_bytes()]


def _policy(data: bytes) -> None:
    policy = policy_named(as_text(data))
    assert policy_named(policy.name) == policy


TARGETS = [
    Target("locomo", "deltamem_fast.eval.locomo:load", lambda data: _load("locomo", data), lambda: _some("locomo", 1),
           "json", 500),
    Target("agent-bench", "deltamem_fast.eval.agent_bench:load", _load_agent_bench, lambda: _some("agent_bench", 10),
           "json", 500),
    Target("entities", "deltamem_fast.eval.agent_bench:load", _read_entities,
           lambda: [(DATA / "entity2id.json").read_bytes()], "json", 200),
    Target("longmemeval", "deltamem_fast.eval.longmemeval:load", lambda data: _load("longmemeval-s", data),
           lambda: _some("longmemeval", 2), "json", 500),
    Target("longmemeval-lines", "deltamem_fast.eval.records:read_records",
           lambda data: _load("longmemeval-s", data, "data.jsonl"),
           lambda: ["\n".join(map(json.dumps, json.loads(_some("longmemeval", 2)[0]))).encode()], "lines", 200),
    Target("longmemeval-wheel", "deltamem_fast.eval.longmemeval:load", _of_the_wheel, _wheel, "lines"),
    Target("paper-rows", "deltamem_fast.eval.paper_rows:local_rows", _read_rows, _rows, "lines", 400),
    Target("paper-csv", "deltamem_fast.eval.paper_rows:local_rows", _read_csv, _csv, "text"),
    Target("parquet", "deltamem_fast.eval.records:read_records", _read_parquet, _parquet, "bytes", 150),
    Target("answers", "deltamem_fast.eval.answers:read_answer_file", _read_answer_file, _answer_files, "lines", 500),
    Target("report", "deltamem_fast.eval.report:build_report", _report, _reports, "lines", 400),
    Target("score", "deltamem_fast.eval.scoring:score_answers", _score_text,
           lambda: [b"Rex", b"1. Iron Man\n2. Heat", b"Answer: 5, 6; no longer Oslo", b"(a)"], "text", 150),
    Target("judge-reply", "deltamem_fast.eval.judge:judge", _judged, _replies, "text", 400),
    Target("kept-scores", "deltamem_fast.eval.judge:keeping", _kept, _kept_scores, "lines"),
    Target("run-record", "deltamem_fast.eval.record:read_before", _go_on, _run_record, "json", 200),
    Target("policy", "deltamem_fast.eval.policies:policy_named", _policy,
           lambda: [b"last-2048", b"everything", b"bm25-4"], "text", 200),
]  # fmt: skip
