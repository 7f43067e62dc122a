"""The demo: what it shows holds, its figures repeat, and a bad conversation file is named."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from deltamem_fast import demo
from deltamem_fast.cli import main
from deltamem_fast.demo import CHECKS, effective_rank, failed_checks
from deltamem_fast.demo_conversations import read_conversations
from deltamem_fast.demo_model import build_tokenizer
from deltamem_fast.demo_text import format_demo

SHORT = """\
# Of different lengths, so that one is padded.
A: I live in Ghent.
B: My bus is line 14, and I like it.
A? Where do I live?

B? Which bus is mine?
"""


@pytest.fixture(autouse=True)
def fewer_rounds(monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "DECODE_TOKENS", 4)


@pytest.fixture
def short(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(SHORT)
    return path


def without_timings(figures):
    return {key: value for key, value in figures.items() if key not in ("timings", "memory_file")}


def test_demo_as_json(tmp_path, capsys):
    output = tmp_path / "out"
    random_state = torch.get_rng_state()
    assert main(["demo", "--output", str(output), "--new-tokens", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert figures["checks"] == dict.fromkeys(CHECKS, True)
    assert figures["trained"] is False
    assert load_file(output / "memory.safetensors")["layers.0.state"].shape == (2, 1, 8, 8)
    assert len(figures["turns"]) == 12
    assert any(turn["padding"] for turn in figures["turns"])
    assert {question["conversation"] for question in figures["questions"]} == {"A", "B"}
    for question in figures["questions"]:
        for difference in question["loaded_against"].values():
            assert difference["max_abs_logit"] > 0 and difference["kl"] > 0
        assert set(question["top"]) == {"loaded", "empty", "disabled"}
    assert len(figures["state"]) == 2 * demo.LAYERS
    for entry in figures["state"]:
        assert 0 < entry["largest"] <= entry["norm"] and 1 <= entry["effective_rank"] <= 8
    for phase in ("prefill", "decode"):
        assert set(figures["timings"][phase]) == {"patched", "disabled", "unpatched"}
        assert all(speed > 0 for speed in figures["timings"][phase].values())


def test_same_seed_same_figures_and_text(tmp_path, short):
    def run(seed, folder):
        return demo.run_demo(seed=seed, output=tmp_path / folder, new_tokens=2, conversation=short)

    first, again, other = run(3, "a"), run(3, "b"), run(4, "c")
    assert without_timings(first) == without_timings(again)
    assert first["questions"] != other["questions"]
    text = format_demo(first)
    assert "untrained" in text and "FAIL" not in text
    for expected in (*CHECKS.values(), "Where do I live?", "memory disabled", "effective rank", "not patched"):
        assert expected in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_broken_promise_fails_loudly(tmp_path, short, capsys, monkeypatch):
    def forget(path, model):
        return demo.MemoryState.zeros(model, batch_size=2)

    monkeypatch.setattr(demo.MemoryState, "load", forget)
    command = ["demo", "--output", str(tmp_path), "--new-tokens", "1", "--conversation", str(short)]
    assert main(command) == 1
    out, err = capsys.readouterr()
    for name in ("saved_equals_loaded", "carried_over_identical", "memory_changed_logits"):
        assert f"DOES NOT HOLD: {CHECKS[name]}" in err
        assert f"FAIL  {CHECKS[name]}" in out
    assert err.count("DOES NOT HOLD") == 3
    assert failed_checks({"checks": {"memory_finite": True}}) == []


def test_the_backend_is_the_one_asked_for(tmp_path, short):
    figures = demo.run_demo(output=tmp_path, new_tokens=1, conversation=short, backend="reference")
    assert figures["backend"] == "reference"
    assert all(figures["checks"].values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A: hello\nwhat is this\nA? why\n", r"talk\.txt:2: got 'what is this', allowed"),
        ("A: hello\n\n# fine\nA:\nA? why\n", r"talk\.txt:4: got 'A:', allowed"),
        ("A: hello\nA? why\nA? who\n", r"talk\.txt:3: a second question for conversation A"),
        ("A: hello\n", r"talk\.txt: conversation A has no question"),
        ("A: hello\nA? why\nB: one\nB: two\nB? why\n", r"talk\.txt: .*the same number of turns.*A has 1, B has 2"),
        ("A? why\n", r"talk\.txt: .*A has 0"),
        ("# nothing\n", r"talk\.txt: holds no conversation"),
    ],
)
def test_bad_conversations_are_named(tmp_path, text, message):
    path = tmp_path / "talk.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_conversations(path)


def test_conversations_that_are_not_utf8(tmp_path, capsys):
    path = tmp_path / "talk.txt"
    path.write_bytes("\ufeffA: hello\r\nA: caf".encode() + b"\xe9\r\nA? why\r\n")
    assert main(["demo", "--output", str(tmp_path / "out"), "--conversation", str(path)]) == 2
    assert f"deltamem: error: {path}:2: not UTF-8\n" == capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "0"], "new_tokens: got 0, allowed 1 or more"),
        (["--seed", "-1"], "seed: got -1, allowed 0 to"),
        (["--conversation", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_bad_arguments(tmp_path, capsys, options, message):
    assert main(["demo", "--output", str(tmp_path / "out"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_the_demos_own_conversations():
    conversations = read_conversations()
    assert [c.name for c in conversations] == ["A", "B"]
    assert [len(c.turns) for c in conversations] == [6, 6]


def test_tokenizer_is_byte_level():
    tokenizer = build_tokenizer()
    text = "Tomás: 8×8 δ\n\t\x00 \U0001f600"
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_effective_rank():
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    assert effective_rank(torch.outer(torch.arange(8.0), torch.ones(8))) == pytest.approx(1)
    assert effective_rank(torch.zeros(8, 8)) == 0
    assert effective_rank(torch.stack([torch.eye(8), torch.diag(torch.eye(8)[0])])) == pytest.approx(4.5)
    two = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
