"""step and steer in Triton's interpreter."""

import kernel_properties as properties
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_interpreted_scan import DTYPES, RULES, SEEDS

from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton.steer import steer
from deltamem_kernels.triton.step import step


@given(RULES, DTYPES, SEEDS, st.integers(1, 3), st.booleans())
def test_step(rule, dtype, seed, batch, masked):
    x, bias, state, mask = properties.random_problem(rule, batch, 3, dtype, seed=seed, masked=masked)
    x[0, 1, seed % rule.width] = float("inf")
    properties.check_step(rule, x, bias, state, mask)


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 32, 64])
def test_ranks(rank):
    rule = DeltaRule(rank)
    x, bias, state, _ = properties.random_problem(rule, 1, 1, torch.bfloat16, seed=rank)
    properties.check_step(rule, x, bias, state, None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots(dtype):
    rule = DeltaRule(3, 2)
    x, bias, _, mask = properties.random_problem(rule, 4, 3, seed=1, masked=True)
    pool = properties.random_problem(rule, 6, 1, seed=2)[2]
    x[2, 0, 1] = x[1, 1, 0] = float("nan")
    properties.check_step(rule, x, bias, pool, mask, slots=torch.tensor([5, -1, 0, 3], dtype=dtype))


def test_no_rows():
    rule = DeltaRule(4)
    state = torch.ones(3, 1, 4, 4)
    slots = torch.zeros(0, dtype=torch.int32)
    assert step(torch.zeros(0, 16), torch.zeros(4), state, rule, slots=slots).shape == (0, 4)
    assert torch.equal(state, torch.ones_like(state))


def test_refuses():
    rule = DeltaRule(4)
    x, bias, state = torch.zeros(2, 16), torch.zeros(4), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="skipped"):
        step(x, bias, state, rule, skipped=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="state"):
        step(x, bias, state.double(), rule)


@given(
    DTYPES, SEEDS, st.sampled_from([1, 7, 64, 130]), st.sampled_from([1, 3, 8, 20]), st.booleans(),
    st.sampled_from([(1,), (3,), (2, 3), (17,), (2, 1, 2), (0, 2)]),
)  # fmt: skip
def test_steer(dtype, seed, n, width, normed, lead):
    make = torch.Generator().manual_seed(seed)
    base = torch.randn(*lead, n, generator=make).to(dtype)
    reads = torch.randn(*lead, width, generator=make)
    weight = torch.randn(n, width, generator=make).to(dtype)
    norm_weight = torch.rand(n, generator=make).to(dtype) if normed else None
    properties.check_steer(base, reads, weight, 2.0, norm_weight)


def test_steer_strides():
    make = torch.Generator().manual_seed(0)
    base, reads = torch.randn(2, 3, 20, generator=make), torch.randn(2, 3, 4, generator=make)
    weight = torch.randn(20, 4, generator=make)
    expected = steer(base, reads, weight, 0.5)
    for copy in properties.strided_copies(base):
        out = copy.clone(memory_format=torch.preserve_format)
        assert torch.equal(steer(copy, reads, weight.t().contiguous().t(), 0.5), expected)
        assert torch.equal(steer(copy, reads, weight, 0.5, out=copy), expected)
        assert torch.equal(copy, expected) and out is not copy


def test_steer_refuses():
    base, reads, weight = torch.zeros(2, 8), torch.zeros(2, 4), torch.zeros(8, 4)
    with pytest.raises(ValueError, match="steer"):
        steer(base, reads, weight.t(), 1.0)
    with pytest.raises(ValueError, match="out"):
        steer(base, reads, weight, 1.0, out=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="norm_weight"):
        steer(base, reads, weight, 1.0, norm_weight=torch.zeros(4))
    with pytest.raises(TypeError, match="weight"):
        steer(base, reads, weight.double(), 1.0)
