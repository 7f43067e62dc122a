"""The demo: the shipped weights recall what they claim to, and weights that do not are told apart."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from recall_weights import write_untrained_weights
from safetensors.torch import load_file

from deltamem_fast.cli.main import main
from deltamem_fast.recall import demo
from deltamem_fast.recall.demo import CHECKS, check_figures, failed_checks, run_demo
from deltamem_fast.recall.demo_text import format_demo
from deltamem_fast.recall.proof import FACTS
from deltamem_fast.recall.task import user
from deltamem_fast.recall.weights import STRATEGIES, find_weights, load_backbone
from deltamem_kernels.dispatch import resolve_backend

COUNTS = [str(count) for count in FACTS]


pytestmark = pytest.mark.xdist_group("demo")  # the proof runs once


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return write_untrained_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """One run on the shipped weights, with fewer questions than the command asks."""
    return run_demo(output=tmp_path_factory.mktemp("shipped"), questions=96)


# --- the proof


def test_told_facts_are_answered_from_the_memory_alone(shipped):
    figures, _ = shipped
    best = figures["recall"][figures["best"]]
    assert all(best[count] >= 0.9 for count in COUNTS[:4])
    assert all(figures["context"][count] >= 0.9 for count in COUNTS[:4])
    for nothing in (figures["empty"], figures["frozen"]):
        assert sum(nothing.values()) / len(nothing) <= figures["chance"] + 0.05
    assert figures["half_ratio"][figures["best"]] >= 1.31
    assert figures["checks"] == dict.fromkeys(CHECKS, True)


def test_every_strategy_remembers(shipped):
    figures, _ = shipped
    for name in STRATEGIES:
        shares = figures["recall"][name]
        assert shares["1"] >= 0.9 and all(shares[count] > figures["empty"][count] + 0.3 for count in COUNTS[:4])


def test_the_story_is_answered_by_generate(shipped):
    figures, snapshots = shipped
    asked = figures["story"]["asked"]
    assert sum(row["memory"] == row["truth"] for row in asked) >= 3
    assert sum(row["empty"] == row["truth"] for row in asked) <= 1
    again = figures["story"]["asked_again"]
    assert again[0]["truth"] != asked[0]["truth"] and again[0]["memory"] == again[0]["truth"]
    assert len(snapshots) == 6 and figures["memory_bytes"] == 4 * 4 * 8 * 8 * 4


def test_interactive_on_the_shipped_weights(capsys, monkeypatch):
    lines = ["The code of Corpus is 42.", "What is the code of Corpus?", "/reset", "What is the code of Corpus?"]
    monkeypatch.setattr(sys, "stdin", FakeInput(lines))
    assert main(["demo", "--interactive"]) == 0
    told, answered, _, forgotten = capsys.readouterr().out.splitlines()[1:]
    assert told == "Told: The code of Corpus is 42."
    assert answered.startswith("42   (with an empty memory: ") and not forgotten.startswith("42 ")


class FakeInput(list):
    def isatty(self):
        return False


# --- what the command promises, on weights that remember nothing


def test_json_is_one_object_and_what_does_not_hold_is_said(untrained, tmp_path, capsys):
    random_state = torch.get_rng_state()
    command = ["demo", "--weights", str(untrained), "--output", str(tmp_path / "out"), "--questions", "8", "--json"]
    command.append("--no-talk")
    assert main(command) == 1
    assert torch.equal(torch.get_rng_state(), random_state)
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert list(figures)[:4] == ["recall", "empty", "frozen", "context"]
    assert list(figures["recall"]) == list(STRATEGIES)
    for shares in (*figures["recall"].values(), figures["empty"], figures["frozen"], figures["context"]):
        assert list(shares) == COUNTS and all(0 <= share <= 1 for share in shares.values())
    for part in ("half", "half_ratio", "revise"):
        assert set(figures[part]) == set(STRATEGIES)
    assert list(figures["half_frozen"]) == list(figures["half"]["tsw"]) == ["4", "8"]
    assert set(figures["revise"]["tsw"]) == {"revised", "stale", "kept"}
    assert figures["backend"] == resolve_backend("auto", "cuda" if torch.cuda.is_available() else "cpu")
    failed = [name for name, holds in figures["checks"].items() if not holds]
    assert "recall" in failed and not {name for name in failed if "identical" in name or "loaded" in name}
    assert err.splitlines() == [f"deltamem: demo: DOES NOT HOLD: {CHECKS[name]}" for name in failed]
    assert sorted(os.listdir(tmp_path / "out")) == ["heatmap.png", "memory.safetensors"]
    assert load_file(tmp_path / "out" / "memory.safetensors")["layers.0.state"].shape == (1, 2, 8, 8)


def test_same_seed_same_figures_and_text(untrained, tmp_path, monkeypatch):
    def run(seed):
        figures, snapshots = run_demo(
            weights=untrained, seed=seed, questions=2, output=tmp_path, strategy="msw", backend="reference"
        )
        return figures | {"timings": None, "files": None}, snapshots, figures

    first, snapshots, whole = run(3)
    assert first["story"] != run(4)[0]["story"]
    assert first["backend"] == "reference" and first["adapter"]["heads"] == 2
    text = format_demo(whole, snapshots)
    for expected in (*CHECKS.values(), "memory, ssw", "empty memory", "layer 1 head 1", "heatmap.png", "2 questions"):
        assert expected in text
    assert all(line == line.rstrip() for line in text.splitlines())
    monkeypatch.setattr(demo, "installed", lambda package: False)
    again, snapshots, without = run(3)
    assert again == first
    files = whole["files"]
    assert files["heat_map"] is not None and without["files"] == files | {"heat_map": None}
    assert "No picture: matplotlib is not installed" in format_demo(without, snapshots)


def test_a_broken_promise_fails_loudly(untrained, tmp_path, capsys, monkeypatch):
    unpatch = demo.unpatch_model

    def leave_a_trace(model):
        unpatch(model)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-6

    monkeypatch.setattr(demo, "unpatch_model", leave_a_trace)
    monkeypatch.setattr(demo.MemoryState, "load", lambda path, model: demo.MemoryState.zeros(model))
    command = ["demo", "--weights", str(untrained), "--output", str(tmp_path), "--questions", "1", "--no-talk"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    for name in ("unpatched_bit_identical", "saved_equals_loaded"):
        assert f"DOES NOT HOLD: {CHECKS[name]}" in err
        assert f"FAIL  {CHECKS[name]}" in out
    assert f"ok    {CHECKS['memory_finite']}" in out


def good_figures():
    """Figures of which all claims hold."""
    many = dict.fromkeys(COUNTS, 0.5) | dict.fromkeys(COUNTS[:4], 0.95)
    return {
        "recall": {"tsw": dict.fromkeys(COUNTS, 0.5), "ssw": many},
        "empty": dict.fromkeys(COUNTS, 0.03),
        "frozen": dict.fromkeys(COUNTS, 0.03),
        "chance": 0.027,
        "half_frozen": {"4": 0.5, "8": 0.5},
        "half": {"tsw": {"4": 0.5, "8": 0.5}, "ssw": {"4": 0.8, "8": 0.8}},
        "revise": {"ssw": {"revised": 0.9, "stale": 0.0, "kept": 0.9}},
    }


@pytest.mark.parametrize(
    ("check", "place", "value"),
    [
        ("recall", ("recall", "ssw", "4"), 0.89),
        ("empty_near_chance", ("empty", "1"), 0.6),
        ("frozen_near_chance", ("frozen", "16"), 0.6),
        ("half_in_sight", ("half", "ssw", "4"), 0.5),
        ("revised", ("revise", "ssw", "revised"), 0.7),
        ("revised", ("revise", "ssw", "kept"), 0.7),
    ],
)
def test_each_figure_is_checked(check, place, value):
    figures = good_figures()
    assert demo.best_strategy(figures) == "ssw"
    figures["best"] = "ssw"
    assert all(check_figures(figures).values())
    changed = copy.deepcopy(figures)
    part = changed
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    checks = check_figures(changed)
    assert [name for name, holds in checks.items() if not holds] == [check]
    assert failed_checks({"checks": checks}) == [CHECKS[check]]


def test_interactive_through_a_pipe(untrained):
    lines = "The code of Corpus is 42.\nWhat is the code of Alice?\nWhat is the code of Corpus?\n/memory\n"
    done = subprocess.run(
        [sys.executable, "-m", "deltamem_fast", "demo", "--interactive", "--strategy", "ssw", "--weights", untrained],
        input=lines, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    first, told, unknown, answered, *state = done.stdout.splitlines()
    assert "ssw" in first and told == "Told: The code of Corpus is 42."
    assert unknown.startswith("Not in its small world: Alice.") and "(with an empty memory: " in answered
    assert state[0].startswith("layer 0: ") and len(state) == 9 and done.stdout.isascii()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--questions", "0"], "questions: got 0, allowed 1 or more"),
        (["--weights", "nowhere"], "weights: nowhere/backbone/config.json: no such file; `python -m examples.recall"),
        (["--weights", "nowhere", "--interactive"], "weights: nowhere/backbone/config.json: no such file"),
        (["--backend", "triton"], "backend: got 'triton'"),
    ],
)
def test_bad_arguments(tmp_path, capsys, options, message):
    if options == ["--backend", "triton"] and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
        pytest.skip("Triton runs here")
    assert main(["demo", "--output", str(tmp_path / "out"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--strategy", "lstm"], ["--json", "--interactive"]])
def test_wrong_usage(capsys, options):
    assert main(["demo", *options]) == 2
    assert "usage: deltamem demo" in capsys.readouterr().err


def test_loading_leaves_the_progress_bars_as_they_are(untrained):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    model, tokenizer = load_backbone(find_weights(untrained).backbone)
    assert logging.is_progress_bar_enabled() == before
    assert tokenizer.apply_chat_template([user("Balton?")], tokenize=False) == "<|user|>Balton?<|end|>"
    assert model.dtype == torch.float32
