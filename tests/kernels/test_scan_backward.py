"""The explicit adjoints against autograd of the reference, in float64. Needs no Triton."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_fast import reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.scan_backward import read_backward, scan_backward, steer_backward

RULES = st.builds(
    DeltaRule,
    rank=st.integers(1, 4),
    heads=st.sampled_from([1, 2]),
    mode=st.sampled_from(["standard", "lambda_outside", "no_lambda"]),
    row_gates=st.booleans(),
    coupled=st.booleans(),
    normalize=st.booleans(),
)


def problem(rule, batch, length, seed, rows=None):
    make = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_()

    state = random(rows or batch, rule.heads, rule.rank, rule.rank)
    return random(batch, length, rule.width), random(rule.bias_width), state


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def against_autograd(rule, x, bias, state, every, mask=None, cu_seqlens=None, slots=None):
    more = {"mask": mask, "cu_seqlens": cu_seqlens, "slots": slots, "checkpoint_every": every}
    out = reference.scan(x, bias, state, rule, **more, dtype=torch.float64)
    outputs = [out.reads, out.state] + ([out.checkpoints] if every else [])
    grads = [torch.randn_like(o) for o in outputs]
    expected = torch.autograd.grad(
        sum((o * g).sum() for o, g in zip(outputs, grads)), (x, bias, state), materialize_grads=True
    )
    with torch.no_grad():
        actual = scan_backward(
            grads[0], grads[1], x, bias, state, rule, **more, d_checkpoints=grads[2] if every else None
        )
    assert_same(actual, expected)
    return actual


@settings(deadline=None, derandomize=True, max_examples=40)
@given(RULES, st.integers(0, 2**16), st.integers(0, 7), st.booleans(), st.integers(0, 3))
def test_rows(rule, seed, length, masked, every):
    x, bias, state = problem(rule, 2, length, seed)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) > 0.3 if masked else None
    against_autograd(rule, x, bias, state, every, mask)


@pytest.mark.parametrize("lengths", [[5], [0, 3, 0, 1, 4], [0], [2, 2]])
@pytest.mark.parametrize("with_slots", [False, True])
def test_packed(lengths, with_slots):
    rule = DeltaRule(3, 2)
    x, bias, state = problem(rule, 1, sum(lengths), 1, rows=len(lengths) + 2 * with_slots)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    slots = torch.arange(len(lengths)).flip(0) if with_slots else None
    if with_slots:
        slots[-1] = -1
    against_autograd(rule, x, bias, state, 2, cu_seqlens=cu, slots=slots)


def test_slots():
    rule = DeltaRule(2)
    x, bias, state = problem(rule, 3, 4, 2, rows=5)
    grads = against_autograd(rule, x, bias, state, 0, slots=torch.tensor([4, -1, 0]))
    assert not grads[0][1].any() and not grads[2][1:4].any()


def test_tokens_that_do_not_count_get_zero():
    rule = DeltaRule(3)
    x, bias, state = problem(rule, 2, 5, 3)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2] = False
    with torch.no_grad():
        x[1, 1, 4], x[1, 4, 0] = float("nan"), float("inf")
    d_reads, d_state = torch.randn(2, 5, 3), torch.randn(2, 1, 3, 3)
    d_reads[1, 1] = float("nan")
    d_x, d_bias, d_initial = scan_backward(d_reads, d_state, x, bias, state, rule, mask=mask)
    assert not d_x[0, 2].any() and not d_x[1, 1].any() and not d_x[1, 4].any()
    assert all(torch.isfinite(t).all() for t in (d_x, d_bias, d_initial))
    assert d_x[0, 0].any() and d_x[1, 0].any()


def test_no_state_and_dtypes():
    rule = DeltaRule(2)
    x, bias, _ = problem(rule, 1, 3, 4)
    x, bias = x.detach().bfloat16(), bias.detach().float()
    d_x, d_bias, d_state = scan_backward(torch.ones(1, 3, 2), torch.ones(1, 1, 2, 2), x, bias, None, rule)
    assert d_x.dtype == torch.bfloat16 and d_bias.dtype == torch.float32 and d_state is None


@settings(deadline=None, derandomize=True, max_examples=15)
@given(RULES, st.integers(0, 2**16), st.integers(0, 4), st.booleans())
def test_read(rule, seed, length, with_slots):
    x, _, state = problem(rule, 2, length, seed, rows=3 if with_slots else 2)
    slots = torch.tensor([2, -1]) if with_slots else None
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    out = reference.read(x, state, rule, mask=mask, slots=slots, dtype=torch.float64)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (x, state), grad, materialize_grads=True)
    assert_same(read_backward(grad, x.detach(), state.detach(), rule, mask=mask, slots=slots), expected)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("lead", [(3,), (2, 3), (0,)])
def test_steer(normed, lead):
    make = torch.Generator().manual_seed(0)
    shapes = (*lead, 6), (*lead, 4), (6, 4), (6,)
    tensors = [torch.randn(*s, generator=make, dtype=torch.float64).requires_grad_() for s in shapes]
    base, reads, weight, norm = tensors
    norm = norm if normed else None
    out = reference.steer(base, reads, weight, 2.0, norm_weight=norm)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, tensors[: 4 if normed else 3], grad, materialize_grads=True)
    with torch.no_grad():
        actual = steer_backward(grad, reads, weight, 2.0, norm_weight=norm)
    assert_same(actual[: len(expected)], expected)
