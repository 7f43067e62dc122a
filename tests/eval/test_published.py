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
