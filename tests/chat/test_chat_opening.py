"""How a chat begins: models, adapters, options, and what is told in one line when something is wrong with them."""

import argparse
import json
import sys

import pytest
import torch
from chat_support import ASKED, TOLD, recall_model, write_tiny_model
from safetensors.torch import load_file, save_file

from deltamem_fast.chat import conversation, options
from deltamem_fast.cli import chat as command
from deltamem_fast.cli.main import main
from deltamem_fast.model import loading


class Stdin(list):
    """Lines typed by nobody."""

    def __init__(self, *lines, terminal=False):
        super().__init__(lines)
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Directories of a tiny model and of an adapter for it."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def shipped(monkeypatch):
    """The shipped model is loaded once."""
    monkeypatch.setattr(conversation, "load_patched", lambda *arguments, **options: recall_model())


def error_of(capsys) -> str:
    """The one line on stderr, with nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("deltamem: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such"], "MODEL: /no/such: no such directory"),
        (["EMPTY"], "no model there (no config.json)"),
        (["MODEL", "--adapter", "/no/such"], "adapter: got '/no/such'"),
        (["MODEL", "--adapter", "EMPTY"], "delta_mem_config.json: no such file"),
        (["MODEL", "--strategy", "tsw"], "--strategy: got 'tsw' with MODEL"),
        (["--adapter", "x"], "--adapter: given without MODEL"),
        (["--trust", "nobody=1"], "--trust: got 'nobody=1', allowed ROLE=X, a role of system, user, assistant, tool"),
        (["--trust", "user"], "--trust: got 'user', allowed ROLE=X, a role of system, user, assistant, tool"),
        (["--trust", "user=1.5"], "--trust user: got '1.5', allowed a number from 0 to 1"),
        (["--budget", "0"], "--budget: got '0', allowed a finite number more than 0"),
        (["--device", "nonsense"], "device: got 'nonsense'"),
        (["--device", "cuda:99"], "device: got 'cuda:99'"),
        (["--backend", "triton"], "backend: got 'triton'"),
        (["--quantize", "4bit"], "--quantize: needs the package bitsandbytes"),
        (["--attention", "flash_attention_2"], "flash_attn"),
        (["--temperature", "hot"], "--temperature: got 'hot', allowed a number, 0 (greedy) or more"),
        (["--top-p", "2"], "--top-p: got '2'"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got '0'"),
        (["--seed", "-1"], "--seed: got '-1'"),
        (["--context-turns", "none"], "--context-turns: got 'none', allowed an integer, 1 or more, or all"),
        (["--context-tokens", "0"], "--context-tokens: got '0'"),
        (["--load", "EMPTY"], "--load: "),
        (["--load", "EMPTY", "--system", "x"], "--system: given with --load"),
        (["--load", "EMPTY", "--no-thinking"], "--thinking, --no-thinking: given with --load"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tiny, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    places = {"MODEL": tiny[0], "EMPTY": str(tmp_path)}
    assert main(["chat", *(places.get(argument, argument) for argument in arguments), "--say", "x"]) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize("arguments", (["--dtype", "float8"], ["--quantize", "2bit"], ["--nonsense"], ["a", "b"]))
def test_wrong_usage(capsys, arguments):
    assert main(["chat", *arguments]) == 2
    usage, *_, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: deltamem ") and arguments[-1] in error


def test_a_model_that_cannot_chat_is_told_before_its_weights_are_read(tiny, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny[0])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert main(["chat", str(tmp_path), "--say", "x"]) == 2
    assert "its tokenizer: has no chat template" in error_of(capsys)
    (tmp_path / "tokenizer.json").write_text("{")
    assert main(["chat", str(tmp_path), "--say", "x"]) == 2
    assert "its tokenizer: " in error_of(capsys)


def test_a_broken_model_is_told_in_one_line(tiny, tmp_path, capsys):
    import shutil

    broken = shutil.copytree(tiny[0], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert main(["chat", str(broken), "--adapter", tiny[1], "--say", "x"]) == 2
    assert "MODEL: " in error_of(capsys)


@pytest.mark.parametrize("package", command.PACKAGES)
def test_a_terminal_needs_packages_that_a_pipe_does_not(shipped, capsys, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] in command.PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "stdin", Stdin(terminal=True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["chat"]) == 2
    error = error_of(capsys)
    assert f"needs the package {package}" in error and "pip install deltamem-fast[chat]" in error
    monkeypatch.setattr(sys, "stdin", Stdin(f"{TOLD}\n", "/memory\n"))
    assert main(["chat"]) == 0
    assert capsys.readouterr().out.startswith("42\n")


def test_say(shipped, capsys):
    assert main(["chat", "--say", TOLD, "--say", "/context drop", "--say", ASKED, "--say", "/quit", "--say", TOLD]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[::2] == ["42", "42"] and err == ""
    assert main(["chat", "--say", "/nothing", "--say", ASKED]) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err.startswith("deltamem: error: /nothing")


def test_trust_and_budget_reach_sessions_new_and_loaded(shipped, tmp_path, capsys):
    """By role: what is not named stays as it was saved. /load keeps what the command line says."""
    saved = tmp_path / "saved"
    given = ["chat", "--trust", "assistant=0.5", "--trust", "user=0.75", "--budget", "3"]
    assert main([*given, "--say", TOLD, "--say", f"/save {saved}"]) == 0
    settings = json.loads((saved / "session.json").read_text())["settings"]
    assert settings["trust"] == {"assistant": 0.5, "user": 0.75} and settings["budget"] == 3
    again = tmp_path / "again"
    more = ["--say", f"/load {saved}", "--say", f"/save {again}"]
    assert main(["chat", "--trust", "user=0.25", *more]) == 0
    settings = json.loads((again / "session.json").read_text())["settings"]
    assert settings["trust"] == {"assistant": 0.5, "user": 0.25} and settings["budget"] == 3
    third = tmp_path / "third"
    assert main(["chat", "--load", str(saved), "--budget", "2", "--say", f"/save {third}"]) == 0
    settings = json.loads((third / "session.json").read_text())["settings"]
    assert settings["trust"] == {"assistant": 0.5, "user": 0.75} and settings["budget"] == 2
    capsys.readouterr()


def test_a_guard_reaches_the_model(tiny, monkeypatch):
    from deltamem_fast.adapter.record import record_of

    model, _ = loading.load_patched(*tiny, guard="on")
    assert record_of(model).guarding.always
    found = {}
    monkeypatch.setattr(conversation, "load_patched", lambda *_, **options: found.update(options) or recall_model())
    assert main(["chat", "--guard", "off", "--say", "/help"]) == 0
    assert found["guard"] == "off"
    with pytest.raises(ValueError, match="guard: got True, allowed"):
        loading.load_patched(*tiny, guard=True)


def test_settings_reach_the_session(shipped, tmp_path, capsys):
    settings = ["--context-turns", "2", "--context-tokens", "99", "--max-new-tokens", "3", "--system", "The rain sang."]
    commands = ["--say", "/context", "--say", "/set", "--say", TOLD, "--say", f"/save {tmp_path}"]
    assert main(["chat", *settings, "--temperature", "0.5", "--top-p", "0.9", "--seed", "7", *commands]) == 0
    out = capsys.readouterr().out
    assert "Allowed: 2 turns (the one being answered included) and 99 tokens of a prompt" in out
    assert torch.initial_seed() == 7 and "Answers are sampled" in out
    shown = [line.split()[:2] for line in out.splitlines() if line.startswith(("temperature", "top_p", "max_", "seed"))]
    assert shown == [["temperature", "0.5"], ["top_p", "0.9"], ["max_new_tokens", "3"], ["seed", "7"]]

    assert main(["chat", "--load", str(tmp_path), "--say", "/context", "--say", "/set"]) == 0
    out = capsys.readouterr().out
    assert "Allowed: 2 turns" in out and "0.5" in out and "The rain sang." in out
    given = ["--context-turns", "all", "--temperature", "0"]
    assert main(["chat", "--load", str(tmp_path), *given, "--say", "/context", "--say", "/set"]) == 0
    out = capsys.readouterr().out
    assert "Allowed: 99 tokens of a prompt" in out and "greedy" in out


def test_thinking_goes_to_the_template():
    from deltamem_fast.cli.main import parser

    for flag, template in (([], {}), (["--thinking"], True), (["--no-thinking"], False)):
        found = options.read_arguments(parser().parse_args(["chat", *flag])).settings["template"]
        assert found == (template if flag == [] else {"enable_thinking": template})


def test_a_model_of_ones_own(tiny, capsys):
    model, adapter = tiny
    options = ["--max-new-tokens", "5", "--context-turns", "1"]
    says = ["--say", "Where did Ada go?", "--say", "/context drop", "--say", "/memory"]
    assert main(["chat", model, "--adapter", adapter, *options, *says]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "layer 1: " in out
    for dtype in ("bfloat16", "float32"):
        assert main(["chat", model, *options, "--dtype", dtype, "--attention", "eager", "--say", "Why?"]) == 0
        err = capsys.readouterr().err
        assert err.startswith("deltamem: warning: no --adapter") and "untrained" in err and err.count("\n") == 1


def test_an_adapter_of_another_model_is_told(tiny, tmp_path, capsys):
    import shutil

    other = shutil.copytree(tiny[1], tmp_path / "adapter")
    path = other / "delta_mem_adapter.safetensors"
    weights = {name.replace("layers.1.", "layers.5."): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, {"format": "deltamem-adapter", "format_version": "1"})
    assert main(["chat", tiny[0], "--adapter", str(other), "--say", "x"]) == 2
    assert "adapter" in error_of(capsys)


@pytest.mark.parametrize("quantize", loading.QUANTIZED)
def test_quantised_weights_are_asked_of_transformers(tiny, monkeypatch, quantize):
    import transformers

    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        raise RuntimeError("far enough")

    monkeypatch.setattr(loading, "require", lambda packages, what: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="far enough"):
        loading.load_patched(tiny[0], tiny[1], quantize=quantize, dtype="bfloat16")
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (quantize == "4bit", quantize == "8bit")
    assert asked["dtype"] == torch.bfloat16 and asked["device_map"] == {"": torch.device("cpu")}
    if quantize == "4bit":
        assert config.bnb_4bit_compute_dtype == torch.bfloat16 and config.bnb_4bit_quant_type == "nf4"


def test_a_known_models_adapter_is_the_shipped_one():
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers())
    for given, adapter in (
        (["smollm2"], "smollm2/msw"),
        (["smollm2", "--strategy", "msw"], "smollm2/msw"),
        (["smollm2", "--adapter", "other/one"], "other/one"),
    ):
        opening = options.read_arguments(parser.parse_args(["chat", *given]))
        assert opening.loading["adapter"] == adapter and opening.name == "smollm2"
    with pytest.raises(ValueError, match="--strategy: given with --adapter"):
        options.read_arguments(parser.parse_args(["chat", "smollm2", "--strategy", "msw", "--adapter", "x"]))
