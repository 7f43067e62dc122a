"""How large a state can get: the bound holds for any tokens, and an adversary comes close to it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_fast import DeltaMemError
from deltamem_kernels.bounds import fixed_point, row_bound, worst_step
from deltamem_kernels.numba import recurrence as numba
from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import STATE_UPDATE_MODES, DeltaRule

gates = st.floats(0.01, 0.99)


@given(gates, gates, st.booleans(), st.floats(0, 5))
@settings(max_examples=200, deadline=None)
def test_a_worst_step_is_the_worst_of_all_angles(keep, write, outside, size):
    erase = keep * write if outside else write
    angles = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    added = write - erase * angles * size
    squares = (keep * size) ** 2 + 2 * keep * angles * size * added + added**2
    assert worst_step(size, keep, erase, write) == pytest.approx(math.sqrt(squares.max()), rel=1e-6)


@given(gates, gates, st.booleans())
@settings(max_examples=100, deadline=None)
def test_worst_steps_end_at_the_fixed_point(keep, write, outside):
    erase, size = keep * write if outside else write, 0.0
    for _ in range(3000):
        size = worst_step(size, keep, erase, write)
    assert size == pytest.approx(fixed_point(keep, erase, write), rel=1e-5)


@given(st.sampled_from(STATE_UPDATE_MODES), st.booleans(), gates, gates)
@settings(max_examples=60, deadline=None)
def test_no_gates_that_a_rule_allows_have_a_larger_fixed_point(mode, coupled, beta_max, keep_max):
    rule = DeltaRule(8, 1, mode, True, coupled, True, beta_max, keep_max)
    worst = 0.0
    for beta in torch.linspace(0.001, beta_max, 30).tolist():
        for lam in torch.linspace(0, 1, 30).tolist():
            keep = min(keep_max, 1.0 if mode == "no_lambda" else 1 - beta if coupled else lam)
            worst = max(worst, fixed_point(keep, keep * beta if mode == "lambda_outside" else beta, beta))
    assert 0.9 * row_bound(rule) < worst <= row_bound(rule) * (1 + 1e-6)


def test_the_bounds_of_the_released_recipe():
    bounds = {beta: row_bound(DeltaRule(8, beta_max=beta)) for beta in (0.5, 2 - math.sqrt(2), 0.9, 1.0)}
    assert bounds == pytest.approx({0.5: 1 / math.sqrt(3), 2 - math.sqrt(2): 2**-0.5, 0.9: 4.5, 1.0: math.inf})
    assert row_bound(DeltaRule(8, mode="lambda_outside")) == 1
    assert row_bound(DeltaRule(8, mode="no_lambda")) == row_bound(DeltaRule(8, coupled=False)) == math.inf
    assert row_bound(DeltaRule(8, normalize=False)) == math.inf
    # At a gate's logit of 5 and 8, |v|·β/(1 − |1 − 2β|).
    logits = [
        row_bound(DeltaRule(8, beta_max=torch.sigmoid(torch.tensor(x, dtype=torch.float64)).item())) for x in (5.0, 8.0)
    ]
    assert logits == pytest.approx([74.2, 1490.5], rel=1e-3)


def raw_tokens(rule: DeltaRule, keys, values, gate: float) -> torch.Tensor:
    """Tokens [1, T, W] with these directions of k, values in every row, and a gate's logit."""
    x = torch.zeros(1, len(keys), rule.width)
    x[..., rule.rank : 2 * rule.rank] = torch.as_tensor(keys, dtype=torch.float32) * 1e-3  # tanh is linear there
    x[..., 2 * rule.rank : 3 * rule.rank] = torch.as_tensor(values, dtype=torch.float32)[:, None]
    x[..., 3 * rule.rank : 3 * rule.rank + rule.gate_width] = gate
    return x


def attack(rule: DeltaRule, beta: float, tokens: int) -> torch.Tensor:
    """The reads of a state by an adversary who sees it: keys at the worst angle to its first row, |v| = 1."""
    state, logit, found = torch.zeros(1, 1, rule.rank, rule.rank), math.log(beta / (1 - beta)), []
    keep = min(rule.keep_max, {"no_lambda": 1.0}.get(rule.mode, 1 - beta))
    erase = keep * beta if rule.mode == "lambda_outside" else beta
    for n in range(tokens):
        row = state[0, 0, 0].double()
        size = float(row.norm())
        way = row / size if size > 0 else torch.eye(rule.rank, dtype=torch.float64)[0]
        side = torch.eye(rule.rank, dtype=torch.float64)[1 + n % (rule.rank - 1)]
        side = side - (side @ way) * way
        side = side / side.norm()
        # c* of the bounds' proof, or the end of its range on that side.
        width = size * erase * (2 * keep - erase)
        top = beta * (keep - erase)
        cosine = max(-1.0, min(1.0, top / width)) if width > 0 else (1.0 if keep >= erase else -1.0)
        key = cosine * way + math.sqrt(max(0.0, 1 - cosine**2)) * side
        state = reference.scan(
            raw_tokens(rule, [key.tolist()], [1.0], logit), torch.zeros(rule.bias_width), state, rule
        ).state
        found.append(float(state[0, 0, 0].norm()))
    return torch.tensor(found)


@pytest.mark.parametrize(
    "mode, beta", [("standard", b) for b in (0.3, 0.5, 0.58, 0.8, 0.95)] + [("lambda_outside", 0.7), ("no_lambda", 0.6)]
)
def test_an_adversary_who_sees_the_state_reaches_the_bound_and_does_not_pass_it(mode, beta):
    rule = DeltaRule(8, mode=mode, beta_max=beta, keep_max=0.99 if mode == "no_lambda" else 1.0)
    found, bound = attack(rule, beta, 400), row_bound(rule)
    assert found.max() <= bound * (1 + 1e-4)
    assert found[-1] > 0.98 * bound


def test_without_a_guard_a_gate_of_exactly_one_lets_a_state_grow_with_every_token():
    rule, tokens = DeltaRule(8), 1000
    values = [1.0 if n % 2 == 0 else -1.0 for n in range(tokens)]
    x = raw_tokens(rule, [[1.0] + [0.0] * 7] * tokens, values, 20.0)
    grown = numba.scan(x, torch.zeros(8), None, rule).state[0, 0, 0].norm()
    held = numba.scan(x, torch.zeros(8), None, dataclasses.replace(rule, beta_max=0.95)).state[0, 0, 0].norm()
    assert grown > 0.99 * tokens and held <= row_bound(DeltaRule(8, beta_max=0.95))


@given(
    st.integers(0, 10**6), st.sampled_from(STATE_UPDATE_MODES), st.booleans(), st.booleans(), st.floats(0.2, 0.98),
    st.floats(0.2, 0.98), st.floats(0.1, 30),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_tokens_pass_the_bound_of_a_guarded_rule(seed, mode, coupled, row_gates, beta_max, keep_max, value_max):
    rule = DeltaRule(8, 2, mode, row_gates, coupled, True, beta_max, keep_max, value_max)
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 64, rule.width, generator=make) * 10.0 ** torch.randint(
        -1, 3, (2, 1, rule.width), generator=make
    )
    for backend in (reference, numba):
        states = backend.scan(
            x, torch.randn(rule.bias_width, generator=make), None, rule, checkpoint_every=1
        ).checkpoints
        assert states.norm(dim=-1).max() <= value_max * row_bound(rule) * (1 + 1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_max": 0.0},
        {"beta_max": 1.1},
        {"keep_max": -1.0},
        {"value_max": 0.0},
        {"value_max": math.nan},
        {"beta_max": math.nan},
    ],
)
def test_a_guard_is_made_of_numbers_that_bound(wrong):
    with pytest.raises(DeltaMemError, match=next(iter(wrong))):
        DeltaRule(8, **wrong)


def test_raw_keys_have_no_guard():
    with pytest.raises(DeltaMemError, match="normalize"):
        DeltaRule(8, normalize=False, beta_max=0.9)
