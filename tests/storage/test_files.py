"""Adapter files: the released format, ours, hub ids, and what is refused."""

import contextlib
import fcntl
import json
import os
import resource
import runpy
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import CASES, GOLDEN, golden_case, golden_model, loud_adapter, tiny_model

from deltamem_fast import DeltaMemConfig, export_adapter, load_adapter, patch_model, save_adapter
from deltamem_fast.adapter.files import RELEASED_NAME, SAFETENSORS_NAME, adapter_state_dict, read_weights
from deltamem_fast.config import CONFIG_NAME
from deltamem_fast.errors import ArgumentError, FileAccessError, FileFormatError, FileMissingError, WrongPathKindError
from deltamem_fast.storage import files, tensors
from deltamem_fast.storage.files import write_text
from deltamem_fast.training import ExampleFiles, TrainingOptions
from deltamem_fast.training.log import TrainingLog


@pytest.fixture
def full_disk():
    """Inside ``full_disk(most)`` no file can grow beyond ``most`` bytes: an OSError, as of a full disk."""

    @contextlib.contextmanager
    def full_disk(most):
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return full_disk


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in theirs
    )


@pytest.mark.parametrize("name", CASES)
def test_released_adapters_round_trip_bit_equal(name, tmp_path):
    source = GOLDEN / name / "adapter"
    case, _ = golden_case(name)
    released = torch.load(source / RELEASED_NAME, weights_only=True)
    model = patch_model(golden_model(case | {"dtype": str(next(iter(released.values())).dtype)[6:]}), source)
    assert same(adapter_state_dict(model), released)
    export_adapter(model, tmp_path / "released", format="released")
    save_adapter(model, tmp_path / "ours")
    assert same(torch.load(tmp_path / "released" / RELEASED_NAME, weights_only=True), released)
    assert same(read_weights(tmp_path / "ours"), released)
    config = json.loads((source / CONFIG_NAME).read_text())
    assert json.loads((tmp_path / "released" / CONFIG_NAME).read_text()) == config
    again = patch_model(golden_model(case), tmp_path / "ours")
    assert DeltaMemConfig.load(tmp_path / "ours") == DeltaMemConfig.load(source)
    assert adapter_state_dict(again).keys() == released.keys()


def test_ours_has_a_format_version(tmp_path):
    save_adapter(patch_model(tiny_model()), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [SAFETENSORS_NAME, CONFIG_NAME]
    with safe_open(tmp_path / SAFETENSORS_NAME, "pt") as file:
        assert file.metadata()["format"] == "deltamem-adapter" and file.metadata()["format_version"] == "1"


def test_names_in_the_files_are_frozen():
    model = patch_model(
        tiny_model(), DeltaMemConfig(couple_lambda=False, delta_o_rmsnorm=True, trainable_delta_scale=True)
    )
    names = {key.removeprefix("model.layers.0.self_attn.") for key in adapter_state_dict(model) if ".layers.0." in key}
    assert names == {
        "memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj", "beta_bias", "lambda_proj", "lambda_bias",
        "delta_q_proj", "delta_k_proj", "delta_v_proj", "delta_o_proj", "delta_o_rmsnorm_weight", "delta_scale_raw",
    }  # fmt: skip


def test_load_adapter_replaces_the_weights(tmp_path):
    one = loud_adapter(patch_model(tiny_model()), seed=1)
    other = loud_adapter(patch_model(tiny_model()), seed=2)
    save_adapter(one, tmp_path)
    assert load_adapter(other, tmp_path) is other
    assert same(adapter_state_dict(other), adapter_state_dict(one))
    kept = adapter_state_dict(other)
    msw = patch_model(tiny_model(), DeltaMemConfig.msw(heads=2))
    with pytest.raises(ValueError, match="num_state_heads 1 .the model's: 2."):
        load_adapter(msw, tmp_path)
    deeper = patch_model(tiny_model(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r"lacks 9 \(layers.3.self_attn.beta_bias"):
        load_adapter(deeper, tmp_path)
    assert same(adapter_state_dict(other), kept)
    with pytest.raises(ValueError, match="not patched"):
        load_adapter(tiny_model(), tmp_path)


def test_one_directory_holds_one_adapter(tmp_path):
    model = patch_model(tiny_model())
    export_adapter(model, tmp_path, format="released")
    save_adapter(model, tmp_path)
    assert not (tmp_path / RELEASED_NAME).exists()
    with pytest.raises(ValueError, match="format: got 'pt', allowed safetensors, released"):
        export_adapter(model, tmp_path, format="pt")


def test_broken_adapters_are_refused(tmp_path):
    save_adapter(patch_model(tiny_model()), tmp_path)
    weights = read_weights(tmp_path)
    path = tmp_path / SAFETENSORS_NAME
    save_file(weights, path, {"format": "deltamem-adapter", "format_version": "9"})
    with pytest.raises(ValueError, match="version '9', this version reads 'deltamem-adapter' 1 to 1"):
        patch_model(tiny_model(), tmp_path)
    path.write_bytes(b"12345678910")
    with pytest.raises(ValueError, match="not a safetensors file, or cut short"):
        patch_model(tiny_model(), tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        patch_model(tiny_model(), tmp_path)
    torch.save({"a": 1}, tmp_path / RELEASED_NAME)
    with pytest.raises(ValueError, match="something else than named tensors"):
        patch_model(tiny_model(), tmp_path)


@pytest.mark.parametrize("metadata", [None, 7, [], ["a"], "text", {"format": 1}, {"format": None}])
@pytest.mark.parametrize("entries", [{}, {"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}], ids=len)
@pytest.mark.parametrize("read", [tensors.read_tensors, tensors.read_metadata])
def test_a_header_whose_metadata_is_no_text_is_refused(tmp_path, metadata, entries, read):
    """With tensors beside it and without: nobody is handed metadata of another type."""
    head = json.dumps({"__metadata__": metadata, **entries}).encode()
    path = tmp_path / "memory.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(FileFormatError, match="memory: .*not a safetensors file: entry '__metadata__'"):
        read(path, "memory")


class Payload:
    def __reduce__(self):
        return print, ("this must never run",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    DeltaMemConfig().save(tmp_path)
    torch.save({"model.layers.0": Payload()}, tmp_path / RELEASED_NAME)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        patch_model(tiny_model(), tmp_path)
    assert "never run" not in capsys.readouterr().out


def test_hub_ids_go_through_the_hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--adapter"
    loud = loud_adapter(patch_model(tiny_model()))
    save_adapter(loud, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True, raising=False)
    model = patch_model(tiny_model(), "someone/adapter")
    assert same(adapter_state_dict(model), adapter_state_dict(loud))
    with pytest.raises(FileNotFoundError, match="adapter: got 'someone/other', which is no directory here"):
        patch_model(tiny_model(), "someone/other")


def test_an_interrupted_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = loud_adapter(patch_model(tiny_model()))
    save_adapter(model, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    loud_adapter(model, seed=4)

    def interrupt(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("before", ("safetensors", "released"))
@pytest.mark.parametrize("after", ("safetensors", "released"))
def test_an_interrupted_save_mixes_no_adapters(tmp_path, monkeypatch, before, after):
    """Two adapters whose weights have the same shapes."""
    model = patch_model(tiny_model())
    export_adapter(model, tmp_path, before)
    other = patch_model(tiny_model(), DeltaMemConfig(alpha=4))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DeltaMemConfig, "save", interrupt)
        export_adapter(other, tmp_path, after)
    with pytest.raises((FileFormatError, FileMissingError), match=f"alpha 4.0 .{CONFIG_NAME}: 16.0|no such file"):
        patch_model(tiny_model(), tmp_path)
    export_adapter(other, tmp_path, after)
    assert same(read_weights(tmp_path), adapter_state_dict(other))


def test_a_save_into_a_hubs_cache_leaves_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG_NAME, SAFETENSORS_NAME):
        (blobs / f"hash of {name}").write_text("shared")
        (snapshot / name).symlink_to(f"../../blobs/hash of {name}")
    model = patch_model(tiny_model())
    save_adapter(model, snapshot)
    assert {path.read_text() for path in blobs.iterdir()} == {"shared"}
    assert same(read_weights(snapshot), adapter_state_dict(model))
    assert DeltaMemConfig.load(snapshot) == DeltaMemConfig()


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = patch_model(tiny_model())
    assert save_adapter(model, "~/adapter") == tmp_path / "home" / "adapter"
    assert load_adapter(model, "~/adapter") is model
    assert same(read_weights("~/adapter"), adapter_state_dict(model))
    assert DeltaMemConfig.load("~/adapter") == DeltaMemConfig()
    assert TrainingOptions(output="~/run").output == str(tmp_path / "home" / "run")
    line = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "home" / "data.jsonl").write_text(json.dumps(line))
    assert len(ExampleFiles(["~/data.jsonl"])) == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize("format", ("safetensors", "released"))
def test_a_full_disk_is_named(tmp_path, full_disk, format):
    model = patch_model(tiny_model())
    with full_disk(5000), pytest.raises(FileAccessError, match=str(tmp_path / "adapter")):
        export_adapter(model, tmp_path / "adapter", format)
    assert not list((tmp_path / "adapter").iterdir())
    log = TrainingLog(tmp_path / "log.jsonl")
    log.start(0)
    with full_disk(5000), pytest.raises(FileAccessError, match=str(log.path)):
        log.write({"step": 1, "evaluation": {"x" * 9000: {}}})


# --- files in general


@pytest.mark.skipif(not hasattr(os, "chown") or os.getuid() != 0, reason="needs root, who may give files away")
def test_owner_and_group_of_a_file_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_text("old")
    os.chown(path, -1, 1234)
    path.chmod(0o640)
    write_text(path, "new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (os.getuid(), 1234, 0o640)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)  # as of a user who is not in the group
    write_text(path, "newer")
    assert path.stat().st_gid != 1234 and path.stat().st_mode & 0o777 == 0o600


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    """A pipe stands for both: as root a wrong answer would cost the machine its /dev/null."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(WrongPathKindError, match="no plain file, allowed a file"):
            write_text(path, "text")
    assert pipe.is_fifo() and link.is_symlink()


def test_a_folder_that_a_sweeper_holds_is_left_to_it(tmp_path, monkeypatch):
    """It has the lock of the fresh folder, and removes it; another one is made."""
    lock, swept = files._lock, []

    def quicker(folder):
        if not swept:
            swept.append(os.open(folder, os.O_RDONLY))
            fcntl.flock(swept[0], fcntl.LOCK_EX)
            found = lock(folder)
            assert not files._holds(found, folder)
            return found
        return lock(folder)

    monkeypatch.setattr(files, "_lock", quicker)
    write_text(tmp_path / "m", "text")
    os.close(swept[0])
    assert (tmp_path / "m").read_text() == "text"


def test_what_a_user_put_there_is_not_swept(tmp_path):
    folders = [tmp_path / name for name in (".m.keep.tmp", ".m.tmp", ".mm.0123456789abcdef.tmp", ".tmpAbCdEf")]
    texts = [tmp_path / name for name in (".m.my-draft.tmp", ".m.draft.tmp", ".m.0123456789abcdef.tmp.txt", "m.tmp")]
    left, old = tmp_path / ".m.0123456789abcdef.tmp", tmp_path / ".m.ab_3def8.tmp"
    for folder in (*folders, left):
        folder.mkdir()
    texts.append(tmp_path / ".m.my_draft.tmp")
    for file in (*texts, old):
        file.write_text("kept")
        os.utime(file, (0, 0))
    old.chmod(0o600)
    write_text(tmp_path / "m", "text")
    assert all(path.exists() for path in (*folders, *texts)) and not left.exists() and not old.exists()


def test_a_file_that_is_overwritten_while_it_is_read(tmp_path):
    """What was checked is what is read."""
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(3)}, path, {"long": "x" * 20_000})  # more than is read ahead
    other = path.read_bytes().replace(b'"F32"', b'"I32"')

    def check(metadata, header):
        path.write_bytes(other)

    with pytest.raises(FileFormatError, match="path: .*m.safetensors: was changed while it was read"):
        tensors.read_tensors(path, "path", check)


@pytest.mark.parametrize("format", ("safetensors", "released"))
def test_weights_that_nobody_could_read_replace_none(tmp_path, format):
    model = loud_adapter(patch_model(tiny_model()))
    export_adapter(model, tmp_path, format)
    memory = model.model.layers[0].self_attn.delta_memory
    before, good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}, memory.memory_q_proj.data
    for bad, message in (
        (torch.full_like(good, float("nan")), "memory_q_proj holds NaN or Inf"),
        (good.to(torch.float8_e4m3fn), "memory_q_proj is torch.float8_e4m3fn, allowed torch.float64"),
        (good.to("meta"), "memory_q_proj is on the meta device"),
    ):
        memory.memory_q_proj = torch.nn.Parameter(bad)
        with pytest.raises(ArgumentError, match=f"adapter: .*{message}"):
            export_adapter(model, tmp_path, format)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_goes_from_one_head_to_another(tmp_path):
    """The decoder has another name in each: ``model``, ``transformer``, or none."""
    from transformers import Qwen3ForQuestionAnswering

    whole = loud_adapter(patch_model(tiny_model()))
    save_adapter(whole, tmp_path)
    answering = patch_model(Qwen3ForQuestionAnswering(whole.config), tmp_path)
    assert all(name.startswith("transformer.layers.") for name in adapter_state_dict(answering))
    export_adapter(answering, tmp_path, format="released")
    decoder = patch_model(tiny_model().model, tmp_path)
    expected = {key.removeprefix("model."): value for key, value in adapter_state_dict(whole).items()}
    assert same(adapter_state_dict(decoder), expected)


@pytest.mark.parametrize("name", ("ours", "released"))
def test_adapters_written_by_the_version_before_are_read(name, tmp_path):
    made = runpy.run_path(str(Path(__file__).parents[1] / "written_before" / "adapters" / "make.py"))
    expected = patch_model(made["model"](), made["config"]())
    made["fill"](expected.model.layers[1].self_attn.delta_memory)
    model = patch_model(made["model"](), made["HERE"] / name)
    assert same(adapter_state_dict(model), adapter_state_dict(expected))
    assert DeltaMemConfig.load(made["HERE"] / name) == made["config"]()
    other = patch_model(made["model"](), made["config"]())
    load_adapter(other, made["HERE"] / name)
    assert same(adapter_state_dict(other), adapter_state_dict(expected))
    # And what is written now has the same tensors.
    export_adapter(model, tmp_path, made["FORMATS"][name])
    assert same(read_weights(tmp_path), read_weights(made["HERE"] / name))
