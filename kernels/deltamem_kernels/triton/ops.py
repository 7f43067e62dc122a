"""The kernels as PyTorch operators, in the namespace ``deltamem``.

``scan``, ``read`` and ``steer`` are functional and differentiable. ``step`` changes the state (and the count of
skipped tokens) in place, ``steer_heads_`` packed heads and ``decode_`` both; they are not. All have fake
implementations, so ``torch.compile`` takes them whole. Called without a compiler and with nothing to differentiate,
they go straight to the launchers: an operator's dispatch costs more than a short kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layout import HeadLayout, Steering, check_heads
from ..rule import DeltaRule, ScanOutput, check_arguments
from . import decode as _decode
from . import heads as _heads
from . import read as _read
from . import read_backward as _read_backward
from . import scan as _scan
from . import scan_backward as _scan_backward
from . import steer as _steer
from . import steer_backward as _steer_backward
from . import step as _step


# A DeltaRule, flat. Its mode is called ``update`` here: an operator that mutates cannot have an argument "mode",
# with which PyTorch's functionalization would mix it up.
def _rule(rank, heads, update, row_gates, coupled, normalize) -> DeltaRule:
    return DeltaRule(rank, heads, update, row_gates, coupled, normalize)


def _flat(rule: DeltaRule) -> tuple:
    return rule.rank, rule.heads, rule.mode, rule.row_gates, rule.coupled, rule.normalize


@torch.library.custom_op("deltamem::scan", mutates_args=())
def scan_op(
    projections: Tensor, gate_bias: Tensor, state: Tensor | None,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    mask: Tensor | None, cu_seqlens: Tensor | None, slots: Tensor | None, checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, flags = _scan.scan_with_flags(
        projections, gate_bias, state, _rule(rank, heads, update, row_gates, coupled, normalize),
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    checkpoints = out.reads.new_empty(0) if out.checkpoints is None else out.checkpoints
    return out.reads, out.state, out.skipped, checkpoints, flags


@scan_op.register_fake
def _(
    projections, gate_bias, state, rank, heads, update, row_gates, coupled, normalize,
    mask, cu_seqlens, slots, checkpoint_every,
):  # fmt: skip
    batch, length = projections.shape[:2]
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    float32 = {"dtype": torch.float32, "device": projections.device}
    shape = (heads, rank, rank)
    if checkpoint_every:
        lead = (batch, length // checkpoint_every) if cu_seqlens is None else (length // checkpoint_every,)
        checkpoints = torch.empty((*lead, *shape), **float32)
    else:
        checkpoints = torch.empty(0, **float32)
    return (
        torch.empty((batch, length, heads * rank), **float32),
        torch.empty((count, *shape), **float32),
        torch.empty((count,), dtype=torch.int32, device=projections.device),
        checkpoints,
        torch.empty((batch, length), dtype=torch.uint8, device=projections.device),
    )


@torch.library.custom_op("deltamem::scan_backward", mutates_args=())
def scan_backward_op(
    d_reads: Tensor, d_state: Tensor, d_checkpoints: Tensor | None,
    projections: Tensor, gate_bias: Tensor, state: Tensor | None,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    flags: Tensor, cu_seqlens: Tensor | None, slots: Tensor | None, checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_x, d_bias, d_initial = _scan_backward.scan_backward(
        d_reads, d_state, projections, gate_bias, state, _rule(rank, heads, update, row_gates, coupled, normalize),
        cu_seqlens=cu_seqlens, slots=slots,
        d_checkpoints=d_checkpoints, checkpoint_every=checkpoint_every, flags=flags,
    )  # fmt: skip
    return d_x, d_bias, d_x.new_empty(0) if d_initial is None else d_initial


@scan_backward_op.register_fake
def _(
    d_reads, d_state, d_checkpoints, projections, gate_bias, state, rank, heads, update, row_gates, coupled,
    normalize, flags, cu_seqlens, slots, checkpoint_every,
):  # fmt: skip
    d_state = projections.new_empty(0) if state is None else state.new_empty(state.shape)
    return projections.new_empty(projections.shape), gate_bias.new_empty(gate_bias.shape), d_state


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
    return d_x, d_bias, None if state is None else d_initial, *([None] * 10)


scan_op.register_autograd(_scan_gradient, setup_context=_scan_setup)


@torch.library.custom_op("deltamem::read", mutates_args=())
def read_op(
    projections: Tensor, state: Tensor,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    mask: Tensor | None, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    rule = _rule(rank, heads, update, row_gates, coupled, normalize)
    return _read.read(projections, state, rule, mask=mask, slots=slots)


@read_op.register_fake
def _(projections, state, rank, heads, update, row_gates, coupled, normalize, mask, slots):
    return projections.new_empty((*projections.shape[:2], heads * rank), dtype=torch.float32)


@torch.library.custom_op("deltamem::read_backward", mutates_args=())
def read_backward_op(
    d_reads: Tensor, projections: Tensor, state: Tensor,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    mask: Tensor | None, slots: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rule = _rule(rank, heads, update, row_gates, coupled, normalize)
    return _read_backward.read_backward(d_reads, projections, state, rule, mask=mask, slots=slots)


@read_backward_op.register_fake
def _(d_reads, projections, state, rank, heads, update, row_gates, coupled, normalize, mask, slots):
    return projections.new_empty(projections.shape), state.new_empty(state.shape)


def _read_setup(ctx, inputs, output):
    projections, state, *flat, mask, slots = inputs
    ctx.save_for_backward(projections, state, mask, slots)
    ctx.flat = flat


def _read_gradient(ctx, d_reads):
    projections, state, mask, slots = ctx.saved_tensors
    return *read_backward_op(d_reads, projections, state, *ctx.flat, mask, slots), *([None] * 8)


read_op.register_autograd(_read_gradient, setup_context=_read_setup)


@torch.library.custom_op("deltamem::steer", mutates_args=())
def steer_op(
    base: Tensor, reads: Tensor, weight: Tensor, scale: float, norm_weight: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    return _steer.steer(base, reads, weight, scale, norm_weight=norm_weight, eps=eps)


@steer_op.register_fake
def _(base, reads, weight, scale, norm_weight, eps):
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


@torch.library.custom_op("deltamem::steer_", mutates_args=("base",))
def steer_in_place_op(
    base: Tensor, reads: Tensor, weight: Tensor, scale: float, norm_weight: Tensor | None, eps: float
) -> None:  # fmt: skip
    _steer.steer(base, reads, weight, scale, norm_weight=norm_weight, eps=eps, out=base)


@steer_in_place_op.register_fake
def _(base, reads, weight, scale, norm_weight, eps):
    return None


@torch.library.custom_op("deltamem::delta", mutates_args=())
def delta_op(
    reads: Tensor, weight: Tensor, scale: float, dtype: torch.dtype, norm_weight: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    return _steer.delta(reads, weight, scale, dtype, norm_weight=norm_weight, eps=eps)


@delta_op.register_fake
def _(reads, weight, scale, dtype, norm_weight, eps):
    return reads.new_empty((*reads.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.custom_op("deltamem::steer_backward", mutates_args=())
def steer_backward_op(
    grad: Tensor, reads: Tensor, weight: Tensor, scale: float, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *found, d_norm = _steer_backward.steer_backward(grad, reads, weight, scale, norm_weight=norm_weight, eps=eps)
    return *found, grad.new_empty(0) if d_norm is None else d_norm


@steer_backward_op.register_fake
def _(grad, reads, weight, scale, norm_weight, eps):
    d_norm = grad.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape)
    return reads.new_empty(reads.shape), weight.new_empty(weight.shape), d_norm


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
@torch.library.custom_op("deltamem::step", mutates_args=("state",))
def step_op(
    projections: Tensor, gate_bias: Tensor, state: Tensor,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    mask: Tensor | None, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    rule = _rule(rank, heads, update, row_gates, coupled, normalize)
    return _step.step(projections, gate_bias, state, rule, mask=mask, slots=slots)


@torch.library.custom_op("deltamem::step_counted", mutates_args=("state", "skipped"))
def step_counted_op(
    projections: Tensor, gate_bias: Tensor, state: Tensor, skipped: Tensor,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    mask: Tensor | None, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    rule = _rule(rank, heads, update, row_gates, coupled, normalize)
    return _step.step(projections, gate_bias, state, rule, mask=mask, slots=slots, skipped=skipped)


@step_op.register_fake
def _(projections, gate_bias, state, rank, heads, update, row_gates, coupled, normalize, mask, slots):
    return projections.new_empty((projections.shape[0], heads * rank), dtype=torch.float32)


@step_counted_op.register_fake
def _(projections, gate_bias, state, skipped, rank, heads, update, row_gates, coupled, normalize, mask, slots):
    return projections.new_empty((projections.shape[0], heads * rank), dtype=torch.float32)


# A HeadLayout and a Steering, flat.
def _layout(heads_q, heads_k, heads_v, dim, rotary) -> HeadLayout:
    return HeadLayout(heads_q, heads_k, heads_v, dim, rotary)


def _flat_layout(layout: HeadLayout) -> tuple:
    return layout.q, layout.k, layout.v, layout.dim, layout.rotary


@torch.library.custom_op("deltamem::steer_heads_", mutates_args=("packed",))
def steer_heads_op(
    packed: Tensor, reads: Tensor, heads_q: int, heads_k: int, heads_v: int, dim: int, rotary: int,
    w_q: Tensor | None, w_k: Tensor | None, w_v: Tensor | None, w_o: Tensor | None, scale: float,
    scale_raw: Tensor | None, scale_max: float, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    cos: Tensor | None, sin: Tensor | None,
) -> None:  # fmt: skip
    steering = Steering(w_q, w_k, w_v, w_o, scale, scale_raw, scale_max, q_norm, k_norm, eps)
    _heads.steer_heads_(packed, reads, _layout(heads_q, heads_k, heads_v, dim, rotary), steering, cos, sin)


@steer_heads_op.register_fake
def _(packed, reads, *_):
    return None


@torch.library.custom_op("deltamem::decode_", mutates_args=("packed", "state", "skipped", "arrived"))
def decode_op(
    packed: Tensor, gate_bias: Tensor, state: Tensor, skipped: Tensor, arrived: Tensor,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    heads_q: int, heads_k: int, heads_v: int, dim: int, rotary: int,
    w_q: Tensor | None, w_k: Tensor | None, w_v: Tensor | None, w_o: Tensor | None, scale: float,
    scale_raw: Tensor | None, scale_max: float, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, slots: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    reads, delta = _decode.decode_(
        packed, gate_bias, state, _rule(rank, heads, update, row_gates, coupled, normalize),
        _layout(heads_q, heads_k, heads_v, dim, rotary),
        Steering(w_q, w_k, w_v, w_o, scale, scale_raw, scale_max, q_norm, k_norm, eps), cos, sin,
        mask=mask, slots=slots, skipped=skipped, workspace=arrived,
    )  # fmt: skip
    return reads, packed.new_empty(0) if delta is None else delta


# The frozen state is an operand that is not mutated, which the same operator could not say.
@torch.library.custom_op("deltamem::decode_frozen_", mutates_args=("packed",))
def decode_frozen_op(
    packed: Tensor, gate_bias: Tensor, state: Tensor,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    heads_q: int, heads_k: int, heads_v: int, dim: int, rotary: int,
    w_q: Tensor | None, w_k: Tensor | None, w_v: Tensor | None, w_o: Tensor | None, scale: float,
    scale_raw: Tensor | None, scale_max: float, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, slots: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    reads, delta = _decode.decode_(
        packed, gate_bias, state, _rule(rank, heads, update, row_gates, coupled, normalize),
        _layout(heads_q, heads_k, heads_v, dim, rotary),
        Steering(w_q, w_k, w_v, w_o, scale, scale_raw, scale_max, q_norm, k_norm, eps), cos, sin,
        mask=mask, slots=slots, frozen=True,
    )  # fmt: skip
    return reads, packed.new_empty(0) if delta is None else delta


def _fake_decode(packed, heads, rank, w_o):
    reads = packed.new_empty((packed.shape[0], heads * rank), dtype=torch.float32)
    return reads, packed.new_empty(0 if w_o is None else (packed.shape[0], w_o.shape[0]))


@decode_op.register_fake
def _(
    packed, gate_bias, state, skipped, arrived, rank, heads, update, row_gates, coupled, normalize,
    heads_q, heads_k, heads_v, dim, rotary, w_q, w_k, w_v, w_o, *_,
):  # fmt: skip
    return _fake_decode(packed, heads, rank, w_o)


@decode_frozen_op.register_fake
def _(
    packed, gate_bias, state, rank, heads, update, row_gates, coupled, normalize,
    heads_q, heads_k, heads_v, dim, rotary, w_q, w_k, w_v, w_o, *_,
):  # fmt: skip
    return _fake_decode(packed, heads, rank, w_o)


def _direct(*tensors: Tensor | None) -> bool:
    """Whether to go past the dispatcher: nothing compiles, nothing is to be differentiated."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def scan(
    projections: Tensor,
    gate_bias: Tensor,
    state: Tensor | None,
    rule: DeltaRule,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    slots: Tensor | None = None,
    checkpoint_every: int = 0,
) -> ScanOutput:
    """``deltamem_kernels.triton.scan.scan``, differentiable in projections, gate_bias and state, and compilable."""
    if _direct(projections, gate_bias, state):
        return _scan.scan(
            projections, gate_bias, state, rule,
            mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
        )  # fmt: skip
    check_arguments(
        projections, gate_bias, state, rule,
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    reads, final, skipped, checkpoints, _ = scan_op(
        projections, gate_bias, state, *_flat(rule), mask, cu_seqlens, slots, checkpoint_every
    )
    return ScanOutput(reads, final, skipped, checkpoints if checkpoint_every else None)


def read(
    projections: Tensor,
    state: Tensor,
    rule: DeltaRule,
    *,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """``deltamem_kernels.triton.read.read``, differentiable in projections and state, and compilable."""
    if _direct(projections, state):
        return _read.read(projections, state, rule, mask=mask, slots=slots)
    return read_op(projections, state, *_flat(rule), mask, slots)


def step(
    projections: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    rule: DeltaRule,
    *,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Tensor:
    """``deltamem_kernels.triton.step.step``, compilable. Not differentiable: the state is changed in place."""
    if not torch.compiler.is_compiling():
        with torch.no_grad():
            return _step.step(projections, gate_bias, state, rule, mask=mask, slots=slots, skipped=skipped)
    if skipped is None:
        return step_op(projections, gate_bias, state, *_flat(rule), mask, slots)
    return step_counted_op(projections, gate_bias, state, skipped, *_flat(rule), mask, slots)


def steer(
    base: Tensor,
    reads: Tensor,
    weight: Tensor,
    scale: float,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """``deltamem_kernels.triton.steer.steer``, compilable, and without ``out`` differentiable in every tensor."""
    if _direct(base, reads, weight, norm_weight):
        return _steer.steer(base, reads, weight, scale, norm_weight=norm_weight, eps=eps, out=out)
    if out is None:
        return steer_op(base, reads, weight, scale, norm_weight, eps)
    if out is not base:
        raise ArgumentError("out: allowed None or the tensor given as base")
    steer_in_place_op(base, reads, weight, scale, norm_weight, eps)
    return base


def delta(
    reads: Tensor,
    weight: Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """``deltamem_kernels.triton.steer.delta``, compilable. Not differentiable."""
    if not torch.compiler.is_compiling():
        with torch.no_grad():
            return _steer.delta(reads, weight, scale, dtype, norm_weight=norm_weight, eps=eps)
    return delta_op(reads, weight, scale, dtype, norm_weight, eps)


workspace = _decode.workspace


def steer_heads_(
    packed: Tensor,
    reads: Tensor,
    layout: HeadLayout,
    steering: Steering,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    check: bool = True,
) -> None:
    """``deltamem_kernels.triton.heads.steer_heads_``, compilable. Not differentiable."""
    if not torch.compiler.is_compiling():
        with torch.no_grad():
            return _heads.steer_heads_(packed, reads, layout, steering, cos, sin, check=check)
    check_heads(packed, layout, steering, cos, sin, reads.shape[-1])
    steer_heads_op(packed, reads, *_flat_layout(layout), *steering, cos, sin)


def decode_(
    packed: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    rule: DeltaRule,
    layout: HeadLayout,
    steering: Steering,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    skipped: Tensor | None = None,
    frozen: bool = False,
    check: bool = True,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``deltamem_kernels.triton.decode.decode_``, compilable. Not differentiable."""
    if not torch.compiler.is_compiling():
        with torch.no_grad():
            return _decode.decode_(
                packed, gate_bias, state, rule, layout, steering, cos, sin, mask=mask, slots=slots, skipped=skipped,
                frozen=frozen, check=check, workspace=workspace,
            )  # fmt: skip
    check_heads(packed, layout, steering, cos, sin, rule.read_width, rule)
    given = *_flat(rule), *_flat_layout(layout), *steering, cos, sin, mask, slots
    if frozen:
        reads, delta = decode_frozen_op(packed, gate_bias, state, *given)
    else:
        # An optional tensor that is mutated cannot be None under Inductor.
        int32 = {"dtype": torch.int32, "device": packed.device}
        skipped = torch.zeros(state.shape[0], **int32) if skipped is None else skipped
        workspace = torch.zeros(packed.shape[0], **int32) if workspace is None else workspace
        reads, delta = decode_op(packed, gate_bias, state, skipped, workspace, *given)
    return reads, None if steering.o is None else delta
