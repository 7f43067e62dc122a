"""A decoded token over a paged cache in one call: the bits of ``step``, and the corrections of ``steer``."""

import pytest
import torch

from deltamem_kernels.errors import ArgumentError
from deltamem_kernels.numba.blocks import MOST_ROWS, BlockStep
from deltamem_kernels.numba.recurrence import step
from deltamem_kernels.rule import DeltaRule
from tests.support import relative_error

RULES = [DeltaRule(rank=8), DeltaRule(rank=8, heads=2, mode="lambda_outside", coupled=False, row_gates=False)]


def at(sources, targets):
    """The places as a step takes them."""
    return len(sources), sources.data_ptr(), targets.data_ptr()


def problem(rule, count, apart=1):
    """Projections, bias, a cache ``apart`` states apart, which blocks, and rows [count, 40]."""
    torch.manual_seed(0)
    room = torch.randn(3 * count, apart, rule.heads, rule.rank, rule.rank)
    places = torch.randperm(3 * count)
    return (
        torch.randn(count, rule.width),
        torch.randn(rule.bias_width),
        room[:, -1],
        places[:count],
        places[count : 2 * count],
        torch.randn(count, 40),
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.mode)
@pytest.mark.parametrize("count", [1, 5, MOST_ROWS + 1])
@pytest.mark.parametrize("apart", [1, 3])
def test_one_call_is_gather_step_scatter_and_correct(rule, count, apart):
    projections, bias, cache, sources, targets, rows = problem(rule, count, apart)
    corrections = [(0, torch.randn(12, rule.read_width), 0.5), None, (20, torch.randn(20, rule.read_width), -2.0)]
    corrections.append((0, torch.randn(7, rule.read_width), 3.0))
    expected, state = cache.clone(), cache[sources]
    reads = step(projections, bias, state, rule)
    expected[targets] = state
    wanted, delta = rows.double().clone(), torch.full((count, 7), torch.nan)
    for first, weight, scale in (corrections[0], corrections[2]):
        wanted[:, first : first + len(weight)] += scale * reads.double() @ weight.double().t()

    before, given = rows.clone(), [tensor.clone() for tensor in (projections, bias, sources, targets)]
    found = BlockStep(cache, rule, corrections)(projections, bias, at(sources, targets), rows, delta)
    assert torch.equal(cache, expected)
    assert all(torch.equal(a, b) for a, b in zip(given, (projections, bias, sources, targets)))
    if count > MOST_ROWS:
        assert torch.equal(found, reads) and torch.equal(rows, before) and torch.isnan(delta).all()
        return
    assert found is None and relative_error(rows, wanted) < 1e-6
    assert torch.equal(rows[:, 12:20], before[:, 12:20])
    assert relative_error(delta, 3.0 * reads.double() @ corrections[3][1].double().t()) < 1e-6


def test_a_sequence_may_stay_in_its_block_and_two_may_resume_from_one():
    rule = RULES[0]
    projections, bias, cache, sources, targets, rows = problem(rule, 3)
    sources = torch.tensor([4, 4, 7])
    targets = torch.tensor([1, 2, 7])
    expected, state = cache.clone(), cache[sources]
    step(projections, bias, state, rule)
    expected[targets] = state
    BlockStep(cache, rule, [None] * 4)(projections, bias, at(sources, targets), rows, torch.empty(3, 0))
    assert torch.equal(cache, expected)


def test_a_token_that_is_not_finite_is_not_written_and_reads_zero():
    rule = RULES[0]
    projections, bias, cache, sources, targets, rows = problem(rule, 2)
    projections[1, 5] = torch.nan
    expected, before = cache[sources[1]].clone(), rows.clone()
    identity = [(0, torch.eye(8), 1.0), None, None, None]
    BlockStep(cache, rule, identity)(projections, bias, at(sources, targets), rows, torch.empty(2, 0))
    assert torch.equal(cache[targets[1]], expected) and torch.equal(rows[1], before[1])


def test_rows_that_are_left_to_others():
    """Rows of 16 bits, and corrections that this knows nothing of: the reads are returned."""
    rule = RULES[0]
    projections, bias, cache, sources, targets, rows = problem(rule, 2)
    delta = torch.full((2, 8), torch.nan)
    weight = [(0, torch.randn(8, 8, dtype=torch.bfloat16), 1.0)] * 4
    for corrections, given in ((None, rows), (weight, rows.bfloat16())):
        before, rounded = given.clone(), projections.to(given.dtype)
        reads = step(rounded, bias, cache[sources], rule)
        found = BlockStep(cache.clone(), rule, corrections)(rounded, bias, at(sources, targets), given, delta)
        assert torch.equal(found, reads) and torch.equal(given, before) and torch.isnan(delta).all()


def test_a_cache_that_cannot_be_taken():
    _, _, cache, *_ = problem(RULES[0], 2)
    with pytest.raises(
        ArgumentError, match=r"cache: got torch.float32 on cpu, a state's strides \[64, 1, 8\], allowed"
    ):
        BlockStep(cache.transpose(2, 3), RULES[0], None)
    with pytest.raises(ArgumentError, match="cache: got torch.float64 on cpu"):
        BlockStep(cache.double(), RULES[0], None)


def test_tokens_that_would_overflow_a_state_are_left_out_as_in_step():
    rule = RULES[0]
    projections, bias, cache, sources, _, rows = problem(rule, 4)
    projections[:, 2 * rule.rank : 3 * rule.rank] = 3e38
    bias += 20.0
    identity = [(0, torch.eye(8), 1.0), None, None, None]
    made, state = BlockStep(cache, rule, identity), cache[sources]
    for _ in range(20):
        rows = torch.zeros(4, 8)
        made(projections, bias, at(sources, sources), rows, torch.empty(4, 0))
        assert torch.equal(rows, step(projections, bias, state, rule)) and torch.equal(cache[sources], state)
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("wrong", [-1, 6])
@pytest.mark.parametrize("which", ["sources", "targets"])
def test_a_block_that_is_not_there_is_refused_before_anything_is_changed(wrong, which):
    projections, bias, cache, sources, targets, rows = problem(RULES[0], 2)
    before = cache.clone()
    {"sources": sources, "targets": targets}[which][1] = wrong
    with pytest.raises(IndexError, match="places: a block that the cache does not have"):
        BlockStep(cache, RULES[0], None)(projections, bias, at(sources, targets), rows, torch.empty(2, 0))
    assert torch.equal(cache, before)
