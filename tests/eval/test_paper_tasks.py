"""lm_eval's own benchmarks on local data: its prompts, its scores, and what is told of what is missing."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
from types import SimpleNamespace

import datasets
import lm_eval
import nltk
import pytest
from harness_support import Saying, evaluated, lines, made

from deltamem_fast.errors import DeltaMemError, FileMissingError
from deltamem_fast.eval import paper
from deltamem_fast.eval.harness import DeltaMemLM
from deltamem_fast.eval.paper import (
    PAPER_TASKS,
    SAMPLES,
    check_hub,
    check_packages,
    check_rows,
    local_task,
    metric_of,
    open_task,
    ruler_task,
    score_of,
)
from deltamem_fast.eval.paper_rows import check_sentences, local_rows
from deltamem_fast.eval.ruler import MAKERS

pytestmark = pytest.mark.xdist_group("lm_eval")  # whose import takes seconds


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in SAMPLES[name].read_text().splitlines()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return made(tmp_path_factory.mktemp("paper"))


def answers(name: str) -> dict[str, str]:
    """Something that is in a prompt of a sample → what scores 1 there."""
    if name == "ifeval":
        said = (
            "Lamps on still water.",
            "The hive is full of honey.",
            "* air\n* legs\n* birds",
            '"It is a deep dark red."',
        )
        return dict(zip((row["prompt"] for row in rows(name)), said))
    if name.startswith("ruler"):
        return {row["input"]: " and ".join(row["outputs"]) for row in rows(name)}
    if name == "hotpotqa":
        return {row["question"]: row["answers"][0] for row in rows(name)}
    return {row["input"]: f"The most recent location is {row['target']}." for row in rows(name)}


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "gpqa"])
def test_scores(name):
    """Right answers score 1, none scores 0, and the first alone its share."""
    right = answers(name)
    for known in (right, {}, dict([next(iter(right.items()))])):
        model = Saying(lambda prompt, known=known: next((known[text] for text in known if text in prompt), "?,"))
        found = evaluated(model, local_task(name, SAMPLES[name]))
        if name == "ifeval" and not known:
            assert score_of(name, found) < 0.5
            continue
        expected = len(known) / len(right)
        if name == "ifeval" and len(known) == 1:
            continue
        assert score_of(name, found) == pytest.approx(expected)
    assert len(model.asked) == len(rows(name))


def test_gpqa():
    """Choices are shuffled once, by the seed; asked and scored alike."""
    state = random.getstate()

    def right(prompt: str) -> str:
        (row,) = (row for row in rows("gpqa") if row["Question"] in prompt)
        (line,) = (line for line in prompt.splitlines() if line[4:] == row["Correct Answer"])
        return f"I think that (A) or (B) would be wrong. The answer is {line[:3]}."

    for seed in range(3):
        assert score_of("gpqa", evaluated(Saying(right), local_task("gpqa", SAMPLES["gpqa"], seed=seed))) == 1
    asked = []
    for seed in (0, 0, 1):
        model = Saying(lambda _: "I do not know.")
        assert score_of("gpqa", evaluated(model, local_task("gpqa", SAMPLES["gpqa"], seed=seed))) == 0
        asked.append([prompt for prompt, _ in model.asked])
    assert asked[0] == asked[1] != asked[2]
    random.setstate(state)
    local_task("gpqa", SAMPLES["gpqa"])
    assert random.getstate() == state


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the samples; what is made of a data set is kept on the disk, as with the real one."""
    real = datasets.load_dataset
    names = {"Idavidrein/gpqa": "gpqa", "google/IFEval": "ifeval", "Xnhyacinth/LongBench": "hotpotqa"}
    names |= {"RMT-team/babilong-1k-samples": "babilong-qa1"}
    changed: dict[str, list[dict]] = {}

    def load(path, name=None, *, split=None, **options):
        known = names[path]
        file = lines(tmp_path / f"{known}.jsonl", changed.get(known) or rows(known))
        given = split or PAPER_TASKS[known].split
        found = real("json", data_files={given: str(file)}, cache_dir=str(tmp_path / "cache"))
        return found[given] if split else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    return changed


def test_the_hubs_rows_are_asked_as_local_ones(hub):
    """GPQA's choices stand in an order by the seed, not in that of a cache; the digest is of what is asked."""
    digests = {}
    for seed in (0, 1, 0):
        asked = []
        for path in (None, SAMPLES["gpqa"]):
            task, digest = open_task("gpqa", path, None, seed=seed)
            model = Saying(lambda _: "I do not know.")
            evaluated(model, task)
            asked.append([prompt for prompt, _ in model.asked])
            digests.setdefault(seed, set()).add(digest)
        assert asked[0] == asked[1]
    assert len(digests[0]) == len(digests[1]) == 1 and digests[0] != digests[1]
    for name in ("ifeval", "hotpotqa", "babilong-qa1"):
        (task, digest), (_, local) = (open_task(name, path, None) for path in (None, SAMPLES[name]))
        assert len(task.eval_docs) == len(rows(name)) and digest == local and len(digest) == 64
    hub["hotpotqa"] = [rows("hotpotqa")[0] | {"answers": ["other"]}, *rows("hotpotqa")[1:]]
    assert open_task("hotpotqa", None, None)[1] != open_task("hotpotqa", SAMPLES["hotpotqa"], None)[1]


def test_the_hub_has_what_ifeval_needs(hub, monkeypatch):
    """What scores need is missing before hours are spent."""
    monkeypatch.setattr(nltk.data, "find", lambda name: (_ for _ in ()).throw(LookupError(name)))
    check_hub("ifeval")
    hub["ifeval"] = [rows("ifeval")[0] | {"instruction_id_list": ["length_constraints:number_sentences"]}]
    with pytest.raises(OSError, match="ifeval: .*number_sentences: needs NLTK's punkt_tab"):
        check_hub("ifeval")


def test_rulers_digest(monkeypatch):
    """Of the rows that were made: another seed or tokenizer makes others."""
    monkeypatch.setitem(paper.MAKERS, "ruler-niah", lambda *given, make=MAKERS["ruler-niah"]: make(given[0], 700, 2))
    found = [open_task("ruler-niah", None, by, seed=seed)[1] for by, seed in ((words, 0), (words, 0), (words, 1))]
    found.append(open_task("ruler-niah", None, lambda text: SimpleNamespace(input_ids=text.split()[::2]))[1])
    assert found[0] == found[1] and len(set(found)) == 3


def test_files_as_they_are_had(tmp_path):
    """GPQA comes as CSV; LongBench's own files call the question input."""
    table = tmp_path / "gpqa.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows("gpqa")[0], "Subdomain"])
        writer.writeheader()
        writer.writerows(row | {"Subdomain": 'says "so",\nhere'} for row in rows("gpqa"))
    texts = [[doc["choices"] for doc in local_task("gpqa", path).test_docs() or local_task("gpqa", path).eval_docs]
             for path in (table, SAMPLES["gpqa"])]  # fmt: skip
    assert texts[0] == texts[1]
    own = lines(tmp_path / "hotpotqa.jsonl", [{"input": "Who?", "context": "Ada.", "answers": ["Ada"], "length": 1}])
    assert local_rows("hotpotqa", own, PAPER_TASKS["hotpotqa"].fields)[0]["question"] == "Who?"


def test_refused(tmp_path):
    data = lines(tmp_path / "data.jsonl", [{"input": "a", "question": "b", "target": "c"}, {"input": "a"}])
    for name, path, words in (
        ("arc", data, "task: got 'arc', allowed ifeval, gpqa"),
        ("babilong-qa1", tmp_path / "none.jsonl", "data: .*none.jsonl"),
        ("babilong-qa1", data, "data: .*data.jsonl: row 2: has no 'question'"),
        ("ifeval", data, "data: .*data.jsonl: row 1: has no 'key'"),
    ):
        with pytest.raises(DeltaMemError, match=words):
            local_task(name, path)
        with pytest.raises(DeltaMemError, match=words):
            check_rows(name, path)
    data.write_text('{"input": "a"\n')
    with pytest.raises(DeltaMemError, match="data: .*data.jsonl: line 1: not JSON"):
        local_task("babilong-qa1", data)
    data.write_text("\n")
    with pytest.raises(DeltaMemError, match="no row in it"):
        local_task("babilong-qa1", data)


def words(text: str):
    """A tokenizer of words, as lm_eval asks RULER's."""
    return SimpleNamespace(input_ids=text.split())


@pytest.mark.parametrize("name", ["ruler-niah", "ruler-vt"])
def test_ruler_is_made_with_a_tokenizer(name):
    """Rows fill the length in tokens of the tokenizer that is given; the seed alone decides what they say."""
    lengths = {"ruler-niah": (512, 700), "ruler-vt": (1024,)}[name]
    before = random.getstate()
    made = [list(ruler_task(name, words, lengths, samples=3, seed=seed).test_docs()) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2] and random.getstate() == before
    answer = 128 if name == "ruler-niah" else 30
    for row, length in zip(made[0], [length for length in lengths for _ in range(3)], strict=True):
        assert row["max_length"] == length and length - 300 < row["length"] <= length
        assert all(one in row["input"] for one in row["outputs"])
        if name == "ruler-niah":
            assert row["length"] == len(row["input"].split()) + answer


def test_ruler_refused():
    for name, lengths, words_of in (
        ("hotpotqa", (512,), "task: got 'hotpotqa', allowed ruler-niah, ruler-vt"),
        ("ruler-niah", (0,), "lengths: got 0"),
        ("ruler-niah", (), "lengths: got none"),
        ("ruler-niah", (130,), "lengths: got 130, too little for a row of ruler-niah"),
        ("ruler-vt", (512,), "the shortest row of ruler-vt has .* tokens, allowed"),  # lm_eval would try without an end
    ):
        with pytest.raises(DeltaMemError, match=words_of):
            ruler_task(name, words, lengths, samples=1)
    with pytest.raises(DeltaMemError, match="the shortest row of ruler-vt has .* tokens, allowed 500"):
        ruler_task("ruler-vt", lambda text: SimpleNamespace(input_ids=list(text)), samples=1)


@pytest.mark.parametrize("name", ["ruler-niah", "ruler-vt"])
def test_rulers_metric_is_its_length(tmp_path, name):
    longer = [one | {"max_length": 8192} for one in rows(name)]
    path = lines(tmp_path / "longer.jsonl", longer)
    assert metric_of(name, rows(name)) == "4096" and metric_of(name, longer) == "8192"
    assert metric_of("gpqa", []) == "exact_match"
    right = answers(name)
    model = Saying(lambda prompt: next(right[text] for text in right if text in prompt))
    task = local_task(name, path)
    assert tuple(task.aggregation()) == tuple(map(str, paper.RULER_LENGTHS))
    assert score_of(name, evaluated(model, task)) == 1
    for change, words_of in (
        ({"max_length": 4096}, "row 2: max_length: got 4096, allowed 8192, as row 1 has it"),
        ({"max_length": 500}, "row 2: max_length: got 500, allowed 4096, 8192"),
    ):
        path = lines(tmp_path / "data.jsonl", [longer[0], longer[1] | change, *longer[2:]])
        for reads in (check_rows, local_task):
            with pytest.raises(DeltaMemError, match=f"data: .*data.jsonl: {words_of}"):
                reads(name, path)


def test_rows_are_checked_without_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "_task_of", None)
    for name in SAMPLES:
        assert check_rows(name, SAMPLES[name]) == rows(name)
    monkeypatch.setattr(paper, "check_sentences", lambda rows: (_ for _ in ()).throw(FileMissingError("punkt_tab")))
    with pytest.raises(OSError, match="punkt_tab"):
        check_rows("ifeval", SAMPLES["ifeval"])


def test_what_is_missing_is_told(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jieba" else find(name, *a))
    with pytest.raises(ImportError, match=r"hotpotqa: needs the packages jieba.*pip install jieba"):
        check_packages("hotpotqa")
    check_packages("babilong-qa1")


def test_sentences_need_a_model_of_them(monkeypatch):

    def find(name):
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", find)
    asked = {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"]}
    with pytest.raises(OSError, match=r"number_sentences: needs NLTK's punkt_tab.*nltk.downloader punkt_tab"):
        check_sentences([asked])
    check_sentences([{"instruction_id_list": ["punctuation:no_comma"]}])


def test_names_are_those_of_lm_eval():
    """Each benchmark is there under its name, and its directory holds it."""
    from pathlib import Path

    from lm_eval.tasks import TaskManager

    place = Path(lm_eval.tasks.__file__).parent
    for name, one in PAPER_TASKS.items():
        manager = TaskManager(include_path=str(place / one.directory), include_defaults=False)
        assert one.task in manager.all_subtasks, name
    assert all(path.is_file() for path in SAMPLES.values()) and SAMPLES.keys() <= PAPER_TASKS.keys()


@pytest.mark.parametrize("policy", ["everything", "nothing", "last-8", "bm25-1", "yarn"])
@pytest.mark.parametrize("adapter", [None, "tsw", "ssw"])
def test_under_a_policy(directory, adapter, policy):
    """BABILong through the whole of it, with a chat template; the same once more."""
    path = None if adapter is None else str(directory / adapter)
    found = []
    for rows_together in (1, 3):
        lm = DeltaMemLM(
            str(directory / "model"), path, backend="reference", device="cpu", policy=policy, batch_size=rows_together
        )
        task = local_task("babilong-qa1", SAMPLES["babilong-qa1"])
        results = evaluated(lm, task, apply_chat_template=True, gen_kwargs={"max_gen_toks": 4})
        found.append([sample["filtered_resps"] for sample in results["samples"]["babilong_qa1"]])
        assert 0 <= score_of("babilong-qa1", results) <= 1
    assert found[0] == found[1]
