"""``deltamem ingest``: a file is made, and written further, as ``ingest`` would; nothing is half done."""

import json
import re

import pytest
from chat_support import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_fast import MemoryState, ingest, patch_model
from deltamem_fast.cli.main import main

FIRST, SECOND = "Ada lives in Lisbon.", "Ben keeps bees. And a dog."


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("ingest"))


def command(places, memory, *more):
    return main(["ingest", str(places[0]), str(memory), "--adapter", str(places[1]), *more])


def test_a_file_is_made_and_written_further(places, tmp_path, capsys):
    path, text = tmp_path / "memory.safetensors", tmp_path / "text"
    text.write_text(SECOND, encoding="utf-8")
    assert command(places, path, "--text", FIRST) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    assert command(places, path, "--text-file", str(text), "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    model = patch_model(AutoModelForCausalLM.from_pretrained(places[0]), places[1])
    tokenizer, memory = AutoTokenizer.from_pretrained(places[0]), MemoryState.zeros(model)
    found = [ingest(model, tokenizer, memory, said) for said in (FIRST, SECOND)]
    assert figures == {"memory": str(path), "tokens": found[1], "pieces": 1, "skipped": 0, "moved": found[1].moved}
    loaded = MemoryState.load(path, model)
    assert all((loaded[layer] == state).all() for layer, state in memory.items())


def test_a_text_that_is_trusted_less_moves_the_memory_less(places, tmp_path, capsys):
    moved = []
    for name, more in (("whole", ()), ("part", ("--trust", "0.25")), ("little", ("--budget", "0.1"))):
        assert command(places, tmp_path / name, "--text", FIRST) == 0
        capsys.readouterr()
        assert command(places, tmp_path / name, "--text", SECOND, "--json", *more) == 0
        moved.append(json.loads(capsys.readouterr().out)["moved"])
    assert moved[0] > moved[1] > moved[2] > 0


def test_mistakes_leave_the_file_as_it_was(places, tmp_path, capsys):
    path = tmp_path / "memory.safetensors"
    model = patch_model(AutoModelForCausalLM.from_pretrained(places[0]), places[1])
    MemoryState.zeros(model, 2).save(path)
    before = path.read_bytes()
    capsys.readouterr()
    for more, said in (
        (("--text", FIRST), "MEMORY: .* has 2 conversations, allowed one"),
        (("--text-file", str(tmp_path / "none")), "--text-file: .* no such file"),
        (("--text", FIRST, "--device", "nowhere"), "device: got 'nowhere'"),
        (("--text", FIRST, "--trust", "1.5"), "--trust: got 1.5, allowed a number from 0 to 1"),
        (("--text", FIRST, "--budget", "0"), "--budget: got 0.0, allowed a finite number more than 0"),
    ):
        assert command(places, path, *more) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and re.search(said, told), told
    assert main(["ingest", str(places[0]), str(path), "--text", FIRST]) == 2
    assert "--adapter: not given" in capsys.readouterr().err
    assert command(places, path) == 2
    assert "one of the arguments --text --text-file is required" in capsys.readouterr().err
    assert path.read_bytes() == before
