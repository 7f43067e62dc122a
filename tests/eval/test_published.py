"""The figures of others, as the issue and the paper's abstract have them."""

import re

import pytest

from deltamem_fast.eval.published import (
    NOT_CLAIMED,
    NOT_YET,
    PAPER_ROWS,
    PAPER_SCORES,
    SYSTEMS,
    SYSTEMS_NOTE,
    paper_scores_of,
    paper_table,
    systems_table,
)


def test_the_paper_s_table():
    assert paper_table() == [
        ["Qwen3-4B-Instruct", "frozen", "BM25", "TSW", "SSW", "MSW", "ours: not measured yet"],
        ["average of five", "46.79", "44.56", "51.66", "51.44", "50.74", ""],
        ["LoCoMo", "40.79", "", "46.53", "47.05", "49.12", ""],
        ["MemoryAgentBench", "29.54", "", "36.48", "37.84", "38.85", ""],
    ]


def test_the_figures_fit_the_ratios_of_the_paper_s_abstract():
    # "1.10× that of the frozen backbone", "1.31× on MemoryAgentBench and 1.20× on LoCoMo".
    for benchmark, ratio in (("average of five", 1.10), ("MemoryAgentBench", 1.31), ("LoCoMo", 1.20)):
        scores = PAPER_SCORES[benchmark]
        assert max(scores.values()) / scores["frozen"] == pytest.approx(ratio, abs=0.006)


def test_not_measured_is_said_once_and_gone_when_it_is():
    assert str(paper_table()).count(NOT_YET) == 1 == str(paper_table({"LoCoMo": {}})).count(NOT_YET)
    measured = paper_table({"LoCoMo": {"frozen": 40.0, "TSW": 45.125}})
    assert NOT_YET not in str(measured)
    assert measured[0][-1] == "ours" and measured[2][-1] == "frozen 40.00, TSW 45.12" and measured[1][-1] == ""


def measured(name, **scores):
    """A task of a report: its rows, by name, and their scores."""
    rows = [
        {"row": row, "policy": row.partition("+")[0], "memory": row.partition("+")[2], "answered": 2, "questions": 2,
         "score": {"mean": score}}
        for row, score in scores.items()
    ]  # fmt: skip
    return {"name": name, "rows": rows}


def test_ours_of_the_paper_s_table():
    run = {"model": "Qwen/Qwen3-4B-Instruct-2507", "documents": None, "questions": None}
    long = {"nothing+off": 0.1, "nothing+tsw": 0.2, "everything+off": 0.4, "everything+tsw": 0.5, "bm25-4+off": 0.25}
    tasks = [measured(name, **long) for name in ("locomo", "memory-agent-bench-paper", "hotpotqa")]
    found = paper_scores_of(run, tasks)
    assert found["LoCoMo"] == {"frozen": 40.0, "TSW": 50.0, "BM25": 25.0} and "average of five" not in found
    tasks += [measured(name, **{"nothing+off": 0.8, "nothing+tsw": 0.9}) for name in ("ifeval", "gpqa")]
    found = paper_scores_of(run, tasks)
    assert found["IFEval"] == {"frozen": 80.0, "TSW": 90.0}  # without a document, one prompt under every policy
    assert found["average of five"] == {"frozen": pytest.approx(56), "TSW": pytest.approx(66)}
    assert paper_table(found)[1][-1] == "frozen 56.00, TSW 66.00" and NOT_YET not in str(paper_table(found))
    for other in ({"model": "Qwen/Qwen3-8B"}, {"documents": 2}, {"questions": 16}, {"model": None}):
        assert paper_scores_of(run | other, tasks) == {}
    tasks[0]["rows"][2]["answered"] = 1  # a part
    assert "frozen" not in paper_scores_of(run, tasks)["LoCoMo"]


def test_the_systems():
    heading, *lines = systems_table()
    assert [line[:3] for line in lines] == [
        ["Mem0 v3", "LoCoMo", "91.6 to 92.5"],
        ["MemOS", "LoCoMo", "88.8"],
        ["Hindsight", "BEAM, 10 M tokens", "64.1"],
    ]
    assert all(len(line) == len(heading) for line in lines)
    assert "not comparable" in SYSTEMS_NOTE and "does not claim" in NOT_CLAIMED and "word for word" in NOT_CLAIMED


def test_every_figure_can_be_one_and_every_source_is_a_link():
    assert all(0 < score < 100 for scores in PAPER_SCORES.values() for score in scores.values())
    assert all(set(scores) <= set(PAPER_ROWS) for scores in PAPER_SCORES.values())
    for one in SYSTEMS:
        assert 0 < one.low <= one.high < 100 and re.fullmatch(r"https://[\w./-]+", one.source)
