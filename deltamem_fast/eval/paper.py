"""The benchmarks that lm-evaluation-harness has itself: what each is called there, what it needs, and on local data.

IFEval, GPQA Diamond and HotpotQA are three of the paper's five; RULER and BABILong have come since. The other two,
LoCoMo and MemoryAgentBench, are tasks of ours (``harness_tasks``).
"""

from __future__ import annotations

import contextlib
import csv
import io
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import check_choice
from ..errors import FileFormatError, FileMissingError, MissingPackageError
from ..storage.files import as_path, read_bytes
from .records import field, read_records

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

_WORDS = ("punkt_tab", "python -m nltk.downloader punkt_tab")
# Of IFEval's 25 instructions the ones that NLTK's model of sentences checks.
_WITH_SENTENCES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


@dataclass(frozen=True)
class PaperTask:
    """A benchmark of lm-evaluation-harness 0.4.13.

    Attributes:
        title: as a report has it.
        task: its name in lm_eval.
        directory: of its configuration, below ``lm_eval/tasks``.
        split: that is asked.
        metric: what is reported of it, as lm_eval names it.
        filter: of the answers, before they are scored.
        packages: that have to be installed; all are in the extra ``eval``.
        data: where it is had from without a local file.
        fields: of a row of a local file, and of what type.
        few_shot: how many worked examples stand before a question.
        chat_template: whether a chat model should be asked with its chat template (``apply_chat_template=True``).
        notes: what has to be known of it.
    """

    title: str
    task: str
    directory: str
    split: str
    metric: str
    data: str
    fields: Mapping[str, type]
    filter: str = "none"
    packages: tuple[str, ...] = ()
    few_shot: int = 0
    chat_template: bool = True
    notes: str = ""


_RULER = ("wonderwords", "nltk", "scipy")
_RULER_FIELDS = {"input": str, "outputs": list, "max_length": int, "gen_prefix": str}
_RULER_DATA = "made by lm_eval at once, with the tokenizer named by metadata={'tokenizer': …}; nothing is downloaded"
PAPER_TASKS = {
    "ifeval": PaperTask(
        "IFEval",
        "ifeval",
        "ifeval",
        "train",
        "prompt_level_strict_acc",
        "hub google/IFEval (541 prompts, Apache-2.0)",
        {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list},
        packages=("langdetect", "immutabledict", "nltk"),
        notes=f"two of 25 instructions ({', '.join(_WITH_SENTENCES)}) need NLTK's punkt_tab: {_WORDS[1]}",
    ),
    "gpqa": PaperTask(
        "GPQA Diamond",
        "gpqa_diamond_cot_zeroshot",
        "gpqa/cot_zeroshot",
        "train",
        "exact_match",
        "hub Idavidrein/gpqa, gpqa_diamond (198 questions, CC BY 4.0), gated: accept its terms there, then `hf auth "
        "login`; its authors ask that questions are shown nowhere",
        {"Question": str, "Correct Answer": str} | {f"Incorrect Answer {n}": str for n in (1, 2, 3)},
        filter="flexible-extract",
        notes="answers are thought aloud, in 256 tokens unless gen_kwargs says max_gen_toks=…",
    ),
    "hotpotqa": PaperTask(
        "HotpotQA (LongBench)",
        "longbench_hotpotqa",
        "longbench",
        "test",
        "qa_f1_score",
        "hub Xnhyacinth/LongBench, hotpotqa (200 questions); or hotpotqa.jsonl of zai-org/LongBench's data.zip",
        {"context": str, "question": str, "answers": list},
        packages=("jieba", "fuzzywuzzy", "rouge"),
    ),
    "ruler-niah": PaperTask(
        "RULER, one needle",
        "niah_single_1",
        "ruler",
        "test",
        "4096",
        _RULER_DATA,
        _RULER_FIELDS,
        packages=_RULER,
        notes="its metric is the length in tokens, 4096 to 131072; lm_eval loads the tokenizer with trust_remote_code",
    ),
    "ruler-vt": PaperTask(
        "RULER, chained variables",
        "ruler_vt",
        "ruler",
        "test",
        "4096",
        _RULER_DATA,
        _RULER_FIELDS,
        packages=_RULER,
        notes="its metric is the length in tokens, 4096 to 131072; lm_eval loads the tokenizer with trust_remote_code",
    ),
} | {
    f"babilong-qa{n}": PaperTask(
        f"BABILong qa{n}",
        f"babilong_qa{n}",
        "babilong",
        f"qa{n}",
        "acc",
        "hub RMT-team/babilong-1k-samples (Apache-2.0); metadata={'max_seq_lengths': '4k'} takes the length: 0k to 1M",
        {"input": str, "question": str, "target": str},
        few_shot=2,
    )
    for n in range(1, 6)
}
_DATA = Path(__file__).parent.parent / "data" / "eval"
# A few rows of our own making in the format of each, which show that it runs and say nothing of a model.
SAMPLES = {
    "ifeval": _DATA / "ifeval.jsonl",
    "gpqa": _DATA / "gpqa.jsonl",
    "hotpotqa": _DATA / "hotpotqa.jsonl",
    "ruler-niah": _DATA / "ruler_niah.jsonl",
    "ruler-vt": _DATA / "ruler_vt.jsonl",
    "babilong-qa1": _DATA / "babilong_qa1.jsonl",
}


def paper_task_named(name: str) -> PaperTask:
    """The benchmark called so.

    Raises:
        ValueError: there is none; names those there are.
    """
    check_choice(name, "task", PAPER_TASKS)
    return PAPER_TASKS[name]


def check_packages(name: str) -> None:
    """Raise ImportError, naming what is missing and the command that installs it, if a benchmark cannot run here."""
    import importlib.util

    missing = [package for package in paper_task_named(name).packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingPackageError(
            f"{name}: needs the packages {', '.join(missing)}, which are not installed; pip install "
            f"{' '.join(missing)}, or 'deltamem-fast[eval]'"
        )


def local_task(name: str, data: Path | str, *, seed: int = 0) -> ConfigurableTask:
    """lm_eval's own task on the rows of a local file, for ``lm_eval.simple_evaluate(tasks=[…])``; no hub is asked.

    Prompts, answers' filters and scores are lm_eval's.

    Args:
        name: one of ``PAPER_TASKS``.
        data: JSON lines, a JSON array of objects, or parquet, as the benchmark itself has its rows (``fields``); CSV,
            too, as GPQA comes.
        seed: of the order in which GPQA's choices stand.

    Raises:
        ValueError, OSError: an unknown name, no such file, or a row without what the benchmark needs.
        ImportError: a package is missing; the message says the command that installs it.
    """
    paper = paper_task_named(name)
    rows = _rows(paper, as_path(data, "data"), name)
    check_packages(name)
    if name == "ifeval":
        _check_sentences(rows)
    from datasets import Dataset
    from lm_eval import tasks as library
    from lm_eval.tasks import TaskManager

    place = Path(library.__file__).parent / paper.directory
    with _seeded(seed), contextlib.redirect_stdout(sys.stderr):  # lm_eval prints what it would download
        manager = TaskManager(include_path=str(place), include_defaults=False)
        changes = {"task": paper.task, "custom_dataset": lambda **_: {paper.split: Dataset.from_list(rows)}}
        task = manager.load([{"group": f"local_{name}", "task": [changes]}])["tasks"][paper.task]
        if task.config.process_docs is not None:
            # lm_eval calls it anew at each look at the rows: choices that it shuffles would be others when scored.
            docs = task.config.process_docs(task.dataset[paper.split])
            task.set_config("process_docs", None)
            task.dataset = {paper.split: docs}
            task.task_docs = task.eval_docs
    return task


def score_of(name: str, results: Mapping[str, Any]) -> float:
    """What is reported of a benchmark, of what ``lm_eval.simple_evaluate`` returned."""
    paper = paper_task_named(name)
    return float(results["results"][paper.task][f"{paper.metric},{paper.filter}"])


def _rows(paper: PaperTask, path: Path, name: str) -> list[dict[str, Any]]:
    rows = _csv_rows(path) if path.suffix == ".csv" else read_records(path, "data")
    if not rows:
        raise FileFormatError(f"data: {path}: no row in it, allowed one or more of {name}")
    if name == "hotpotqa":  # LongBench's own files call the question input
        rows = [{"question": row["input"], **row} if isinstance(row.get("input"), str) else row for row in rows]
    for number, row in enumerate(rows, 1):
        for key, kind in paper.fields.items():
            field(row, key, kind, f"data: {path}: row {number}")
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = read_bytes(path, "data").decode("utf-8-sig")
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"data: {path}: not CSV in UTF-8: {error}") from error


def _check_sentences(rows: list[dict[str, Any]]) -> None:
    needed = sorted({one for row in rows for one in row["instruction_id_list"] if one in _WITH_SENTENCES})
    if not needed:
        return
    import nltk

    try:
        nltk.data.find(f"tokenizers/{_WORDS[0]}")
    except LookupError as error:
        raise FileMissingError(
            f"ifeval: {', '.join(needed)}: needs NLTK's {_WORDS[0]}, which is not here; {_WORDS[1]}"
        ) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's own random numbers, which lm_eval's tasks draw, from a seed; afterwards as they were."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
