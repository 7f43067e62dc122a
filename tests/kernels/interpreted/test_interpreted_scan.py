"""scan and read in Triton's interpreter."""

import kernel_properties as properties
import pytest
import torch
import triton
import triton.language as tl
from drawn_rules import GUARDS, drawn_rules
from hypothesis import given
from hypothesis import strategies as st

from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton import scan as kernel
from deltamem_kernels.triton.primitives import sigmoid, tanh

CHUNK = 3
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
RULES = drawn_rules([1, 2, 3, 5, 8], [1, 2])
CHUNKS = st.sampled_from([0, CHUNK])
SEEDS = st.integers(0, 2**16)


@given(RULES, DTYPES, CHUNKS, SEEDS, st.integers(1, 2), st.integers(1, 7), st.booleans(), st.booleans())
def test_equals_reference(rule, dtype, chunk, seed, batch, length, masked, from_zero):
    x, bias, state, mask = properties.random_problem(rule, batch, length, dtype, seed=seed, masked=masked)
    state = None if from_zero else state
    properties.check_scan(rule, x, bias, state, chunk=chunk, mask=mask, checkpoint_every=seed % 4)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 16, 17, 32, 33, 64])
def test_ranks(rank):
    rule = DeltaRule(rank)
    x, bias, state, _ = properties.random_problem(rule, 1, 4, torch.bfloat16, seed=rank)
    properties.check_scan(rule, x, bias, state)
    properties.check_read(rule, x, state)
    if rank <= 8:
        properties.check_scan(rule, x, bias, state, chunk=2)


def test_rank_16_in_chunks():
    rule = DeltaRule(16)
    x, bias, state, mask = properties.random_problem(rule, 1, 3, torch.float16, seed=5, masked=True)
    properties.check_scan(rule, x, bias, state, chunk=2, mask=mask)
    with pytest.raises(ValueError, match="chunk"):
        kernel.scan(x.new_zeros(1, 4, 68), bias.new_zeros(17), None, DeltaRule(17), chunk=2)


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("row_gates", [True, False])
def test_gates(mode, coupled, row_gates):
    rule = DeltaRule(4, 2, mode, row_gates, coupled)
    x, bias, state, mask = properties.random_problem(rule, 1, 4, seed=7, masked=True)
    for chunk in (0, 2):
        properties.check_scan(rule, x, bias, state, chunk=chunk, mask=mask)


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("coupled", [True, False])
def test_guard(mode, coupled):
    """Held gates and values, in one chunk and several; steps and one chunk agree to the bit."""
    rule = DeltaRule(4, 2, mode, coupled, coupled, True, *GUARDS[1])
    x, bias, state, mask = properties.random_problem(rule, 1, 4, seed=7, masked=True)
    for chunk in (0, 2):
        out = properties.check_scan(rule, x, bias, state, chunk=chunk, mask=mask)
        assert chunk or properties.equal(out[:2], properties.all_steps(rule, x, bias, state, mask))


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 4 * CHUNK + 1])
def test_lengths(length):
    rule = DeltaRule(2)
    x, bias, state, _ = properties.random_problem(rule, 2, length, seed=length)
    for chunk in (0, CHUNK):
        for initial in (state, None):
            properties.check_scan(rule, x, bias, initial, chunk=chunk, checkpoint_every=2)


@pytest.mark.parametrize("chunk", [0, CHUNK])
def test_no_rows(chunk):
    rule = DeltaRule(4)
    out = kernel.scan(torch.zeros(0, 5, 16), torch.zeros(4), None, rule, chunk=chunk, checkpoint_every=2)
    assert out.reads.shape == (0, 5, 4) and out.state.shape == (0, 1, 4, 4)
    assert out.checkpoints.shape == (0, 2, 1, 4, 4) and out.skipped.shape == (0,)
    cu = torch.zeros(1, dtype=torch.int32)
    out = kernel.scan(torch.zeros(1, 0, 16), torch.zeros(4), None, rule, chunk=chunk, cu_seqlens=cu)
    assert out.reads.shape == (1, 0, 4) and out.state.shape == (0, 1, 4, 4)


@given(RULES, CHUNKS, SEEDS, st.integers(0, 6), st.booleans())
def test_split(rule, chunk, seed, cut, masked):
    x, bias, state, mask = properties.random_problem(rule, 1, 6, torch.bfloat16, seed=seed, masked=masked)
    properties.check_split(rule, x, bias, state, mask, cut, chunk)


@given(RULES, CHUNKS, SEEDS, st.integers(0, 7))
def test_masked_tail(rule, chunk, seed, kept):
    x, bias, state, _ = properties.random_problem(rule, 1, 7, torch.bfloat16, seed=seed)
    properties.check_masked_tail(rule, x, bias, state, kept, chunk)


@given(RULES, SEEDS)
def test_masked_inside(rule, seed):
    properties.check_masked_inside(rule, *properties.random_problem(rule, 2, 5, seed=seed, masked=True))


@given(RULES, CHUNKS, SEEDS)
def test_closed_gate(rule, chunk, seed):
    x, bias, state, _ = properties.random_problem(rule, 1, 5, seed=seed)
    properties.check_closed_gate(rule, x, bias, state, chunk)


@pytest.mark.parametrize("chunk", [0, CHUNK])
def test_rows_permute(chunk):
    rule = DeltaRule(5)
    properties.check_rows_permute(rule, *properties.random_problem(rule, 4, 4, seed=2, masked=True), chunk)


@pytest.mark.parametrize("chunk", [0, CHUNK])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides(chunk, dtype):
    rule = DeltaRule(4)
    properties.check_strides(rule, *properties.random_problem(rule, 2, 4, dtype, seed=3, masked=True), chunk)


@pytest.mark.parametrize("chunk", [0, CHUNK])
@pytest.mark.parametrize("normalize", [True, False])
def test_recall(chunk, normalize):
    properties.check_recall(4, normalize, chunk)


@pytest.mark.parametrize("chunk", [0, CHUNK])
@pytest.mark.parametrize("rule", [DeltaRule(3, 2), DeltaRule(16)], ids=["looks itself", "flags"])
def test_not_finite(chunk, rule):
    x, bias, state, _ = properties.random_problem(rule, 2, 4, torch.float16, seed=4)
    properties.check_not_finite(rule, x, bias, state, chunk if rule.rank < 16 else 0)


@pytest.mark.parametrize("chunk", [0, CHUNK])
@pytest.mark.parametrize("lengths", [[5], [0, 4, 1, 0, 3], [3, 3], [0], [1, 1, 1, 7]])
def test_packed(chunk, lengths):
    rule = DeltaRule(2, 2)
    x, bias, _, mask = properties.random_problem(rule, 1, sum(lengths), seed=6, masked=True)
    state = properties.random_problem(rule, len(lengths), 1, seed=7)[2]
    properties.check_packed(rule, x, bias, state, mask, lengths, chunk, every=2)


@pytest.mark.parametrize("chunk", [0, CHUNK])
def test_slots(chunk):
    rule = DeltaRule(3)
    x, bias, _, mask = properties.random_problem(rule, 3, 4, seed=8, masked=True)
    pool = properties.random_problem(rule, 5, 1, seed=9)[2]
    slots = torch.tensor([4, -1, 0])
    x[1, 2, 3] = float("nan")
    before = pool.clone()
    out = properties.check_scan(rule, x, bias, pool, chunk=chunk, mask=mask, slots=slots.int(), checkpoint_every=2)
    assert not out.reads[1].any() and not out.state[1].any() and torch.equal(pool, before)
    properties.check_read(rule, x, pool, mask=mask, slots=slots)
    packed = x.reshape(1, 12, rule.width)[:, :10]
    properties.check_packed(
        rule, packed, bias, pool, mask.reshape(1, 12)[:, :10], [4, 2, 4], chunk, slots=slots, every=3
    )


@given(RULES, DTYPES, SEEDS, st.integers(0, 3), st.booleans())
def test_read(rule, dtype, seed, length, masked):
    x, _, state, mask = properties.random_problem(rule, 2, length, dtype, seed=seed, masked=masked)
    properties.check_read(rule, x, state, mask=mask)


LENGTHS = [64, 65, 2048, 8192, 32768]


def test_chunk_choice():
    chosen = {(rule.rank, n): kernel.choose_chunk(rule, n) for rule in map(DeltaRule, (1, 8, 16, 17)) for n in LENGTHS}
    assert [chosen[8, n] for n in LENGTHS] == [0, 32, 32, 64, 64]
    assert [chosen[16, n] for n in LENGTHS] == [0, 0, 128, 128, 128]
    assert chosen[1, 65] == 16 and chosen[17, 32768] == 0


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("heads", [1, 4])
def test_depth_and_maps(rank, heads, monkeypatch):
    """Depth grows as √T, and nothing that is allocated outweighs the tokens by T r."""
    from deltamem_kernels.triton import launch

    monkeypatch.setattr(launch, "empty", torch.empty)
    rule = DeltaRule(rank, heads)
    for length in [4096, 5000, 16384, 50000, 2**17, 2**20 - 1, 2**20]:
        # 3 √T at C = √(T / 4); C is a power of two.
        assert kernel.depth(rule, length) <= 4.5 * length**0.5
        monkeypatch.setattr(launch, "recorded", recorded := [])
        x = torch.empty(1, length, rule.width, dtype=torch.bfloat16, device="meta")
        kernel.scan(x, torch.empty(rule.bias_width, device="meta"), None, rule)
        found = [(n, t) for _, given, _ in recorded for n, t in given.items() if isinstance(t, torch.Tensor)]
        sizes = {n: t.numel() * t.element_size() for n, t in found}
        # What does not depend on the state is 5 r + 4 numbers a token and head, where that is no burden.
        prepared = 4 * length * heads * (5 * rank + 4)
        assert sizes.get("parts_ptr", prepared) == prepared and (prepared <= 2**28) == ("parts_ptr" in sizes)
        assert sizes["transitions_ptr"] <= 2 * x.nbytes
        parts = [t for n, t in found if n == "parts_ptr"]
        others = [t for _, t in found if t is not x and not any(t is part for part in parts)]
        assert all(t.numel() < length * heads * rank**2 for t in others)  # no state is kept a token
    assert [kernel.depth(rule, n) for n in (0, 1, 64)] == [0, 1, 64]


@triton.jit
def both_kernel(x_ptr, y_ptr, s_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr + tl.arange(0, N), tanh(x))
    tl.store(s_ptr + tl.arange(0, N), sigmoid(x))


def test_tanh_is_right_relative_to_itself():
    sizes = torch.logspace(-30, 3, 4096)
    x = torch.cat([sizes, -sizes])
    y, s = torch.empty_like(x), torch.empty_like(x)
    both_kernel[(1,)](x, y, s, N=8192)
    exact = torch.tanh(x.double())
    assert ((y.double() - exact) / exact).abs().max().item() < 4 * properties.EPS32
    near = x.abs() < 80
    exact = torch.sigmoid(x.double())
    assert ((s.double() - exact) / exact)[near].abs().max().item() < 2e-5
    assert torch.isfinite(s).all()


def test_refuses():
    rule = DeltaRule(4)
    x, bias, state, _ = properties.random_problem(rule, 1, 2)
    with pytest.raises(TypeError, match="float64"):
        kernel.scan(x.double(), bias, state, rule)
    with pytest.raises(TypeError, match="float64"):
        kernel.scan(x, bias, state.double(), rule)
    with pytest.raises(ValueError, match="projections"):
        kernel.scan(x[..., :-1], bias, state, rule)
