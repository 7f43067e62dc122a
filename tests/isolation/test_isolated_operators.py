"""A row's bits do not depend on its neighbours: the operators, whatever the others hold and however many they are."""

import pytest
import torch
from heads_properties import random_rows, random_steering

from deltamem_kernels.dispatch import operations
from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule

ROWS, TOKENS, OURS = 5, 7, 2
LAYOUT = HeadLayout(q=2, k=1, v=1, dim=8, rotary=4)
RULES = [DeltaRule(8), DeltaRule(8, heads=3), DeltaRule(8, mode="no_lambda"), DeltaRule(8, coupled=False)]


@pytest.fixture(params=["reference", "numba"])
def ops(request):
    return operations(request.param, torch.device("cpu"))


@pytest.fixture(params=RULES, ids=lambda rule: f"{rule.mode}-{rule.heads}-{rule.coupled}")
def rule(request):
    return request.param


def neighbours(kind: str, *shape):
    """What may lie in the rows beside ours."""
    if kind == "others":
        return torch.randn(*shape)
    return torch.full(shape, {"nan": torch.nan, "inf": torch.inf, "huge": 3e38, "zeros": 0.0}[kind])


KINDS = ["others", "nan", "inf", "huge"]


def beside(kind: str, tensor):
    """A copy, of which all rows but ours hold something else."""
    changed = neighbours(kind, *tensor.shape)
    changed[OURS] = tensor[OURS]
    return changed


def same(one, other):
    assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def problem(rule, *lead):
    return torch.randn(*lead, rule.width), torch.randn(rule.bias_width), torch.randn(ROWS, rule.heads, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_scan_and_read(ops, rule, kind):
    x, bias, state = problem(rule, ROWS, TOKENS)
    mask = torch.rand(ROWS, TOKENS) > 0.3
    out = ops.scan(x, bias, state, rule, mask=mask, checkpoint_every=3)
    others = mask.logical_not()
    others[OURS] = mask[OURS]
    # A neighbour's state may be broken, too, as no bank and no memory lets it be.
    again = ops.scan(beside(kind, x), bias, beside(kind, state), rule, mask=others, checkpoint_every=3)
    for name in ("reads", "state", "checkpoints"):
        same(getattr(out, name)[OURS], getattr(again, name)[OURS])
    assert out.skipped[OURS] == again.skipped[OURS] == 0
    alone = ops.scan(x[OURS, None], bias, state[OURS, None], rule, mask=mask[OURS, None])
    if ops.__name__.split(".")[-2] == "numba":
        same(alone.reads[0], out.reads[OURS])
        same(alone.state[0], out.state[OURS])
    else:  # matmuls of another shape
        assert (alone.state[0] - out.state[OURS]).abs().max() <= 16 * 1.2e-7 * out.state[OURS].abs().max()
    same(ops.read(x, state, rule)[OURS], ops.read(beside(kind, x), beside(kind, state), rule)[OURS])


@pytest.mark.parametrize("kind", KINDS)
def test_step_and_slots(ops, rule, kind):
    x, bias, state = problem(rule, ROWS)
    slots = torch.tensor([1, -1, 4, 0, 3])
    others = beside(kind, x)
    pools = [state.clone(), neighbours(kind, *state.shape)]
    pools[1][slots[OURS]] = state[slots[OURS]]
    counts = [torch.zeros(ROWS, dtype=torch.int32) for _ in pools]
    reads = [ops.step(given, bias, pool, rule, slots=slots, skipped=count)
             for given, pool, count in zip((x, others), pools, counts)]  # fmt: skip
    same(reads[0][OURS], reads[1][OURS])
    same(pools[0][4], pools[1][4])
    assert counts[0][4] == counts[1][4] == 0
    assert torch.equal(pools[0][2], state[2])  # nobody's slot
    fresh = ops.scan(x[:, None], bias, neighbours("nan", *state.shape), rule, slots=torch.full((ROWS,), -1))
    assert not fresh.state.any() and not fresh.reads.any()  # of no slot: nothing of the pool is seen


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(ops, rule, kind):
    x, bias, state = problem(rule, 1, 12)
    bounds = torch.tensor([0, 4, 4, 9, 12])
    found = ops.scan(x, bias, state[:4], rule, cu_seqlens=bounds)
    x2, state2 = neighbours(kind, *x.shape), neighbours(kind, 4, *state.shape[1:])
    x2[:, 4:9], state2[2] = x[:, 4:9], state[2]
    again = ops.scan(x2, bias, state2, rule, cu_seqlens=bounds)
    same(found.reads[:, 4:9], again.reads[:, 4:9])
    same(found.state[2], again.state[2])


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_decode(ops, rule, kind):
    _, bias, state = problem(rule, ROWS)
    steering = random_steering(LAYOUT, rule.read_width, "qkvo")
    packed, cos, sin = random_rows(LAYOUT, (ROWS,), extra=rule.width)
    packed = packed.contiguous()
    rows, states = [packed.clone(), beside(kind, packed)], [state.clone(), beside(kind, state)]
    out = [ops.decode_(row, bias, own, rule, LAYOUT, steering, cos, sin, workspace=ops.workspace({}, None))
           for row, own in zip(rows, states)]  # fmt: skip
    for one, other in zip((*out[0], rows[0], states[0]), (*out[1], rows[1], states[1])):
        same(one[OURS], other[OURS])
    reads = torch.randn(ROWS, TOKENS, rule.read_width)
    packed, cos, sin = random_rows(LAYOUT, (ROWS, TOKENS))
    rows = [packed.contiguous(), beside(kind, packed)]
    ops.steer_heads_(rows[0], reads, LAYOUT, steering, cos, sin)
    ops.steer_heads_(rows[1], beside(kind, reads), LAYOUT, steering, cos, sin)
    same(rows[0][OURS], rows[1][OURS])
