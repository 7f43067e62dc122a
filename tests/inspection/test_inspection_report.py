"""Figures of memories, distances, and files without a model."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inspection_support import CONFIGS, bits, filled, memory_in, model_with, random_memory, report
from safetensors.torch import save_file

from deltamem_fast import MemoryState
from deltamem_fast.display import columns_of, number, printable, table
from deltamem_fast.memory.figures import distance, effective_rank
from deltamem_fast.memory.file import read_memory
from deltamem_fast.storage.tensors import read_tensors

examples = settings(deadline=None, max_examples=25, derandomize=True, database=None)
SEEDS = st.integers(0, 2**20)


def memory_of(*states):
    return MemoryState({i: torch.as_tensor(state).float()[None, None] for i, state in enumerate(states)})


# --- figures


def test_figures_of_states_that_can_be_computed_by_hand():
    diagonal = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    one_row = torch.zeros(4, 4)
    one_row[2] = torch.tensor([0.0, 3.0, 0.0, 4.0])
    memory = memory_of(diagonal, one_row, torch.zeros(4, 4), -2 * torch.eye(4))
    memory._skipped[1] += 7
    first, second, empty, full = report(memory)
    # Shares 3/4 and 1/4: exp of their entropy.
    rank = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert first.norm == pytest.approx(math.sqrt(10)) and first.effective_rank == pytest.approx(rank)
    assert first.saturation == pytest.approx(rank / 4) and (first.largest_row, first.largest_row_norm) == (0, 3)
    assert (second.layer, second.head, second.row, second.skipped) == (1, 0, 0, 7)
    assert (second.norm, second.largest_row, second.largest_row_norm) == (5, 2, 5)
    assert second.effective_rank == pytest.approx(1) and second.saturation == pytest.approx(1 / 4)
    assert (empty.norm, empty.effective_rank, empty.saturation, empty.largest_row_norm) == (0, 0, 0, 0)
    assert (full.norm, full.saturation, full.largest_row) == (pytest.approx(4), pytest.approx(1), 0)


@examples
@given(seed=SEEDS, rank=st.integers(1, 16), data=st.data())
def test_k_orthonormal_directions_are_an_effective_rank_of_k(seed, rank, data):
    k = data.draw(st.integers(1, rank))
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator)).Q for _ in "ab")
    assert effective_rank(left[:, :k] @ right[:k]).item() == pytest.approx(k, rel=1e-6)


@examples
@given(seed=SEEDS, scale=st.floats(1e-20, 1e20), rank=st.integers(1, 12))
def test_effective_rank_knows_no_scale_nor_rotation(seed, scale, rank):
    generator = torch.Generator().manual_seed(seed)
    state, other = (torch.randn(rank, rank, dtype=torch.float64, generator=generator) for _ in range(2))
    found = effective_rank(state).item()
    assert 1 - 1e-9 <= found <= rank + 1e-9
    for changed in (state * scale, -state, state.T, torch.linalg.qr(other).Q @ state, state[torch.randperm(rank)]):
        assert effective_rank(changed).item() == pytest.approx(found, rel=1e-6)


def test_a_state_that_is_not_finite_has_no_figures_and_harms_no_other():
    memory = memory_of(torch.eye(3), torch.eye(3))
    memory[1][0, 0, 1, 1] = math.nan
    good, bad = report(memory)
    assert good.saturation == pytest.approx(1) and math.isnan(bad.norm) and math.isnan(bad.effective_rank)
    rows = json.loads(json.dumps(report(memory).to_dict(), allow_nan=False))["rows"]
    assert rows[1]["norm"] is rows[1]["saturation"] is None and rows[0]["norm"] == pytest.approx(math.sqrt(3))
    assert "nan" in str(report(memory)) and distance(memory, memory).to_dict()["rows"][1]["distance"] is None


def test_rows_layers_and_heads_are_told_in_order_and_one_row_alone():
    memory = random_memory(layers=(1, 4), rows=3, heads=2, rank=5)
    before = bits(memory)
    found = report(memory)
    assert [(r.row, r.layer, r.head) for r in found] == [(b, i, h) for b in range(3) for i in (1, 4) for h in range(2)]
    assert all(r.norm == pytest.approx(memory[r.layer][r.row, r.head].norm().item(), rel=1e-6) for r in found)
    assert report(memory, 2).rows == found.rows[8:] and bits(memory) == before
    assert memory.report() == found and len(found) == 12
    for row in (3, -1, True, 1.0, "0"):
        with pytest.raises(ValueError, match="row: got .*, allowed an integer, 0 to 2"):
            report(memory, row)
    with pytest.raises(ValueError, match="holds no conversation"):
        report(random_memory(rows=0), 0)
    assert len(report(random_memory(rows=0))) == 0


def test_the_table_is_aligned_and_names_what_there_is_more_than_one_of():
    lines = str(report(random_memory(layers=(0, 11), rows=2, heads=2))).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 9
    assert lines[0].split()[:3] == ["row", "layer", "head"] and lines[3].split()[:3] == ["0", "11", "0"]
    single = str(report(memory_of(torch.eye(2), torch.zeros(2, 2)))).splitlines()
    assert "head" not in single[0] and "row " not in single[0].split("largest")[0]
    assert single[2].split() == ["1", "0", "0.00", "0.00", "-", "0", "0"]


def test_columns_stand_under_each_other_whatever_is_in_them():
    lines = table(["a", "text"], [["1", "日本"], ["10", "é"], ["100", "plain"]], left=[1]).splitlines()
    assert lines == ["  a  text", "  1  日本", " 10  é", "100  plain"]
    assert columns_of("日本") == 4 and columns_of("e\u0301") == 1
    assert printable("a\x1b[2Jb\n\u2028é") == "a\\x1b[2Jb\\n\\u2028é"
    assert [number(x) for x in (None, 0.0, 1 / 3, 1e-9, math.inf)] == ["-", "0", "0.3333", "1e-09", "inf"]


# --- distances


def test_distances_that_can_be_computed_by_hand():
    a = memory_of(torch.eye(2), torch.eye(2), torch.eye(2), torch.zeros(2, 2))
    b = memory_of(torch.eye(2), -torch.eye(2), torch.zeros(2, 2), torch.zeros(2, 2))
    root = math.sqrt(2)
    found = [(d.distance, d.relative, d.cosine) for d in distance(a, b)]
    assert found == [pytest.approx(t) for t in ((0, 0, 1), (2 * root, 2, -1))] + [
        (pytest.approx(root), pytest.approx(1), None), (0, 0, None),
    ]  # fmt: skip
    assert str(distance(a, b)).splitlines()[3].split() == ["2", "1.414", "1", "-"]


@examples
@given(seeds=st.tuples(SEEDS, SEEDS), rows=st.integers(1, 3), heads=st.integers(1, 3))
def test_distance_is_symmetric_and_nothing_to_itself(seeds, rows, heads):
    a, b = (random_memory(rows=rows, heads=heads, seed=seed) for seed in seeds)
    assert distance(a, b).rows == distance(b, a).rows
    for entry in distance(a, a):
        assert entry.distance == entry.relative == 0 and entry.cosine == pytest.approx(1)
    for entry in distance(a, b):
        assert -1 <= entry.cosine <= 1 and 0 <= entry.relative <= 2
        apart = (a[entry.layer] - b[entry.layer])[entry.row, entry.head].double().norm().item()
        assert entry.distance == pytest.approx(apart, rel=1e-5)


def test_memories_that_cannot_be_compared():
    a = random_memory(rows=2)
    with pytest.raises(ValueError, match=r"b: got layers \{0: \[1, 4, 4\].*allowed \{0: \[1, 8, 8\]"):
        distance(a, random_memory(rows=2, rank=4))
    with pytest.raises(ValueError, match="b: got layers"):
        distance(a, random_memory(layers=(0, 2), rows=2))
    with pytest.raises(ValueError, match="b: got 1 rows, allowed 2 as in the other one; or name one row"):
        distance(a, random_memory())
    with pytest.raises(ValueError, match="row: got 1, allowed an integer, 0 to 0"):
        distance(a, random_memory(), row=1)
    assert len(distance(a, random_memory(), row=0)) == 2


# --- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = model_with(CONFIGS["msw"])
    memory = filled(model, rows=2)
    memory.frozen = True
    memory._skipped[1] += torch.tensor([0, 3], dtype=torch.int32)
    return model, memory, memory.save(tmp_path_factory.mktemp("memory") / "alice.safetensors")


def test_a_file_is_read_without_a_model(saved):
    model, memory, path = saved
    file = read_memory(path)
    found = memory_in(file)
    assert bits(found) == bits(memory) and found.frozen and list(found) == [0, 1, 2]
    assert report(found) == report(memory)
    names = memory._identity.fingerprints()
    assert names.items() <= file.fingerprints.items()
    assert file.path == path and names["adapter_fingerprint"][:12] in file.made_with
    loaded = MemoryState.load(path, model)
    assert all(entry.distance == 0 for entry in distance(loaded, found))


def rewritten(saved, path, drop=(), **changes):
    metadata, tensors = read_tensors(saved[2], "path")
    tensors |= {name: tensor for name, tensor in changes.items() if isinstance(tensor, torch.Tensor)}
    metadata |= {name: text for name, text in changes.items() if isinstance(text, str)}
    for name in drop:
        metadata.pop(name, None)
        tensors.pop(name, None)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a memory file (format 'other', allowed 'deltamem-memory')"),
        ({"drop": ["format"]}, "not a memory file (format None"),
        ({"format_version": "3"}, "format version '3', this version reads 1 to 2"),
        ({"format_version": "one"}, "format version 'one'"),
        ({"drop": ["layers"]}, "lacks the entry 'layers'"),
        ({"layers": "[1]"}, "got a JSON list, allowed an object"),
        ({"layers": "entry 'layers': not JSON"}, "not JSON"),
        ({"drop": ["layers.1.state"]}, "a broken memory file"),
        ({"drop": ["skipped"]}, "a broken memory file"),
        ({"layers.1.state": torch.zeros(2, 3, 4, 5)}, "layers.1.state is F32 [2, 3, 4, 5], allowed F32 [2, 3,"),
        ({"layers.1.state": torch.zeros(3, 3, 4, 4)}, "layers.1.state is F32 [3, 3, 4, 4]"),
        ({"layers.1.state": torch.zeros(2, 3, 4, 4).half()}, "layers.1.state is F16"),
        ({"skipped": torch.zeros(1, 2)}, "skipped is F32 [1, 2], allowed I32 [3, 2]"),
    ],
)
def test_a_broken_file_is_told(saved, tmp_path, changes, message):
    path = rewritten(saved, tmp_path / "broken.safetensors", **changes)
    with pytest.raises(ValueError) as error:
        read_memory(path, "MEMORY")
    assert message in str(error.value) and str(error.value).startswith(f"MEMORY: {path}: ")


def test_no_file_and_no_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: .*missing: no such file"):
        read_memory(tmp_path / "missing")
    (tmp_path / "text").write_text("a text")
    with pytest.raises(ValueError, match="path: .*text: not a safetensors file"):
        read_memory(tmp_path / "text")
