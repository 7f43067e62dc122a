"""deltamem train: from the command line to an adapter, and what it says when something is wrong."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from tokenizers_for_tests import chatml_tokenizer
from training_support import chat, recall_lines, small_model, steps_in, weights_in, write_lines

from deltamem_fast import patch_model
from deltamem_fast.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's directory and data."""
    place = tmp_path_factory.mktemp("command")
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(place / "model")
    small_model(tokenizer).save_pretrained(place / "model")
    write_lines(place / "d.jsonl", recall_lines())
    return place


def command(place, output, *flags):
    return ["train", str(place / "model"), str(place / "d.jsonl"), "--output", str(output),
            "--backend", "reference", "--rank", "4", "--no-progress", *flags]  # fmt: skip


def error_of(capsys):
    """The one line on stderr."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("deltamem: error: ")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_train_and_train_on(place, tmp_path, capsys):
    flags = ("--steps", "2", "--lr", "1e-2", "--batch-size", "3", "--accumulate", "1", "--save-every", "1")
    assert main(command(place, tmp_path / "a", *flags, "--evaluate", str(place / "d.jsonl"))) == 0
    out = capsys.readouterr().out
    assert "d.jsonl: loss of the answers" in out and f"patch_model(model, '{tmp_path / 'a'}')" in out
    model = patch_model(small_model(dtype=torch.bfloat16), tmp_path / "a", backend="reference")
    assert model.model.layers[0].self_attn.delta_memory.config.rank == 4
    before = (tmp_path / "a" / "log.jsonl").read_text()
    assert main(command(place, tmp_path / "a", *flags, "--evaluate", str(place / "d.jsonl"), "--resume")) == 0
    assert (tmp_path / "a" / "log.jsonl").read_text() == before
    capsys.readouterr()
    on = [item for item in command(place, tmp_path / "b", *flags, "--json") if item not in ("--rank", "4")]
    assert main([*on, "--adapter", str(tmp_path / "a"), "--dtype", "float32"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == facts["total_steps"] == 2 and facts["checkpoint"] is None
    first, second = weights_in(tmp_path / "a"), weights_in(tmp_path / "b")
    assert any((first[name] != second[name]).any() for name in first)
    # A segment a sentence.
    flags = ("--steps", "1", "--strategy", "ssw", "--granularity", "sentence_mean", "--delta-heads", "q,v,o")
    assert main(command(place, tmp_path / "c", *flags)) == 0
    config = json.loads((tmp_path / "c" / "delta_mem_config.json").read_text())
    assert config["memory_write_granularity"] == "sentence_mean" and config["delta_heads"] == ["q", "v", "o"]


WRONG = {
    "no model": (["/no/such", "{data}", "--output", "{out}"], "MODEL: /no/such: no such directory"),
    "no data": (["{model}", "/no/such.jsonl", "--output", "{out}"], "DATA: /no/such.jsonl: no such file"),
    "a bad line": (["{model}", "{bad}", "--output", "{out}"], "bad.jsonl:2: messages[1].role: got 'ai', allowed"),
    "an over-long example": (
        ["{model}", "{data}", "--output", "{out}", "--write-length", "5"],
        "12 of 12 examples are over-long: ",
    ),
    "an adapter that is not there": (
        ["{model}", "{data}", "--output", "{out}", "--adapter", "/no/such"],
        "adapter: got '/no/such'",
    ),
    "an adapter and a rank": (
        ["{model}", "{data}", "--output", "{out}", "--adapter", "{model}", "--rank", "4"],
        "--rank: given with --adapter, whose configuration says it",
    ),
    "heads without msw": (
        ["{model}", "{data}", "--output", "{out}", "--heads", "2"],
        "--heads: got 2 with --strategy tsw, allowed with msw only",
    ),
    "a rank out of range": (
        ["{model}", "{data}", "--output", "{out}", "--rank", "0"],
        "rank: got 0, allowed an integer, 1 to 64",
    ),
    "no learning rate": (["{model}", "{data}", "--output", "{out}", "--lr", "0"], "lr: got 0.0, allowed a number"),
    "no checkpoint": (
        ["{model}", "{data}", "--output", "{out}", "--resume", "{out}/checkpoint-1"],
        "resume: got {out}/checkpoint-1, which is no whole checkpoint",
    ),
    "a model without a chat template": (["{plain}", "{data}", "--output", "{out}"], "has no chat template"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_one_line(name, place, tmp_path, capsys):
    arguments, message = WRONG[name]
    write_lines(place / "bad.jsonl", [recall_lines()[0], {"messages": [*chat("a"), {"role": "ai", "content": "b"}]}])
    if not (place / "plain").exists():
        tokenizer = chatml_tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(place / "plain")
        small_model(tokenizer).save_pretrained(place / "plain")
        capsys.readouterr()
    names = {"model": place / "model", "data": place / "d.jsonl", "bad": place / "bad.jsonl", "out": tmp_path / "out",
             "plain": place / "plain"}  # fmt: skip
    filled = [argument.format(**names) for argument in arguments]
    assert main(["train", *filled, "--backend", "reference"]) == 2
    assert message.format(**names) in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_the_command_line_is_light():
    heavy = ("transformers.trainer", "matplotlib", "tensorboard", "wandb")
    program = f"import sys, deltamem_fast.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_usage(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "released recipe" in out and "(8192)" in out and '"write": [messages]' in out
    assert main(["train", "model", "data.jsonl"]) == 2
    assert "--output" in capsys.readouterr().err


def test_ctrl_c_in_a_terminal(place, tmp_path):
    output = tmp_path / "out"
    flags = ("--steps", "100000", "--batch-size", "1", "--accumulate", "1", "--save-every", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "deltamem_fast", *command(place, output, *flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not (output / "log.jsonl").is_file() or not (output / "log.jsonl").stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    steps = len(steps_in(output))
    assert f"interrupted after step {steps} of 100000; saved {output}/checkpoint-{steps}" in err and "--resume" in err
    assert (output / f"checkpoint-{steps}" / "checkpoint.json").is_file()


@pytest.mark.parametrize("name", ("README.md", "log.jsonl", "checkpoint-100"))
def test_what_no_run_has_written_is_not_written_over(place, tmp_path, capsys, name):
    """Where a run is kept: in a project's or a model's directory, or beside data of this name."""
    (tmp_path / name).write_text("somebody's")
    for flags in ((), ("--resume",)):
        assert main(command(place, tmp_path, "--steps", "1", *flags)) == 2
        assert f"output: {tmp_path} holds {name} and no training run" in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "somebody's"
