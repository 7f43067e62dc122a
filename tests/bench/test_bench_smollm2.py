"""bench.recall released and smollm2: what is measured, on stand-ins, and what the pages make of it."""

import argparse
import importlib
import math
import re
from random import Random

import pytest
import torch
from support import loud_adapter, tiny_model
from tokenizers_for_tests import default_system_tokenizer

from deltamem_fast import DeltaMemConfig, patch_model
from deltamem_fast.adapter.shipped import SHIPPED


def bench(name):
    return importlib.import_module(f"bench.{name}")


# --- the released code beside ours


def test_pieces_cover_a_text():
    ways = {way.name: way for way in bench("recall.released").WAYS}
    assert ways["one forward"].pieces(13) == [13] and ways["two chunks"].pieces(13) == [7, 6]
    assert ways["chunks of 8 tokens"].pieces(13) == [8, 5] and ways["chunks of 8 tokens"].pieces(8) == [8]


def test_however_it_is_told_ours_remembers_the_same(monkeypatch):
    released = bench("recall.released")
    monkeypatch.setattr(released.peers, "released", lambda: None)
    rows = released.measure(4)
    ours = [row for row in rows if row.variant == "deltamem-fast"]
    theirs = [row for row in rows if row.variant != "deltamem-fast"]
    assert len(ours) == len(theirs) == 8 and {row.status for row in theirs} == {"absent"}
    shares = {row.values["share"] for row in ours}
    assert len(shares) == 1 and shares.pop() > 0.7
    assert all(row.values["asked"] == 16 for row in ours)


def test_without_the_released_package_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench("recall.released").peers, "released", lambda: None)
    assert bench("recall.__main__").main(["released", "--output", str(tmp_path)]) == 2
    assert "DELTAMEM_RELEASED" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- SmolLM2


@pytest.fixture(scope="module")
def rows():
    """All parts, of random weights in the shape of a Llama: what is counted, not what is found."""
    smollm2, tokenizer = bench("recall.smollm2"), default_system_tokenizer()
    model = patch_model(
        tiny_model("llama", vocab_size=len(tokenizer)), DeltaMemConfig.ssw("sentence_mean"), backend="reference"
    )
    loud_adapter(model)
    text = tokenizer("Ada went to the market; then she took the train home. " * 60, add_special_tokens=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "FACTS": (1, 2),
            "DISTANCES": (0, 40),
            "TEXTS": 16,
            "TEXT_TOKENS": 32,
            "SEGMENT": 8,
        }.items():
            patch.setattr(smollm2, name, value)
        patch.setattr(importlib.import_module("examples.recall_smollm2.measure"), "TOKENS", 4)
        measure = smollm2.Measure(model, tokenizer, "ssw", 4, text["input_ids"], lambda said: None)
        return [
            *measure.facts(smollm2.CONDITIONS), *measure.distance(), *measure.perplexities(), *measure.operators()
        ]  # fmt: skip


def test_every_part_is_measured(rows):
    kinds = [row.kind for row in rows]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "facts": (3 + 1 + 1 + 1) * 2, "distance": 2, "perplexity": 3, "operators": 6
    }  # fmt: skip
    assert all(row.status == "measured" for row in rows)
    facts = {(row.variant, *row.parameters.values()): row.values for row in rows if row.kind == "facts"}
    assert all(values["asked"] == 4 and 0 <= values["share"] <= 1 for values in facts.values())
    for count in (1, 2):
        assert facts["empty memory", count, "new values"] == facts["bare", count, "new values"]


def test_an_empty_memory_leaves_text_as_it_is(rows):
    ratios = {row.parameters["memory"]: row.values["ratio"] for row in rows if row.kind == "perplexity"}
    assert ratios["empty"] == 1.0
    # What segments of a text write is read by later ones of it.
    assert ratios["filled"] != 1.0 != ratios["live"] and all(math.isfinite(ratio) for ratio in ratios.values())


def test_without_essays_their_rows_say_so():
    smollm2, tokenizer = bench("recall.smollm2"), default_system_tokenizer()
    model = patch_model(tiny_model("llama", vocab_size=len(tokenizer)), backend="reference")
    measure = smollm2.Measure(model, tokenizer, "tsw", 1, None, lambda said: None)
    (row,) = measure.perplexities()
    assert row.status == "absent" and "pip install" in row.note


# --- the pages


def test_the_pages_show_every_figure(rows):
    pages, results = bench("report.pages"), bench("instrument.results")
    make = bench("instrument.rows").counted
    head = dict.fromkeys(results.KEYS) | {"device": "a CPU", "driver": None, "cores": 2, "threads": 2}
    head |= {"time": "2026-01-01", "commit": "abc", "dirty": False, "arguments": {}}
    told = [
        make(f"released/{name}", {"attention": "sdpa", "told": way}, share=share, error=0.01)
        for way, shares in {"one forward": (0.9, 0.9), "two chunks": (0.9, 0.4)}.items()
        for name, share in zip(("deltamem-fast", "released code"), shares)
    ]
    found = bench("report.found").Found(released=results.Result(head, told), smollm2=(results.Result(head, rows),))
    page = pages.released(found)
    assert "| sdpa, two chunks | 90.0 ± 1.0 | 40.0 ± 1.0 |" in page and "2e9a67c" in page
    text = pages.smollm2(found)
    for line in ("bare", "empty memory", "context", "ssw", "forget, then revise (ssw)"):
        assert re.search(rf"^\| {re.escape(line)} \| \d+\.\d ± ", text, re.MULTILINE), line
    assert "| live memory |" in text and "| perplexity of essays ÷ frozen, filled memory | ≤ 1.01 | " in text
    lines = list(pages._released_rows(found))
    assert [line[0].split(": ")[0][-11:] for line in lines] == ["one forward", " two chunks"]
    assert lines[1][1] == "deltamem-fast 90 %, released code 40 %"
    assert pages.NOT_YET in pages.smollm2(bench("report.found").Found())


def test_of_rows_measured_twice_the_page_has_the_newer_one_in_the_older_ones_place(rows):
    pages, results = bench("report.pages"), bench("instrument.results")
    make = bench("instrument.rows").counted
    at = {"facts": 4, "new": "new values"}

    def measured(time, *shares):
        head = dict.fromkeys(results.KEYS) | {
            "device": "a CPU",
            "cores": 2,
            "threads": 2,
            "time": time,
            "arguments": {},
        }
        rows = [make(f"facts/{name}", at, share=share, error=0.01, asked=8) for name, share in shares]
        return results.Result(head, rows)

    whole = measured("2026-01-01", ("tsw", 0.1), ("bare", 0.0), ("context", 0.9), ("ssw", 0.2))
    alone = measured("2026-01-02", ("tsw", 0.4), ("msw", 0.6))
    older = measured("2025-12-31", ("tsw", 0.3))
    for parts in ((whole, alone, older), (alone, older, whole)):
        found = bench("report.found").Found(smollm2=parts)
        (line,) = pages._sentence_rows(found)
        assert line[1] == "TSW 40 %, SSW 20 %, MSW 60 %; all in sight 90 %, nothing 0 %"
        # Nothing of the oldest is left on the page: it is not said what that was measured on.
        text = pages.smollm2(found)
        assert "2026-01-01" in text and "2026-01-02" in text and "2025-12-31" not in text


def test_goals_are_of_the_least_of_few_facts_against_the_context():
    make = bench("instrument.rows").counted
    rows = [
        make(f"facts/{name}", {"facts": count, "new": new}, share=share, error=0.01)
        for name, new, shares in (
            ("msw", "new values", (0.9, 0.6, 0.5, 0.1)),
            ("msw", "new values and phrasings", (0.4, 0.4, 0.2, 0.1)),
            ("tsw", "new values", (0.5, 0.5, 0.5, 0.5)),
            ("context", "new values", (0.5, 0.4, 0.4, 0.3)),
        )
        for count, share in zip((1, 2, 4, 8), shares)
    ]
    rows.append(make("perplexity/msw", {"memory": "filled"}, ratio=1.0085, error=0.001))
    lines = bench("report.recall_pages").sentence_goals(rows).splitlines()
    assert lines[0] == "|  | goal | TSW | MSW |"
    assert lines[2].endswith("| ≥ 1 | 1.00 | 1.25 |") and lines[3].endswith("| ≥ 0.75 |  | 0.50 |")
    assert lines[4] == "| perplexity of essays ÷ frozen, filled memory | ≤ 1.01 |  | 1.0085 |"


def test_what_the_page_shows_was_measured_on_the_adapters_that_are_shipped():
    found = bench("report.found").find()
    rows = bench("report.found").newest_rows(found.smollm2)
    kept = {id(row) for row in rows if row.status == "measured"}
    seen = set()
    for result in found.smollm2:
        for row in result.rows:
            # Without a name of the model it would be a row of earlier tests.
            assert id(row) not in kept or result.head.get("model"), row.name
            if id(row) in kept and (name := f"smollm2/{row.variant}") in SHIPPED:
                digest = bench("recall.figures").weights_digest(SHIPPED[name])
                assert result.head["weights"].get(row.variant) == digest, (name, row.name)
                seen.add(name)
    assert seen == set(SHIPPED)


def test_the_flood_is_about_nobody_that_was_told_of():
    smollm2, facts = bench("recall.smollm2"), importlib.import_module("examples.recall_smollm2.facts")
    for seed in range(20):
        told = facts.draw_facts(Random(seed), 4, held_out=True)
        others = smollm2.facts_about_others(Random(seed), told, 8)
        assert len(others) == 8 and not {f.subject.said for f in others} & {f.subject.said for f in told}


def stand_ins(monkeypatch):
    """In the model's and the measurements' place; returns a list that gets how many conditions each was asked for."""
    smollm2, asked = bench("recall.smollm2"), []
    monkeypatch.setattr(smollm2, "SHIPPED", {"smollm2/tsw": None, "smollm2/msw": None})
    model = torch.nn.Linear(1, 1)
    model.name_or_path = "cache/smollm2-abc"
    monkeypatch.setattr(smollm2, "load_model", lambda *args, **named: (model, None))
    monkeypatch.setattr(smollm2, "essays", lambda: None)
    for name in ("patch_model", "unpatch_model"):
        monkeypatch.setattr(smollm2, name, lambda *args: None)

    class Measure:
        def __init__(self, model, tokenizer, name, *rest):
            self.name = name

        def part(self, part, conditions):
            asked.append(len(conditions))
            return [bench("instrument.rows").counted(f"{part}/{self.name}", {"facts": 1}, share=1.0)]

    monkeypatch.setattr(smollm2, "Measure", Measure)
    return asked


def run(output, *arguments):
    """The command's exit status."""
    parser = argparse.ArgumentParser()
    bench("recall.smollm2").add_arguments(parser)
    options = parser.parse_args(arguments)
    options.output = output
    return bench("recall.smollm2").run(options)


@pytest.mark.parametrize(
    ("adapters", "questions", "folder", "conditions", "quick"),
    [
        ([], 128, "facts", [4, 1], False),
        (["smollm2/msw"], 128, "facts-msw", [1], False),
        (["smollm2/tsw"], 2, "facts-tsw", [1], True),
        (["smollm2/msw", "smollm2/tsw"], 128, "facts", [4, 1], False),
        (["elsewhere/mine/"], 128, "facts-mine", [4], True),
    ],
)
def test_some_adapters_are_measured_by_themselves(
    adapters, questions, folder, conditions, quick, monkeypatch, tmp_path
):  # fmt: skip
    """Into a folder of their own; what sees no memory stands beside shipped ones already, and not beside others.

    Fewer questions and others' adapters stay out of the pages.
    """
    asked = stand_ins(monkeypatch)
    named = ["--only", "facts", "--questions", str(questions), *(["--adapter", *adapters] if adapters else [])]
    assert run(tmp_path, *named) == 0 and asked == conditions
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert (bench("instrument.results").latest(tmp_path / folder) is None) is quick


def test_all_adapters_are_looked_at_before_the_first_is_measured(monkeypatch, tmp_path):
    smollm2, asked = bench("recall.smollm2"), stand_ins(monkeypatch)
    patched = smollm2.patch_model

    def patch_model(model, adapter):
        if adapter == "nowhere":
            raise ValueError("adapter: got 'nowhere'")
        return patched(model, adapter)

    monkeypatch.setattr(smollm2, "patch_model", patch_model)
    with pytest.raises(ValueError, match="nowhere"):
        run(tmp_path, "--only", "facts", "--adapter", "smollm2/msw", "nowhere")
    assert not asked and not list(tmp_path.iterdir())
