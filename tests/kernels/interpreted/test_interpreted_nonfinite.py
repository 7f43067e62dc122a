"""A token that would leave NaN or Inf in a state is a masked token: reads 0, no write in any head, counted."""

import pytest
import torch
from drawn_rules import GUARDS

from deltamem_kernels.layout import HeadLayout, Steering
from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton import decode, ops, scan, step

# One program for all columns, several rows in one, several tiles of one row; chunks.
CASES = [
    (DeltaRule(8), 4, None),
    (DeltaRule(2, coupled=False), 18, 16),
    (DeltaRule(5, 3), 3, None),
    (DeltaRule(64), 3, None),
]


def problem(rule: DeltaRule, length: int):
    """Projections [2, T, W] whose tokens 1 and 2 of row 1 overflow the last head; bias, state, and the mask of it."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, rule.width, generator=make)
    width = rule.read_width
    for t, value in ((1, 1e38), (2, -3.4e38)):
        x[1, t, 2 * width - rule.rank : 2 * width] = 1.0
        x[1, t, 3 * width - 1] = value
        x[1, t, 3 * width :] = 9.0
    state = torch.randn(2, rule.heads, rule.rank, rule.rank, generator=make)
    written = torch.ones(2, length, dtype=torch.bool)
    written[1, 2] = False
    return x, torch.zeros(rule.bias_width), state, written


@pytest.mark.parametrize(("rule", "length", "chunk"), CASES)
def test_scan_and_step(rule, length, chunk):
    x, bias, state, written = problem(rule, length)
    found, flags = scan.scan_with_flags(x, bias, state, rule, checkpoint_every=2, chunk=chunk)
    assert torch.equal(flags, torch.where(written, 1, 2).to(torch.uint8)) and found.skipped.tolist() == [0, 1]
    # One chunk: what is repaired has the bits of one that never broke.
    masked = scan.scan(x, bias, state, rule, mask=written, checkpoint_every=2, chunk=0)
    for name in ("reads", "state", "checkpoints"):
        ours, theirs = getattr(found, name), getattr(masked, name)
        assert torch.equal(ours[1:], theirs[1:])
        torch.testing.assert_close(ours, theirs)
    expected = reference.scan(x, bias, state, rule)
    assert torch.equal(found.skipped, expected.skipped)
    torch.testing.assert_close(found.state, expected.state, rtol=1e-5, atol=1e-5)
    stepped, skipped = state.clone(), torch.zeros(2, dtype=torch.int32)
    for t in range(3):
        reads = step.step(x[:, t], bias, stepped, rule, skipped=skipped)
        if chunk is None:
            assert torch.equal(reads, found.reads[:, t])
    assert skipped.tolist() == [0, 1] and not reads[1].any() and torch.isfinite(stepped).all()


@pytest.mark.parametrize("chunk", [0, 2])
def test_what_is_taken_once_more_is_held_too(chunk):
    """Token 0 asks for more than the state may hold: the others are written by ``repair_kernel``."""
    rule = DeltaRule(2, 2, "standard", True, False, True, *GUARDS[1])
    make = torch.Generator().manual_seed(0)
    x, state = torch.randn(1, 5, rule.width, generator=make), torch.randn(1, 2, 2, 2, generator=make)
    state[0, 0, 0], x[..., 4:6] = 3e38, torch.tensor([1.0, -1.0])
    x[0, 0, 4:6] = 1.0
    bias, mask = torch.zeros(rule.bias_width), torch.tensor([[False, True, True, True, True]])
    found = scan.scan(x, bias, state, rule, chunk=chunk, checkpoint_every=2)
    masked = scan.scan(x, bias, state, rule, mask=mask, chunk=0, checkpoint_every=2)
    assert found.skipped.tolist() == [1] and (x[0, 1:, 8:12].abs() > rule.value_max).any()
    assert all(torch.equal(getattr(found, name), getattr(masked, name)) for name in ("reads", "state", "checkpoints"))


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("guard", GUARDS[:2])
def test_a_gate_that_is_nan_is_not_held_but_left_out(guard, place):
    """A bias may be NaN, in β or λ. A minimum would make a bound of it, and the token would be written."""
    rule = DeltaRule(2, 2, "standard", False, False, True, *guard)
    make = torch.Generator().manual_seed(0)
    x, state = torch.randn(2, 3, rule.width, generator=make), torch.randn(2, 2, 2, 2, generator=make)
    bias = torch.zeros(rule.bias_width)
    bias[place] = float("nan")
    for chunk in (0, 2):
        found = scan.scan(x, bias, state, rule, chunk=chunk)
        assert torch.equal(found.state, state) and found.skipped.tolist() == [3, 3] and not found.reads.any()
    stepped = state.clone()
    assert not step.step(x[:, 0], bias, stepped, rule).any() and torch.equal(stepped, state)
    leaves = [t.clone().requires_grad_() for t in (x, bias, state)]
    out = ops.scan(*leaves, rule)
    d_x, d_bias, d_state = torch.autograd.grad(out.reads.sum() + out.state.sum(), leaves)
    assert not d_x.any() and not d_bias.any() and torch.equal(d_state, torch.ones_like(state))


@pytest.mark.parametrize(
    ("rule", "parts"), [(DeltaRule(8), 1), (DeltaRule(8), 4), (DeltaRule(64), 1), (DeltaRule(16, 3), 2)]
)
def test_decode(rule, parts):
    x, bias, state, _ = problem(rule, 3)
    state[1] = scan.scan(x[:, :2], bias, state, rule).state[1]
    layout = HeadLayout(2, 1, 1, 8)
    steering = Steering(q=torch.randn(16, rule.read_width), o=torch.randn(8, rule.read_width))
    packed = torch.cat([torch.randn(2, layout.width), x[:, 2]], 1)
    skipped, arrived = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    before, given = state.clone(), packed.clone()
    reads, delta = decode.decode_(
        packed, bias, state, rule, layout, steering, skipped=skipped, workspace=arrived, parts=parts
    )  # fmt: skip
    expected = before.clone()
    assert torch.equal(reads, step.step(x[:, 2], bias, expected, rule)) and torch.equal(state, expected)
    assert torch.equal(state[1], before[1]) and not torch.equal(state[0], before[0])
    assert skipped.tolist() == [0, 1] and not reads[1].any() and not delta[1].any() and reads[0].any()
    assert torch.equal(packed[1], given[1]) and not arrived.any()


@pytest.mark.parametrize(("rule", "length", "chunk"), CASES[:2])
def test_gradients_of_the_rest(rule, length, chunk):
    x, bias, state, written = problem(rule, length)
    flags = scan.scan_with_flags(x, bias, state, rule, chunk=chunk)[1]
    leaves = [tensor.clone().requires_grad_() for tensor in (x, bias, state)]
    for arguments in ({}, {"mask": written}):
        out = ops.scan(*leaves, rule, **arguments)
        loss = (out.reads.double() / (1 + out.reads.double().abs())).sum()
        found = torch.autograd.grad(loss, leaves)
        assert all(torch.isfinite(gradient).all() for gradient in found)
        if not arguments:
            ours = found
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, found)) and flags[1, 2] == 2
