"""steer_heads_ and decode_ in Triton's interpreter."""

import heads_properties as properties
import pytest
import torch
from drawn_rules import GUARDS
from kernel_properties import random_problem

from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.schemas import flat_layout, flat_rule
from deltamem_kernels.triton import ops
from deltamem_kernels.triton.decode import decode_
from deltamem_kernels.triton.heads import steer_heads_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(16, 16), (16, 8), (16, 0), (24, 24), (24, 8), (128, 128)]
WHICH = ["qo", "qkvo", "", "v"]


def memory(rule, layout, batch, dtype=torch.float32, seed=0, **rows):
    x, bias, state, mask = random_problem(rule, batch, 1, dtype, seed=seed, masked=True)
    packed, cos, sin = properties.random_rows(layout, (batch,), rule.width, dtype, seed=seed, **rows)
    packed[:, layout.width :] = x[:, 0]
    return (packed, bias, state), (cos, sin), mask[:, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steer_heads(shape, dtype):
    layout = HeadLayout(3, 1, 2, *shape)
    case = SHAPES.index(shape) + DTYPES.index(dtype)
    width, lead = [3, 8, 20][case % 3], [(2, 5), (1, 17), (3, 1)][case % 3]
    packed, cos, sin = properties.random_rows(layout, lead, 5, dtype, seed=case, rows=lead[0] if case % 2 else 1)
    reads = torch.randn(*lead, width, generator=torch.Generator().manual_seed(case))
    steering = properties.random_steering(
        layout, width, WHICH[case % 4], case % 3 > 0, [0, 1, 4][case % 3], dtype=dtype, seed=case
    )
    properties.check_steer_heads(layout, packed, reads, steering, cos, sin)


def test_steer_heads_strides():
    """Where weights, reads, tables and rows lie makes no difference, to the bit."""
    layout, lead = HeadLayout(2, 1, 1, 16, 8), (2, 3)
    packed, cos, sin = properties.random_rows(layout, lead, rows=2)
    reads = torch.randn(*lead, 4)
    steering = properties.random_steering(layout, 4, "qkv")
    plain = properties.check_steer_heads(layout, packed, reads, steering, cos, sin)
    far = steering._replace(q=steering.q.t().contiguous().t(), v=torch.stack([steering.v] * 2, -1)[..., 0])
    turned = packed.transpose(0, 1).contiguous().transpose(0, 1)
    steer_heads_(turned, reads.transpose(1, 2).contiguous().transpose(1, 2), layout, far, *(
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in (cos, sin)
    ))  # fmt: skip
    assert torch.equal(turned, plain)


RULES = {
    "released": DeltaRule(8),
    "two heads, held": DeltaRule(3, 2, "lambda_outside", False, False, True, *GUARDS[1]),
    "several tiles": DeltaRule(16, 4),
}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", RULES)
def test_decode(name, which):
    rule = RULES[name]
    case = WHICH.index(which)
    dtype, shape = DTYPES[case % 3], SHAPES[case]
    layout = HeadLayout(2, 1, 1, *shape)
    given, turn, mask = memory(rule, layout, 3, dtype, seed=case, rows=3 if case % 2 else 1)
    given[0][1, layout.width + 1] = float("nan")
    steering = properties.random_steering(
        layout, rule.read_width, which, case != 1, [0, 1, 4][case % 3], dtype=dtype, seed=case
    )
    # Several tiles take the interpreter long; the emulator has them in any number of parts.
    parts = (3,) if rule.rank == 16 else (1, 3, None)
    properties.check_decode(rule, layout, *given, steering, *turn, parts=parts, mask=mask if case % 2 else None)


@pytest.mark.parametrize("rank", [1, 17, 64])
def test_ranks(rank):
    rule, layout = DeltaRule(rank), HeadLayout(1, 1, 1, 16, 16)
    given, turn, _ = memory(rule, layout, 1, torch.bfloat16, seed=rank)
    steering = properties.random_steering(layout, rank, "qo", dtype=torch.bfloat16, outputs=5)
    properties.check_decode(rule, layout, *given, steering, *turn, parts=(1, 2))


@pytest.mark.parametrize("frozen", [False, True])
def test_slots(frozen):
    rule, layout = DeltaRule(3, 2), HeadLayout(2, 1, 1, 16, 16)
    (packed, bias, _), turn, mask = memory(rule, layout, 4)
    pool = random_problem(rule, 6, 1, seed=2)[2]
    packed[3, -1] = float("inf")
    slots = torch.tensor([5, -1, 0, 3], dtype=torch.int32)
    steering = properties.random_steering(layout, rule.read_width, "qo", raws=4)
    reads, after = properties.check_decode(
        rule, layout, packed, bias, pool, steering, *turn, mask=mask, slots=slots, frozen=frozen
    )
    assert not reads[1].any() and not reads[3].any() and torch.equal(after[[1, 2, 3, 4]], pool[[1, 2, 3, 4]])
    assert torch.equal(after, pool) == frozen


def test_many_steps():
    rule, layout = DeltaRule(8), HeadLayout(2, 1, 1, 16)
    steering = properties.random_steering(layout, 8, "qo", dtype=torch.bfloat16)
    properties.check_many_steps(rule, layout, 2, steering, 3, None, torch.bfloat16, "cpu")


def test_nothing_to_do():
    rule, layout = DeltaRule(4), HeadLayout(1, 1, 1, 16)
    packed = torch.zeros(0, layout.width + rule.width)
    steering = properties.random_steering(layout, 4, "o", normed=False)
    reads, delta = decode_(packed, torch.zeros(4), torch.zeros(0, 1, 4, 4), rule, layout, steering)
    assert reads.shape == (0, 4) and delta.shape == (0, 20)
    given, _, _ = memory(rule, layout, 2)
    properties.check_decode(rule, layout, *given, steering._replace(o=None), None, None)
    steer_heads_(torch.zeros(1, 0, 48), torch.zeros(1, 0, 4), layout, steering)


def test_refuses():
    rule, layout = DeltaRule(4), HeadLayout(1, 1, 1, 16)
    (packed, bias, state), _, _ = memory(rule, layout, 2)
    steering = properties.random_steering(layout, 4, "qo")
    with pytest.raises(ValueError, match="workspace"):
        decode_(packed, bias, state, rule, layout, steering, workspace=torch.zeros(2))
    with pytest.raises(ValueError, match="skipped"):
        decode_(packed, bias, state, rule, layout, steering, skipped=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="float64"):
        decode_(packed.double(), bias, state, rule, layout, steering)
    with pytest.raises(ValueError, match="reads"):
        steer_heads_(packed[None], torch.zeros(1, 3, 4), layout, steering)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_whole(backend, frozen):
    rule, layout = DeltaRule(4), HeadLayout(2, 1, 1, 16, 16)
    (packed, bias, state), turn, mask = memory(rule, layout, 2)
    steering = properties.random_steering(layout, 4, "qo", raws=4)

    def both(packed, state):
        reads, delta = ops.decode_(packed, bias, state, rule, layout, steering, *turn, mask=mask, frozen=frozen)
        ops.steer_heads_(packed[:, None], reads[:, None], layout, steering, *turn)
        return reads, delta

    ours, theirs = (packed.clone(), state.clone()), (packed.clone(), state.clone())
    compiled = torch.compile(both, fullgraph=True, backend=backend)(*ours)
    for a, b in zip((*compiled, *ours), (*both(*theirs), *theirs)):
        assert torch.equal(a, b)


def test_opcheck():
    rule, layout = DeltaRule(4), HeadLayout(2, 1, 1, 16, 16)
    (packed, bias, state), turn, mask = memory(rule, layout, 2)
    steering = properties.random_steering(layout, 4, "q", raws=1)
    flat = (*flat_rule(rule), *flat_layout(layout), *steering, *turn, mask, None)
    counts = [torch.zeros(2, dtype=torch.int32) for _ in range(2)]
    packed = packed.contiguous()
    torch.library.opcheck(ops.decode_op, (packed.clone(), bias, state.clone(), *counts, *flat))
    torch.library.opcheck(ops.decode_frozen_op, (packed.clone(), bias, state, *flat))
    torch.library.opcheck(
        ops.steer_heads_op,
        (packed[:, None].clone(), torch.zeros(2, 1, 4), *flat_layout(layout), *steering, *turn),
    )
