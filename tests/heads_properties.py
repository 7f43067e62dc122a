"""What must hold of the kernels on packed heads, on any device: the interpreter and a GPU run the same checks."""

from __future__ import annotations

import torch

from deltamem_kernels.layout import HeadLayout, Steering
from deltamem_kernels.reference import heads as reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton.decode import decode_
from deltamem_kernels.triton.heads import steer_heads_
from deltamem_kernels.triton.read import read
from deltamem_kernels.triton.step import step


def random_steering(layout: HeadLayout, width, which="qo", normed=True, raws=0, outputs=20, dtype=torch.float32,
                    device="cpu", seed=0):  # fmt: skip
    make = torch.Generator().manual_seed(seed + 100)
    rows = {"q": layout.q * layout.dim, "k": layout.k * layout.dim, "v": layout.v * layout.dim, "o": outputs}

    def random(*shape):
        return torch.randn(*shape, generator=make).to(device, dtype)

    return Steering(
        **{head: random(rows[head], width) for head in which}, scale=0.5, scale_max=1.5,
        scale_raw=random(raws).float() if raws else None,
        q_norm=random(layout.dim) if normed else None, k_norm=random(layout.dim) if normed else None,
    )  # fmt: skip


def random_rows(layout: HeadLayout, lead, extra=0, dtype=torch.float32, device="cpu", seed=0, rows=1):
    """packed, cos, sin: packed's rows lie in wider ones, and the tables hold no pair of equal numbers."""
    make = torch.Generator().manual_seed(seed)
    wide = torch.randn(*lead, layout.width + extra + 8, generator=make)
    turn = [torch.randn(rows, lead[1] if len(lead) > 1 else 1, layout.rotary, generator=make) for _ in range(2)]
    cos, sin = [t.to(device, dtype) if layout.rotary else None for t in turn]
    return wide.to(device, dtype)[..., : layout.width + extra], cos, sin


def same_strides(tensor: torch.Tensor) -> torch.Tensor:
    """A copy as a slice of wider rows, like the original; NaN lies around it."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"))
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def cpu(value, dtype=None):
    """A tensor, or a Steering, on the CPU and in ``dtype``."""
    if isinstance(value, Steering):
        return Steering(*(cpu(v, dtype) if isinstance(v, torch.Tensor) else v for v in value))
    return None if value is None else value.cpu().to(dtype or value.dtype)


def assert_rounded(actual, plain, oracle, what):
    """Right to one rounding of the result's own dtype, and a few times the error of plain float32."""
    actual_wide, plain, oracle = actual.double().cpu(), plain.double(), oracle.double()
    assert actual_wide.shape == oracle.shape, what
    eps = torch.finfo(actual.dtype).eps
    size = max(1.0, oracle.abs().max().item())
    budget = eps * oracle.abs() + 4 * (plain - oracle).abs().max() + 32 * torch.finfo(torch.float32).eps * size
    if actual.dtype == torch.float16:
        budget = budget + 2**-24
    assert bool(((actual_wide - oracle).abs() <= budget).all()), what  # False for NaN


def check_steer_heads(layout, packed, reads, steering, cos, sin):
    before, actual = packed.clone(), same_strides(packed)
    steer_heads_(actual, reads, layout, steering, cos, sin)
    wide = {}
    for dtype in (torch.float32, torch.float64):
        wide[dtype] = cpu(packed, dtype).clone()
        given = [cpu(t, dtype) for t in (cos, sin)]
        reference.steer_heads_(wide[dtype], cpu(reads, dtype), layout, cpu(steering, dtype), *given)
    assert_rounded(actual, wide[torch.float32], wide[torch.float64], "heads")
    check_untouched(layout, before, actual, steering)
    return actual


def check_untouched(layout, before, after, steering):
    assert torch.equal(after[..., layout.width :], before[..., layout.width :])
    if steering.v is None:
        first, last = layout.span("v")
        assert torch.equal(after[..., first:last], before[..., first:last])
    room = after.as_strided((*after.shape[:-1], 8), after.stride(), after.storage_offset() + after.shape[-1])
    assert bool(torch.isnan(room).all())


def check_decode(rule: DeltaRule, layout, packed, bias, state, steering, cos, sin, parts=(1, 3, None), **given):
    """decode_ = its reference; its state, reads and counts = those of step (read if frozen), to the bit."""
    mask, slots = given.get("mask"), given.get("slots")
    frozen = given.get("frozen", False)
    memory = packed[:, layout.width : layout.width + rule.width]
    stepped, counted = state.clone(), torch.zeros(state.shape[0], dtype=torch.int32, device=state.device)
    if frozen:
        reads = read(
            memory[:, None], stepped, rule, mask=None if mask is None else mask[:, None], slots=slots
        )[:, 0]  # fmt: skip
    else:
        reads = step(memory, bias, stepped, rule, mask=mask, slots=slots, skipped=counted)
    wide = {}
    for dtype in (torch.float32, torch.float64):
        row = cpu(packed, dtype).clone()
        at = cpu(reads, dtype)
        turn = [cpu(t, dtype) for t in (cos, sin)]
        reference.steer_heads_(row[:, None], at[:, None], layout, cpu(steering, dtype), *turn)
        delta = None
        if steering.o is not None:
            delta = at @ cpu(steering.o, dtype).t() * reference.factor(cpu(steering), "o", dtype)
        wide[dtype] = row, delta
    for part in parts:
        actual, own = same_strides(packed), state.clone()
        skipped = torch.zeros_like(counted)
        arrived = torch.zeros(packed.shape[0], dtype=torch.int32, device=packed.device)
        found, delta = decode_(
            actual, bias, own, rule, layout, steering, cos, sin, skipped=skipped, workspace=arrived, parts=part, **given
        )
        assert torch.equal(found, reads) and found.is_contiguous(), f"reads, {part} parts"
        assert torch.equal(own.view(torch.int32), stepped.view(torch.int32)), f"state, {part} parts"
        assert torch.equal(skipped, counted) and not arrived.any()
        heads = slice(None, layout.width)
        assert_rounded(actual[:, heads], *(wide[d][0][:, heads] for d in wide), f"heads, {part} parts")
        again = actual[:, layout.width :], packed[:, layout.width :]
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in again))
        assert (delta is None) == (steering.o is None)
        if delta is not None:
            assert delta.dtype == packed.dtype
            assert_rounded(delta, *(wide[d][1] for d in wide), f"Δo, {part} parts")
    return reads, stepped


def check_many_steps(rule, layout, batch, steering, steps, parts, dtype, device, seed=0):
    """Token after token, each launch on the heels of the last: the state stays that of step, to the bit."""
    make = torch.Generator().manual_seed(seed)
    tokens = torch.randn(steps, batch, layout.width + rule.width, generator=make).to(device, dtype)
    bias = torch.randn(rule.bias_width, generator=make).to(device)
    one = torch.randn(batch, rule.heads, rule.rank, rule.rank, generator=make).to(device)
    two = one.clone()
    arrived = torch.zeros(batch, dtype=torch.int32, device=device)
    bare = HeadLayout(layout.q, layout.k, layout.v, layout.dim)
    ours, theirs = [], []
    for token in tokens:
        theirs.append(step(token[:, layout.width :], bias, one, rule))
    for token in tokens:
        ours.append(decode_(token, bias, two, rule, bare, steering, workspace=arrived, parts=parts)[0])
    assert torch.equal(torch.stack(ours), torch.stack(theirs)) and torch.equal(one, two)
    assert not arrived.any()
