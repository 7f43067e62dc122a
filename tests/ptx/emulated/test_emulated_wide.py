"""Larger problems of every rank and dtype: several chunks, many rows, one program a row."""

import heads_properties
import kernel_properties as properties
import pytest
import torch

from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule

pytestmark = pytest.mark.soak
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)


@pytest.fixture(autouse=True)
def without_races(emulator, monkeypatch):
    # The small tests look for them; here are many accesses, of the same instructions.
    monkeypatch.setattr(emulator, "races", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "heads"), [(4, 1), (8, 1), (8, 4), (16, 1), (16, 4)])
def test_several_chunks(rank, heads, dtype):
    rule = DeltaRule(rank, heads)
    length = 300 if heads == 1 else 140
    x, bias, state, mask = properties.random_problem(rule, 1, length, dtype, seed=rank, masked=True)
    x[0, 7, 1] = float("nan")
    properties.check_scan(rule, x, bias, state, chunk=64, mask=mask, checkpoint_every=100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "chunk"), [(4, 16), (8, 64), (16, 32)])
def test_gradient_of_several_chunks(rank, chunk, dtype):
    rule = DeltaRule(rank)
    x, bias, state, mask = properties.random_problem(rule, 1, 2 * chunk + 5, dtype, seed=rank, masked=True)
    properties.check_scan_gradient(rule, x, bias, state, chunk, mask=mask, checkpoint_every=50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [4, 8, 12, 16, 32, 64])
def test_ranks(rank, dtype):
    rule = DeltaRule(rank)
    x, bias, state, mask = properties.random_problem(rule, 2, 9, dtype, seed=rank, masked=True)
    properties.check_scan(rule, x, bias, state, mask=mask, checkpoint_every=4)
    properties.check_step(rule, x[:, :2], bias, state, mask[:, :2])
    properties.check_read(rule, x, state, mask=mask)
    properties.check_scan_gradient(rule, x, bias, state, spacing=(4, 2), checkpoint_every=4, mask=mask)
    properties.check_read_gradient(rule, x, state, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "heads", "batch"), [(8, 1, 512), (16, 4, 65)])
def test_decode_of_many_rows(emulator, rank, heads, batch, dtype):
    """As the launcher chooses: with many rows one program takes a whole one."""
    rule, layout = DeltaRule(rank, heads), HeadLayout(2, 1, 1, 16, 16)
    x, bias, state, mask = properties.random_problem(rule, batch, 1, dtype, seed=rank, masked=True)
    packed, cos, sin = heads_properties.random_rows(layout, (batch,), rule.width, dtype, seed=rank)
    packed[:, layout.width :] = x[:, 0]
    steering = heads_properties.random_steering(layout, rule.read_width, "qo", dtype=dtype)
    heads_properties.check_decode(
        rule, layout, packed, bias, state, steering, cos, sin, parts=(None,), mask=mask[:, 0]
    )  # fmt: skip
    if batch >= 512:
        assert emulator.records[-1].name == "decode_kernel" and emulator.records[-1].grid == batch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_and_read_of_many_rows(dtype):
    rule = DeltaRule(8)
    x, bias, state, mask = properties.random_problem(rule, 513, 1, dtype, seed=1, masked=True)
    properties.check_step(rule, x, bias, state, mask)
    properties.check_read(rule, x, state, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_and_rows_of_many_tokens(dtype):
    layout = HeadLayout(4, 2, 2, 128, 128)
    packed, cos, sin = heads_properties.random_rows(layout, (1, 65), 5, dtype, seed=3)
    steering = heads_properties.random_steering(layout, 8, "qkvo", raws=4, dtype=dtype)
    reads = torch.randn(1, 65, 8, generator=torch.Generator().manual_seed(1))
    heads_properties.check_steer_heads(layout, packed, reads, steering, cos, sin)
    weight = torch.randn(640, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    properties.check_steer(packed[..., :640].contiguous(), reads, weight, 2.0)
