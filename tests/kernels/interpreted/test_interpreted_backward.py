"""Gradients of scan, read and steer in Triton's interpreter."""

import kernel_properties as properties
import pytest
import torch
from drawn_rules import GUARDS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_interpreted_scan import DTYPES, RULES, SEEDS, both_kernel

from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton import read_backward, steer_backward
from deltamem_kernels.triton import scan_backward as kernel

# Tokens of a chunk (0: one), of a block, of a part: several of each, and none of several.
WAYS = [(0, (2, 2)), (0, (4, 1)), (2, (2, 1)), (4, (2, 2)), (4, (4, 2))]
TOKENS_AND_CHUNKS = [WAYS[1], WAYS[3]]


@given(RULES, DTYPES, st.sampled_from(WAYS), SEEDS, st.integers(1, 2), st.integers(1, 9), st.booleans(), st.booleans())
def test_equals_autograd(rule, dtype, way, seed, batch, length, masked, from_zero):
    x, bias, state, mask = properties.random_problem(rule, batch, length, dtype, seed=seed, masked=masked)
    state = None if from_zero else state
    properties.check_scan_gradient(rule, x, bias, state, *way, checkpoint_every=seed % 4, mask=mask)


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize(("coupled", "row_gates"), [(True, True), (False, False), (True, False), (False, True)])
def test_gates(mode, coupled, row_gates):
    rule = DeltaRule(3, 2, mode, row_gates, coupled)
    x, bias, state, mask = properties.random_problem(rule, 1, 5, seed=7, masked=True)
    properties.check_scan_gradient(rule, x, bias, state, 2, (2, 1), mask=mask)


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("coupled", [True, False])
def test_guard(mode, coupled):
    rule = DeltaRule(3, 2, mode, mode != "no_lambda", coupled, True, *GUARDS[1])
    x, bias, state, mask = properties.random_problem(rule, 1, 9, seed=7, masked=True)
    properties.check_scan_gradient(rule, x, bias, state, 4, (4, 2), mask=mask)


@pytest.mark.parametrize(("bound", "open_"), [(0.5, True), (0.4999, False)])
@pytest.mark.parametrize("coupled", [True, False])
def test_what_lies_on_a_bound_is_not_held(coupled, bound, open_):
    """Gates of σ(0), as training may start with, and values of 1: they have gradients up to the bound itself."""
    half = torch.empty(1)
    both_kernel[(1,)](torch.zeros(1), torch.empty(1), half, N=1)
    if half.item() != 0.5:
        pytest.skip("the emulator has moved σ(0) off the bound, as it was asked to")
    rule = DeltaRule(3, coupled=coupled, beta_max=bound, keep_max=bound, value_max=2 * bound)
    x, bias, state, _ = properties.random_problem(rule, 1, 3, seed=8)
    x[..., 6:], bias[:] = 0.0, 0.0
    x[..., 6:9] = torch.tensor([1.0, -1.0, 1.0])
    d_x, d_bias, _ = properties.check_scan_gradient(rule, x, bias, state)
    assert bool(d_x[..., 6:].all()) == bool(d_bias.all()) == open_ and bool(d_x[..., 6:].any()) == open_


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64])
def test_ranks(rank):
    rule = DeltaRule(rank)
    x, bias, state, _ = properties.random_problem(rule, 1, 4, torch.bfloat16, seed=rank)
    # Above rank 16 a block has 32 parts and more, and the interpreter would take each.
    spacing = (4, 2) if rank > 16 else None
    properties.check_scan_gradient(rule, x, bias, state, spacing=spacing, checkpoint_every=3)
    if rank <= 16:
        properties.check_scan_gradient(rule, x, bias, state, 2, (2, 1))
    properties.check_read_gradient(rule, x, state)


@pytest.mark.parametrize("rank", [2, 8])
def test_blocks_and_parts_as_they_are(rank):
    rule = DeltaRule(rank)
    x, bias, state, mask = properties.random_problem(rule, 1, 35, torch.bfloat16, seed=rank, masked=True)
    properties.check_scan_gradient(rule, x, bias, state, 16, mask=mask, checkpoint_every=5)


@pytest.mark.parametrize("length", [0, 1, 4, 5])
def test_lengths(length):
    rule = DeltaRule(2)
    x, bias, state, _ = properties.random_problem(rule, 2, length, seed=length)
    for way in TOKENS_AND_CHUNKS:
        properties.check_scan_gradient(rule, x, bias, state, *way, checkpoint_every=3)
    properties.check_read_gradient(rule, x, state)


@pytest.mark.parametrize("way", TOKENS_AND_CHUNKS)
def test_bits(way):
    rule = DeltaRule(4, 2)
    properties.check_gradient_bits(rule, *properties.random_problem(rule, 2, 5, seed=3, masked=True), *way)


@settings(max_examples=4)
@given(RULES, SEEDS, st.sampled_from([(2, 1), (4, 2)]))
def test_masked_is_removed(rule, seed, spacing):
    problem = properties.random_problem(rule, 2, 5, seed=seed, masked=True)
    properties.check_masked_gradient(rule, *problem, spacing=spacing)


@pytest.mark.parametrize("way", TOKENS_AND_CHUNKS)
def test_not_finite(way):
    rule = DeltaRule(3, 2)
    x, bias, state, _ = properties.random_problem(rule, 2, 5, torch.float16, seed=4)
    properties.check_not_finite_gradient(rule, x, bias, state, *way)


@pytest.mark.parametrize("lengths", [[0, 4, 1, 0, 3], [5], [0]])
@pytest.mark.parametrize("way", TOKENS_AND_CHUNKS)
def test_packed(way, lengths):
    rule = DeltaRule(2, 2)
    x, bias, _, mask = properties.random_problem(rule, 1, sum(lengths), seed=6, masked=True)
    state = properties.random_problem(rule, len(lengths), 1, seed=7)[2]
    chunk, spacing = way
    properties.check_packed_gradient(rule, x, bias, state, lengths, chunk=chunk, spacing=spacing)
    properties.check_packed_gradient(
        rule, x, bias, state, lengths, chunk=chunk, spacing=spacing, mask=mask, checkpoint_every=2
    )


def test_tokens_of_no_sequence_get_zero():
    rule = DeltaRule(2)
    x, bias, state, _ = properties.random_problem(rule, 1, 6, seed=6)
    cu = torch.tensor([0, 4])
    _, (d_x, _, _) = properties.scan_gradients(rule, x, bias, state, cu_seqlens=cu)
    _, (expected, _, _) = properties.scan_gradients(rule, x[:, :4], bias, state)
    assert not d_x[:, 4:].any() and torch.isfinite(d_x).all() and expected.any()


@pytest.mark.parametrize("way", TOKENS_AND_CHUNKS)
def test_slots(way):
    """Two sequences from one slot add up; one without a slot gets nothing, and no other slot does."""
    rule = DeltaRule(3)
    x, bias, _, mask = properties.random_problem(rule, 4, 5, seed=8, masked=True)
    pool = properties.random_problem(rule, 6, 1, seed=9)[2]
    slots = torch.tensor([4, -1, 0, 4])
    x[1, 2, 3] = float("nan")
    d_x, _, d_pool = properties.check_scan_gradient(rule, x, bias, pool, *way, mask=mask, slots=slots.int())
    assert not d_x[1].any() and not d_pool[[1, 2, 3, 5]].any()
    properties.check_read_gradient(rule, x, pool, mask=mask, slots=slots)
    chunk, spacing = way
    properties.check_packed_gradient(
        rule, x.nan_to_num().reshape(1, 20, -1), bias, pool, [7, 3, 0, 10], slots, chunk, spacing
    )


@settings(max_examples=6)
@given(RULES, DTYPES, SEEDS, st.integers(1, 20), st.booleans())
def test_read(rule, dtype, seed, length, masked):
    x, _, state, mask = properties.random_problem(rule, 2, length, dtype, seed=seed, masked=masked)
    properties.check_read_gradient(rule, x, state, mask=mask)


FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LEADS = st.sampled_from([(3,), (2, 5), (1, 40), (2, 2, 2), (0,)])


@settings(max_examples=12)
@given(
    FLOATS, FLOATS, st.booleans(), SEEDS, LEADS, st.integers(1, 70), st.integers(1, 20), st.sampled_from([1, 3, 128])
)
def test_steer(dtype, weight_dtype, normed, seed, lead, n, width, splits):
    make = torch.Generator().manual_seed(seed)
    reads, grad = torch.randn(*lead, width, generator=make), torch.randn(*lead, n, generator=make).to(dtype)
    weight = torch.randn(n, width, generator=make).to(weight_dtype)
    norm = torch.randn(n, generator=make).to(weight_dtype) if normed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steer_backward, "ROWS", 16)
        patch.setattr(steer_backward, "SPLITS", splits)
        properties.check_steer_gradient(grad, reads, weight, 2.0, norm)
        properties.check_steer_gradient(grad.expand_as(grad), reads, weight.t().contiguous().t(), 0.5, norm)


def test_steer_of_wide_reads():
    """More columns than one program takes."""
    grad, reads, weight = torch.randn(3, 20).bfloat16(), torch.randn(3, 40), torch.randn(20, 40)
    for normed in (False, True):
        properties.check_steer_gradient(grad, reads, weight, 2.0, torch.randn(20) if normed else None)


def on_meta(rule, length, monkeypatch, packed=False):
    """What scan_backward allocates and launches, from tensors that hold no numbers: the host cannot look at them."""
    from deltamem_kernels.triton import launch

    monkeypatch.setattr(launch, "empty", torch.empty)
    monkeypatch.setattr(launch, "recorded", recorded := [])
    meta = {"device": "meta"}
    sequences = 3 if packed else 1
    x = torch.empty(1, length, rule.width, dtype=torch.bfloat16, **meta)
    d_reads = torch.empty(1, length, rule.read_width, **meta)
    state = torch.empty(sequences, rule.heads, rule.rank, rule.rank, **meta)
    cu = torch.empty(sequences + 1, dtype=torch.int32, **meta) if packed else None
    kernel.scan_backward(d_reads, state, x, torch.empty(rule.bias_width, **meta), state, rule, cu_seqlens=cu)
    return recorded


@pytest.mark.parametrize("rank", [3, 8, 16, 64])
@pytest.mark.parametrize("heads", [1, 4])
def test_memory_grows_as_the_tokens(rank, heads, monkeypatch):
    """What is stored besides inputs and gradients: as many numbers as two of the reads, whatever T."""
    rule = DeltaRule(rank, heads)
    for length in (2**17, 2**20):
        tensors = {}
        for packed in (False, True):
            for _, arguments, _ in on_meta(rule, length, monkeypatch, packed):
                tensors |= {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
        size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        reads = 4 * length * rule.read_width
        # A rank between powers of two has blocks for the greater one; packed sequences have a block more each.
        assert size["bounds_ptr"] <= 1.01 * reads and size["d_bias_ptr"] <= 0.51 * reads
        if rank <= 16:
            assert size["transitions_ptr"] <= 1.3 * size["x_ptr"] and size["edges_ptr"] <= 0.51 * reads
        else:
            assert "transitions_ptr" not in size
        others = {
            "x_ptr",
            "d_x_ptr",
            "d_reads_ptr",
            "bounds_ptr",
            "d_bias_ptr",
            "transitions_ptr",
            "edges_ptr",
            "flags_ptr",
        }
        # Nothing else, but the number of its sequence for each block (or chunk) of 16 tokens or more.
        most = max(reads / 100, length / 4 + 12)
        assert all(bytes_ <= most for name, bytes_ in size.items() if name not in others)


def test_no_sequence():
    """Tokens and a pool, but nobody's: gradients of 0, and no look at slots that are not there."""
    rule = DeltaRule(2)
    x, bias, pool, _ = properties.random_problem(rule, 1, 40)
    cu, slots = torch.zeros(1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    for start, where in ((pool, slots), (pool[:0], None)):
        _, found = properties.scan_gradients(rule, x, bias, start, cu_seqlens=cu, slots=where)
        assert not any(t.any() for t in found) and [t.shape for t in found] == [x.shape, bias.shape, start.shape]


def test_refuses():
    rule = DeltaRule(4)
    x, bias, state, _ = properties.random_problem(rule, 1, 2)
    with pytest.raises(ValueError, match="d_reads"):
        kernel.scan_backward(x, state, x, bias, state, rule)
    with pytest.raises(ValueError, match="d_state"):
        kernel.scan_backward(x[..., :4], state[0], x, bias, state, rule)
    with pytest.raises(ValueError, match="d_checkpoints"):
        kernel.scan_backward(x[..., :4], state, x, bias, state, rule, d_checkpoints=state, checkpoint_every=1)
    with pytest.raises(ValueError, match="d_reads"):
        read_backward.read_backward(x, x, state, rule)
    with pytest.raises(TypeError, match="float64"):
        kernel.scan_backward(x[..., :4], state, x.double(), bias, state, rule)
    with pytest.raises(ValueError, match="spacing"):
        kernel.scan_backward(x[..., :4], state, x, bias, state, rule, chunk=3, spacing=(2, 1))
    with pytest.raises(ValueError, match="steer_backward"):
        steer_backward.steer_backward(x, x, bias, 1.0)
