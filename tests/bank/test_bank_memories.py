"""MemoryBank: gather and commit bit for bit, what is refused, files."""

import copy
import json
import pickle
import sys
from contextlib import closing
from datetime import UTC

import pytest
import torch
from bank_support import check_file
from support import loud_adapter, tiny_model
from transformers import DynamicCache

import deltamem_fast
from deltamem_fast import BankConflict, DeltaMemConfig, MemoryBank, MemoryState, memory_state, patch_model
from deltamem_fast.errors import ArgumentError, FileFormatError
from deltamem_fast.memory.bank import BankEntry
from deltamem_fast.storage.bank_store import BankStore
from deltamem_fast.storage.tensors import read_tensors

CONFIGS = {
    "tsw": DeltaMemConfig(),
    "msw": DeltaMemConfig.msw(heads=3),
    "some layers": DeltaMemConfig.msw(heads=2, target_layers=(0, 2)),
    "one layer": DeltaMemConfig(target_layers=(1,)),
}


def patched(config="tsw", seed=1, **changes):
    return loud_adapter(patch_model(tiny_model(**changes), CONFIGS[config]), seed=seed)


@pytest.fixture(scope="module")
def model():
    return patched()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "users.bank"


@pytest.fixture
def bank(path, model):
    with MemoryBank(path, model) as bank:
        yield bank


def random_memory(model, rows, seed=0):
    """Random bits in every state and counter; no NaN or Inf."""
    generator = torch.Generator().manual_seed(seed)
    memory = MemoryState.zeros(model, rows)
    for i, state in memory.items():
        bits = torch.randint(-(2**31), 2**31, state.shape, generator=generator).to(torch.int32).view(torch.float32)
        state.copy_(torch.where(bits.isfinite(), bits, -0.0))
        memory._skipped[i].copy_(torch.randint(0, 2**31 - 1, (rows,), generator=generator))
    return memory


def bits(memory):
    return {i: (state.view(torch.int32).tolist(), memory._skipped[i].tolist()) for i, state in memory.items()}


def content(bank):
    ids = [entry.id for entry in bank.list()]
    memory = bank.gather(ids)
    return ids, memory._rows, bits(memory)


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_bit_for_bit(config, path):
    model, ids = patched(config), ["bob", "alice", "carol"]
    memory = random_memory(model, 3)
    with MemoryBank(path, model) as bank:
        bank.commit(ids, memory)
    with MemoryBank(path, model) as bank:
        assert bits(bank.gather(ids)) == bits(memory)
        mixed = bank.gather(["carol", "nobody", "bob"])
        assert bits(mixed.select([2, 0])) == bits(memory.select([0, 2]))
        assert all(state[1].abs().max() == 0 for _, state in mixed.items()) and mixed.skipped[1] == 0
        for i, state in MemoryState.zeros(model, 3).items():
            assert mixed[i].shape == state.shape and mixed[i].dtype == state.dtype and mixed[i].is_contiguous()
    check_file(path)


def test_layers_share_no_storage(bank):
    for ids in (["a"], ["a", "b"]):
        memory = bank.gather(ids)
        tensors = [*memory._layers.values(), *memory._skipped.values()]
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_a_turn(bank, model):
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    memory = bank.gather(["a", "b"])
    with torch.no_grad():
        model(tokens, memory=memory)
    bank.commit(["a", "b"], memory)
    memory = bank.gather(["b", "a"])
    with torch.inference_mode():
        model(tokens, memory=memory)
    bank.commit(["b", "a"], memory)
    kept = MemoryState.zeros(model, 2)
    with torch.no_grad():
        model(tokens, memory=kept)
        kept = kept.select([1, 0])
        model(tokens, memory=kept)
    assert bits(bank.gather(["b", "a"])) == bits(kept) and kept[0].abs().max() > 0


def test_generate_and_autograd(bank, model):
    memory = bank.gather(["a"])
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, memory=memory, do_sample=False)
    bank.commit(["a"], memory)
    memory = bank.gather(["a"])
    model(torch.tensor([[5, 6, 7]]), memory=memory)
    assert memory[0].requires_grad
    bank.commit(["a"], memory)
    assert torch.equal(bank.gather(["a"])[0], memory[0].detach())


def test_whatever_mode_torch_is_in(bank, model):
    memory = random_memory(model, 2)
    bank.commit(["a", "b"], memory)
    with torch.inference_mode():
        inside = bank.gather(["a", "b"])
        bank.commit(["a", "b"], inside)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            gathered = bank.gather(["a", "b"])
            bank.commit(["a", "b"], gathered)
    finally:
        torch.set_default_dtype(torch.float32)
    assert bits(inside) == bits(gathered) == bits(bank.gather(["a", "b"])) == bits(memory)


def test_the_same_holder_commits_again(bank, model):
    memory = random_memory(model, 1)
    for _ in range(3):
        memory[0].add_(1)
        bank.commit(["a"], memory)
    assert bank.gather(["a"])._rows == memory._rows and len(bank) == 1


def test_copies_know_their_versions(bank, model):
    bank.commit(["a", "b", "c"], random_memory(model, 3))
    memory = bank.gather(["a", "b", "c"])
    bank.commit(["c", "a"], memory.select([2, 0]))
    for copied in (memory.clone(), memory.detach(), pickle.loads(pickle.dumps(memory))):
        with pytest.raises(BankConflict) as refused:
            bank.commit(["a", "b", "c"], copied)
        assert refused.value.ids == ["a", "c"]
    parts = [bank.gather(["a"]), bank.gather(["b"]), bank.gather(["new"])]
    bank.commit(["a", "b", "new"], MemoryState.cat(parts))


SWAPS = {
    "as it is": lambda memory: memory,
    "selected": lambda memory: memory.select([1, 0]).select([1, 0]),
    "cut": lambda memory: MemoryState.cat([memory.select([0]), memory.select([1])]),
    "repeated": lambda memory: memory.repeat(2).select([0, 2]),
    "cloned": lambda memory: memory.clone(),
    "detached": lambda memory: memory.detach(),
    "copied": copy.deepcopy,
    "copied flat": copy.copy,
    "pickled": lambda memory: pickle.loads(pickle.dumps(memory)),
    "read-only": lambda memory: memory.read_only(),
}


@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("way", SWAPS)
def test_rows_go_back_under_their_own_ids(bank, model, way, overwrite):
    bank.commit(["ada", "ben"], random_memory(model, 2))
    before = content(bank)
    memory = SWAPS[way](bank.gather(["ada", "ben"]))
    assert memory.ids == ["ada", "ben"]
    for ids, message in (
        (["ben", "ada"], "row 0 is the memory of 'ada', not of 'ben', row 1 is the memory of 'ben', not of 'ada'"),
        (["ada", "eve"], "row 1 is the memory of 'ben', not of 'eve'"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.commit(ids, memory, overwrite=overwrite)
    assert content(bank) == before
    bank.commit(["ada", "ben"], memory, overwrite=overwrite)
    assert bits(bank.gather(["ada", "ben"])) == bits(random_memory(model, 2))


def test_rows_after_forwards_and_in_caches(bank, model):
    bank.commit(["ada", "ben"], random_memory(model, 2).decay(1))
    memory, tokens = bank.gather(["ada", "ben"]), torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        model(tokens, memory=memory)
    model.generate(tokens, max_new_tokens=2, memory=memory, do_sample=False)
    memory.zero_().decay(0.5)
    with pytest.raises(ValueError, match="row 0 is the memory of 'ada', not of 'ben'"):
        bank.commit(["ben", "ada"], memory)
    bank.commit(["ada", "ben"], memory)
    # Rows of a cache's own memory get their names by a commit, and keep them when the cache is reordered.
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    assert memory_state(cache).ids == [None, None]
    bank.commit(["eve", "fay"], memory_state(cache))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert memory_state(cache).ids == ["fay", "eve"]
    with pytest.raises(ValueError, match="row 0 is the memory of 'fay', not of 'eve'"):
        bank.commit(["eve", "fay"], memory_state(cache), overwrite=True)
    cache.batch_repeat_interleave(2)
    assert memory_state(cache).ids == ["fay", "fay", "eve", "eve"]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert memory_state(cache).ids == ["eve", "fay"]
    bank.commit(["eve", "fay"], memory_state(cache))
    cache.reset()
    assert memory_state(cache).ids == [None, None]


def test_one_row_twice(bank, model):
    bank.commit(["ada"], random_memory(model, 1))
    twice = bank.gather(["ada"]).repeat(2)
    with pytest.raises(ValueError, match="row 1 is the memory of 'ada', not of 'copy'"):
        bank.commit(["ada", "copy"], twice)
    with pytest.raises(ValueError, match="'ada' twice"):
        bank.commit(["ada", "ada"], twice)
    assert len(bank) == 1


def test_a_copy_under_another_id_on_purpose(bank, model):
    bank.commit(["ada", "ben"], random_memory(model, 2))
    memory = bank.gather(["ada"])
    copied = memory.unnamed()
    bank.commit(["ada before"], copied)
    assert copied.ids == ["ada before"] and memory.ids == ["ada"]
    with pytest.raises(BankConflict, match="'ben' .made on no entry"):
        bank.commit(["ben"], memory.unnamed())
    bank.commit(["ben"], memory.unnamed(), overwrite=True)
    assert bits(bank.gather(["ada before"])) == bits(bank.gather(["ben"])) == bits(memory)
    mixed = MemoryState.cat([memory, MemoryState.zeros(model)])
    assert mixed.ids == ["ada", None]
    bank.commit(["ada", "new"], mixed)


def test_a_commit_on_what_moved_on_is_refused(bank, model):
    bank.commit(["a", "b"], random_memory(model, 2))
    mine, yours = bank.gather(["a", "b"]), bank.gather(["b"])
    yours.zero_()
    bank.commit(["b"], yours)
    before, rows = content(bank), mine._rows
    with pytest.raises(BankConflict, match=r"ids: 'b' \(made on version .*gather again"):
        bank.commit(["a", "b"], mine)
    assert content(bank) == before and mine._rows == rows
    bank.commit(["a"], mine.select([0]))
    mine = bank.gather(["a", "b"])
    bank.commit(["a", "b"], mine)
    assert issubclass(BankConflict, RuntimeError) and deltamem_fast.BankConflict is BankConflict


def test_who_was_not_gathered_must_be_new(bank, model):
    bank.commit(["a"], MemoryState.zeros(model, 1))
    with pytest.raises(BankConflict, match=r"'a' \(made on no entry"):
        bank.commit(["a"], MemoryState.zeros(model, 1))
    first, second = bank.gather(["new"]), bank.gather(["new"])
    bank.commit(["new"], first)
    with pytest.raises(BankConflict):
        bank.commit(["new"], second)
    bank.commit(["a", "new"], random_memory(model, 2), overwrite=True)
    assert bits(bank.gather(["a", "new"])) == bits(random_memory(model, 2))


def test_deleted_and_made_again_is_another_memory(bank, model):
    bank.commit(["a"], random_memory(model, 1))
    old = bank.gather(["a"])
    assert bank.delete(["a", "nobody"]) == 1 and "a" not in bank
    with pytest.raises(BankConflict, match="found no entry"):
        bank.commit(["a"], old)
    for _ in range(3):
        bank.commit(["a"], MemoryState.zeros(model, 1))
        with pytest.raises(BankConflict):
            bank.commit(["a"], old)
        bank.delete(["a"])


BAD_IDS = (
    (["a", "a"], ValueError, "ids: got 'a' twice"),
    (["", "b"], ValueError, "ids: got ''"),
    (["x" * 513, "b"], ValueError, "of 513 bytes, allowed 1 to 512"),
    (["a", 5], TypeError, "ids: got 5"),
    ("ab", TypeError, "ids: got a str"),
    (None, TypeError, "ids: got a NoneType"),
)


@pytest.mark.parametrize(("ids", "error", "message"), BAD_IDS)
def test_bad_ids_change_nothing(bank, model, ids, error, message):
    bank.commit(["a", "b"], random_memory(model, 2))
    before = content(bank)
    for call in (bank.gather, bank.delete, lambda ids: bank.commit(ids, MemoryState.zeros(model, 2), overwrite=True)):
        with pytest.raises(error, match=message):
            call(ids)
    assert content(bank) == before


def test_states_that_do_not_fit_change_nothing(bank, model):
    bank.commit(["a", "b"], random_memory(model, 2))
    before, ids = content(bank), ["a", "b"]
    halves = MemoryState({i: state.half() for i, state in MemoryState.zeros(model, 2).items()})
    for state, error, message in (
        ({0: torch.zeros(2, 1, 8, 8)}, TypeError, "state: got a dict, allowed a MemoryState"),
        (MemoryState.zeros(model, 3), ValueError, "state: got 3 memories for 2 ids"),
        (MemoryState.zeros(patched("some layers"), 2), ValueError, r"state: got layers \{0: \(2, 8, 8\)"),
        (MemoryState.zeros(patched(num_hidden_layers=4), 2), ValueError, "state: got layers"),
        (MemoryState.zeros(patched(seed=9), 2), ValueError, "memory: made under adapter a fresh adapter"),
        (halves, ValueError, r"state: got torch\.float16, allowed torch\.float32"),
    ):
        with pytest.raises(error, match=message):
            bank.commit(ids, state, overwrite=True)
    assert content(bank) == before


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_what_is_not_finite_is_refused(bank, model, value):
    memory = random_memory(model, 3)
    memory[2][1, 0, 7, 7] = value
    with pytest.raises(ValueError, match=r"state: the memories of 'b' hold NaN or Inf"):
        bank.commit(["a", "b", "c"], memory)
    assert len(bank) == 0
    memory[1].fill_(value)
    with pytest.raises(ValueError, match="'u0', 'u1', 'u2'"):
        bank.commit(["u0", "u1", "u2"], memory)


@pytest.mark.parametrize("value", (torch.nan, -torch.inf, "count"))
def test_what_no_commit_writes_is_not_gathered(bank, model, value):
    bank.commit(["a", "b"], random_memory(model, 2))
    row = bytearray(bank._store.row_bytes)
    if value == "count":
        row[-4:] = (-1).to_bytes(4, sys.byteorder, signed=True)
    else:
        row[:4] = torch.tensor([value]).numpy().tobytes()
    bank._store.write(["b"], None, [bytes(row)])
    with pytest.raises(FileFormatError, match="the memories of 'b' hold NaN or Inf, or counts below 0"):
        bank.gather(["a", "nobody", "b"])
    assert bank.gather(["a", "nobody"]).batch_size == 2


def test_no_ids(bank):
    memory = bank.gather([])
    assert memory.batch_size == 0 and list(memory) == [0, 1, 2]
    bank.commit([], memory)
    assert bank.delete([]) == 0 and len(bank) == 0 and bank.list() == []


def test_device(bank):
    assert bank.gather(["a"], "cpu")[0].device.type == "cpu"
    assert bank.gather(["a"], torch.device("meta"))[0].device.type == "meta"


@pytest.mark.gpu
def test_on_a_gpu(path):
    model = patched().to("cuda")
    memory = random_memory(model, 5)
    ids = [f"user-{n}" for n in range(5)]
    with MemoryBank(path, model) as bank:
        bank.commit(ids, memory)
        gathered = bank.gather(ids)
        assert gathered[0].is_cuda and bits(gathered) == bits(memory) == bits(bank.gather(ids, "cpu"))
        with torch.no_grad():
            model(torch.randint(3, 128, (5, 12), device="cuda"), memory=gathered)
        bank.commit(ids, gathered)
        assert bits(bank.gather(ids)) == bits(gathered) != bits(memory)


def test_what_is_there(bank, model):
    for id in ("team/bob", "team/alice", "eve"):
        bank.commit([id], MemoryState.zeros(model, 1))
    assert len(bank) == 3 and "eve" in bank and "nobody" not in bank
    assert "" not in bank and 5 not in bank and "x" * 600 not in bank and "\ud800" not in bank
    entries = bank.list()
    assert [entry.id for entry in entries] == ["eve", "team/alice", "team/bob"]
    assert all(isinstance(entry, BankEntry) and entry.bytes == 3 * (64 * 4 + 4) for entry in entries)
    assert all(entry.created.tzinfo is UTC and entry.created == entry.updated for entry in entries)
    assert [entry.id for entry in bank.list(prefix="team/", order_by="created")] == ["team/bob", "team/alice"]
    assert [entry.id for entry in bank.list(order_by="updated", descending=True, limit=1, offset=1)] == ["team/alice"]
    assert bank.gather(["eve"])._rows == (("eve", entries[0].version, bank._store.name),)
    assert repr(bank).startswith("MemoryBank('/") and "a fresh adapter" in repr(bank)


def test_the_file_is_of_one_adapter_and_backbone(path, model):
    with MemoryBank(path, model) as bank:
        bank.commit(["a"], random_memory(model, 1))
    before = path.read_bytes()
    for other, message in (
        (patched(seed=2), r"under adapter a fresh adapter \(.*but the model's adapter is a fresh adapter \("),
        (patched("msw"), "under adapter"),
        (patched(num_hidden_layers=4), "under backbone .*3 layers.*but the model's backbone is .*4 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryBank(path, other)
        assert path.read_bytes() == before
    with MemoryBank(path, patched(dtype=torch.bfloat16)) as bank:
        assert bits(bank.gather(["a"])) == bits(random_memory(model, 1)), "one adapter under another dtype"


def test_other_layouts_are_refused(path, model, tmp_path):
    with MemoryBank(path, model) as bank:
        layout, size = bank._store.layout, bank._store.row_bytes
    assert set(layout) == {
        "layers", "byteorder", "adapter_fingerprint", "adapter_name", "backbone_fields", "backbone_fingerprint",
        "backbone_fingerprint_1", "backbone_name",
    }  # fmt: skip
    other = "big" if sys.byteorder == "little" else "little"
    for changed, row_bytes, message in (
        (layout | {"byteorder": other}, size, f"a bank of byteorder {other}"),
        (layout | {"layers": "{}"}, size, r"a bank of layers \{\}, but here it is"),
        (layout, size + 4, "bytes a memory"),
        ({"kind": "something"}, size, r"made under backbone None \(\?\)"),
    ):
        file = tmp_path / f"{len(message)}{row_bytes}.bank"
        BankStore(file, changed, row_bytes).close()
        with pytest.raises(ValueError, match=message):
            MemoryBank(file, model)


def test_what_cannot_be_opened(tmp_path, model):
    with pytest.raises(ValueError, match="not patched"):
        MemoryBank(tmp_path / "a.bank", tiny_model())
    assert not (tmp_path / "a.bank").exists()
    with pytest.raises(IsADirectoryError):
        MemoryBank(tmp_path, model)
    (tmp_path / "text.bank").write_text("text" * 3000)
    with pytest.raises(ValueError, match="not a SQLite file"):
        MemoryBank(tmp_path / "text.bank", model)


def test_closed(path, model):
    with MemoryBank(path, model) as bank:
        memory = bank.gather(["a"])
    bank.close()
    for call in (
        lambda: len(bank),
        lambda: bank.gather(["a"]),
        lambda: bank.commit(["a"], memory),
        lambda: "a" in bank,
    ):
        with pytest.raises(ValueError, match="was closed"):
            call()


@pytest.mark.parametrize("durable", (True, False))
def test_durable_syncs(path, model, durable):
    with MemoryBank(path, model, durable=durable) as bank, bank._store._file.connection() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2 if durable else 1,)


# --- files


def test_export_is_what_save_writes(bank, model, tmp_path):
    memory = random_memory(model, 2)
    bank.commit(["a", "b"], memory)
    written = bank.export("b", tmp_path / "deep" / "b.safetensors")
    saved = memory.select([1]).save(tmp_path / "saved.safetensors")
    (ours, tensors), (theirs, wanted) = (read_tensors(file, "path") for file in (written, saved))
    assert ours == theirs and tensors.keys() == wanted.keys() and written.stat().st_size == saved.stat().st_size
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert bits(MemoryState.load(written, model)) == bits(memory.select([1]))
    with pytest.raises(KeyError, match="'nobody': not in the bank"):
        bank.export("nobody", tmp_path / "nobody.safetensors")
    assert not (tmp_path / "nobody.safetensors").exists()
    with pytest.raises(ValueError, match="id: got ''"):
        bank.export("", tmp_path / "x.safetensors")


def test_import(bank, model, tmp_path):
    memory = random_memory(model, 1)
    file = memory.save(tmp_path / "a.safetensors")
    bank.import_("a", file)
    assert bits(bank.gather(["a"])) == bits(memory)
    with pytest.raises(BankConflict, match="made on no entry"):
        bank.import_("a", file)
    bank.commit(["a"], MemoryState.zeros(model, 1), overwrite=True)
    bank.import_("a", file, overwrite=True)
    assert bits(bank.gather(["a"])) == bits(memory)
    before = content(bank)
    with pytest.raises(ValueError, match="holds 2 memories, allowed 1"):
        bank.import_("b", random_memory(model, 2).save(tmp_path / "two.safetensors"))
    with pytest.raises(ValueError, match="saved under adapter"):
        bank.import_("b", MemoryState.zeros(patched(seed=5), 1).save(tmp_path / "other.safetensors"))
    with pytest.raises(FileNotFoundError):
        bank.import_("b", tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="id: got 5"):
        bank.import_(5, file)
    assert content(bank) == before


def test_export_all_and_import_all(bank, model, tmp_path):
    ids = [f"../{n}?*:" for n in range(7)]
    bank.commit(ids, random_memory(model, 7))
    assert bank.export_all(tmp_path / "all", batch_size=3) == 7
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == [
        "index.json", "memories-000000.safetensors", "memories-000001.safetensors", "memories-000002.safetensors",
    ]  # fmt: skip
    with MemoryBank(tmp_path / "other.bank", model) as other:
        assert other.import_all(tmp_path / "all") == 7
        assert bits(other.gather(ids)) == bits(bank.gather(ids))
        other.delete(ids[:6])
        with pytest.raises(BankConflict) as refused:
            other.import_all(tmp_path / "all")
        assert refused.value.ids == ids[6:] and len(other) == 1
        assert other.import_all(tmp_path / "all", overwrite=True) == 7 and len(other) == 7
    with pytest.raises(FileExistsError, match="not empty"):
        bank.export_all(tmp_path / "all")
    with pytest.raises(ValueError, match="batch_size: got 0"):
        bank.export_all(tmp_path / "new", batch_size=0)


def test_an_empty_bank_travels_too(bank, model, tmp_path):
    assert bank.export_all(tmp_path / "all") == 0
    with MemoryBank(tmp_path / "other.bank", model) as other:
        assert other.import_all(tmp_path / "all") == 0


def test_exports_that_are_not_as_written_are_refused(bank, model, tmp_path):
    bank.commit(["a", "b"], random_memory(model, 2))
    bank.export_all(tmp_path / "all")
    index = tmp_path / "all" / "index.json"
    good = json.loads(index.read_text())
    old = good | {"format_version": 1}
    outside = tmp_path / "outside.safetensors"
    (tmp_path / "all" / "memories-000000.safetensors").rename(outside)
    with closing(MemoryBank(tmp_path / "other.bank", model)) as other:
        for changed, error, message in (
            (good | {"format": "x"}, ValueError, "no export of a bank"),
            (good | {"format_version": 4}, ValueError, "format version 4, this version reads 1 to 3"),
            (good | {"files": None}, ValueError, "got None"),
            (good | {"files": [{"file": "../outside.safetensors", "ids": ["a", "b"]}]}, ValueError, "beside it"),
            (good | {"files": [{"file": str(outside), "ids": ["a", "b"]}]}, ValueError, "beside it"),
            (old | {"files": [{"file": "x", "ids": "ab"}]}, ValueError, "ids: got a str"),
            (old | {"files": [{"file": "x", "ids": ["a"]}] * 2}, ValueError, "'a' twice"),
            (good | {"files": [good["files"][0] | {"ids": ["b", "a"]}]}, ValueError, "damaged"),
            (good, FileNotFoundError, "no such file"),
        ):
            index.write_text(json.dumps(changed))
            with pytest.raises(error, match=message):
                other.import_all(tmp_path / "all")
        index.write_text(json.dumps(old | {"files": [{"file": "x", "ids": ["a"]}]}))
        outside.rename(tmp_path / "all" / "x")
        with pytest.raises(ValueError, match="x holds 2 memories, the index says 1"):
            other.import_all(tmp_path / "all")
        index.unlink()
        with pytest.raises(FileNotFoundError, match="no such file"):
            other.import_all(tmp_path / "all")
        assert len(other) == 0


def test_a_row_of_another_bank_is_not_stored_under_the_same_id(bank, model, tmp_path):
    """Two tenants may each have a "user 1"."""
    with MemoryBank(tmp_path / "other.bank", model) as other:
        for place, seed in ((bank, 1), (other, 2)):
            place.commit(["ada"], random_memory(model, 1, seed))
        mixed = MemoryState.cat([bank.gather(["ada"]), other.gather(["ada"])])
        assert mixed.ids == ["ada", "ada"]
        for overwrite in (False, True):
            with pytest.raises(ArgumentError, match="row 0 is the memory of 'ada' in another bank.*unnamed"):
                other.commit(["ada"], mixed.select([0]), overwrite=overwrite)
        other.commit(["ada"], mixed.select([1]))
        other.commit(["from here"], mixed.select([0]).unnamed())
        assert bits(other.gather(["from here"])) == bits(bank.gather(["ada"]))


def test_a_count_that_passes_its_end_stays_readable(bank, model, tmp_path):
    memory = MemoryState.zeros(model, 2)
    memory._skipped[0][1] = 2**31 - 1
    memory.count(0, torch.tensor([3, 1], dtype=torch.int32))
    memory._skipped[1][1] = 5
    assert memory.skipped.tolist() == [3, 2**31 - 1]
    bank.commit(["a", "b"], memory)
    loaded = MemoryState.load(memory.save(tmp_path / "m.safetensors"), model)
    for read in (bank.gather(["a", "b"]), loaded):
        assert read._skipped[0].tolist() == [3, 2**31 - 1] and read.skipped.tolist() == [3, 2**31 - 1]


def test_a_memory_without_values_is_refused(bank, model):
    with pytest.raises(ArgumentError, match="state: is on the meta device"):
        bank.commit(["a"], MemoryState.zeros(model).to("meta"))


def test_a_pickled_row_goes_back_to_its_owner_alone(bank, model):
    bank.commit(["ada"], random_memory(model, 1))
    sent = pickle.loads(pickle.dumps(bank.gather(["ada"])))
    with pytest.raises(ArgumentError, match="is the memory of 'ada'"):
        bank.commit(["ben"], sent, overwrite=True)
    bank.commit(["ada"], sent)
