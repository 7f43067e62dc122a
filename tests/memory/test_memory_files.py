"""Memory files: those of the version before, whose they are, damage, and whose memory loaded tensors are."""

import gzip
import json
import math
import os
import shutil
from pathlib import Path

import memories_before
import pytest
import torch
from inspection_support import memory_in
from safetensors.torch import load_file, save_file
from support import tiny_model

from deltamem_fast import DeltaMemConfig, MemoryBank, MemoryState, patch_model
from deltamem_fast.errors import DeltaMemError, FileAccessError, FileFormatError
from deltamem_fast.memory.file import read_memory
from deltamem_fast.storage.tensors import read_tensors, seal

BEFORE = Path(__file__).parents[1] / "written_before" / "memories_v1"


@pytest.fixture(scope="module")
def model():
    return memories_before.model()


@pytest.fixture(scope="module")
def written(model):
    return memories_before.memory(model)


@pytest.fixture
def path(written, tmp_path):
    return written.save(tmp_path / "m.safetensors")


def same(ours, theirs):
    return list(ours) == list(theirs) and all(
        torch.equal(ours[i], theirs[i]) and torch.equal(ours._skipped[i], theirs._skipped[i]) for i in theirs
    )


def small(**changes):
    """A model with the shapes of ``memories_before.model`` and its adapter, the backbone changed."""
    patched = patch_model(tiny_model(**changes), DeltaMemConfig.msw(heads=2, target_layers=(0, 2)))
    theirs = dict(memories_before.model().named_parameters())
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            if ".delta_memory." in name:
                parameter.copy_(theirs[name])
    return patched


# --- of the version before


def test_a_memory_of_the_version_before(model, written):
    loaded = MemoryState.load(BEFORE / "memory.safetensors", model)
    assert same(loaded, written) and loaded.frozen
    file = read_memory(BEFORE / "memory.safetensors")
    assert same(memory_in(file), written) and file.names["backbone_name"] == "qwen3 (qwen3, 3 layers, hidden 64)"


@pytest.mark.parametrize(
    ("file", "message"),
    (("users.bank.gz", "under backbone .* has no fields of its backbone"), ("users-3.bank.gz", "rms_norm_eps")),
)
def test_a_bank_of_a_version_before(model, written, tmp_path, file, message):
    path = tmp_path / "users.bank"
    path.write_bytes(gzip.decompress((BEFORE / file).read_bytes()))
    with pytest.raises(FileFormatError, match=message):
        MemoryBank(path, small(rms_norm_eps=1e-5))
    ids = memories_before.IDS
    for _ in range(2):  # upgraded by the first
        with MemoryBank(path, model) as bank:
            memory = bank.gather(ids)
            assert same(memory, written) and [entry.id for entry in bank.list()] == sorted(ids)
            assert [entry.version for entry in bank.list()] == [memory._rows[0][1]] * 3
            assert "backbone_fields" in bank._store.layout
    with MemoryBank(path, model) as bank:
        bank.commit(ids[1:], memory.select([1, 2]).zero_())
        assert bank.delete(ids[:1]) == 1 and len(bank) == 2
        bank.commit(["new"], written.select([0]))
        assert same(bank.gather(["new", ids[0]]), MemoryState.cat([written.select([0]), MemoryState.zeros(model)]))


def test_an_export_of_the_version_before(model, written, tmp_path):
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        assert bank.import_all(BEFORE / "export") == 3
        assert same(bank.gather(memories_before.IDS), written)


# --- whose they are


HARMLESS = (
    {"pad_token_id": 5, "eos_token_id": [2, 7], "bos_token_id": None},
    {"attention_dropout": 0.1, "vocab_size": 160, "max_position_embeddings": 4096},
    {"initializer_range": 0.5, "tie_word_embeddings": True, "use_cache": False},
)


@pytest.mark.parametrize("changes", HARMLESS)
def test_what_hidden_states_do_not_depend_on_may_differ(changes, path, written):
    assert same(MemoryState.load(path, small(**changes)), written)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"intermediate_size": 64}, r"they differ in intermediate_size 96 \(the model's: 64\)"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps 1e-06 \(the model's: 1e-05\)"),
        ({"rope_theta": 5e5}, r'rope {"rope_theta": 10000, .*} \(the model\'s: {"rope_theta": 500000'),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, r"sliding_window null \(.*: 4\)"),
        ({"attention_bias": True}, r"attention_bias null \(the model's: true\)"),
    ),
)
def test_the_message_names_the_field_and_both_values(changes, message, path, tmp_path, written, model):
    other = small(**changes)
    with pytest.raises(FileFormatError, match=message):
        MemoryState.load(path, other)
    adopted = MemoryState.load(path, other, adopt=True)
    assert same(adopted, written)
    assert same(MemoryState.load(adopted.save(tmp_path / "adopted.safetensors"), other), written)
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        bank.commit(memories_before.IDS, written.unnamed())
    with pytest.raises(FileFormatError, match=message):
        MemoryBank(tmp_path / "users.bank", other)
    MemoryBank(tmp_path / "users.bank", model).close()
    MemoryBank(tmp_path / "users.bank", other, adopt=True).close()
    with MemoryBank(tmp_path / "users.bank", other) as bank:
        assert same(bank.gather(memories_before.IDS), written)


def test_adopting_never_skips_the_shapes(path):
    with pytest.raises(FileFormatError, match=r"holds layers \{0: |holds layers \[0, 2\]"):
        MemoryState.load(path, patch_model(tiny_model(), DeltaMemConfig.msw(heads=3, target_layers=(0, 2))), adopt=True)


def test_an_old_file_of_another_backbone_can_be_adopted(written):
    file = BEFORE / "memory.safetensors"
    with pytest.raises(FileFormatError, match="has no fields of its backbone, only a fingerprint.*adopt=True"):
        MemoryState.load(file, small(pad_token_id=5))
    assert same(MemoryState.load(file, small(pad_token_id=5), adopt=True), written)


def test_no_path_is_in_a_file(tmp_path, model):
    from deltamem_fast import save_adapter

    save_adapter(model, tmp_path / "secret place" / "my adapter")
    backbone = tiny_model()
    backbone.config._name_or_path = str(tmp_path / "secret place" / "backbone")
    patched = patch_model(backbone, tmp_path / "secret place" / "my adapter")
    file = MemoryState.zeros(patched).save(tmp_path / "m.safetensors")
    with MemoryBank(tmp_path / "users.bank", patched) as bank:
        bank.commit(["a"], MemoryState.zeros(patched))
    for one in (file, tmp_path / "users.bank"):
        assert b"secret" not in one.read_bytes() and b"my adapter" in one.read_bytes()
    metadata, tensors = read_tensors(file, "path")
    metadata |= {"adapter_name": str(tmp_path / "a"), "backbone_name": f"{tmp_path} (qwen3, 3 layers, hidden 64)"}
    save_file(tensors, file, metadata | {"format_version": "1"})
    shown = read_memory(file)
    assert (
        shown.names["adapter_name"] == "a"
        and shown.names["backbone_name"] == f"{tmp_path.name} (qwen3, 3 layers, hidden 64)"
    )


# --- damage


def rewritten(path, *, sealed=True, metadata=None, **tensors):
    """The file with other content; ``sealed`` makes its checksum right, so that the other checks have to find it."""
    head, found = read_tensors(path, "path")
    head |= metadata or {}
    found |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    head = {name: value for name, value in head.items() if value is not None}
    if sealed:
        head["sha256"] = seal(head, found)
    save_file(found, path, head)


STATE, COUNTS = (3, 2, 8, 8), (2, 3)
WRONG = (
    ({"layers__0__state": torch.full(STATE, math.nan)}, "layer 0 holds NaN or Inf"),
    ({"layers__0__state": torch.zeros(STATE, dtype=torch.float16)}, "layers.0.state is F16"),
    (
        {"layers__2__state": torch.zeros(3, 2, 9, 9)},
        r"layers.2.state is F32 \[3, 2, 9, 9\], allowed F32 \[3, 2, 8, 8\]",
    ),
    ({"layers__2__state": torch.zeros(4, 2, 8, 8)}, r"layers.2.state is F32 \[4"),
    ({"layers__2__state": None}, r"lacks \['layers.2.state'\]"),
    ({"layers__1__state": torch.zeros(STATE)}, r"unexpected \['layers.1.state'\]"),
    ({"skipped": torch.full(COUNTS, -1, dtype=torch.int32)}, "skipped holds counts below 0"),
    ({"skipped": torch.zeros(COUNTS)}, "skipped is F32"),
    ({"skipped": torch.zeros(COUNTS, dtype=torch.int64)}, "skipped is I64"),
    ({"skipped": torch.zeros(2, 4, dtype=torch.int32)}, r"skipped is I32 \[2, 4\]"),
    ({"skipped": None}, "lacks"),
    ({"metadata": {"frozen": '"no"'}}, "frozen is"),
    ({"metadata": {"frozen": None}}, "frozen is None"),
    ({"metadata": {"layers": None}}, "lacks the entry 'layers'"),
    ({"metadata": {"layers": "{"}}, "metadata's entry 'layers': not JSON"),
    ({"metadata": {"layers": "[]"}}, "JSON list"),
    ({"metadata": {"layers": '{"00": [2, 8, 8], "2": [2, 8, 8]}'}}, "layer '00'"),
    ({"metadata": {"layers": '{"0": [2, 8, 8.0], "2": [2, 8, 8]}'}}, "layer '0'"),
    ({"metadata": {"layers": '{"0": [2, 8, 9], "2": [2, 8, 8]}'}}, "layer '0'"),
    ({"metadata": {"layers": '{"0": [2, 8, 8], "2": null}'}}, "layer '2'"),
    ({"metadata": {"layers": '{"0": [2, 8, 8]}'}}, "unexpected"),
    ({"metadata": {"format_version": "²"}}, "format version"),
    ({"metadata": {"format_version": "-1"}}, "format version"),
    ({"metadata": {"backbone_fields": "{"}}, ""),
    ({"sealed": False, "layers__0__state": torch.ones(STATE)}, "damaged: its content is not what was written"),
    ({"sealed": False, "metadata": {"frozen": "true"}}, "damaged: its content"),
    ({"sealed": False, "metadata": {"sha256": None}}, "damaged: its content"),
)


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_files_that_are_not_what_they_say_are_refused(changes, message, path, model, tmp_path):
    rewritten(path, **changes)
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        if message:
            for read in (
                lambda: MemoryState.load(path, model),
                lambda: read_memory(path),
                lambda: bank.import_("a", path),
            ):
                with pytest.raises(FileFormatError, match=message) as refused:
                    read()
                assert str(path) in str(refused.value)
        else:
            MemoryState.load(path, model)  # what the fields are is of no matter where the fingerprint is right
        assert len(bank) == 0


def test_any_byte_of_a_file(path, written, model):
    """Whatever is cut off or changed: refused with one of our errors, or the same memory."""
    whole = path.read_bytes()
    for place in range(0, len(whole), 101):
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]):
            path.write_bytes(data)
            try:
                assert same(MemoryState.load(path, model), written)
            except FileFormatError as error:
                assert str(path) in str(error)


def test_what_is_not_finite_is_not_saved(path, written):
    before = path.read_bytes()
    broken = written.clone()
    broken[2][1, 0, 3, 3] = math.inf
    with pytest.raises(ValueError, match=r"layers.2.state holds NaN or Inf"):
        broken.save(path)
    with pytest.raises(ValueError, match="on the meta device"):
        written.to("meta").save(path)
    assert path.read_bytes() == before


# --- whose memory loaded tensors are


def overwrite(path):
    """In place, then cut: a file that is mapped would change with it, or end the process."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)
        file.truncate(16)


def test_loaded_memories_are_the_process_own(path, written, model, tmp_path):
    loaded, looked_at = MemoryState.load(path, model), read_memory(path)
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        bank.commit(["a"], written.select([0]).unnamed())
        exported = bank.export("a", tmp_path / "a.safetensors")
        bank.import_("b", exported)
        gathered = bank.gather(["b"])
        for one in (path, exported):
            overwrite(one)
        assert same(loaded, written) and same(memory_in(looked_at), written)
        assert same(bank.gather(["b"]), written.select([0]))
        shutil.copy(exported, tmp_path / "users.bank")
        assert same(gathered, written.select([0]))


def test_loaded_adapters_are_the_process_own(model, tmp_path):
    from deltamem_fast import save_adapter
    from deltamem_fast.adapter.files import read_adapter

    directory = save_adapter(model, tmp_path / "adapter")
    weights, file = read_adapter(directory).weights, directory / "delta_mem_adapter.safetensors"
    before = {name: weight.clone() for name, weight in weights.items()}
    assert before.keys() == load_file(file).keys()
    overwrite(file)
    assert all(torch.equal(weights[name], before[name]) for name in before)


# --- modes of torch, and repr


def test_whatever_torch_takes_for_granted(path, written, model, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            fresh, loaded = MemoryState.zeros(model, 2), MemoryState.load(path, model)
            rows = loaded.select([2, 0]).repeat(2)
            again = MemoryState.cat([loaded, fresh]).clone().to("cpu").detach()
            assert loaded.select([]).batch_size == 0 and MemoryState({}).skipped.device.type == "cpu"
            loaded.save(tmp_path / "again.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(loaded, written) and same(rows, written.select([2, 2, 0, 0]))
    assert same(again, MemoryState.cat([written, MemoryState.zeros(model, 2)]))
    assert fresh[0].dtype == torch.float32 and fresh[0].device.type == "cpu"
    assert same(MemoryState.load(tmp_path / "again.safetensors", model), written)


def test_repr(written, model):
    norm = math.sqrt(sum(float(state.double().square().sum()) for _, state in written.items()))
    assert repr(written) == (
        f"MemoryState(batch_size=3, layers=[0, 2], shape=[3, 2, 8, 8], norm={norm:.4g}, device=cpu, "
        "adapter='a fresh adapter', frozen=False)"
    )
    broken = written.clone()
    broken[0][0, 0, 0, 0] = math.nan
    assert "norm=nan" in repr(broken) and "norm=?, device=meta" in repr(written.to("meta"))
    with torch.inference_mode():
        inside = MemoryState.zeros(model)
    assert "norm=0," in repr(inside) and "adapter=None" in repr(MemoryState({0: torch.zeros(1, 1, 2, 2)}))
    assert repr(MemoryState({})) == "MemoryState(batch_size=0, layers=[], adapter=None, frozen=False)"
    many = MemoryState({i: torch.full((1, 1, 2, 2), 1e30) for i in range(36)})
    assert "layers=[0, ..., 35]" in repr(many) and "norm=1.2e+31" in repr(many)
    huge = torch.vmap(lambda state: (repr(MemoryState({0: state})), state)[1])(torch.ones(2, 1, 1, 2, 2))
    assert huge.shape == (2, 1, 1, 2, 2)


@pytest.mark.parametrize("device", ("banana", "cuda:99", -7))
def test_devices_that_are_not_here(device, written, model, tmp_path):
    with pytest.raises(DeltaMemError, match="device: got"):
        written.to(device)
    with MemoryBank(tmp_path / "users.bank", model) as bank, pytest.raises(DeltaMemError, match="device: got"):
        bank.gather(["a"], device)


@pytest.mark.parametrize("given", (5, None, b"x", "", "a\0b", "\ud800"))
def test_what_can_be_no_path(given, written, model, tmp_path):
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        bank.commit(["a"], written.select([0]).unnamed())
        for call in (
            lambda: written.save(given),
            lambda: MemoryState.load(given, model),
            lambda: read_memory(given),
            lambda: bank.export("a", given),
            lambda: bank.import_("b", given),
            lambda: bank.export_all(given),
            lambda: bank.import_all(given),
            lambda: MemoryBank(given, model),
        ):
            with pytest.raises(DeltaMemError, match="(path|directory): got"):
                call()


def test_directories_for_files(written, model, tmp_path):
    (tmp_path / "file").write_text("x")
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        for call in (
            lambda: written.save(tmp_path),
            lambda: MemoryState.load(tmp_path, model),
            lambda: bank.import_all(tmp_path / "file"),
            lambda: bank.export_all(tmp_path / "file"),
            lambda: MemoryBank(tmp_path, model),
            lambda: MemoryBank(tmp_path / "file" / "users.bank", model),
        ):
            with pytest.raises(FileAccessError, match=str(tmp_path)):
                call()


def test_files_are_private(written, model, tmp_path):
    before = os.umask(0)
    try:
        written.save(tmp_path / "new" / "m.safetensors")
        with MemoryBank(tmp_path / "bank" / "users.bank", model) as bank:
            bank.commit(memories_before.IDS, written.unnamed())
            modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "bank").iterdir()}
            bank.export_all(tmp_path / "all")
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("users.bank", "users.bank-lock", "users.bank-shm", "users.bank-wal"), 0o600)
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o700 for name in ("new", "bank", "all"))
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "all").iterdir()} == {0o600}
    assert json.loads((tmp_path / "all" / "index.json").read_text())["format_version"] == 3
