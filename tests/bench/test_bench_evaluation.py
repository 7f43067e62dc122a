"""bench.evaluation: its plans, one of them run short, and what the page makes of a run."""

import argparse
import importlib
import json
from pathlib import Path

import deltamem_fast
from deltamem_fast.eval.policies import KINDS

DATA = Path(deltamem_fast.__file__).parent / "data" / "eval" / "locomo.json"


def bench(name):
    return importlib.import_module(f"bench.{name}")


def test_the_small_backbones_rows_and_their_page(tmp_path, capsys):
    assert (
        bench("evaluation.__main__").main(["small", "--documents", "1", "--output", str(tmp_path / "changes-small")])
        == 0
    )
    report = json.loads((tmp_path / "changes-small" / "report.json").read_text())
    rows = report["tasks"][0]["rows"]
    assert len(rows) == 7 * 4 and {row["memory"] for row in rows} == {"off", "tsw", "ssw", "msw"}
    assert report["run"]["model"] == "recall" and report["run"]["adapters"]["msw"] == "recall/msw"
    assert report["run"]["commit"] and "/" not in report["run"]["model"]
    assert all(row["holds"] for row in report["run"]["verified"]["changes-small"].values())

    pages, runs = bench("report.pages"), bench("report.evaluation").found_runs(tmp_path)
    text = pages.evaluation(bench("report.found").Found(evaluations=runs))
    assert text.count("Not measured yet.") == 1  # LoCoMo
    assert "| state only, MSW | " in text and "padding equal plain forwards, one a prompt" in text
    assert f"commit {report['run']['commit']}" in text and str(tmp_path) not in text
    assert "![score against cost](../../bench/results/eval/changes-small/cost.svg)" in text
    assert "Mem0" in text and "40.79" in text


def test_locomos_plans_fit_one_directory(tmp_path, monkeypatch):
    module, plans = bench("evaluation.locomo"), []
    monkeypatch.setattr(module, "run_all", lambda found: plans.extend(found) or 0)
    common = {"output": tmp_path, "data": DATA, "documents": None, "questions": module.QUESTIONS}
    assert module.run(argparse.Namespace(**common, embedder=None)) == 0
    for plan in plans:
        plan.check()
        assert (plan.model, plan.questions, plan.settings) == ("smollm2", 16, plans[0].settings) and plan.verify
    without = {policy.kind for plan in plans for policy in plan.policies}
    plans.clear()
    assert module.run(argparse.Namespace(**common, embedder="here")) == 0
    assert {policy.kind for plan in plans for policy in plan.policies} == without | {"dense"} == {*KINDS}
    assert {plan.settings.embedder for plan in plans} == {None, "here"}
    rows = [f"{p.name}+{label}" for plan in plans for p in plan.policies for label in plan.adapters or {"off": ""}]
    assert len(rows) == len(set(rows)) and {"nothing+off", "nothing+tsw", "nothing+ssw", "nothing+msw"} <= set(rows)


def test_mistakes_are_told(capsys):
    assert bench("evaluation.__main__").main(["locomo", "--data", "/nowhere/locomo10.json"]) == 2
    assert "locomo10.json: no such file" in capsys.readouterr().err
