"""``deltamem inspect``: what it prints and writes, and how it tells an error."""

import json
import os
import re
import shutil
import threading

import pytest
import torch
from inspection_support import CHAT, CONFIGS, TOKENIZER, bits, filled, memory_in, model_with, report
from matplotlib.image import imread

from deltamem_fast import MemoryState, patch_model, save_adapter, unpatch_model
from deltamem_fast.cli.main import main
from deltamem_fast.inspection import pictures as heatmap
from deltamem_fast.inspection.trace import trace
from deltamem_fast.memory.figures import distance
from deltamem_fast.memory.file import read_memory
from deltamem_fast.model.loading import load_patched
from deltamem_fast.recall import weights as recall_weights
from deltamem_fast.recall.chats import tell
from deltamem_fast.recall.weights import find_weights, load_backbone

FACT = "The code of Corpus is 42."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """alice (two rows) and bob (two rows), of one model; its directory, with the adapter; a memory of another rank."""
    directory = tmp_path_factory.mktemp("files")
    model = model_with(CONFIGS["msw"])
    TOKENIZER.save_pretrained(directory / "model")
    save_adapter(model, directory / "adapter")
    unpatch_model(model).save_pretrained(directory / "model")
    model, _ = load_patched(str(directory / "model"), str(directory / "adapter"), tokenizer=False)
    alice, bob = filled(model, 2), filled(model, 2, seed=5)
    alice._skipped[1] += torch.tensor([4, 0], dtype=torch.int32)
    alice.save(directory / "alice.safetensors")
    bob.save(directory / "bob.safetensors")
    bob.select([0]).save(directory / "one.safetensors")
    patch_model(unpatch_model(model), CONFIGS["message"])
    filled(model).save(directory / "small.safetensors")
    return directory


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Of each strategy a memory of the shipped weights that was told something else."""
    directory, weights = tmp_path_factory.mktemp("shipped"), find_weights()
    model, tokenizer = load_backbone(weights.backbone)
    for name, adapter in weights.adapters.items():
        patch_model(model, adapter)
        told = [[{"role": "user", "content": "The code of Balton is 34."}]]
        tell(model, tokenizer, told).save(directory / f"{name}.safetensors")
        unpatch_model(model)
    return directory


def inspect(capsys, *arguments):
    """What the command prints; it must not fail."""
    code = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys, *arguments):
    """The one line on stderr, with nothing on stdout."""
    code = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("deltamem: error: ") and err.count("\n") == 1
    return err.removeprefix("deltamem: error: ")


# --- files alone


def test_a_file_is_told_without_a_model(files, capsys):
    path = files / "alice.safetensors"
    out = inspect(capsys, path)
    file = read_memory(path)
    memory, names = memory_in(file), file.names
    assert str(report(memory)) in out and out.startswith(f"{path}\n")
    for text in (
        names["adapter_name"],
        names["adapter_fingerprint"][:12],
        names["backbone_name"],
        "2 conversations",
        "rank 8",
    ):
        assert text in out
    assert str(report(memory, 1)) in inspect(capsys, path, "--row", "1")
    told = json.loads(inspect(capsys, path, "--json"))
    assert told["report"] == report(memory).to_dict() and told["rows"] == 2 and not told["frozen"]
    assert told["adapter_fingerprint"] == names["adapter_fingerprint"] and told["written"] == []
    assert all(line == line.rstrip() for line in out.splitlines())


def test_two_files_are_compared(files, capsys):
    a, b = files / "alice.safetensors", files / "bob.safetensors"
    apart = distance(read_memory(a).layers, read_memory(b).layers)
    out = inspect(capsys, a, b)
    assert f"Distance to {b}\n{apart}" in out
    assert json.loads(inspect(capsys, a, b, "--json"))["distance"] == apart.to_dict()
    assert (
        len(json.loads(inspect(capsys, a, files / "one.safetensors", "--row", "0", "--json"))["distance"]["rows"]) == 9
    )


def test_pictures_and_page_of_files(files, tmp_path, capsys):
    a, b = files / "alice.safetensors", files / "bob.safetensors"
    before = a.read_bytes()
    page, png = tmp_path / "new" / "page.html", tmp_path / "state.png"
    out = inspect(capsys, a, b, "--html", page, "--png", png, "--row", "1")
    assert out.endswith(f"\n\nwrote {page}\nwrote {png}\n") and imread(png).std() > 0.01
    text = page.read_text("utf-8")
    for part in (
        "Inside alice.safetensors",
        '["Conversation","1 of 0 to 1"]',
        '["Memory","3 layers, 3 heads, rank 8"]',
    ):
        assert part in text
    assert json.loads(re.search(r'"name":("[^"]*")', text).group(1)) == "bob" and a.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "state.png"]


# --- with a text


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_a_text_on_the_shipped_weights_needs_no_model(shipped, strategy, capsys):
    path = shipped / f"{strategy}.safetensors"
    told = json.loads(inspect(capsys, path, "--text", FACT, "--json"))
    weights = find_weights()
    model, tokenizer = load_backbone(weights.backbone)
    patch_model(model, weights.adapters[strategy])
    found = trace(model, tokenizer, FACT, MemoryState.load(path, model))
    assert [t["token"] for t in told["text"]["tokens"]] == list(found.tokens)
    for token, write in zip(told["text"]["tokens"], found.total("writes").tolist()):
        assert token["write"] == pytest.approx(write, rel=1e-4)
    if strategy != "ssw":
        assert max(told["text"]["tokens"], key=lambda t: t["beta"])["token"] == " 42"


def test_what_is_printed_of_a_text(shipped, tmp_path, capsys):
    path = shipped / "msw.safetensors"
    out = inspect(capsys, path, "--text", FACT)
    assert "Wrote most (gate × error), over all layers and heads:" in out and "Read most" in out
    written = out[out.index("Wrote most") : out.index("Read most")].splitlines()[1:]
    assert any("' 42'  token 7" in line for line in written[:2]) and len(written) == 8 and "state norm" not in out
    os.mkfifo(pipe := tmp_path / "text")
    writer = threading.Thread(target=pipe.write_text, args=(FACT, "utf-8"))
    writer.start()
    by_token = inspect(capsys, path, "--text-file", pipe, "--tokens")
    writer.join()
    assert by_token.startswith(out.rstrip("\n")) and "state norm" in by_token and "' 42'" in by_token.splitlines()[-3]


def test_a_text_on_a_given_model(files, tmp_path, capsys):
    path, text = files / "alice.safetensors", CHAT[0]["content"]
    given = ["--model", files / "model", "--adapter", files / "adapter", "--text", text, "--row", "1"]
    page, png = tmp_path / "page.html", tmp_path / "a.b.png"
    told = json.loads(inspect(capsys, path, *given, "--html", page, "--png", png, "--json"))
    model = model_with(CONFIGS["msw"])
    memory = memory_in(read_memory(path))
    found = trace(model, TOKENIZER, text, memory.select([1]))
    assert [t["write"] for t in told["text"]["tokens"]] == pytest.approx(found.total("writes").tolist(), rel=1e-3)
    assert told["written"] == [str(page), str(png), str(tmp_path / "a.b-tokens.png")]
    assert all(imread(path).std() > 0.01 for path in told["written"][1:]) and "My" in page.read_text("utf-8")
    assert bits(memory_in(read_memory(path))) == bits(memory)
    half = json.loads(inspect(capsys, path, *given, "--dtype", "bfloat16", "--json"))
    ratio = half["text"]["tokens"][3]["write"] / told["text"]["tokens"][3]["write"]
    assert 0.8 < ratio < 1.25 and ratio != 1


def test_a_read_only_memory_says_so(files, tmp_path, capsys):
    model, _ = load_patched(str(files / "model"), str(files / "adapter"), tokenizer=False)
    memory = filled(model)
    memory.frozen = True
    memory.save(tmp_path / "frozen.safetensors")
    given = ["--model", files / "model", "--adapter", files / "adapter", "--text", "The dog."]
    out = inspect(capsys, tmp_path / "frozen.safetensors", *given)
    assert "1 conversation, rank 8, read-only" in out
    assert "the text writes nothing" in out and "Wrote most (gate × error): nothing" in out


def test_what_is_printed_cannot_steer_a_terminal(files, capsys):
    given = ["--model", files / "model", "--adapter", files / "adapter", "--text", "a\x1b[2Jb\n\x07"]
    out = inspect(capsys, files / "alice.safetensors", *given, "--tokens")
    assert "\\x1b" in out and not re.search("[\x00-\x09\x0b-\x1f\x7f]", out)


# --- errors


def test_errors_name_the_argument(files, tmp_path, capsys):
    a, small = files / "alice.safetensors", files / "small.safetensors"
    model = ["--model", files / "model", "--adapter", files / "adapter"]
    (tmp_path / "text").write_bytes(b"\xff\xfe\xff")
    for arguments, message in (
        (["/no/such"], "MEMORY: /no/such: no such file"),
        ([a, "/no/such"], "OTHER: /no/such: no such file"),
        ([tmp_path / "text"], "MEMORY: .*text: not a safetensors file"),
        ([a, small], r"OTHER: got layers \{0: \[1, 3, 3\]"),
        ([a, files / "one.safetensors"], "OTHER: got 1 rows, allowed 2"),
        ([a, "--row", "2"], "--row: got 2, allowed an integer, 0 to 1"),
        ([a, files / "one.safetensors", "--row", "1"], "--row: OTHER: got 1, allowed an integer, 0 to 0"),
        ([a, "--tokens"], "--tokens: given without --text"),
        ([a, *model[:2]], "--model: given without --text"),
        ([a, "--text", "x", *model[2:]], "--adapter: given without --model"),
        ([a, "--text", "x", *model[:2]], "--model: given without --adapter"),
        ([a, "--text-file", "/no/such"], "--text-file: /no/such: no such file"),
        ([a, "--text-file", tmp_path / "text"], "--text-file: .*text: not UTF-8"),
        (
            [small, "--text", "x", *model],
            "MEMORY: .*small.safetensors: saved under adapter .*, but the model's adapter",
        ),
        ([a, "--text", "x", *model, "--device", "nonsense"], "device: got 'nonsense'"),
        ([a, "--text", "x", "--model", "/no/such", "--adapter", files / "adapter"], "--model: /no/such: no such dir"),
    ):
        assert re.match(message, refused(capsys, *arguments)), message
    assert main(["inspect", str(a), "--text", "x", "--text-file", "y"]) == 2


def test_what_is_read_is_not_written_over(files, tmp_path, capsys):
    a, b = (shutil.copy(files / "alice.safetensors", tmp_path / name) for name in ("a", "b"))
    (tmp_path / "link").symlink_to(a)
    (tmp_path / "t-tokens.png").write_text("Ada")
    before = a.read_bytes()
    for arguments, message in (
        ([a, "--html", a], "--html: would write .*/a, which is MEMORY; allowed another file"),
        ([a, "--png", tmp_path / "link"], "--png: would write .*/link, which is MEMORY"),
        ([a, b, "--html", tmp_path / "." / "b"], "--html: would write .*/b, which is OTHER"),
        ([a, "--html", tmp_path / "x", "--png", tmp_path / "x"], "--png: would write .*/x, which is --html"),
        (
            [a, "--text-file", tmp_path / "t-tokens.png", "--png", tmp_path / "t.png"],
            "--png: would write .*/t-tokens.png, which is --text-file",
        ),
    ):
        assert re.match(message, refused(capsys, *arguments)), message
    assert a.read_bytes() == b.read_bytes() == before and (tmp_path / "t-tokens.png").read_text() == "Ada"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_foreign_memory_asks_for_its_model(files, tmp_path, capsys, monkeypatch):
    a = files / "alice.safetensors"
    names = read_memory(a).names
    told = refused(capsys, a, "--text", "x")
    assert told.startswith("--model: not given, and MEMORY was not made with the demo's weights but with adapter ")
    assert (
        names["adapter_fingerprint"][:12] in told
        and names["backbone_fingerprint"][:12] in told
        and "pass --model" in told
    )
    monkeypatch.setattr(recall_weights, "SHIPPED", tmp_path / "nothing")
    assert refused(capsys, a, "--text", "x") == told


def test_a_failed_picture_is_told(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heatmap, "installed", lambda package: False)
    assert refused(capsys, files / "alice.safetensors", "--png", tmp_path / "a.png").startswith(
        "--png: matplotlib is not installed"
    )
    assert not list(tmp_path.iterdir())
