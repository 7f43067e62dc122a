"""The registered operators, on the kernels in Triton's interpreter."""

import dataclasses
import math

import kernel_properties as properties
import pytest
import torch

from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.schemas import flat_rule
from deltamem_kernels.triton import ops

RULE = DeltaRule(3, 2, coupled=False, beta_max=0.4, keep_max=0.7, value_max=1.0)


def problem(batch=2, length=3, grad=False, **arguments):
    x, bias, state, mask = properties.random_problem(RULE, batch, length, seed=1, masked=True, **arguments)
    return *(t.requires_grad_(grad) for t in (x, bias, state)), mask


def steer_problem(grad=False):
    make = torch.Generator().manual_seed(0)
    shapes = (2, 3, 10), (2, 3, 4), (10, 4), (10,)
    return [torch.randn(*shape, generator=make).requires_grad_(grad) for shape in shapes]


def same_gradients(function, oracle, inputs, what):
    """Gradients of a random combination of the outputs, against those of the reference in float64."""
    outputs = function(*inputs)
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(5)) for o in outputs]
    actual = torch.autograd.grad(outputs, inputs, weights)
    for dtype in (torch.float32, torch.float64):
        wide = [t.detach().to(dtype).requires_grad_() for t in inputs]
        found = torch.autograd.grad(oracle(*wide, dtype), wide, [w.to(dtype) for w in weights])
        plain, exact = (found, None) if dtype == torch.float32 else (plain, found)  # noqa: F821
    for i, grads in enumerate(zip(actual, plain, exact)):
        assert grads[0].dtype == inputs[i].dtype
        properties.assert_budget(*grads, f"{what}: gradient {i}", 8)


@pytest.mark.parametrize("kind", ["rows", "packed", "slots"])
def test_scan_gradient(kind):
    x, bias, state, mask = problem(grad=True)
    more = {"mask": mask, "checkpoint_every": 2}
    if kind == "packed":
        x, mask = x.detach().reshape(1, 6, -1).requires_grad_(), mask.reshape(1, 6)
        more |= {"mask": mask, "cu_seqlens": torch.tensor([0, 4, 6])}
    elif kind == "slots":
        more["slots"] = torch.tensor([1, -1])

    def outputs(out):
        return out.reads, out.state, out.checkpoints

    same_gradients(
        lambda x, b, s: outputs(ops.scan(x, b, s, RULE, **more)),
        lambda x, b, s, dtype: outputs(reference.scan(x, b, s, RULE, **more, dtype=dtype)),
        (x, bias, state), "scan",
    )  # fmt: skip


def test_scan_gradient_without_state():
    x, bias, _, _ = problem(grad=True)
    out = ops.scan(x, bias, None, RULE)
    assert out.checkpoints is None and not out.skipped.requires_grad
    out.reads.sum().backward()
    assert x.grad.abs().sum() > 0 and bias.grad.abs().sum() > 0


def test_read_gradient():
    x, _, state, mask = problem(grad=True)
    same_gradients(
        lambda x, s: (ops.read(x, s, RULE, mask=mask),),
        lambda x, s, dtype: (reference.read(x, s, RULE, mask=mask, dtype=dtype),),
        (x, state), "read",
    )  # fmt: skip


@pytest.mark.parametrize("normed", [False, True])
def test_steer_gradient(normed):
    given = steer_problem(True)[: 4 if normed else 3]
    same_gradients(
        lambda b, r, w, n=None: (ops.steer(b, r, w, 2.0, norm_weight=n),),
        lambda b, r, w, *n: (reference.steer(b, r, w, 2.0, norm_weight=n[0] if normed else None),),
        given, "steer",
    )  # fmt: skip


def test_direct_call_equals_operator():
    x, bias, state, mask = problem()
    direct = ops.scan(x, bias, state, RULE, mask=mask, checkpoint_every=2)
    flat = (3, 2, "standard", True, False, True, 0.4, 0.7, 1.0)
    through = torch.ops.deltamem.scan(x, bias, state, *flat, mask, None, None, 2)
    assert all(torch.equal(a, b) for a, b in zip(direct, through))


def test_opcheck():
    flat = flat_rule(RULE)
    x, bias, state, mask = problem(grad=True)
    slots = torch.tensor([1, -1])
    check = torch.library.opcheck
    check(ops.scan_op, (x, bias, state, *flat, mask, None, None, 2))
    check(ops.scan_op, (x, bias, None, *flat, None, None, None, 0))
    check(ops.scan_op, (x[:1], bias, state, *flat, None, torch.tensor([0, 2, 3]), slots, 2))
    check(ops.read_op, (x, state, *flat, mask, slots))
    base, reads, weight, norm = steer_problem(True)
    check(ops.steer_op, (base, reads, weight, 2.0, norm, 1e-6))
    check(ops.steer_op, (base, reads, weight, 2.0, None, 1e-6))
    token, bias, state = x.detach()[:, 0].contiguous(), bias.detach(), state.detach()
    check(ops.step_op, (token, bias, state.clone(), *flat, mask[:, 0], None))
    count = torch.zeros(2, dtype=torch.int32)
    check(ops.step_counted_op, (token, bias, state.clone(), count, *flat, None, slots))
    check(ops.steer_in_place_op, (base.detach().clone(), reads.detach(), weight.detach(), 2.0, None, 1e-6))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    x, bias, state, mask = problem()
    base, reads, weight, norm = steer_problem()
    unbounded = dataclasses.replace(RULE, value_max=math.inf)  # as most have it, and compilers write it down

    def everything(x, bias, state, count, base):
        out = ops.scan(x, bias, state, RULE, mask=mask, checkpoint_every=2)
        frozen = ops.read(x, out.state, unbounded)
        here = ops.step(x[:, 0], bias, state, RULE, skipped=count)
        silent = ops.step(x[:, 1], bias, state, unbounded)
        steered = ops.steer(base * 2, reads, weight, 0.5, norm_weight=norm)
        work = base + 1
        in_place = ops.steer(work, reads, weight, 0.5, out=work)
        return out.reads, out.state, out.checkpoints, out.skipped, frozen, here, silent, steered, in_place

    def run(function):
        at, count = state.clone(), torch.zeros(2, dtype=torch.int32)
        spoiled = x.clone()
        spoiled[1, 0, 0] = float("nan")
        return *function(spoiled, bias, at, count, base), at, count

    torch._dynamo.reset()
    for a, b in zip(run(torch.compile(everything, fullgraph=True, backend=backend)), run(everything)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compiles_training():
    given = problem(grad=True)[:3]
    weight = steer_problem()[2]

    def loss(x, bias, state):
        out = ops.scan(x, bias, state, RULE)
        lifted = ops.steer(x[..., :10], ops.read(x, out.state, RULE)[..., :4], weight, 0.5)
        return lifted.square().sum() + out.reads.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(function(*given), given) for function in (compiled, loss))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
