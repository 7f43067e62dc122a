"""Tokens, segments, texts and messages that are trusted less: what they may change, and what not."""

import math

import pytest
import torch
from support import loud_adapter, tiny_model

from deltamem_fast import DeltaMemConfig, DeltaMemError, Guard, MemoryState, patch_model
from deltamem_fast.adapter.record import record_of
from deltamem_fast.model import begin
from deltamem_kernels.bounds import row_bound
from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.trust import trusted

RULES = [
    DeltaRule(8),
    DeltaRule(8, 2, coupled=False),
    DeltaRule(3, mode="no_lambda", row_gates=False),
    DeltaRule(8, mode="lambda_outside", coupled=False, row_gates=False),
]
GPU = torch.cuda.is_available()
IDS = torch.arange(20).reshape(2, 10) + 3


def patched(config=None, guard="auto", backend="reference", dtype=torch.float32):
    model = patch_model(
        tiny_model(dtype=dtype, num_hidden_layers=2), config or DeltaMemConfig(), backend=backend, guard=guard
    )
    return loud_adapter(model)


def written(model, **arguments):
    memory = MemoryState.zeros(model, 2)
    with torch.no_grad():
        logits = model(IDS, memory=memory, **arguments).logits
    return memory, logits


def same(a, b) -> bool:
    return all(torch.equal(a[layer], b[layer]) for layer in a)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_trusted_token_writes_a_blend_of_the_states_before_and_after(rule):
    make = torch.Generator().manual_seed(1)
    x, bias = torch.randn(3, 1, rule.width, generator=make), torch.randn(rule.bias_width, generator=make)
    state = torch.randn(3, rule.heads, rule.rank, rule.rank, generator=make)
    trust = torch.tensor([[0.25], [1.0], [0.0]])
    lowered = trusted(x, bias, rule, trust)
    assert torch.equal(lowered[1], x[1])
    found = reference.scan(lowered, bias, state, rule)
    whole = reference.scan(x, bias, state, rule)
    assert torch.equal(found.reads, whole.reads) and torch.equal(found.state[2], state[2])
    if rule.mode != "lambda_outside":
        torch.testing.assert_close(found.state[0], torch.lerp(state[0], whole.state[0], 0.25))
    else:  # erase = λ β, both lowered
        q, k, v, keep, _, beta = reference.split_projections(x, bias, rule)
        keep, beta = 1 - 0.25 * (1 - keep), 0.25 * beta
        _, (wanted,) = reference.delta_rule(q, k, v, keep, keep * beta, beta, state)
        torch.testing.assert_close(found.state[0], wanted[0])


@pytest.mark.parametrize("gate", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("trust", [0.5, 0.0])
def test_a_token_whose_gate_is_not_finite_is_left_out_and_counted(gate, trust):
    rule = DeltaRule(8, coupled=False)
    for place in (24, 32):  # β, λ
        x = torch.randn(1, 2, rule.width, generator=torch.Generator().manual_seed(4))
        x[0, 0, place] = gate
        found = reference.scan(
            trusted(x, torch.zeros(16), rule, torch.full((1, 2), trust)), torch.zeros(16), None, rule
        )
        assert found.skipped.tolist() == [1] and not found.reads[0, 0].any()


@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_trust_is_differentiable_but_for_itself(rule):
    make = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, rule.width, generator=make, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(rule.bias_width, generator=make, dtype=torch.float64, requires_grad=True)
    trust = torch.tensor([[0.3, 1.0, 0.7, 0.05]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, bias: trusted(x, bias, rule, trust).clamp(-50, 50), (x, bias))


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_a_row_and_a_token_mean_the_same(backend, dtype):
    model = patched(backend=backend, dtype=dtype)
    half, logits = written(model, trust=0.5)
    for trust in (torch.full((2, 10), 0.5), torch.full((2,), 0.5, dtype=torch.float64)):
        again, same_logits = written(model, trust=trust)
        assert same(half, again) and torch.equal(logits, same_logits)
    whole, _ = written(model)
    assert same(whole, written(model, trust=1.0)[0]) and not same(whole, half)
    nothing, _ = written(model, trust=torch.zeros(2, 10))
    assert same(nothing, MemoryState.zeros(model, 2)) and same(nothing, written(model, trust=0)[0])


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_prefill_is_decode_with_trust_and_padding_takes_none(backend):
    model, trust = patched(backend=backend), torch.rand(2, 10, generator=torch.Generator().manual_seed(3))
    whole, _ = written(model, trust=trust)
    memory, cache = MemoryState.zeros(model, 2), None
    with torch.no_grad():
        for t in range(10):
            out = model(IDS[:, t : t + 1], memory=memory, past_key_values=cache, trust=trust[:, t : t + 1])
            cache = out.past_key_values
    for layer in whole:
        torch.testing.assert_close(whole[layer], memory[layer], rtol=1e-4, atol=1e-5)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[:, 6:] = 0
    cut, longer = MemoryState.zeros(model, 2), MemoryState.zeros(model, 2)
    with torch.no_grad():
        model(IDS[:, :6], memory=cut, trust=trust[:, :6])
        model(IDS, attention_mask=mask, memory=longer, trust=trust)
    for layer in cut:
        torch.testing.assert_close(cut[layer], longer[layer], rtol=1e-5, atol=1e-6)


def test_generate_takes_a_number_for_all_or_a_tensor_for_the_prompt():
    model = patched(guard=False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    states = []
    for trust in (None, 0.5, torch.full((2, 10), 0.5), torch.ones(2, 10)):
        memory = MemoryState.zeros(model, 2)
        model.generate(IDS, memory=memory, trust=trust, **options)
        states.append(memory)
    assert same(states[0], states[3]) and not same(states[1], states[2]) and not same(states[0], states[2])


def test_a_segment_has_the_mean_trust_of_its_tokens():
    model, segments = patched(DeltaMemConfig.ssw("sentence_mean")), torch.tensor([[0] * 4 + [1] * 6] * 2)
    uneven = torch.tensor([[0.5, 0.0, 1.0, 0.5] + [1.0] * 6] * 2)
    even = torch.tensor([[0.5] * 4 + [1.0] * 6] * 2)
    found, wanted = (written(model, segment_ids=segments, trust=trust)[0] for trust in (uneven, even))
    for layer in found:
        torch.testing.assert_close(found[layer], wanted[layer])
    assert not same(found, written(model, segment_ids=segments)[0])


def test_packed_sequences_and_the_caches_own_memory_take_trust():
    model, trust = patched(), torch.tensor([[0.1] * 4 + [0.9] * 6])
    memory = MemoryState.zeros(model, 2)
    places = torch.tensor([[*range(4), *range(6)]])
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    with torch.no_grad():
        model(
            IDS[:1], position_ids=places, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=6, max_length_k=6,
            memory=memory, trust=trust, use_cache=False,
        )  # fmt: skip
        alone = MemoryState.zeros(model, 1)
        model(IDS[:1, :4], memory=alone, trust=0.1, use_cache=False)
    for layer in alone:
        torch.testing.assert_close(memory[layer][:1], alone[layer])


@pytest.mark.parametrize(
    "trust", [2, -0.1, "x", True, float("nan"), torch.rand(2, 9), torch.full((2, 10), 1.5), torch.ones(2, 10).long()]
)
def test_what_is_no_trust_is_refused_before_anything_is_written(trust):
    model = patched()
    memory = MemoryState.zeros(model, 2)
    for call in (
        lambda: model(IDS, memory=memory, trust=trust),
        lambda: model.generate(IDS, memory=memory, trust=trust),
    ):
        with pytest.raises(DeltaMemError, match="trust: got"):
            call()
    assert same(memory, MemoryState.zeros(model, 2))


def test_what_is_no_share_is_none():
    found = begin.shares(torch.tensor([math.nan, 1.5, 50.0, math.inf, -math.inf, -0.1, 1.0001, 0.0, 0.25, 1.0]))
    assert found.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0.25, 1] and found.dtype == torch.float32
    assert begin.shares(torch.tensor([1 - 1e-12, math.nan], dtype=torch.float64)).tolist() == [1, 0]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")])]
)
def test_where_nobody_waits_for_trust_what_is_none_writes_nothing(device, monkeypatch):
    monkeypatch.setattr(begin, "is_at_hand", lambda tensor: False)  # as of a GPU's, and in compiled code
    model, ids = patched(guard=False).to(device), IDS.to(device)
    memory = MemoryState.zeros(model, 2)
    trust = torch.tensor([math.nan, 1.5, math.inf, -1.0], device=device).repeat_interleave(5).reshape(2, 10)
    with torch.no_grad():
        model(ids, memory=memory, trust=trust)
        assert same(memory, MemoryState.zeros(model, 2)) and not memory.skipped.any()
        trust[1] = 1.0
        model(ids, memory=memory, trust=trust)
    for layer in memory:
        assert not memory[layer][0].any() and memory[layer][1].any()


# --- the guard


def test_a_guard_bounds_every_state_and_auto_only_what_is_trusted_less():
    guard = Guard(beta=0.6, norm=2.0)
    guarded = written(patched(guard=guard))[0]
    free, unguarded = (written(patched(guard=way))[0] for way in (False, "auto"))
    assert same(free, unguarded)  # the released adapters' bits
    assert max(free[layer].norm(dim=(-2, -1)).max() for layer in free) > 2.0
    assert max(guarded[layer].norm(dim=(-2, -1)).max() for layer in guarded) <= 2.0
    model = patched()
    rule = record_of(model).guarding.rule
    assert row_bound(rule) * rule.value_max * rule.rank**0.5 == pytest.approx(Guard().norm)
    always = patched(guard=Guard(beta=0.6, norm=2.0))
    assert record_of(always).guarding.always and not record_of(model).guarding.always


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_guarded_prefill_is_its_decode_and_both_backends_agree(backend):
    model, guard = patched(guard=Guard(0.6, 0.9, 2.0), backend=backend), DeltaMemConfig()
    assert guard.couple_lambda
    whole, _ = written(model)
    memory, cache = MemoryState.zeros(model, 2), None
    with torch.no_grad():
        for t in range(10):
            cache = model(IDS[:, t : t + 1], memory=memory, past_key_values=cache).past_key_values
    other = written(patched(guard=Guard(0.6, 0.9, 2.0), backend="reference"))[0]
    for layer in whole:
        torch.testing.assert_close(whole[layer], memory[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole[layer], other[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guard", ["on", None, 1, 0.5])
def test_what_is_no_guard_is_refused(guard):
    with pytest.raises(DeltaMemError, match="guard: got"):
        patched(guard=guard)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 1.0},
        {"beta": 0},
        {"keep": 1},
        {"norm": 0},
        {"norm": float("inf")},
        {"beta": 1 - 1e-12},
        {"norm": 1e300},
        {"beta": 1e-300},
        {"beta": "x"},
    ],
)
def test_a_guard_bounds(wrong):
    with pytest.raises(DeltaMemError, match=next(iter(wrong))):
        Guard(**wrong)


def test_raw_keys_have_no_guard():
    config = DeltaMemConfig(normalize_qk=False)
    with pytest.raises(DeltaMemError, match="normalize_qk"):
        patched(config, guard=True)
    assert record_of(patched(config)).guarding.rule is None
