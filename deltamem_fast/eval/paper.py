"""The benchmarks that lm-evaluation-harness has itself: what each is called there, what it needs, and on local data.

IFEval, GPQA Diamond and HotpotQA are three of the paper's five; RULER and BABILong have come since. The other two,
LoCoMo and MemoryAgentBench, are tasks of ours (``harness_tasks``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import check_choice, check_integer
from ..errors import ArgumentError, FileFormatError, MissingPackageError
from ..model.libraries import told
from ..storage.files import as_path
from .paper_rows import HOW, WITH_SENTENCES, check_sentences, local_rows
from .ruler import MAKERS

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager


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
        new_tokens: of an answer at most, where nothing else is said; 0 = as lm_eval has it.
        made: whether lm_eval makes its rows itself, with a tokenizer; see ``ruler_task``. Their ``max_length`` is the
            name of the metric then.
        document: whether its prompts have one, of which a policy leaves something out; else all policies are the same.
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
    new_tokens: int = 0
    made: bool = False
    document: bool = True
    notes: str = ""


_NO_DOCUMENT = (
    "a prompt has no document, so that it is the same under every policy: nothing stands beside it, and a memory is "
    "written while it is read"
)
_RULER = ("wonderwords", "nltk", "scipy")
_RULER_FIELDS = {"input": str, "outputs": list, "max_length": int, "gen_prefix": str}
_RULER_DATA = "made by lm_eval's functions at once, with the model's tokenizer; nothing is downloaded"
# The lengths that lm_eval's tasks have as metrics.
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
PAPER_TASKS = (
    {
        "ifeval": PaperTask(
            "IFEval",
            "ifeval",
            "ifeval",
            "train",
            "prompt_level_strict_acc",
            "hub google/IFEval (541 prompts, Apache-2.0)",
            {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list},
            packages=("langdetect", "immutabledict", "nltk"),
            document=False,
            notes=f"{_NO_DOCUMENT}; two of 25 instructions ({', '.join(WITH_SENTENCES)}) need NLTK's punkt_tab: {HOW}",
        ),
        "gpqa": PaperTask(
            "GPQA Diamond",
            "gpqa_diamond_cot_zeroshot",
            "gpqa/cot_zeroshot",
            "train",
            "exact_match",
            "hub Idavidrein/gpqa, gpqa_diamond (198 questions, CC BY 4.0), gated: accept its terms, then `hf auth "
            "login`; its authors ask that questions are shown nowhere",
            {"Question": str, "Correct Answer": str} | {f"Incorrect Answer {n}": str for n in (1, 2, 3)},
            filter="flexible-extract",
            new_tokens=2048,
            document=False,
            notes=f"{_NO_DOCUMENT}; answers are thought aloud: they have up to 2,048 tokens, where lm_eval by itself "
            "gives 256",
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
    }
    | {
        f"ruler-{name}": PaperTask(
            f"RULER, {title}",
            task,
            "ruler",
            "test",
            "4096",
            _RULER_DATA,
            _RULER_FIELDS,
            packages=_RULER,
            made=True,
            notes="its metric is the length in tokens, 4096 to 131072",
        )
        for name, title, task in (("niah", "one needle", "niah_single_1"), ("vt", "chained variables", "ruler_vt"))
    }
    | {
        f"babilong-qa{n}": PaperTask(
            f"BABILong qa{n}",
            f"babilong_qa{n}",
            "babilong",
            f"qa{n}",
            "acc",
            "hub RMT-team/babilong-1k-samples (Apache-2.0); metadata={'max_seq_lengths': '4k'} for others: 0k to 1M",
            {"input": str, "question": str, "target": str},
            few_shot=2,
        )
        for n in range(1, 6)
    }
)
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


def open_task(name: str, path: Path | None, tokenizer, *, seed: int = 0) -> tuple[ConfigurableTask, str]:
    """A benchmark as ``deltamem eval run`` asks it, and the digest of what is asked (``task_digest``).

    Args:
        name: one of ``PAPER_TASKS``.
        path: a local file with its rows; None = from the hub, or made with ``tokenizer`` (RULER).
        seed: of what is drawn: the order of GPQA's choices, RULER's rows.

    Raises:
        ValueError, OSError, ImportError: the data cannot be had, or is not what it should be.
    """
    if path is not None:
        task = local_task(name, path, seed=seed)
    elif paper_task_named(name).made:
        with told(f"task {name}"):
            task = ruler_task(name, tokenizer, seed=seed)
    else:
        check_packages(name)
        task = _task_of(name, _hub_rows(name), seed)
    return task, task_digest(task)


def task_digest(task: ConfigurableTask) -> str:
    """SHA-256 of all that a task of lm_eval's asks, in hexadecimal: another order, of choices too, has another."""
    digest = hashlib.sha256()
    for doc in task.eval_docs:
        digest.update(json.dumps(doc, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace"))
        digest.update(b"\n")
    return digest.hexdigest()


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
    return _task_of(name, check_rows(name, data), seed)


def check_rows(name: str, data: Path | str) -> list[dict[str, Any]]:
    """The rows of a local file, read and checked wholly, so that no model need be loaded before; see ``local_task``."""
    paper = paper_task_named(name)
    path = as_path(data, "data")
    rows = local_rows(name, path, paper.fields)
    if paper.made:
        metric_of(name, rows, f"data: {path}: ")
    check_packages(name)
    if name == "ifeval":
        check_sentences(rows)
    return rows


def check_hub(name: str) -> None:
    """Fetch what lm_eval has of a benchmark from the hub, so that what cannot be had is told before hours are spent.

    Raises:
        ValueError, OSError, ImportError: it cannot be had; the message says from where, and what else is allowed.
    """
    _hub_rows(name)


def _hub_rows(name: str) -> list[dict[str, Any]]:
    """What a benchmark is made of on the hub, as ``check_rows`` gives that of a local file.

    As a list: what lm_eval makes of a data set on the disk (GPQA's choices in an order) would be kept there, whatever
    the seed, and be the same or another on another machine.
    """
    paper = paper_task_named(name)
    with told(f"task {name}: from {paper.data}; allowed, too: {name}=FILE with its rows"):
        with _seeded(0), contextlib.redirect_stdout(sys.stderr):
            task = _manager(paper).load([paper.task])["tasks"][paper.task]
        rows = list(task.dataset[paper.split])
    if name == "ifeval":
        check_sentences(rows)
    return rows


def ruler_task(
    name: str, tokenizer, lengths: Sequence[int] = RULER_LENGTHS[:1], *, samples: int = 500, seed: int = 0
) -> ConfigurableTask:
    """RULER on rows that are made here by lm_eval's functions, to so many tokens of ``tokenizer``.

    By itself lm_eval loads a tokenizer to make them, by name and with ``trust_remote_code``: whatever code lies beside
    the model. Here the one that is there is handed to it, and nothing is loaded.

    Args:
        name: one of ``PAPER_TASKS`` that are ``made``.
        lengths: of prompts with their answers, in tokens; lm_eval reports scores of ``RULER_LENGTHS``.
        samples: rows of each length.
        seed: of what is drawn.

    Raises:
        ValueError: another name, or a length that the benchmark cannot be made with.
        ImportError: a package is missing; the message says the command that installs it.
    """
    check_choice(name, "task", [name for name, paper in PAPER_TASKS.items() if paper.made])
    check_packages(name)
    check_integer(samples, "samples", 1)
    if not lengths:
        raise ArgumentError("lengths: got none, allowed one or more")
    for length in lengths:
        check_integer(length, "lengths", 1)
    with _seeded(seed), contextlib.redirect_stdout(sys.stderr):
        rows = [row for length in lengths for row in MAKERS[name](tokenizer, length, samples)]
    return _task_of(name, rows, seed)


def _task_of(name: str, rows: list[dict[str, Any]], seed: int) -> ConfigurableTask:
    from datasets import Dataset

    paper = PAPER_TASKS[name]
    with _seeded(seed), contextlib.redirect_stdout(sys.stderr):  # lm_eval prints what it would download
        changes = {"task": paper.task, "custom_dataset": lambda **_: {paper.split: Dataset.from_list(rows)}}
        task = _manager(paper).load([{"group": f"local_{name}", "task": [changes]}])["tasks"][paper.task]
        if task.config.process_docs is not None:
            # lm_eval calls it anew at each look at the rows: choices that it shuffles would be others when scored.
            docs = task.config.process_docs(task.dataset[paper.split])
            task.set_config("process_docs", None)
            task.dataset = {paper.split: docs}
            task.task_docs = task.eval_docs
    return task


def _manager(paper: PaperTask) -> TaskManager:
    """Of a benchmark's own directory: to look through all that lm_eval knows takes seconds."""
    from lm_eval import tasks as library
    from lm_eval.tasks import TaskManager

    place = Path(library.__file__).parent / paper.directory
    return TaskManager(include_path=str(place), include_defaults=False)


def metric_of(name: str, rows: Iterable[Mapping[str, Any]], where: str = "") -> str:
    """What is reported of a benchmark on these rows: RULER's metric is their length.

    Args:
        where: of an error, what stands before the row.

    Raises:
        ValueError: two rows of different lengths, or of one that lm_eval has no metric of; names the row.
    """
    paper = paper_task_named(name)
    if not paper.made:
        return paper.metric
    first = None
    for number, row in enumerate(rows, 1):
        length = row["max_length"]
        if length not in RULER_LENGTHS:
            allowed = ", ".join(map(str, RULER_LENGTHS))
            raise FileFormatError(f"{where}row {number}: max_length: got {length}, allowed {allowed}")
        first = first or length
        if length != first:
            raise FileFormatError(f"{where}row {number}: max_length: got {length}, allowed {first}, as row 1 has it")
    return paper.metric if first is None else str(first)


def score_of(name: str, results: Mapping[str, Any]) -> float:
    """What is reported of a benchmark, of what ``lm_eval.simple_evaluate`` returned.

    Of RULER at several lengths, the shortest's.
    """
    paper = paper_task_named(name)
    found = results["results"][paper.task]
    metrics = map(str, RULER_LENGTHS) if paper.made else ()
    # −1 is a length without a row
    measured = [metric for metric in metrics if found.get(f"{metric},{paper.filter}", -1) != -1]
    return float(found[f"{(measured or [paper.metric])[0]},{paper.filter}"])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of Python and NumPy, which lm_eval's tasks draw, from a seed; afterwards as they were."""
    import numpy

    before = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
