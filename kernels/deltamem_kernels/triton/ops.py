"""The kernels as PyTorch operators, in the namespace ``deltamem``; see ``dispatch.Operators``.

``scan``, ``read`` and ``steer`` are functional and differentiable. ``step`` changes the state (and the count of
skipped tokens) in place, ``steer_heads_`` packed heads and ``decode_`` both; they are not. All have fake
implementations, so ``torch.compile`` takes them whole. Called without a compiler and with nothing to differentiate,
they go straight to the launchers: an operator's dispatch costs more than a short kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layout import HeadLayout, Steering, check_heads
from ..rule import DeltaRule, ScanOutput, check_arguments
from ..schemas import (
    DELTA,
    LAYOUT,
    NORM,
    ROPE,
    ROWS,
    RULE,
    RULE_SIZE,
    SEQUENCES,
    STEERING,
    TOKENS,
    fake_decode,
    fake_reads,
    flat_layout,
    flat_rule,
    like,
    needs_operator,
    operator,
    or_empty,
)
from . import decode as _decode_rows
from . import heads as _heads
from . import read as _read
from . import read_backward as _read_backward
from . import scan as _scan
from . import scan_backward as _scan_backward
from . import steer as _steer
from . import steer_backward as _steer_backward
from . import step as _step


def _fake_scan(projections, gate_bias, state, rank, heads, *given):
    _, cu_seqlens, _, every = given[-4:]
    batch, length = projections.shape[:2]
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    float32, states = {"dtype": torch.float32, "device": projections.device}, (heads, rank, rank)
    lead = (batch,) if cu_seqlens is None else ()
    return (
        fake_reads(projections, rank, heads),
        torch.empty((count, *states), **float32),
        torch.empty((count,), dtype=torch.int32, device=projections.device),
        torch.empty((*lead, length // every, *states) if every else 0, **float32),
        torch.empty((batch, length), dtype=torch.uint8, device=projections.device),
    )


@operator(
    "deltamem::scan", f"{TOKENS}, Tensor? state, {RULE}, {SEQUENCES}, SymInt checkpoint_every",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_fake_scan,
)  # fmt: skip
def scan_op(projections, gate_bias, state, *given):
    *rule, mask, cu_seqlens, slots, every = given
    out, flags = _scan.scan_with_flags(
        projections, gate_bias, state, DeltaRule(*rule),
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=every,
    )  # fmt: skip
    return out.reads, out.state, out.skipped, or_empty(out.checkpoints, out.reads), flags


@operator(
    "deltamem::scan_backward",
    f"Tensor d_reads, Tensor d_state, Tensor? d_checkpoints, {TOKENS}, Tensor? state, {RULE}, "
    "Tensor flags, Tensor? cu_seqlens, Tensor? slots, SymInt checkpoint_every",
    "(Tensor, Tensor, Tensor)",
    fake=lambda d_reads, d_state, d_checkpoints, projections, gate_bias, state, *_: (
        like(projections, projections), like(gate_bias, projections), like(state, projections),
    ),
)  # fmt: skip
def scan_backward_op(d_reads, d_state, d_checkpoints, projections, gate_bias, state, *given):
    *rule, flags, cu_seqlens, slots, every = given
    d_x, d_bias, d_initial = _scan_backward.scan_backward(
        d_reads, d_state, projections, gate_bias, state, DeltaRule(*rule), cu_seqlens=cu_seqlens, slots=slots,
        d_checkpoints=d_checkpoints, checkpoint_every=every, flags=flags,
    )  # fmt: skip
    return d_x, d_bias, or_empty(d_initial, d_x)


def _scan_setup(ctx, inputs, output):
    projections, gate_bias, state, *flat, _mask, cu_seqlens, slots, every = inputs
    ctx.save_for_backward(projections, gate_bias, state, output[4], cu_seqlens, slots)
    ctx.flat, ctx.every = flat, every
    ctx.mark_non_differentiable(output[2], output[4])


def _scan_gradient(ctx, d_reads, d_state, _skipped, d_checkpoints, _flags):
    projections, gate_bias, state, flags, cu_seqlens, slots = ctx.saved_tensors
    d_x, d_bias, d_initial = scan_backward_op(
        d_reads, d_state, d_checkpoints if ctx.every else None, projections, gate_bias, state, *ctx.flat,
        flags, cu_seqlens, slots, ctx.every,
    )  # fmt: skip
    return d_x, d_bias, None if state is None else d_initial, *([None] * (RULE_SIZE + 4))


scan_op.register_autograd(_scan_gradient, setup_context=_scan_setup)


@operator(
    "deltamem::read", f"Tensor projections, Tensor state, {RULE}, {ROWS}",
    fake=lambda projections, state, rank, heads, *_: fake_reads(projections, rank, heads),
)  # fmt: skip
def read_op(projections, state, *given):
    *rule, mask, slots = given
    return _read.read(projections, state, DeltaRule(*rule), mask=mask, slots=slots)


@operator(
    "deltamem::read_backward", f"Tensor d_reads, Tensor projections, Tensor state, {RULE}, {ROWS}", "(Tensor, Tensor)",
    fake=lambda d_reads, projections, state, *_: (like(projections, state), like(state, state)),
)  # fmt: skip
def read_backward_op(d_reads, projections, state, *given):
    *rule, mask, slots = given
    return _read_backward.read_backward(d_reads, projections, state, DeltaRule(*rule), mask=mask, slots=slots)


def _read_setup(ctx, inputs, output):
    projections, state, *flat, mask, slots = inputs
    ctx.save_for_backward(projections, state, mask, slots)
    ctx.flat = flat


def _read_gradient(ctx, d_reads):
    projections, state, mask, slots = ctx.saved_tensors
    return *read_backward_op(d_reads, projections, state, *ctx.flat, mask, slots), *([None] * (RULE_SIZE + 2))


read_op.register_autograd(_read_gradient, setup_context=_read_setup)


@operator(
    "deltamem::steer", f"Tensor base, {DELTA}, {NORM}",
    fake=lambda base, *_: torch.empty(base.shape, dtype=base.dtype, device=base.device),
)  # fmt: skip
def steer_op(base, reads, weight, scale, norm_weight, eps):
    return _steer.steer(base, reads, weight, scale, norm_weight=norm_weight, eps=eps)


@operator("deltamem::steer_", f"Tensor(a0!) base, {DELTA}, {NORM}", "()", fake=lambda *_: None)
def steer_in_place_op(base, reads, weight, scale, norm_weight, eps):
    _steer.steer(base, reads, weight, scale, norm_weight=norm_weight, eps=eps, out=base)


@operator(
    "deltamem::delta", f"{DELTA}, ScalarType dtype, {NORM}",
    fake=lambda reads, weight, scale, dtype, *_: reads.new_empty((*reads.shape[:-1], weight.shape[0]), dtype=dtype),
)  # fmt: skip
def delta_op(reads, weight, scale, dtype, norm_weight, eps):
    return _steer.delta(reads, weight, scale, dtype, norm_weight=norm_weight, eps=eps)


@operator(
    "deltamem::steer_backward", f"Tensor grad, {DELTA}, {NORM}", "(Tensor, Tensor, Tensor)",
    fake=lambda grad, reads, weight, scale, norm_weight, eps: (
        like(reads, grad), like(weight, grad), like(norm_weight, grad),
    ),
)  # fmt: skip
def steer_backward_op(grad, reads, weight, scale, norm_weight, eps):
    *found, d_norm = _steer_backward.steer_backward(grad, reads, weight, scale, norm_weight=norm_weight, eps=eps)
    return *found, or_empty(d_norm, grad)


def _steer_setup(ctx, inputs, output):
    _, reads, weight, ctx.scale, norm_weight, ctx.eps = inputs
    ctx.save_for_backward(reads, weight, norm_weight)


def _steer_gradient(ctx, grad):
    reads, weight, norm_weight = ctx.saved_tensors
    d_reads, d_weight, d_norm = steer_backward_op(grad, reads, weight, ctx.scale, norm_weight, ctx.eps)
    # base has the gradient that came in, itself: an operator could not return what it was given.
    return grad, d_reads, d_weight, None, None if norm_weight is None else d_norm, None


steer_op.register_autograd(_steer_gradient, setup_context=_steer_setup)


# Two operators: an optional tensor that is mutated cannot be None under Inductor.
@operator(
    "deltamem::step", f"{TOKENS}, Tensor(a2!) state, {RULE}, {ROWS}",
    fake=lambda projections, gate_bias, state, rank, heads, *_: fake_reads(projections, rank, heads),
)  # fmt: skip
def step_op(projections, gate_bias, state, *given):
    *rule, mask, slots = given
    return _step.step(projections, gate_bias, state, DeltaRule(*rule), mask=mask, slots=slots)


@operator(
    "deltamem::step_counted", f"{TOKENS}, Tensor(a2!) state, Tensor(a3!) skipped, {RULE}, {ROWS}",
    fake=lambda projections, gate_bias, state, skipped, rank, heads, *_: fake_reads(projections, rank, heads),
)  # fmt: skip
def step_counted_op(projections, gate_bias, state, skipped, *given):
    *rule, mask, slots = given
    return _step.step(projections, gate_bias, state, DeltaRule(*rule), mask=mask, slots=slots, skipped=skipped)


@operator(
    "deltamem::steer_heads_", f"Tensor(a0!) packed, Tensor reads, {LAYOUT}, {STEERING}, {ROPE}", "()",
    fake=lambda *_: None,
)  # fmt: skip
def steer_heads_op(packed, reads, *given):
    _heads.steer_heads_(packed, reads, HeadLayout(*given[:5]), Steering(*given[5:-2]), *given[-2:])


_DECODE = f"{RULE}, {LAYOUT}, {STEERING}, {ROPE}, {ROWS}"
_STEERING = RULE_SIZE + LAYOUT.count(",") + 1  # where its arguments begin there
_W_O = _STEERING + 3


def _decode(packed, gate_bias, state, given, **options):
    *given, cos, sin, mask, slots = given
    reads, delta = _decode_rows.decode_(
        packed, gate_bias, state, DeltaRule(*given[:RULE_SIZE]), HeadLayout(*given[RULE_SIZE:_STEERING]),
        Steering(*given[_STEERING:]), cos, sin, mask=mask, slots=slots, **options,
    )  # fmt: skip
    return reads, or_empty(delta, packed)


@operator(
    "deltamem::decode_",
    "Tensor(a0!) packed, Tensor gate_bias, Tensor(a2!) state, Tensor(a3!) skipped, Tensor(a4!) arrived, " + _DECODE,
    "(Tensor, Tensor)",
    fake=lambda packed, gate_bias, state, skipped, arrived, *given: fake_decode(packed, *given[:2], given[_W_O]),
)
def decode_op(packed, gate_bias, state, skipped, arrived, *given):
    return _decode(packed, gate_bias, state, given, skipped=skipped, workspace=arrived)


# The frozen state is an operand that is not mutated, which the same operator could not say.
@operator(
    "deltamem::decode_frozen_", "Tensor(a0!) packed, Tensor gate_bias, Tensor state, " + _DECODE, "(Tensor, Tensor)",
    fake=lambda packed, gate_bias, state, *given: fake_decode(packed, *given[:2], given[_W_O]),
)  # fmt: skip
def decode_frozen_op(packed, gate_bias, state, *given):
    return _decode(packed, gate_bias, state, given, frozen=True)


def _as_operator(launcher: Callable, differentiable: bool = False) -> Callable:
    """Decorates what hands the arguments of ``launcher`` to an operator; the launcher itself takes them where nothing
    compiles and, if it is differentiable, nothing is to be differentiated."""

    def decorate(through_operator: Callable) -> Callable:
        @functools.wraps(launcher)
        def run(*arguments, **options):
            if differentiable and not needs_operator(*arguments, *options.values()):
                return launcher(*arguments, **options)
            if differentiable or torch.compiler.is_compiling():
                return through_operator(*arguments, **options)
            with torch.no_grad():
                return launcher(*arguments, **options)

        return run

    return decorate


@_as_operator(_scan.scan, differentiable=True)
def scan(
    projections, gate_bias, state, rule, *, mask=None, cu_seqlens=None, slots=None, checkpoint_every=0
) -> ScanOutput:
    """Differentiable in projections, gate_bias and state."""
    check_arguments(
        projections, gate_bias, state, rule,
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    reads, final, skipped, checkpoints, _ = scan_op(
        projections, gate_bias, state, *flat_rule(rule), mask, cu_seqlens, slots, checkpoint_every
    )
    return ScanOutput(reads, final, skipped, checkpoints if checkpoint_every else None)


@_as_operator(_read.read, differentiable=True)
def read(projections, state, rule, *, mask=None, slots=None) -> Tensor:
    """Differentiable in projections and state."""
    return read_op(projections, state, *flat_rule(rule), mask, slots)


@_as_operator(_step.step)
def step(projections, gate_bias, state, rule, *, mask=None, slots=None, skipped=None) -> Tensor:
    """Not differentiable: the state is changed in place."""
    if skipped is None:
        return step_op(projections, gate_bias, state, *flat_rule(rule), mask, slots)
    return step_counted_op(projections, gate_bias, state, skipped, *flat_rule(rule), mask, slots)


@_as_operator(_steer.steer, differentiable=True)
def steer(base, reads, weight, scale, *, norm_weight=None, eps=1e-6, out=None) -> Tensor:
    """Without ``out`` differentiable in every tensor."""
    if out is None:
        return steer_op(base, reads, weight, scale, norm_weight, eps)
    if out is not base:
        raise ArgumentError("out: allowed None or the tensor given as base")
    steer_in_place_op(base, reads, weight, scale, norm_weight, eps)
    return base


@_as_operator(_steer.delta)
def delta(reads, weight, scale, dtype, *, norm_weight=None, eps=1e-6) -> Tensor:
    return delta_op(reads, weight, scale, dtype, norm_weight, eps)


workspace = _decode_rows.workspace


@_as_operator(_heads.steer_heads_)
def steer_heads_(packed, reads, layout, steering, cos=None, sin=None, *, check=True) -> None:
    check_heads(packed, layout, steering, cos, sin, reads.shape[-1])
    steer_heads_op(packed, reads, *flat_layout(layout), *steering, cos, sin)


@_as_operator(_decode_rows.decode_)
def decode_(
    packed, gate_bias, state, rule, layout, steering, cos=None, sin=None, *,
    mask=None, slots=None, skipped=None, frozen=False, check=True, workspace=None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    check_heads(packed, layout, steering, cos, sin, rule.read_width, rule)
    given = *flat_rule(rule), *flat_layout(layout), *steering, cos, sin, mask, slots
    if frozen:
        reads, delta = decode_frozen_op(packed, gate_bias, state, *given)
    else:
        # An optional tensor that is mutated cannot be None under Inductor.
        int32 = {"dtype": torch.int32, "device": packed.device}
        skipped = torch.zeros(state.shape[0], **int32) if skipped is None else skipped
        workspace = torch.zeros(packed.shape[0], **int32) if workspace is None else workspace
        reads, delta = decode_op(packed, gate_bias, state, skipped, workspace, *given)
    return reads, None if steering.o is None else delta
