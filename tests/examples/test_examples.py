"""The examples run as they are, on small local models, and do what they say."""

import runpy
import sys
from pathlib import Path

import pytest
from support import tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import MemorySession, MemoryState, patch_model, save_adapter
from deltamem_fast.recall.weights import find_weights, load_backbone

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGEST = 60


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_example


@pytest.fixture
def random_model(tmp_path):
    """The directory of a random model with a tokenizer, which knows nothing of the shipped world."""
    directory, tokenizer = tmp_path / "model", chatml_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2, **ends).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def patched():
    model, tokenizer = load_backbone(find_weights().backbone)
    return patch_model(model, find_weights().adapters["msw"]), tokenizer


def test_every_example_is_short_and_has_a_test():
    text = Path(__file__).read_text(encoding="utf-8")
    scripts = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "__init__.py")
    assert len(scripts) == 5
    for path in scripts:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= LONGEST and f'run("{path.name}"' in text
        assert source.startswith('"""') and f"python examples/{path.name}" in source and '"--model"' in source


def test_first_memory(run, tmp_path):
    lines = run("first_memory.py", "--output", "m.safetensors")
    assert lines == [
        "What is the code of Corpus? 42",
        "Where is the glass clock? hall",
        "Revised: What is the code of Corpus? 43",
        "Revised: Where is the glass clock? hall",
        "Saved to m.safetensors and read back: True",
    ]
    memory = MemoryState.load(tmp_path / "m.safetensors", patched()[0])
    assert all(state.abs().max() > 0 for _, state in memory.items())


def test_first_memory_of_another_model(run, random_model):
    model = patch_model(tiny_model(vocab_size=len(chatml_tokenizer()), num_hidden_layers=2))
    save_adapter(model, random_model.parent / "adapter")
    lines = run("first_memory.py", "--model", random_model, "--adapter", random_model.parent / "adapter")
    assert lines[-1] == "Saved to memory.safetensors and read back: True"


def test_many_users(run):
    lines = run("many_users.py")
    assert lines[:2] == ["ada: 42", "ben: 17"]
    assert lines[2].startswith("eve: ") and lines[2] not in ("eve: 42", "eve: 17")
    assert lines[3] == "2 memories: ada (4,112 bytes), ben (4,112 bytes)"


def test_session_restart(run, tmp_path):
    first = run("session_restart.py", "The code of Corpus is 42.", "The glass clock is in the hall.")
    assert first[0] == "you:   The code of Corpus is 42."
    again = run("session_restart.py", "What is the code of Corpus?")
    assert again == [
        "(goes on after 2 turn(s), 4 messages)", "you:   What is the code of Corpus?", "model: 42",
    ]  # fmt: skip
    session = MemorySession.load(tmp_path / "conversation", *patched())
    assert session.turns == 3 and len(session.messages) == 6 and len(session.context) == 2  # one turn in sight


def test_train_your_own(run, random_model):
    lines = run("train_your_own.py", "--model", random_model, "--steps", 2)
    assert lines[-2].startswith("2 steps; loss of the answers: ") and lines[-1].startswith("patch_model(model, ")
    model = tiny_model(vocab_size=len(chatml_tokenizer()), num_hidden_layers=2)
    assert patch_model(model, random_model.parent / "my-adapter") is model


def test_hub_adapter(run, monkeypatch):
    asked = {}

    def push(model, repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return "https://hub/commit/1"

    monkeypatch.setattr("deltamem_fast.push_to_hub", push, raising=False)
    lines = run("hub_adapter.py", "--push", "someone/adapter")
    assert asked == {"repo_id": "someone/adapter", "private": True}
    assert lines[1:] == [
        "uploaded: https://hub/commit/1",
        "safetensors gives the same logits: True",
        "released gives the same logits: True",
    ]
