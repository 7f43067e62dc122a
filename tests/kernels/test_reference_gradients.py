"""The reference's gradients: right by finite differences, and cheap in memory on long sequences."""

import functools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule

RULES = [
    DeltaRule(2, 2, mode, row_gates, coupled, normalize)
    for mode in ("standard", "lambda_outside", "no_lambda")
    for row_gates in (True, False)
    for coupled in (True, False)
    for normalize in (True, False)
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


@pytest.fixture
def short_blocks(monkeypatch):
    """Rows of more than one token are cut into blocks."""
    monkeypatch.setattr(reference, "UNDIVIDED", 1)


def problem(rule, batch=1, length=4, states=None, dtype=torch.float64):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    states = batch if states is None else states
    x = random(batch, length, rule.width)
    return x, random(rule.bias_width), random(states, rule.heads, rule.rank, rule.rank)


def scan(rule, **more):
    """scan as a function of its differentiable arguments alone."""

    def run(x, bias, state):
        out = reference.scan(x, bias, state, rule, dtype=torch.float64, **more)
        return tuple(t for t in (out.reads, out.state, out.checkpoints) if t is not None)

    return run


MASK = torch.tensor([[True, False, True, True]])


@every_rule
def test_scan(rule, short_blocks):
    assert gradcheck(scan(rule, mask=MASK, checkpoint_every=2), problem(rule))


@pytest.mark.parametrize("mode", ("standard", "lambda_outside", "no_lambda"))
@pytest.mark.parametrize("undivided", (1, 64))
def test_second_derivatives(mode, undivided, monkeypatch):
    monkeypatch.setattr(reference, "UNDIVIDED", undivided)
    rule = DeltaRule(2, mode=mode, coupled=False)
    assert gradgradcheck(scan(rule, checkpoint_every=2), problem(rule, batch=1, length=3))


def test_packed_sequences_and_slots(short_blocks):
    rule = DeltaRule(2)
    bounds, slots = torch.tensor([0, 4, 4, 9, 11]), torch.tensor([3, 0, 3, -1])
    assert gradcheck(scan(rule, cu_seqlens=bounds, slots=slots, checkpoint_every=2), problem(rule, 1, 11, states=4))


@every_rule
def test_read(rule):
    x, _, state = problem(rule, batch=2, length=2, states=3)
    read = functools.partial(reference.read, rule=rule, mask=MASK[:, :2].expand(2, 2), dtype=torch.float64)
    assert gradcheck(lambda x, s: read(x, s, slots=torch.tensor([2, -1])), (x, state))
    assert gradcheck(lambda x, s: read(x, s[:2]), (x, state))


@pytest.mark.parametrize("normed", (False, True))
def test_steer(normed):
    base, reads, weight, norm = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 3, 4), (5, 4), (5,))
    )
    tensors = (base, reads, weight, norm) if normed else (base, reads, weight)

    def steer(base, reads, weight, norm=None):
        return reference.steer(base, reads, weight, 2.0, norm_weight=norm)

    assert gradcheck(steer, tensors) and gradgradcheck(steer, tensors)


def gradients(tensors, rule, **more):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = reference.scan(*leaves, rule, **more)
    (out.reads.square().sum() + out.state.sin().sum()).backward()
    return [*out[:2], *(leaf.grad for leaf in leaves)]


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("length", (65, 100, 130))
def test_blocks_change_no_bit(length, monkeypatch):
    rule = DeltaRule(3, 2, coupled=False)
    tensors, mask = problem(rule, 2, length, dtype=torch.float32), torch.rand(2, length) > 0.2
    cut = gradients(tensors, rule, mask=mask)
    monkeypatch.setattr(reference, "UNDIVIDED", length)
    assert same_bits(cut, gradients(tensors, rule, mask=mask))


@pytest.mark.parametrize("wanted", range(3))
def test_one_input_wants_a_gradient(wanted, short_blocks):
    rule = DeltaRule(2)
    leaves = problem(rule)
    whole = torch.autograd.grad(reference.scan(*leaves, rule).reads.sum(), leaves)
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
    (grad,) = torch.autograd.grad(reference.scan(*alone, rule).reads.sum(), alone[wanted])
    assert torch.equal(grad, whole[wanted])


def test_inside_of_other_machinery(short_blocks):
    rule = DeltaRule(2)
    tensors = problem(rule, dtype=torch.float32)
    expected = gradients(tensors, rule)

    def loss(x, bias, state):
        out = reference.scan(x, bias, state, rule)
        return out.reads.square().sum() + out.state.sin().sum()

    def backward(function):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    for reentrant in (False, True):
        assert same_bits(backward(lambda *t, r=reentrant: checkpoint(loss, *t, use_reentrant=r)), expected[2:])
    assert same_bits(backward(torch.compile(loss, fullgraph=True, backend="aot_eager")), expected[2:])

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(*tensors)

    assert same_bits(backward(under_autocast), expected[2:])
    detached = [t.detach() for t in tensors]
    for ours, theirs in zip(torch.func.grad(loss, (0, 1, 2))(*detached), expected[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


def peak_bytes(tensors, rule):
    """Most bytes that PyTorch holds at once during forward and backward, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        gradients(tensors, rule)
    live = top = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top


def test_a_long_gradient_keeps_the_starts_of_blocks(monkeypatch):
    rule, length = DeltaRule(64), 256  # a state outweighs a token's factors
    tensors = problem(rule, 1, length, dtype=torch.float32)
    cut = peak_bytes(tensors, rule)
    monkeypatch.setattr(reference, "UNDIVIDED", length)
    whole = peak_bytes(tensors, rule)
    states = length * rule.rank**2 * 4
    assert whole > states and whole - cut > 0.7 * states
