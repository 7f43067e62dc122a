"""``steer_heads_``: what a memory does to the heads of many tokens whose reads are known, where they lie.

    x <- RoPE(rms_norm(x + scale · c · W reads))     q and k; v: the correction alone

One launch; computes in float32 and rounds once. ``decode`` does it to one token a row, with the step of its state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layout import HeadLayout, Steering, check_heads
from ..rule import check_shape, check_together
from . import launch as _launch
from .head_parts import arguments, check_tensors, load_raw, load_turn, pairs, scale_of, steered_heads, turned
from .launch import (
    MOST_REGISTERS,
    check_reach,
    fixed,
    half_or_single,
    launch,
    matrix_precision,
    narrow_reads,
    next_power_of_two,
    strides,
)
from .primitives import load_weights, read_parts, times_reads
from .replay import replayed

LEAST_TOKENS = 16  # of a tile: what fills a matrix instruction; twice as many with narrow reads
HEADS_IN_TURN = 4  # heads that a program takes one after another, cosines and sines staying
READ_BLOCK = 16  # numbers of a read that are multiplied at once: a matrix instruction takes no fewer


class Rows(NamedTuple):
    """The packed rows [B, T, N] and the reads [B, T, H·r] of ``tokens`` = B · T tokens, T = ``length``.

    TOKENS: tokens of a program. PRECISION: of matrix instructions. NARROW: see ``launch.narrow_reads``.
    """

    x_ptr: torch.Tensor
    reads_ptr: torch.Tensor
    tokens: int
    length: int
    stride_x_b: int
    stride_x_t: int
    stride_r_b: int
    stride_r_t: int
    stride_r_c: int
    TOKENS: tl.constexpr
    PRECISION: tl.constexpr
    NARROW: tl.constexpr


class Places(NamedTuple):
    """Where the tokens of a program lie, and which there are; all [TOKENS]."""

    p_x: tl.tensor
    p_reads: tl.tensor
    p_cos: tl.tensor
    p_sin: tl.tensor
    m_token: tl.tensor


@triton.jit
def steer_unit(kind, unit, at, rows, turn, factor, heads):
    """UNIT heads of one kind, one after another, of TOKENS tokens."""
    DIM: tl.constexpr = heads.DIM
    READ_WIDTH: tl.constexpr = heads.READ_WIDTH
    first = unit * heads.UNIT
    last = tl.minimum(first + heads.UNIT, kind.COUNT)
    stride_w_n = kind.stride_w_n
    stride_w_c = kind.stride_w_c
    if heads.DENSE:
        stride_w_n = READ_WIDTH
        stride_w_c = 1
    o_j = tl.arange(0, heads.PAIRS)  # [PAIRS]
    m_j = o_j < DIM // 2
    o_lo, o_hi = pairs(o_j, DIM=DIM, ROTARY=kind.ROTARY)  # [PAIRS]
    m_tile = at.m_token[:, None] & m_j[None, :]  # [TOKENS, PAIRS]
    p_x = at.p_x + (first + kind.FIRST) * DIM  # [TOKENS]
    p_lo, p_hi = p_x[:, None] + o_lo[None, :], p_x[:, None] + o_hi[None, :]  # [TOKENS, PAIRS]
    x_lo = tl.load(p_lo, mask=m_tile, other=0.0)  # [TOKENS, PAIRS]
    x_hi = tl.load(p_hi, mask=m_tile, other=0.0)
    if kind.ROTARY > 0:
        m_turn = at.m_token[:, None] & (o_j < kind.ROTARY // 2)[None, :]  # [TOKENS, PAIRS]
        cos_lo, sin_lo, cos_hi, sin_hi = load_turn(
            p_cos=at.p_cos[:, None], p_sin=at.p_sin[:, None], o_lo=o_lo[None, :], o_hi=o_hi[None, :], turn=turn,
            m=m_turn,
        )  # fmt: skip
    if kind.HAS_NORM:
        norm_lo = tl.load(kind.norm_ptr + o_lo * kind.stride_norm, mask=m_j, other=0.0).to(tl.float32)  # [PAIRS]
        norm_hi = tl.load(kind.norm_ptr + o_hi * kind.stride_norm, mask=m_j, other=0.0).to(tl.float32)
    if kind.HAS_DELTA:
        by = scale_of(factor, raw=load_raw(factor, PLACE=kind.PLACE))
        p_w = kind.w_ptr + first.to(tl.int64) * DIM * stride_w_n
        if rows.NARROW:
            most, rest = read_parts(at.p_reads, at.m_token, stride=rows.stride_r_c, WIDTH=READ_WIDTH)
    for head in range(first, last):
        # The next head is on its way while this one is computed.
        m_next = m_tile & (o_j * 0 + head + 1 < last)[None, :]  # [TOKENS, PAIRS]
        next_lo = tl.load(p_lo + DIM, mask=m_next, other=0.0)
        next_hi = tl.load(p_hi + DIM, mask=m_next, other=0.0)

        lo, hi = x_lo.to(tl.float32), x_hi.to(tl.float32)
        if kind.HAS_DELTA:
            # The sum is short, but as outer products every thread would fetch the weights of its places one by one.
            if rows.NARROW:
                w_lo = load_weights(p_w + o_lo * stride_w_n, stride=stride_w_c, m_n=m_j, WIDTH=READ_WIDTH)
                w_hi = load_weights(p_w + o_hi * stride_w_n, stride=stride_w_c, m_n=m_j, WIDTH=READ_WIDTH)
                d_lo, d_hi = times_reads(most, rest, w_lo), times_reads(most, rest, w_hi)
            else:
                d_lo = tl.zeros([rows.TOKENS, heads.PAIRS], tl.float32)
                d_hi = tl.zeros([rows.TOKENS, heads.PAIRS], tl.float32)
                for start in range(0, READ_WIDTH, heads.CHUNK):
                    o_c = start + tl.arange(0, heads.CHUNK)  # [CHUNK]
                    m_c = o_c < READ_WIDTH
                    m_w = m_c[:, None] & m_j[None, :]  # [CHUNK, PAIRS]
                    p_r = at.p_reads[:, None] + o_c[None, :] * rows.stride_r_c  # [TOKENS, CHUNK]
                    reads = tl.load(p_r, mask=at.m_token[:, None] & m_c[None, :], other=0.0).to(tl.float32)
                    p_c = p_w + o_c[:, None] * stride_w_c  # [CHUNK, 1]
                    w_lo = tl.load(p_c + o_lo[None, :] * stride_w_n, mask=m_w, other=0.0).to(
                        tl.float32
                    )  # [CHUNK, PAIRS]
                    w_hi = tl.load(p_c + o_hi[None, :] * stride_w_n, mask=m_w, other=0.0).to(tl.float32)
                    d_lo = tl.dot(reads, w_lo, d_lo, input_precision=rows.PRECISION)  # [TOKENS, PAIRS]
                    d_hi = tl.dot(reads, w_hi, d_hi, input_precision=rows.PRECISION)
            lo = tl.fma(d_lo, tl.zeros_like(d_lo) + by, lo)
            hi = tl.fma(d_hi, tl.zeros_like(d_hi) + by, hi)
            p_w += DIM * stride_w_n
        if kind.HAS_NORM:
            inverse = tl.rsqrt(tl.sum(tl.fma(lo, lo, hi * hi), axis=1) / DIM + heads.eps)  # [TOKENS]
            lo = lo * inverse[:, None] * norm_lo[None, :]
            hi = hi * inverse[:, None] * norm_hi[None, :]
        if kind.ROTARY > 0:
            lo, hi = turned(lo, hi, cos_lo, sin_lo, cos_hi, sin_hi)
        tl.store(p_lo, lo.to(x_lo.dtype), mask=m_tile)
        tl.store(p_hi, hi.to(x_hi.dtype), mask=m_tile)
        p_lo += DIM
        p_hi += DIM
        x_lo, x_hi = next_lo, next_hi


@triton.jit
def steer_heads_kernel(rows, q, k, v, turn, factor, heads):
    """``reference.heads.steer_heads_``. A program: TOKENS tokens, one unit of heads.

    rows: ``Rows``. q, k, v: ``Kind``. turn, factor, heads: see ``head_parts``.
    """
    UNITS: tl.constexpr = q.UNITS + k.UNITS + v.UNITS
    unit = tl.program_id(0) % UNITS
    token = tl.program_id(0) // UNITS * rows.TOKENS + tl.arange(0, rows.TOKENS)  # [TOKENS]
    b = (token // rows.length).to(tl.int64)
    t = (token % rows.length).to(tl.int64)
    p_x = rows.x_ptr + b * rows.stride_x_b + t * rows.stride_x_t
    # What is not there is not used; None would do, but a tuple does not take it.
    p_reads, p_cos, p_sin = p_x, p_x, p_x
    if q.HAS_DELTA or k.HAS_DELTA or v.HAS_DELTA:
        p_reads = rows.reads_ptr + b * rows.stride_r_b + t * rows.stride_r_t
    if q.ROTARY > 0:
        p_cos = turn.cos_ptr + b * turn.stride_cos_b + t * turn.stride_cos_t
        p_sin = turn.sin_ptr + b * turn.stride_sin_b + t * turn.stride_sin_t
    at = Places(p_x=p_x, p_reads=p_reads, p_cos=p_cos, p_sin=p_sin, m_token=token < rows.tokens)
    if q.UNITS > 0:
        if unit < q.UNITS:
            steer_unit(kind=q, unit=unit, at=at, rows=rows, turn=turn, factor=factor, heads=heads)
    if k.UNITS > 0:
        if (unit >= q.UNITS) & (unit < q.UNITS + k.UNITS):
            steer_unit(kind=k, unit=unit - q.UNITS, at=at, rows=rows, turn=turn, factor=factor, heads=heads)
    if v.UNITS > 0:
        if unit >= q.UNITS + k.UNITS:
            steer_unit(kind=v, unit=unit - q.UNITS - k.UNITS, at=at, rows=rows, turn=turn, factor=factor, heads=heads)


def steer_heads_(
    packed: torch.Tensor,
    reads: torch.Tensor,
    layout: HeadLayout,
    steering: Steering,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    check: bool = True,
) -> None:
    """Correct, normalise and rotate the heads of packed rows, in place. Not differentiable.

        x <- RoPE(rms_norm(x + scale · c · W reads))     q and k; v: the correction alone

    Args:
        packed: bfloat16, float16 or float32 [B, T, N], last stride 1, N at least the layout's width; q, k and v
            are changed, what lies behind them is not. Heads to which nothing is done are neither read nor written.
        reads: [B, T, H·r], float32 (another floating dtype is widened), of any strides.
        layout: which heads lie where.
        steering: corrections and norms; ``o`` is not used.
        cos, sin: [B or 1, T, rotary], of any floating dtype up to float32, or None without RoPE.
        check: False leaves the checks out, for a caller that knows the shapes.

    Everything is computed in float32 and rounded once.

    Raises:
        ValueError, TypeError: see ``layout.check_heads``; a float64 tensor; tensors that are not on a GPU.
    """
    if check:
        check_heads(packed, layout, steering, cos, sin, reads.shape[-1])
        check_tensors(packed, steering, cos, sin)
        half_or_single("reads", reads)
        check_together("packed", packed, reads=reads)
        check_reach("reads", reads, 1)
        check_shape("reads", reads, (*packed.shape[:-1], reads.shape[-1]))
    if packed.shape[0] * packed.shape[1] == 0 or sum(steered_heads(layout, steering)) == 0:
        return
    q, k, v, _, scale, raw, scale_max, q_norm, k_norm, eps = steering
    replayed(_steer_heads, (packed, reads, cos, sin, q, k, v, raw, q_norm, k_norm), layout, scale, scale_max, eps)


def _steer_heads(packed, reads, cos, sin, q, k, v, raw, q_norm, k_norm, layout, scale, scale_max, eps) -> tuple:
    """The launch."""
    steering = Steering(q, k, v, None, scale, raw, scale_max, q_norm, k_norm, eps)
    steered = steered_heads(layout, steering)
    tokens = packed.shape[0] * packed.shape[1]
    narrow = narrow_reads(reads.shape[-1], q, k, v)
    of_tile = 2 * LEAST_TOKENS if narrow and _launch.WARP == 32 else LEAST_TOKENS  # AMD has no registers for more
    blocks = triton.cdiv(tokens, of_tile)
    unit = min(HEADS_IN_TURN, max(2, blocks * sum(steered) // 1024))
    given = arguments(layout, steering, cos, sin, unit=unit, read_width=reads.shape[-1], chunk=READ_BLOCK)
    rows = fixed(
        Rows, x_ptr=packed, reads_ptr=reads, tokens=tokens, length=packed.shape[1],
        stride_x_b=packed.stride(0), stride_x_t=packed.stride(1), **strides("r", "btc", reads),
        TOKENS=of_tile, PRECISION=matrix_precision(), NARROW=narrow,
    )  # fmt: skip
    # 16 bytes of a 16-bit tile are a thread's.
    warps = max(1, min(16, next_power_of_two(layout.dim // 2) // 16))
    programs = blocks * sum(triton.cdiv(n, unit) for n in steered)
    # With wide reads ptxas would spill a few registers so that more warps fit beside each other. 8 warps may have all.
    registers = None if narrow or warps > 8 else MOST_REGISTERS
    launch(steer_heads_kernel, programs, packed, num_warps=warps, registers=registers, rows=rows, **given)
    return ()
