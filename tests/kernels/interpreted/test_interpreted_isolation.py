"""A row's bits do not depend on what its neighbours hold, in Triton's interpreter; tests/isolation has the others."""

import pytest
import torch
from heads_properties import random_rows, random_steering

from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton import ops, scan

ROWS, OURS = 3, 1
LAYOUT = HeadLayout(q=2, k=1, v=1, dim=16, rotary=8)
KINDS = {"others": None, "nan": torch.nan, "inf": torch.inf, "huge": 3e38}
# One program for all columns; heads; several rows of a state in one program; several tiles of one row.
RULES = [DeltaRule(8), DeltaRule(3, 2, "lambda_outside", coupled=False), DeltaRule(2, mode="no_lambda"), DeltaRule(32)]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rank}-{rule.heads}-{rule.mode}")


def beside(kind: str, tensor: torch.Tensor, ours=OURS) -> torch.Tensor:
    """A copy, of which all rows but ours hold something else."""
    value = KINDS[kind]
    changed = torch.randn(tensor.shape) if value is None else torch.full(tensor.shape, value)
    changed[ours] = tensor[ours]
    return changed


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert torch.isfinite(one).all() and torch.equal(one.view(torch.int32), other.view(torch.int32))


def problem(rule: DeltaRule, *lead: int):
    return (
        torch.randn(*lead, rule.width),
        torch.randn(rule.bias_width),
        torch.randn(ROWS, rule.heads, rule.rank, rule.rank),
    )


@every_kind
@every_rule
def test_scan_and_read(rule, kind):
    x, bias, state = problem(rule, ROWS, 4)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]).bool()
    others = mask.logical_not()
    others[OURS] = mask[OURS]
    out = scan.scan(x, bias, state, rule, mask=mask, checkpoint_every=2)
    again = scan.scan(beside(kind, x), bias, beside(kind, state), rule, mask=others, checkpoint_every=2)
    for name in ("reads", "state", "checkpoints"):
        same(getattr(out, name)[OURS], getattr(again, name)[OURS])
    assert out.skipped[OURS] == again.skipped[OURS] == 0
    same(ops.read(x, state, rule)[OURS], ops.read(beside(kind, x), beside(kind, state), rule)[OURS])


@every_kind
def test_scan_in_chunks(kind):
    x, bias, state = problem(RULES[2], ROWS, 18)
    out = scan.scan(x, bias, state, RULES[2], chunk=16)
    again = scan.scan(beside(kind, x), bias, beside(kind, state), RULES[2], chunk=16)
    same(out.reads[OURS], again.reads[OURS])
    same(out.state[OURS], again.state[OURS])


@every_kind
def test_packed_sequences(kind):
    x, bias, state = problem(RULES[0], 1, 8)
    bounds, ours = torch.tensor([0, 2, 6, 8]), (0, slice(2, 6))
    out = scan.scan(x, bias, state, RULES[0], cu_seqlens=bounds)
    again = scan.scan(beside(kind, x, ours), bias, beside(kind, state), RULES[0], cu_seqlens=bounds)
    same(out.reads[ours], again.reads[ours])
    same(out.state[OURS], again.state[OURS])


@every_kind
@every_rule
def test_step_and_slots(rule, kind):
    x, bias, state = problem(rule, ROWS)
    slots = torch.tensor([-1, 2, 0])
    pools, counts = [state.clone(), beside(kind, state, 2)], [torch.zeros(ROWS, dtype=torch.int32) for _ in range(2)]
    reads = [ops.step(given, bias, pool, rule, slots=slots, skipped=count)
             for given, pool, count in zip((x, beside(kind, x)), pools, counts)]  # fmt: skip
    same(reads[0][OURS], reads[1][OURS])
    same(pools[0][2], pools[1][2])
    assert counts[0][2] == counts[1][2] == 0 and torch.equal(pools[0][1], state[1])  # 1 is nobody's slot


@every_kind
@every_rule
def test_decode_and_steer_heads(rule, kind):
    _, bias, state = problem(rule, ROWS)
    steering = random_steering(LAYOUT, rule.read_width, "qkvo")
    packed, cos, sin = random_rows(LAYOUT, (ROWS,), extra=rule.width)
    rows, states = [packed.contiguous(), beside(kind, packed)], [state.clone(), beside(kind, state)]
    out = [ops.decode_(row, bias, own, rule, LAYOUT, steering, cos, sin, workspace=ops.workspace({}, None))
           for row, own in zip(rows, states)]  # fmt: skip
    for one, other in zip((*out[0], rows[0], states[0]), (*out[1], rows[1], states[1])):
        same(one[OURS], other[OURS])
    reads = torch.randn(ROWS, 2, rule.read_width)
    packed, cos, sin = random_rows(LAYOUT, (ROWS, 2))
    rows = [packed.contiguous(), beside(kind, packed)]
    ops.steer_heads_(rows[0], reads, LAYOUT, steering, cos, sin)
    ops.steer_heads_(rows[1], beside(kind, reads), LAYOUT, steering, cos, sin)
    same(rows[0][OURS], rows[1][OURS])
