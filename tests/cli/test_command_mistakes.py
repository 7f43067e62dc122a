"""Mistakes on the command line: each is one line on stderr that names argument or file, exit code 2, no traceback."""

import codecs
import io
import json
import logging
import shutil
import sys

import pytest
import torch
from chat_support import write_tiny_model
from support import GOLDEN
from transformers import AutoModelForCausalLM

from deltamem_fast import MemoryState, patch_model
from deltamem_fast.chat.loop import typed_lines
from deltamem_fast.cli import info
from deltamem_fast.cli import main as cli
from deltamem_fast.cli.main import main
from deltamem_fast.errors import ArgumentError

ADAPTER = str(GOLDEN / "qwen3_tsw" / "adapter")
LONG, HUGE = "x" * 5000, "9" * 5000


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, its adapter and a memory, data, and things that are none of these; broken models under their names."""
    root = tmp_path_factory.mktemp("mistakes")
    model, adapter = write_tiny_model(root)
    patched = patch_model(AutoModelForCausalLM.from_pretrained(model), adapter)
    MemoryState.zeros(patched).save(root / "memory")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (root / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (root / "file").write_text("x")
    (root / "latin").write_bytes(b"caf\xe9")
    (root / "directory").mkdir()
    (root / "loop").symlink_to(root / "loop")
    config = json.loads((root / model / "config.json").read_text())
    weights = (root / model / "model.safetensors").read_bytes()
    broken = {
        "empty-config": ("config.json", b""),
        "list-config": ("config.json", b"[]"),
        "deep-config": ("config.json", b"[" * 100_000),
        "latin-config": ("config.json", b"\xff\xfe{}"),
        "no-kind": ("config.json", b"{}"),
        "negative": ("config.json", json.dumps(config | {"hidden_size": -3}).encode()),
        "no-heads": ("config.json", json.dumps(config | {"num_attention_heads": 0}).encode()),
        "its-code": ("config.json", json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}).encode()),
        "cut-weights": ("model.safetensors", weights[:20_000]),
        "no-weights": ("model.safetensors", None),
        "big-header": ("model.safetensors", b"\xff" * 8 + b"{}"),
        "no-tokenizer": ("tokenizer.json", None),
        "broken-tokenizer": ("tokenizer.json", b'{"x": 1}'),
        "deep-tokenizer": ("tokenizer.json", b"[" * 100_000),
    }
    for name, (file, contents) in broken.items():
        shutil.copytree(model, root / name)
        if contents is None:
            (root / name / file).unlink()
        else:
            (root / name / file).write_bytes(contents)
    return {"root": str(root), "model": str(model), "adapter": str(adapter)}


CHAT = ("chat", "{model}", "--adapter", "{adapter}", "--say", "hi", "--max-new-tokens", "2")
TEXT = ("inspect", "{root}/memory", "--text", "hi", "--model", "{model}", "--adapter", "{adapter}")
TRAIN = ("train", "{model}", "{root}/data.jsonl", "--output", "{root}/run", "--cpu")

# Arguments, and what the error says.
MISTAKES = [
    # the model
    *((("info", f"{{root}}/{name}"), f"MODEL: .*{name}") for name in ("empty-config", "list-config", "deep-config")),
    *((("info", f"{{root}}/{name}"), f"MODEL: .*{name}") for name in ("latin-config", "no-kind", "negative")),
    *((("info", f"{{root}}/{name}"), f"MODEL: .*{name}") for name in ("no-heads", "cut-weights", "no-weights")),
    (("info", "{root}/its-code"), "MODEL: .*its-code.*(custom code|does not recognize)"),
    (("info", "{root}/big-header"), "MODEL: .*header too large"),
    (("chat", "{root}/no-tokenizer", "--say", "hi"), "MODEL: .*no-tokenizer: its tokenizer: "),
    (("chat", "{root}/broken-tokenizer", "--say", "hi"), "MODEL: .*broken-tokenizer: its tokenizer: "),
    (("train", "{root}/deep-tokenizer", *TRAIN[2:]), "MODEL: .*deep-tokenizer: its tokenizer: "),
    (("train", "{root}/cut-weights", *TRAIN[2:]), "MODEL: .*cut-weights: "),
    ((*TEXT[:5], "{root}/broken-tokenizer", *TEXT[6:]), "--model: .*broken-tokenizer: its tokenizer: "),
    ((*TEXT[:5], "{root}/cut-weights", *TEXT[6:]), "--model: .*cut-weights: "),
    (("info", ""), "MODEL: got ''"),
    (("info", "a\0b"), "MODEL: got 'a"),
    (("info", LONG), "MODEL: got 'xxx"),
    (("info", "~nobody-has-this/x"), "MODEL: got '~nobody"),
    (("info", "{root}/file"), "MODEL: .*file: a file, allowed a model's directory"),
    (("info", "{root}/directory"), "MODEL: .*directory: no model there"),
    (("info", "{root}/file/x"), "MODEL: .*no such directory"),
    (("info", "{model}", "--device", "nonsense"), "device: got 'nonsense'"),
    (("info", "{model}", "--device", "meta"), "device: got 'meta'"),
    (("info", "{model}", "--device", ""), "device: got ''"),
    ((*CHAT, "--device", "cuda:99"), "device: got 'cuda:99'"),
    ((*TEXT, "--device", "\0"), "device: got"),
    ((*CHAT, "--backend", "triton"), "backend: got 'triton'"),
    # the adapter
    (("info", "{model}", "--adapter", "a\0b"), "adapter: got 'a"),
    (("info", "{model}", "--adapter", ""), "adapter: got ''"),
    (("info", "{model}", "--adapter", "~nobody-has-this/x"), "adapter: got '~nobody"),
    (("info", "{model}", "--adapter", LONG), "adapter: xxx.*too long"),
    (("info", "{model}", "--adapter", "{root}/file"), "adapter: got .*file"),
    (("info", "{model}", "--adapter", "{root}/directory"), "directory/delta_mem_config.json: no such file"),
    # files and directories
    (("convert", ADAPTER, "a\0b", "--to", "released"), "TARGET: got 'a"),
    (("convert", ADAPTER, "", "--to", "released"), "TARGET: got ''"),
    (("convert", ADAPTER, "{root}/file/x", "--to", "released"), "file.*Not a directory"),
    (("convert", ADAPTER, "{root}/loop", "--to", "released"), "loop"),
    (("convert", "{root}/loop", "{root}/new", "--to", "released"), "adapter: .*loop.*neither a directory"),
    (("convert", LONG, "{root}/new", "--to", "released"), "SOURCE: xxx.*too long"),
    (("inspect", "{root}/directory"), "MEMORY: .*directory"),
    (("inspect", "{root}/latin"), "MEMORY: .*latin: "),
    (("inspect", "a\0b"), "MEMORY: got 'a"),
    (("inspect", "{root}/memory", "{root}/missing"), "OTHER: .*missing: no such file"),
    (("inspect", "{root}/memory", "--html", "{root}/directory"), "directory: a directory, allowed a file"),
    (("inspect", "{root}/memory", "--html", ""), "--html: got ''"),
    (("inspect", "{root}/memory", "--png", "a\0b.png"), "--png: got 'a"),
    (("inspect", "{root}/memory", "--row", "-1"), "--row"),
    ((*TEXT[:2], "--text-file", "{root}/latin", *TEXT[4:]), "--text-file: .*latin: not UTF-8"),
    ((*TEXT[:2], "--text-file", "~nobody-has-this", *TEXT[4:]), "--text-file: got '~nobody"),
    ((*CHAT, "--load", "a\0b"), "--load: got 'a"),
    ((*CHAT, "--load", "{root}/directory"), "--load: .*no session there"),
    (("demo", "--weights", "{root}/directory"), "weights: .*no such file"),
    (("demo", "--weights", "a\0b"), "weights: got 'a"),
    (("demo", "--output", ""), "--output: got ''"),
    ((*TEXT[:2], "--text-file", "{root}/directory", *TEXT[4:]), "--text-file: .*directory: .*directory"),
    (("train", "{model}", "a\0b", *TRAIN[3:]), "DATA: got 'a"),
    (("train", "{model}", "{root}/directory", *TRAIN[3:]), "DATA: .*directory: not a file but a directory"),
    ((*TRAIN, "--evaluate", "{root}/missing"), "--evaluate: .*missing: no such file"),
    ((*TRAIN[:4], "a\0b"), "output: got 'a"),
    ((*TRAIN, "--resume", LONG), "--resume: xxx.*too long"),
    # numbers
    ((*CHAT, "--temperature=nan"), "--temperature: got 'nan'"),
    ((*CHAT, f"--seed={HUGE}"), "--seed: got"),
    ((*CHAT, f"--context-turns={HUGE}"), "--context-turns: got"),
    ((*CHAT, "--context-tokens=²"), "--context-tokens: got"),
    ((*CHAT, "--threads=0"), "--threads: got 0, allowed an integer, 1 to"),
    (("demo", "--threads=99999"), "--threads: got 99999"),
    (("demo", "--questions=0"), "questions: got 0"),
    ((*TRAIN, "--lr=nan"), "lr: got nan"),
    ((*TRAIN, "--epochs=1e999"), "epochs: got inf"),
    ((*TRAIN, "--rank=0"), "rank"),
    ((*TRAIN, "--alpha=nan"), "alpha"),
    ((*TRAIN, "--strategy=msw", "--heads=-1"), "num_state_heads"),
    ((*TRAIN, f"--steps={10**400}"), "steps: got an integer of many digits, allowed an integer, 1 or more"),
    ((*TRAIN, "--steps=100000", "--batch-size=100000"), "steps: with batch_size and accumulate"),
    ((*TRAIN, "--delta-heads="), "delta_heads"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=lambda value: str(value)[:50] if value else "none")
def test_a_mistake_is_one_line(arguments, says, places, capsys, monkeypatch):
    import re

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(places["root"])
    arguments = [a if len(a) > 500 else a.format(**places) for a in arguments]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("deltamem")]
    assert out == "" and len(lines) == 1, err
    assert re.match("deltamem: error: .*", lines[0]) and re.search(says, lines[0]), lines[0]
    assert "Traceback" not in err and "should have been said better" not in err


# --- the boundary itself


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ArgumentError("text: got 3"), 2, "text: got 3"),
        (ArgumentError("file: key \x1b[31mRED\x07\x9b"), 2, r"file: key \\x1b\[31mRED\\x07\\x9b"),
        (OSError(28, "No space left on device", "/x/y"), 2, "/x/y: No space left on device"),
        (MemoryError(), 2, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, r"out of memory \(CUDA out of memory. Tried\)"),
        (RecursionError("maximum depth"), 2, r"RecursionError: maximum depth \(.*report it.*DELTAMEM_DEBUG=1"),
        (AssertionError(), 2, r"AssertionError:  \(main.py, line"),
        (ValueError(), 2, "ValueError: "),
        (RuntimeError("one\ntwo"), 2, r"RuntimeError: one two \("),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_whatever_is_raised_is_one_line(error, code, says, capsys, monkeypatch):
    def fails(arguments):
        raise error

    import re

    monkeypatch.setattr(info, "_info", fails)
    monkeypatch.setattr(cli, "_close_stdout", lambda: None)
    assert main(["info"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == (1 if says else 0) and re.search(f"deltamem: error: {says}" if says else "", err)
    if code == 2:
        monkeypatch.setenv("DELTAMEM_DEBUG", "1")
        with pytest.raises(type(error)):
            main(["info"])


def test_a_full_standard_output_is_one_line(capsys, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    closed = []
    monkeypatch.setattr(cli, "_close_stdout", lambda: closed.append(True))
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["--version"]) == 2
    assert capsys.readouterr().err == "deltamem: error: output: stdout: No space left on device\n" and closed


def test_streams_that_are_closed(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["--version"]) == 0 and main(["info", "a\0b"]) == 2
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_warnings_are_one_line_each_and_only_while_a_command_runs(capsys, monkeypatch):
    def warns(arguments):
        logging.getLogger("deltamem_fast").warning("one\n%s", "two\x1b[31m")
        logging.getLogger("deltamem_fast").info("not this")
        return 0

    monkeypatch.setattr(info, "_info", warns)
    handlers = list(logging.getLogger("deltamem_fast").handlers)
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "deltamem: warning: one two\\x1b[31m\n"
    assert logging.getLogger("deltamem_fast").handlers == handlers


# --- standard input


def standard_input(contents, encoding="utf-8"):
    return io.TextIOWrapper(io.BufferedReader(io.BytesIO(contents)), encoding=encoding, errors="strict")


@pytest.mark.parametrize("encoding", ("utf-8", "ascii"))
def test_a_byte_order_mark_is_no_text(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdin", standard_input(codecs.BOM_UTF8 + "é\n\ufeffx\n".encode(), encoding))
    assert list(typed_lines()) == ["é\n", "\ufeffx\n"]
    monkeypatch.setattr(sys, "stdin", standard_input(b"caf\xe9\n\xff"))
    assert list(typed_lines()) == ["caf\ufffd\n", "\ufffd"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffno bytes behind it\n"))
    assert list(typed_lines()) == ["no bytes behind it\n"]
    monkeypatch.setattr(sys, "stdin", standard_input(b""))
    assert list(typed_lines()) == []


@pytest.mark.parametrize("encoding", ("utf-16-le", "utf-16-be", "utf-32-be", "utf-32-le"))
def test_another_encoding_is_named(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdin", standard_input("\ufeffHello\n".encode(encoding)))
    with pytest.raises(ValueError, match="standard input: UTF-(16|32), allowed UTF-8"):
        list(typed_lines())


# --- threads


def test_a_small_model_gets_one_thread_and_gives_the_others_back(monkeypatch):
    from deltamem_fast.model import threads
    from deltamem_fast.model.threads import VARIABLES, fitting_threads

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    model, before = torch.nn.Linear(2, 2), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(KeyError), fitting_threads(model) as count:
            assert count == torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 3
        with fitting_threads(model, 2) as count:
            assert count == torch.get_num_threads() == 2
        monkeypatch.setattr(threads, "SMALL", 1)
        with fitting_threads(model) as count:
            assert count == 3
        monkeypatch.setattr(threads, "SMALL", 100)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        with fitting_threads(model) as count:
            assert count == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_help_says_how_many_threads(capsys):
    for command in ("demo", "chat"):
        assert main([command, "--help"]) == 0
        assert "one for a small model" in " ".join(capsys.readouterr().out.split())
