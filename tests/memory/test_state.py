"""MemoryState by itself, and its files."""

import copy
import errno
import json
import pickle
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import loud_adapter, tiny_model
from transformers import DynamicCache

from deltamem_fast import DeltaMemConfig, MemoryState, memory_state, patch_model
from deltamem_fast.errors import ArgumentError, FileAccessError, FileFormatError
from deltamem_fast.memory import file as memory_format
from deltamem_fast.storage.tensors import seal

IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return loud_adapter(patch_model(tiny_model(), DeltaMemConfig.msw(heads=2, target_layers=(0, 2))))


@pytest.fixture
def memory(model):
    memory = MemoryState.zeros(model, 3)
    with torch.no_grad():
        model(IDS, memory=memory)
    return memory


def equal(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[i], theirs[i]) for i in theirs)


def test_shape_and_keys(memory):
    assert list(memory) == [0, 2] and len(memory) == 2 and 1 not in memory
    assert memory[0].shape == (3, 2, 8, 8) and memory[0].dtype == torch.float32 and memory.batch_size == 3
    with pytest.raises(KeyError, match=r"layer 1: no memory there, only in layers \[0, 2\]"):
        memory[1]
    assert "layers=[0, 2]" in repr(memory) and memory.skipped.tolist() == [0, 0, 0]


def test_rows(memory):
    assert equal(memory.select([2, 0]), memory.select(torch.tensor([2, 0])))
    assert equal(memory.select(torch.tensor([True, False, True])), memory.select([0, 2]))
    assert torch.equal(memory.repeat(2)[0], memory[0].repeat_interleave(2, 0))
    assert equal(MemoryState.cat([memory.select([0]), memory.select([1, 2])]), memory)
    assert memory.select([]).batch_size == 0
    for rows in ([3], [-1], torch.tensor([True])):
        with pytest.raises(IndexError, match="rows: got"):
            memory.select(rows)
    with pytest.raises(ValueError, match="times: got 0"):
        memory.repeat(0)
    with pytest.raises(ValueError, match="memories: got none"):
        MemoryState.cat([])
    broken = memory.clone()
    broken._broken = "it no longer fits"
    for rows in ([memory, broken], [broken, memory]):  # what holds of one row's memory holds of all
        assert MemoryState.cat(rows)._broken == "it no longer fits"


def test_copies_are_apart(memory):
    copy, kept = memory.clone(), memory[0].clone()
    copy.zero_()
    assert torch.equal(memory[0], kept) and copy[0].abs().max() == 0
    assert memory.to("cpu") is memory
    with pytest.raises(TypeError, match=r"device: got torch.bfloat16"):
        memory.to(torch.bfloat16)


def test_zero_keeps_the_address(memory):
    address = memory[0].data_ptr()
    assert memory.zero_() is memory and memory[0].data_ptr() == address and memory[0].abs().max() == 0


def test_zero_under_autograd(model):
    memory = MemoryState.zeros(model, 3)
    model(IDS, memory=memory)
    assert memory[0].requires_grad and not memory.detach()[0].requires_grad
    memory.zero_()
    assert not memory[0].requires_grad and memory[0].abs().max() == 0


def test_inference_mode_does_not_stick(model):
    memory = MemoryState.zeros(model, 3)
    with torch.inference_mode():
        model(IDS, memory=memory)
        cache = DynamicCache(config=model.config)
        model(IDS, past_key_values=cache)
    with torch.no_grad():
        model(IDS, memory=memory)
        model(IDS[:, :1], memory=memory_state(cache).clone())


@pytest.mark.parametrize("size", (-1, 1.5, "2"))
def test_bad_batch_sizes(model, size):
    with pytest.raises(ValueError, match="batch_size: got"):
        MemoryState.zeros(model, size)


def test_an_unpatched_model_has_no_memory():
    with pytest.raises(ValueError, match="not patched"):
        MemoryState.zeros(tiny_model())


def test_save_and_load(model, memory, tmp_path):
    path = tmp_path / "deep" / "alice.safetensors"
    memory.frozen = True
    memory.save(path)
    loaded = MemoryState.load(path, model)
    assert equal(loaded, memory) and loaded.frozen
    assert [p.name for p in path.parent.iterdir()] == ["alice.safetensors"]
    other = loud_adapter(patch_model(tiny_model(dtype=torch.bfloat16), DeltaMemConfig.msw(2, target_layers=(0, 2))))
    assert equal(MemoryState.load(path, other), memory), "the same adapter under a bfloat16 backbone"


def test_a_memory_of_another_adapter_or_backbone_is_refused(model, memory, tmp_path):
    path = memory.save(tmp_path / "m.safetensors")
    config = DeltaMemConfig.msw(heads=2, target_layers=(0, 2))
    retrained = loud_adapter(patch_model(tiny_model(), config), seed=8)
    with pytest.raises(ValueError, match=r"saved under adapter a fresh adapter \(.*but the model's adapter is a fresh"):
        MemoryState.load(path, retrained)
    deeper = loud_adapter(patch_model(tiny_model(num_hidden_layers=4), config))
    with pytest.raises(ValueError, match="saved under backbone .*3 layers.*but the model's backbone is .*4 layers"):
        MemoryState.load(path, deeper)


def header(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite(path, head, body):
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_broken_files_are_refused(model, memory, tmp_path):
    path = memory.save(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        MemoryState.load(tmp_path / "other.safetensors", model)
    head, body = header(path)
    head["__metadata__"]["format_version"] = "3"
    rewrite(path, head, body)
    with pytest.raises(ValueError, match="format version '3', this version reads 1 to 2"):
        MemoryState.load(path, model)
    head["__metadata__"]["format"] = "something"
    rewrite(path, head, body)
    with pytest.raises(ValueError, match="not a memory file"):
        MemoryState.load(path, model)
    memory.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a safetensors file, or cut short"):
        MemoryState.load(path, model)


def test_a_failed_write_leaves_the_old_file(model, memory, tmp_path, monkeypatch):
    path = memory.save(tmp_path / "m.safetensors")
    before = path.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(memory_format, "save_tensors", fail)
    with pytest.raises(FileAccessError, match="m.safetensors: disk full"):
        memory.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_memory_is_small(tmp_path):
    model = patch_model(tiny_model(num_hidden_layers=36))
    path = MemoryState.zeros(model, 1).save(tmp_path / "m.safetensors")
    assert path.stat().st_size < 36 * 64 * 4 + 6000


def test_a_frozen_memory_is_not_changed(memory, tmp_path, model):
    before = {i: state.clone() for i, state in memory.items()}
    for change in (lambda m: m.zero_(), lambda m: m.decay(0.5), lambda m: m.decay(0)):
        with pytest.raises(ArgumentError, match="memory: it is frozen"):
            change(memory.read_only())
    assert all(torch.equal(memory[i], before[i]) for i in before)
    for flag, frozen in ((1, True), ("yes", True), (None, False), (torch.tensor(True), True)):
        memory.frozen = flag
        assert MemoryState.load(memory.save(tmp_path / "m.safetensors"), model).frozen is frozen


def test_a_pickled_memory_knows_its_adapter(model, memory, tmp_path):
    torch.save(memory, tmp_path / "m.pt")
    found = [pickle.loads(pickle.dumps(memory)), torch.load(tmp_path / "m.pt", weights_only=False), copy.copy(memory)]
    other = loud_adapter(patch_model(tiny_model(), DeltaMemConfig.msw(heads=2, target_layers=(0, 2))), seed=5)
    for sent in found:
        with pytest.raises(ArgumentError, match="memory: made under adapter"):
            other(IDS, memory=sent)
        with torch.no_grad():
            model(IDS, memory=sent)
        loaded = MemoryState.load(sent.save(tmp_path / "m.safetensors"), model)
        assert all(torch.equal(loaded[i], state) for i, state in sent.items())
    assert len({id(sent._identity) for sent in found[:2]}) == 1  # a server that is sent thousands keeps one
    MemoryState.cat([found[0], memory])
    assert found[0]._identity.accepted == []  # nor does it hold a model's weights
    values = vars(memory) | {"_identity": None}  # as versions before have pickled it
    old = MemoryState.__new__(MemoryState)
    old.__setstate__(values)
    assert old._identity is None and old.batch_size == memory.batch_size


def test_copies_belong_to_their_adapter_when_it_was_trained_meanwhile():
    """As the memory itself does; a copy of the model has weights of its own."""
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1)))
    memory = MemoryState.zeros(model)
    sent = [pickle.loads(pickle.dumps(memory)), copy.copy(memory), copy.deepcopy(memory)]
    other = copy.deepcopy(model)
    for trained, step in ((model, 0.1), (other, 0.2)):
        with torch.no_grad():
            next(p for n, p in trained.named_parameters() if ".delta_memory." in n).add_(step)
    with torch.no_grad():
        for one in sent:
            model(IDS, memory=one.repeat(3))
        with pytest.raises(ArgumentError, match="memory: made under adapter"):
            other(IDS, memory=pickle.loads(pickle.dumps(memory)).repeat(3))


def test_a_file_that_says_too_much_of_its_backbone(model, memory, tmp_path):
    """What differs is read from the file, too: whatever stands there."""
    path = memory.save(tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {"backbone_fingerprint": "x"}
    for fields in ("[" * 100_000, json.dumps({"x" * 100_000: 1}), '{"a": ' + "1" * 5000 + "}"):
        changed = metadata | {"backbone_fields": fields, "backbone_name": "y" * 100_000}
        tensors = load_file(path)
        save_file(tensors, tmp_path / "changed.safetensors", changed | {"sha256": seal(changed, tensors)})
        with pytest.raises(FileFormatError, match="path: .*saved under backbone yyy") as caught:
            MemoryState.load(tmp_path / "changed.safetensors", model)
        assert len(str(caught.value)) < 2000
