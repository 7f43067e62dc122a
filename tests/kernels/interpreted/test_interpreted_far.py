"""Rows that lie further apart than 32 bits reach. The memory between them is never touched, so it costs nothing."""

import heads_properties
import kernel_properties as properties
import pytest
import torch

from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton.decode import decode_
from deltamem_kernels.triton.heads import steer_heads_
from deltamem_kernels.triton.read import read
from deltamem_kernels.triton.read_backward import read_backward
from deltamem_kernels.triton.scan import scan
from deltamem_kernels.triton.scan_backward import scan_backward
from deltamem_kernels.triton.steer import steer
from deltamem_kernels.triton.step import step

pytestmark = pytest.mark.soak
FAR = 2**31 + 16
RULE = DeltaRule(4)


def far(near: torch.Tensor, dim: int = 0, last: int = FAR) -> torch.Tensor:
    """The same numbers, the last along ``dim`` lying ``last`` elements, or a few more, from the first."""
    strides = list(near.contiguous().stride())
    strides[dim] = last // (near.shape[dim] - 1) + near.numel()
    storage = torch.empty(strides[dim] * (near.shape[dim] - 1) + near.numel(), dtype=near.dtype)
    return storage.as_strided(near.shape, strides).copy_(near)


def problem(batch, length, dtype=torch.bfloat16):
    return properties.random_problem(RULE, batch, length, dtype, seed=1, masked=True)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_scan(chunk, dim):
    x, bias, state, mask = problem(*((2, 5) if dim == 0 else (3, 2)))
    near = scan(x, bias, state, RULE, mask=mask, chunk=chunk)
    there = scan(far(x, dim), bias, state, RULE, mask=far(mask, dim), chunk=chunk)
    assert torch.equal(near.reads, there.reads) and torch.equal(near.state, there.state)


@pytest.mark.parametrize("dim", [0, 1])
def test_scan_gradient(dim):
    x, bias, state, mask = problem(*((2, 5) if dim == 0 else (3, 2)))
    (d_reads, d_state, _), near = properties.scan_gradients(RULE, x, bias, state, 4, (4, 4), mask=mask)
    given = {"mask": mask, "chunk": 4, "spacing": (4, 4)}
    there = scan_backward(far(d_reads, dim), d_state, far(x, dim), bias, state, RULE, **given)
    assert properties.equal(there, near)
    near = read_backward(d_reads, x, state, RULE, mask=mask)
    assert properties.equal(read_backward(far(d_reads, dim), far(x, dim), state, RULE, mask=mask), near)


def test_read_and_step():
    x, bias, state, mask = problem(2, 2)
    assert torch.equal(read(far(x), state, RULE, mask=mask), read(x, state, RULE, mask=mask))
    one, two = state.clone(), far(state)
    reads = step(x[:, 0], bias, one, RULE)
    assert torch.equal(step(far(x[:, 0]), bias, two, RULE), reads) and torch.equal(one, two)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_states_of_any_stride(dim):
    """Each stride fits 32 bits, and the last row, key or head lies past them."""
    rule = DeltaRule(4, 2)
    x, bias, state, _ = properties.random_problem(rule, 2, 5, seed=1)
    d_reads, d_state = torch.randn(2, 5, 8), torch.randn(2, 2, 4, 4)
    packed, layout = torch.randn(2, 64 + rule.width), HeadLayout(2, 1, 1, 16)
    for chunk in (0, 2):
        near, there = (scan(x, bias, s, rule, chunk=chunk)[:2] for s in (state, far(state, dim)))
        assert properties.equal(there, near)
    for chunk, spacing in ((0, (4, 2)), (4, (4, 2))):
        given = {"chunk": chunk, "spacing": spacing}
        near = scan_backward(d_reads, d_state, x, bias, state, rule, **given)
        there = scan_backward(d_reads, far(d_state, dim), x, bias, far(state, dim), rule, **given)
        assert properties.equal(there, near)
    assert torch.equal(read(x, far(state, dim), rule), read(x, state, rule))
    near = read_backward(d_reads, x, state, rule)
    assert properties.equal(read_backward(d_reads, x, far(state, dim), rule), near)
    one, two = state.clone(), far(state, dim)
    assert torch.equal(step(x[:, 0], bias, two, rule), step(x[:, 0], bias, one, rule)) and torch.equal(one, two)
    steering = heads_properties.random_steering(layout, 8, "qo")
    for parts in (1, 3):
        one, two = state.clone(), far(state, dim)
        arrived = torch.zeros(2, dtype=torch.int32)
        near, there = (
            decode_(packed.clone(), bias, s, rule, layout, steering, workspace=arrived, parts=parts) for s in (one, two)
        )
        assert properties.equal(there, near) and torch.equal(one, two)


def test_steer():
    base, reads, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 4), torch.randn(8, 4)
    base = far(base.bfloat16())
    expected = steer(base.contiguous(), reads, weight, 0.5)
    steer(base, reads, weight, 0.5, out=base)
    assert torch.equal(base, expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_heads(dim):
    layout = HeadLayout(2, 1, 1, 16, 16)
    steering = heads_properties.random_steering(layout, 4, "qkv")
    packed, cos, sin = heads_properties.random_rows(layout, (2, 2), dtype=torch.bfloat16)
    reads, near = torch.randn(2, 2, 4), packed.clone()
    there = far(packed, dim)
    steer_heads_(near, reads, layout, steering, cos, sin)
    steer_heads_(there, reads, layout, steering, cos, sin)
    assert torch.equal(near, there)


def test_decode():
    layout = HeadLayout(2, 1, 1, 16)
    steering = heads_properties.random_steering(layout, 4, "qo")
    packed, _, _ = heads_properties.random_rows(layout, (2,), RULE.width, torch.bfloat16)
    _, bias, state, _ = problem(2, 1)
    near, there, one, two = packed.clone(), far(packed), state.clone(), far(state)
    for parts in (1, 3):
        arrived = torch.zeros(2, dtype=torch.int32)
        a = decode_(near, bias, one, RULE, layout, steering, workspace=arrived, parts=parts)
        b = decode_(there, bias, two, RULE, layout, steering, workspace=arrived, parts=parts)
        assert all(torch.equal(s, t) for s, t in zip((*a, near, one), (*b, there, two)))
