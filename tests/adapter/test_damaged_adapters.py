"""Adapter files that are damaged or made to do harm: refused before anything is changed or allocated."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import save, save_file
from support import loud_adapter, tiny_model

from deltamem_fast import DeltaMemConfig, DeltaMemError, load_adapter, patch_model, save_adapter
from deltamem_fast.adapter.files import RELEASED_NAME, SAFETENSORS_NAME, adapter_state_dict, read_weights
from deltamem_fast.config import CONFIG_NAME
from deltamem_fast.errors import FileFormatError

FIRST = "model.layers.0.self_attn.memory_q_proj"
LAST = "model.layers.2.self_attn.delta_o_proj"
OURS = {"format": "deltamem-adapter", "format_version": "1"}


@pytest.fixture(scope="module")
def model():
    return loud_adapter(patch_model(tiny_model()))


@pytest.fixture(scope="module")
def half():
    return loud_adapter(patch_model(tiny_model(dtype=torch.float16)))


@pytest.fixture(scope="module")
def weights(model):
    return {key: value + 1 for key, value in adapter_state_dict(model).items()}


def refused(model, directory, message, kind=ValueError):
    """Loading raises, the model keeps its weights, and patching another leaves it bare."""
    before = adapter_state_dict(model)
    tracemalloc.start()
    with pytest.raises(kind, match=message) as caught:
        load_adapter(model, directory)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert isinstance(caught.value, DeltaMemError)
    assert all(torch.equal(value, before[key]) for key, value in adapter_state_dict(model).items())
    bare = tiny_model(dtype=model.dtype)
    with pytest.raises(kind, match=message):
        patch_model(bare, directory)
    assert not any("delta_memory" in name for name, _ in bare.named_modules())


def written(directory, weights, format):
    directory.mkdir(exist_ok=True)
    DeltaMemConfig().save(directory)
    if format == "safetensors":
        save_file(weights, directory / SAFETENSORS_NAME, OURS)
    else:
        torch.save(weights, directory / RELEASED_NAME)
    return directory


def with_value(tensor, value, dtype=None):
    changed = tensor.clone() if dtype is None else tensor.to(dtype)
    changed.view(-1)[-1] = value
    return changed


TENSORS = {
    "NaN": (lambda t: with_value(t, float("nan")), "number that is not finite in layers.2"),
    "Inf": (lambda t: with_value(t, float("inf")), "number that is not finite in layers.2"),
    "bool": (lambda t: t > 0, "delta_o_proj of BOOL, allowed F64, F32, F16, BF16"),
    "int64": (lambda t: t.long(), "delta_o_proj of I64, allowed F64"),
    "complex": (lambda t: t.to(torch.complex64), "delta_o_proj of C64, allowed F64"),
    "transposed": (lambda t: t.T.contiguous(), r"shape \[8, 64\], the model needs \[64, 8\]"),
    "a row too many": (lambda t: torch.cat([t, t[:1]]), r"shape \[65, 8\], the model needs \[64, 8\]"),
    "no dimension": (lambda t: t[0, 0].clone(), r"shape \[\], the model needs \[64, 8\]"),
}


@pytest.mark.parametrize("format", ("safetensors", "released"))
@pytest.mark.parametrize("kind", TENSORS)
def test_a_wrong_tensor(model, weights, tmp_path, kind, format):
    change, message = TENSORS[kind]
    refused(model, written(tmp_path, weights | {LAST: change(weights[LAST])}, format), message)


@pytest.mark.parametrize("format", ("safetensors", "released"))
def test_a_number_that_the_models_dtype_cannot_hold(model, half, weights, tmp_path, format):
    doubled = weights | {LAST: with_value(weights[LAST], 1e39, torch.float64)}
    refused(model, written(tmp_path / "double", doubled, format), "a number that torch.float32 cannot hold in layers.2")
    large = written(tmp_path / "large", weights | {LAST: with_value(weights[LAST], 7e4)}, format)
    refused(half, large, "a number that torch.float16 cannot hold in layers.2")
    load_adapter(model, large)  # float32 can
    save_adapter(loud_adapter(model), tmp_path)
    assert load_adapter(half, tmp_path) is half


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.to_sparse(), "asks for torch._utils._rebuild_sparse_tensor, allowed dense tensors"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "allowed dense tensors"),
        (lambda t: t.to("meta"), "asks for torch._utils._rebuild_meta_tensor_no_storage, allowed dense"),
        (lambda t: t.to(torch.float8_e4m3fn), "allowed dense tensors"),
        (lambda t: torch.zeros(()).expand(64, 8), "512 numbers, its storage 1: expanded tensors are not read"),
        (lambda t: torch.zeros(1).expand(2**28), "268,435,456 numbers, its storage 1: expanded"),
        (lambda t: [1, 2], "something else than named tensors"),
        (lambda t: {"a": t}, "something else than named tensors"),
        (lambda t: torch._neg_view(t), "with another sign than it has"),
    ],
    ids=("sparse", "quantised", "meta", "float8", "expanded", "expanded to 1 GiB", "list", "nested", "negated"),
)
def test_a_wrong_tensor_in_a_pickle(model, weights, tmp_path, make, message):
    refused(model, written(tmp_path, weights | {LAST: make(weights[LAST])}, "released"), message)


def test_values_that_are_right_are_read(model, weights, tmp_path):
    """Views, one storage for several, parameters and an OrderedDict: as torch.save writes them."""
    storage = torch.cat([weights[FIRST], weights[FIRST] * 2])
    changed = weights | {FIRST: storage[8:], LAST: weights[LAST].T.contiguous().T}
    changed = {key: torch.nn.Parameter(value) for key, value in changed.items()}
    state = torch.nn.Module()
    state.model = torch.nn.Linear(2, 2)
    changed = type(state.state_dict())(changed)
    changed._metadata = state.state_dict()._metadata
    read = read_weights(written(tmp_path, changed, "released"))
    assert read.keys() == changed.keys() and all(torch.equal(read[key], changed[key]) for key in read)
    assert torch.equal(read[FIRST], weights[FIRST] * 2)
    load_adapter(model, tmp_path)
    empty = written(tmp_path / "empty", {"a": torch.zeros(0, 3), "b": torch.ones(())}, "released")
    read = read_weights(empty)
    assert read["a"].shape == (0, 3) and read["b"] == 1


# --- archives


def rezipped(path, change, **arguments):
    """The archive of ``torch.save`` once more, each entry as ``change(name, data)`` says."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", **arguments) as archive:
        for name, data in entries:
            for entry in change(name, data):
                archive.writestr(*entry)


def put(name, data):
    return lambda entry, old: [(entry, data if entry.endswith(name) else old)]


def pickled(old, new):
    return lambda entry, data: [(entry, data.replace(old, new, 1) if entry.endswith("data.pkl") else data)]


ARCHIVES = {
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, lambda n, d: [(n, d)], "is compressed or encrypted"),
    "a bomb": ({"compression": zipfile.ZIP_DEFLATED}, put("data/0", bytes(2**26)), "is compressed or encrypted"),
    "a storage cut": ({}, lambda n, d: [(n, d[:-4] if n.endswith("data/0") else d)], "not there, or of another size"),
    "a storage gone": ({}, lambda n, d: [] if n.endswith("data/3") else [(n, d)], "not there, or of another size"),
    "no pickle": ({}, lambda n, d: [] if n.endswith("data.pkl") else [(n, d)], "no archive of torch.save"),
    "two folders": ({}, lambda n, d: [(n, d), (f"x{n}", d)], "no archive of torch.save"),
    "big-endian": ({}, put("byteorder", b"big"), "its numbers are big-endian"),
    "a pickle cut": ({}, lambda n, d: [(n, d[:-200] if n.endswith(".pkl") else d)], "data.pkl"),
    "an empty pickle": ({}, put("data.pkl", b""), "data.pkl"),
    "a long pickle": ({}, put("data.pkl", bytes(2**23 + 1)), "data.pkl has 8,388,609 bytes, allowed 8,388,608"),
    "a storage elsewhere": ({}, pickled(b"\x00\x00\x001", b"\x00\x00\x00x"), "is not there, or of another size"),
    "code": ({}, put("data.pkl", pickle.dumps({"a": print}, 2)), "asks for __builtin__.print, allowed dense"),
    "a memo of 4 G": ({}, put("data.pkl", b"\x80\x02}r\xff\xff\xff\xff."), "fit the model: of its weights it lacks"),
    "another protocol": ({}, put("data.pkl", pickle.dumps({"a": 1.5}, 4)), "something else than named tensors"),
    "numbers as keys": ({}, put("data.pkl", pickle.dumps({1: 1}, 2)), "something else than named tensors"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_wrong_archive(model, weights, tmp_path, kind):
    arguments, change, message = ARCHIVES[kind]
    written(tmp_path, weights, "released")
    rezipped(tmp_path / RELEASED_NAME, change, **arguments)
    refused(model, tmp_path, message)


def test_a_view_beyond_its_storage(model, weights, tmp_path):
    class Beyond(torch.Tensor):
        pass

    written(tmp_path, weights, "released")
    stride, offset = b"K\x08K\x01\x86", b"K\x00K@K\x08\x86"  # (8, 1); 0, (64, 8): of delta_o_proj
    for old, new in ((stride, b"K\xffK\x01\x86"), (offset, b"K\x01K@K\x08\x86")):
        written(tmp_path, weights, "released")
        rezipped(tmp_path / RELEASED_NAME, pickled(old, new))
        refused(model, tmp_path, "reaches beyond its storage")


def test_sizes_that_torch_cannot_multiply(tmp_path):
    written(tmp_path, {"a": torch.zeros(3, 2, 0)}, "released")
    large = b"\x8a\x08" + (2**62).to_bytes(8, "little")
    rezipped(tmp_path / RELEASED_NAME, pickled(b"K\x03K\x02K\x00\x87", large * 2 + b"K\x00\x87"))
    with pytest.raises(FileFormatError, match="cannot be read as weights"):
        read_weights(tmp_path)


def test_names_that_are_there_many_times_take_no_room(tmp_path):
    one = torch.zeros(2**20)
    read = read_weights(written(tmp_path, {f"w{n}": one for n in range(2000)}, "released"))
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == 1


def test_a_file_of_old_torch_or_of_nothing(model, weights, tmp_path):
    written(tmp_path, weights, "released")
    torch.save(weights, tmp_path / RELEASED_NAME, _use_new_zipfile_serialization=False)
    refused(model, tmp_path, "cannot be read as weights")
    for data in (b"", b"PK\x05\x06" + bytes(18), b"PK\x03\x04" * 99, pickle.dumps(weights)):
        (tmp_path / RELEASED_NAME).write_bytes(data)
        refused(model, tmp_path, "cannot be read as weights")
    (tmp_path / RELEASED_NAME).unlink()
    (tmp_path / RELEASED_NAME).mkdir()
    refused(model, tmp_path, "holds neither", FileNotFoundError)


def test_any_byte_of_a_released_file_may_be_wrong(model, weights, tmp_path):
    """Refused with one of our errors, or what is read is as it was."""
    written(tmp_path, weights, "released")
    path = tmp_path / RELEASED_NAME
    whole = path.read_bytes()
    for place in torch.randint(0, len(whole), (150,), generator=torch.Generator().manual_seed(3)).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            read = read_weights(tmp_path)
        except DeltaMemError:
            continue
        for key, value in weights.items():
            assert key not in read or torch.equal(read[key], value), place


# --- safetensors


def test_a_wrong_safetensors_file(model, weights, tmp_path):
    DeltaMemConfig().save(tmp_path)
    path = tmp_path / SAFETENSORS_NAME
    data = save(weights, OURS)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])

    def with_header(entries):
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    vast = {**header[LAST], "shape": [2**40, 8]}
    for content, message in (
        (data[:-8], "not a safetensors file, or cut short"),
        (struct.pack("<Q", 2**62) + data[8:], "not a safetensors file, or cut short"),
        (with_header(header | {LAST: vast}), r"shape \[1099511627776, 8\], the model needs \[64, 8\]"),
        (with_header({k: v for k, v in header.items() if k != "__metadata__"}), "has format None version ''"),
        (
            with_header(header | {"__metadata__": OURS | {"format_version": "9" * 5000}}),
            "has format 'deltamem-adapter'",
        ),
        (with_header(header | {FIRST.removeprefix("model."): header[FIRST]}), "two weights for one layer"),
        (b"", "not a safetensors file, or cut short"),
    ):
        path.write_bytes(content)
        refused(model, tmp_path, message)
    path.write_bytes(data)
    os.truncate(path, 2**36)  # a hole, which takes no room on the disk
    refused(model, tmp_path, "cut short: has 68,719,476,736 bytes")


def test_a_changed_bit_is_seen(model, tmp_path):
    save_adapter(model, tmp_path)
    path = tmp_path / SAFETENSORS_NAME
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(model, tmp_path, "damaged: its content is not what was written")


def test_an_interrupted_load_changes_nothing(model, tmp_path, monkeypatch):
    save_adapter(loud_adapter(patch_model(tiny_model()), seed=8), tmp_path)
    before, copies, real = adapter_state_dict(model), [], torch.Tensor.copy_

    def interrupt(tensor, *arguments):
        copies.append(tensor)
        if len(copies) == 12:
            raise KeyboardInterrupt
        return real(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, tmp_path)
    monkeypatch.undo()
    assert len(copies) > 12
    assert all(torch.equal(value, before[key]) for key, value in adapter_state_dict(model).items())


def test_a_model_that_cannot_take_it(tmp_path):
    save_adapter(patch_model(tiny_model()), tmp_path)
    model = patch_model(tiny_model())
    memory = model.model.layers[2].self_attn.delta_memory
    memory.delta_o_proj = torch.nn.Parameter(torch.zeros(64, 8, dtype=torch.int8), requires_grad=False)
    before = {key: value.clone() for key, value in memory.state_dict().items()}
    with pytest.raises(ValueError, match=r"delta_o_proj is a Parameter of torch.int8; load the adapter before"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in memory.state_dict().items())


def test_a_configuration_of_a_file_that_asks_for_too_much(tmp_path):
    save_adapter(patch_model(tiny_model()), tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    for change in ({"num_state_heads": 10**9}, {"rank": 10**400}, {"target_layers": [10**400]}):
        (tmp_path / CONFIG_NAME).write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"{CONFIG_NAME}: {next(iter(change))}: got "):
            patch_model(tiny_model(), tmp_path)


def test_the_hub_is_asked_for_the_adapters_files_alone(monkeypatch, tmp_path):
    asked = {}

    def download(name, **arguments):
        asked.update(arguments, name=name)
        return str(tmp_path)

    save_adapter(patch_model(tiny_model()), tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    patch_model(tiny_model(), "someone/adapter")
    assert asked == {"name": "someone/adapter", "allow_patterns": [CONFIG_NAME, SAFETENSORS_NAME, RELEASED_NAME]}


def test_io_errors_are_ours(model, tmp_path):
    with pytest.raises(TypeError, match="directory: got DeltaMemConfig, allowed an adapter's directory or hub id"):
        load_adapter(model, DeltaMemConfig())
    with pytest.raises(TypeError, match="adapter: got BytesIO"):
        load_adapter(model, io.BytesIO())
