"""The recurrence, replayed: sizes computed by hand, and the reference's scan and read as the measure."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_fast.inspection import replay as module
from deltamem_fast.inspection.replay import replay
from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.segment_means import segment_means

RULES = st.builds(
    DeltaRule,
    rank=st.sampled_from([1, 3, 8]),
    heads=st.integers(1, 3),
    mode=st.sampled_from(["standard", "lambda_outside", "no_lambda"]),
    row_gates=st.booleans(),
    coupled=st.booleans(),
    normalize=st.booleans(),
)
SEEDS = st.integers(0, 2**20)
examples = settings(deadline=None, max_examples=25, derandomize=True, database=None)


def drawn(rule, seed, layers=2, length=9):
    """projections [L, T, W], gate biases [L, ...], initial [L, H, r, r], a mask [T]."""
    generator = torch.Generator().manual_seed(seed)
    projections = torch.randn(layers, length, rule.width, generator=generator)
    bias = torch.randn(layers, rule.bias_width, generator=generator)
    initial = torch.randn(layers, rule.heads, rule.rank, rule.rank, generator=generator)
    return projections, bias, initial, torch.rand(length, generator=generator) < 0.7


def test_sizes_that_can_be_computed_by_hand():
    # Rank 2, raw q and k, one gate for the state: sigmoid(0) = 1/2, keep = 1 − 1/2.
    rule = DeltaRule(rank=2, row_gates=False, normalize=False)
    tokens = torch.tensor([[[1.0, 0, 2, 0, 3, 4, 0], [1.0, 0, 2, 0, 3, 4, 0], [0, 1.0, 0, 1, 0, 0, 0]]])
    found = replay(tokens, torch.zeros(1, 1), torch.zeros(1, 1, 2, 2), rule, keep_states=True)
    # First: S = ½ v kᵀ = [[3, 0], [4, 0]]; ‖½ v‖ ‖k‖ = 2.5 · 2, and nothing to read.
    assert found.states[0, 0, 0].tolist() == [[3, 0], [4, 0]]
    # Second: S k = (6, 8), error ½ (3, 4) − ½ (6, 8) = −½ (3, 4); S = ½ S − ½ v kᵀ.
    assert found.states[1, 0, 0].tolist() == [[-1.5, 0], [-2, 0]]
    # Third: its key finds nothing, its value is 0: only the decay.
    assert found.states[2, 0, 0].tolist() == [[-0.75, 0], [-1, 0]]
    assert found.writes.flatten().tolist() == [5, 5, 0] and found.reads.flatten().tolist() == [0, 5, 0]
    assert found.norms.flatten().tolist() == [5, 2.5, 1.25] and found.beta.flatten().tolist() == [0.5] * 3
    assert torch.equal(found.final, found.states[-1])


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(0, 9), masked=st.booleans(), block=st.sampled_from([2, 256]))
def test_every_token_reads_and_writes_as_in_the_reference(rule, seed, length, masked, block):
    projections, bias, initial, mask = drawn(rule, seed, length=length)
    mask = mask if masked else None
    if length > 2:
        projections[1, 2, 0] = torch.nan  # not finite in one layer only
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = replay(projections, bias, initial, rule, mask=mask, keep_states=True)
    for layer in range(2):
        out = reference.scan(
            projections[layer : layer + 1], bias[layer], initial[layer : layer + 1], rule,
            mask=None if mask is None else mask[None], checkpoint_every=1,
        )  # fmt: skip
        reads = out.reads[0].unflatten(-1, (rule.heads, rule.rank)).norm(dim=-1)
        torch.testing.assert_close(found.reads[:, layer], reads)
        torch.testing.assert_close(found.states[:, layer], out.checkpoints[0])
        torch.testing.assert_close(found.norms[:, layer], out.checkpoints[0].norm(dim=(-2, -1)))
        torch.testing.assert_close(found.final[layer], out.state[0])
        # What is written is the state after the token less what it keeps of the state before.
        before = torch.cat([initial[layer : layer + 1], out.checkpoints[0][:-1]])[:length]
        valid = torch.isfinite(projections[layer]).all(-1) & (True if mask is None else mask)
        clean = torch.where(valid[:, None], projections[layer], 0)
        *_, keep, _, beta = reference.split_projections(clean, bias[layer], rule)
        change = (out.checkpoints[0] - keep.unsqueeze(-1) * before).norm(dim=(-2, -1))
        torch.testing.assert_close(found.writes[:, layer], change * valid[:, None], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.beta[:, layer], beta.mean(-1) * valid[:, None])
    assert found.states.shape == (length, 2, rule.heads, rule.rank, rule.rank)


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(1, 9), masked=st.booleans())
def test_a_segment_is_written_once_and_said_of_each_of_its_tokens(rule, seed, length, masked):
    projections, bias, initial, mask = drawn(rule, seed, length=length)
    mask = mask if masked else None
    ids = torch.randint(-1, 3, (length,), generator=torch.Generator().manual_seed(seed))
    projections[1, length // 2, 0] = torch.inf
    found = replay(projections, bias, initial, rule, mask=mask, segment_ids=ids, keep_states=True)
    for layer in range(2):
        row, state = projections[layer : layer + 1], initial[layer : layer + 1]
        row_mask = None if mask is None else mask[None]
        reads = reference.read(row, state, rule, mask=row_mask)[0].unflatten(-1, (rule.heads, rule.rank))
        torch.testing.assert_close(found.reads[:, layer], reads.norm(dim=-1))
        means, present, _ = segment_means(row, ids[None], row_mask)
        out = reference.scan(means, bias[layer], state, rule, mask=present, checkpoint_every=1)
        torch.testing.assert_close(found.final[layer], out.state[0])
        alone = replay(means, bias[layer : layer + 1], state, rule, mask=present[0], keep_states=True)
        wanted = (ids >= 0) & torch.isfinite(row[0]).all(-1) & (True if mask is None else mask)
        segments, last = ids[wanted].unique().tolist(), None
        for t in range(length):
            if wanted[t]:
                last = segments.index(ids[t].item())
                torch.testing.assert_close(found.writes[t, layer], alone.writes[last, 0])
                torch.testing.assert_close(found.beta[t, layer], alone.beta[last, 0])
            else:
                assert not found.writes[t, layer].any() and not found.beta[t, layer].any()
            expected = state[0] if last is None else alone.states[last, 0]
            torch.testing.assert_close(found.states[t, layer], expected)
            torch.testing.assert_close(found.norms[t, layer], expected.norm(dim=(-2, -1)))


@examples
@given(rule=RULES, seed=SEEDS, segmented=st.booleans(), length=st.integers(0, 6))
def test_nothing_is_written_to_a_frozen_state(rule, seed, segmented, length):
    projections, bias, initial, _ = drawn(rule, seed, length=length)
    ids = torch.zeros(length, dtype=torch.int64) if segmented else None
    found = replay(projections, bias, initial, rule, segment_ids=ids, frozen=True, keep_states=True)
    assert not found.writes.any() and not found.beta.any() and torch.equal(found.final, initial)
    assert all(torch.equal(state, initial) for state in found.states)
    for layer in range(2):
        reads = reference.read(projections[layer : layer + 1], initial[layer : layer + 1], rule)[0]
        torch.testing.assert_close(found.reads[:, layer], reads.unflatten(-1, (rule.heads, rule.rank)).norm(dim=-1))


def test_states_are_not_kept_unless_asked_for_and_autocast_rounds_nothing():
    rule = DeltaRule(rank=4, heads=2)
    projections, bias, initial, _ = drawn(rule, 3)
    plain = replay(projections, bias, initial, rule)
    assert plain.states is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = replay(projections, bias, initial, rule)
    assert torch.equal(plain.writes, rounded.writes) and torch.equal(plain.final, rounded.final)
    wide = replay(projections, bias, initial.double(), rule)
    assert wide.writes.dtype == torch.float64
    torch.testing.assert_close(wide.writes.float(), plain.writes)
