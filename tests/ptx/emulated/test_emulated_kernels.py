"""Every kernel as compiled, at unusual specialisations (the released one: see costs), and the promised bits."""

import heads_properties
import kernel_properties as properties
import pytest
import torch
from drawn_rules import GUARDS

from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton import steer_backward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RULES = {
    "released": (DeltaRule(8), BF16),
    "several-tiles": (DeltaRule(16, 4), FP32),
    "odd": (DeltaRule(5, 2, "lambda_outside", True, False, True, *GUARDS[1]), FP16),
}
every_rule = pytest.mark.parametrize(("rule", "dtype"), RULES.values(), ids=RULES)


@pytest.mark.parametrize(("name", "length", "chunk", "every"), [
    ("released", 6, 0, 3), ("several-tiles", 5, 0, 2), ("odd", 9, 4, 0),
])  # fmt: skip
def test_scan(name, length, chunk, every):
    rule, dtype = RULES[name]
    x, bias, state, mask = properties.random_problem(rule, 2, length, dtype, seed=length, masked=True)
    x[1, 2, 1] = float("nan")
    properties.check_scan(rule, x, bias, state, chunk=chunk, mask=mask, checkpoint_every=every)


@pytest.mark.parametrize("name", ["released", "odd", pytest.param("several-tiles", marks=pytest.mark.soak)])
def test_step(name):
    rule, dtype = RULES[name]
    x, bias, state, mask = properties.random_problem(rule, 3, 2, dtype, seed=1, masked=True)
    x[0, 1, 2] = float("inf")
    properties.check_step(rule, x, bias, state, mask)


@every_rule
def test_read(rule, dtype):
    x, _, state, mask = properties.random_problem(rule, 2, 5, dtype, seed=2, masked=True)
    properties.check_read(rule, x, state, mask=mask)


@pytest.mark.parametrize(("dtype", "n", "width"), [(FP32, 130, 20)])
def test_steer(dtype, n, width):
    make = torch.Generator().manual_seed(0)
    base, weight = torch.randn(2, 3, n, generator=make).to(dtype), torch.randn(n, width, generator=make).to(dtype)
    reads, norm = torch.randn(2, 3, width, generator=make), torch.rand(n, generator=make).to(dtype)
    properties.check_steer(base, reads, weight, 2.0, norm if dtype == FP32 else None)


@pytest.mark.parametrize(("dtype", "shape", "which"), [(FP32, (24, 8), "qkvo")])
def test_steer_heads(dtype, shape, which):
    layout = HeadLayout(2, 1, 1, *shape)
    packed, cos, sin = heads_properties.random_rows(layout, (2, 3), 5, dtype, seed=3)
    steering = heads_properties.random_steering(layout, 8, which, raws=4, dtype=dtype)
    reads = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    heads_properties.check_steer_heads(layout, packed, reads, steering, cos, sin)


@pytest.mark.parametrize(("name", "shape", "which", "frozen"), [
    ("odd", (16, 8), "qkvo", False), ("released", (16, 16), "q", True),
])  # fmt: skip
def test_decode(name, shape, which, frozen):
    """However many programs share a row: the bits of step, and heads to one rounding."""
    rule, dtype = RULES[name]
    layout = HeadLayout(2, 1, 1, *shape)
    x, bias, state, mask = properties.random_problem(rule, 3, 1, dtype, seed=4, masked=True)
    packed, cos, sin = heads_properties.random_rows(layout, (3,), rule.width, dtype, seed=4)
    packed[:, layout.width :] = x[:, 0]
    packed[1, layout.width + 1] = float("nan")
    steering = heads_properties.random_steering(layout, rule.read_width, which, raws=1, dtype=dtype)
    heads_properties.check_decode(
        rule, layout, packed, bias, state, steering, cos, sin, parts=(1, 3), mask=mask[:, 0], frozen=frozen
    )


def test_guard():
    """Held gates and values: a chunk has the bits of steps, and a gate that is NaN is not held."""
    rule, dtype = RULES["odd"]
    x, bias, state, mask = properties.random_problem(rule, 2, 3, dtype, seed=5, masked=True)
    out = properties.check_scan(rule, x, bias, state, chunk=0, mask=mask)
    assert properties.equal(out[:2], properties.all_steps(rule, x, bias, state, mask))
    for gate in (0, -1):  # β's, λ's
        unknown = bias.clone()
        unknown[gate] = float("nan")
        out = properties.check_scan(rule, x, unknown, state, chunk=0, mask=mask)
        assert torch.equal(out.state, state) and out.skipped.tolist() == mask.sum(1).tolist()
        assert properties.equal(out[:2], properties.all_steps(rule, x, unknown, state, mask))


@pytest.mark.parametrize(("name", "length", "chunk", "spacing", "every"), [
    ("several-tiles", 4, 0, (2, 2), 2), ("odd", 5, 2, (2, 1), 0),
])  # fmt: skip
def test_scan_gradient(name, length, chunk, spacing, every):
    rule, dtype = RULES[name]
    x, bias, state, mask = properties.random_problem(rule, 1, length, dtype, seed=5, masked=True)
    properties.check_scan_gradient(rule, x, bias, state, chunk, spacing, checkpoint_every=every, mask=mask)


@pytest.mark.parametrize("name", ["odd"])
def test_read_gradient(name):
    rule, dtype = RULES[name]
    x, _, state, mask = properties.random_problem(rule, 2, 9, dtype, seed=6, masked=True)
    properties.check_read_gradient(rule, x, state, mask=mask)


@pytest.mark.parametrize(("dtype", "weight_dtype", "normed"), [(FP16, FP32, True)])
def test_steer_gradient(dtype, weight_dtype, normed, monkeypatch):
    monkeypatch.setattr(steer_backward, "ROWS", 16)
    make = torch.Generator().manual_seed(0)
    reads, grad = torch.randn(2, 20, 8, generator=make), torch.randn(2, 20, 70, generator=make).to(dtype)
    weight = torch.randn(70, 8, generator=make).to(weight_dtype)
    norm = torch.randn(70, generator=make).to(weight_dtype) if normed else None
    properties.check_steer_gradient(grad, reads, weight, 2.0, norm)


def test_bits_of_packed_sequences():
    rule = DeltaRule(4, 2)
    x, bias, _, mask = properties.random_problem(rule, 1, 9, seed=7, masked=True)
    state = properties.random_problem(rule, 3, 1, seed=8)[2]
    properties.check_packed(rule, x, bias, state, mask, [4, 0, 5], 0)


# Each compiles six variants; the interpreted tests hold the same bits with one.
@pytest.mark.soak
def test_bits_without_masked_tokens():
    rule = DeltaRule(4, 2)
    problem = properties.random_problem(rule, 2, 5, seed=9, masked=True)
    properties.check_masked_inside(rule, *problem)
    properties.check_masked_gradient(rule, *problem, spacing=(2, 1))


@pytest.mark.soak
def test_bits_wherever_numbers_lie():
    rule = DeltaRule(4)
    properties.check_strides(rule, *properties.random_problem(rule, 2, 4, FP32, seed=10, masked=True), 0)
