"""What a memory does to the attention's heads, where they lie: in packed rows [q heads | k heads | v heads | ...].

    x <- RoPE(rms_norm(x + scale · c · W reads))     q and k; v: the correction alone

``steer_heads_`` does it to many tokens whose reads are known, ``decode_`` to one token per row, together with the
step of its state and with Δo. Both are one launch, compute in float32 and round once.

RoPE turns pairs of numbers, so a head is two tiles of D / 2 numbers, ``lo`` and ``hi``; pair j < rotary / 2 is (j,
j + rotary / 2), and the pairs behind them, which are not turned, are (j + rotary / 2, j + D / 2): every number of
the head once, in pieces that lie together, and no number has to change threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch as _launch
from .columns import direction, gates, load_bias, load_vector, load_write, sigmoid, written
from .launch import (
    check_device,
    float32_only,
    half_or_single,
    launch,
    next_power_of_two,
    rule_flags,
    state_strides,
    tile,
)
from .layout import HeadLayout, Steering, check_heads
from .rule import DeltaRule, check_arguments

TOKENS = 16  # tokens of a tile of ``steer_heads_``: the least that fills a matrix instruction
HEADS_IN_TURN = 8  # heads that a program of it takes one after another, cosines and sines staying
PROGRAMS = 4096  # of one warp each: what an H200 holds at once (132 × 32)


@triton.jit
def pairs(o_j, DIM: tl.constexpr, ROTARY: tl.constexpr):
    """The two places of pair j in its head."""
    if ROTARY == 0 or ROTARY == DIM:
        o_lo, o_hi = o_j, o_j + DIM // 2
    else:
        o_lo = o_j + tl.where(o_j < ROTARY // 2, 0, ROTARY // 2)
        o_hi = o_j + tl.where(o_j < ROTARY // 2, ROTARY // 2, DIM // 2)
    return o_lo, o_hi


@triton.jit
def factor(raw, scale, scale_max, HAS_RAW: tl.constexpr):
    """scale · c"""
    if HAS_RAW:
        scale = scale * sigmoid(raw.to(tl.float32)) * scale_max
    return scale


@triton.jit
def turned(lo, hi, cos_lo, sin_lo, cos_hi, sin_hi):
    out_lo = lo * cos_lo.to(tl.float32) - hi * sin_lo.to(tl.float32)
    out_hi = hi * cos_hi.to(tl.float32) + lo * sin_hi.to(tl.float32)
    return out_lo, out_hi


@triton.jit
def steer_group(
    p_x, p_reads, w_ptr, norm_ptr, raw_ptr, turn, m_token, first, last, scale, scale_max, eps,
    stride_r_c, stride_w_n, stride_w_c, stride_norm,
    DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    READ_WIDTH: tl.constexpr, READ_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, HAS_RAW: tl.constexpr,
):  # fmt: skip
    """Heads ``first`` to ``last`` of one kind, one after another, of TOKENS tokens."""
    o_j = tl.arange(0, PAIRS)
    m_j = o_j < DIM // 2
    o_lo, o_hi = pairs(o_j, DIM, ROTARY)
    m_tile = m_token[:, None] & m_j[None, :]
    if HAS_ROPE:
        cos_lo, sin_lo, cos_hi, sin_hi = turn
    if HAS_NORM:
        norm_lo = tl.load(norm_ptr + o_lo * stride_norm, mask=m_j, other=0.0).to(tl.float32)
        norm_hi = tl.load(norm_ptr + o_hi * stride_norm, mask=m_j, other=0.0).to(tl.float32)
    if HAS_DELTA:
        raw = scale
        if HAS_RAW:
            raw = tl.load(raw_ptr)
        by = factor(raw, scale, scale_max, HAS_RAW)
    p_x += first * DIM
    p_lo, p_hi = p_x[:, None] + o_lo[None, :], p_x[:, None] + o_hi[None, :]
    m = m_tile & (m_tile == (first < last))
    x_lo = tl.load(p_lo, mask=m, other=0.0)
    x_hi = tl.load(p_hi, mask=m, other=0.0)
    for head in range(first, last):
        # The next head is on its way while this one is computed.
        m_next = m_tile & (m_tile == (head + 1 < last))
        next_lo = tl.load(p_lo + DIM, mask=m_next, other=0.0)
        next_hi = tl.load(p_hi + DIM, mask=m_next, other=0.0)

        lo, hi = x_lo.to(tl.float32), x_hi.to(tl.float32)
        if HAS_DELTA:
            # K is short, but a sum of outer products would fetch every weight once per thread.
            d_lo = tl.zeros([TOKENS, PAIRS], tl.float32)
            d_hi = tl.zeros([TOKENS, PAIRS], tl.float32)
            p_w = w_ptr + head.to(tl.int64) * DIM * stride_w_n
            for start in range(0, READ_WIDTH, READ_BLOCK):
                o_c = start + tl.arange(0, READ_BLOCK)
                m_c = o_c < READ_WIDTH
                m_w = m_c[:, None] & m_j[None, :]
                reads = tl.load(
                    p_reads[:, None] + o_c[None, :] * stride_r_c, mask=m_token[:, None] & m_c[None, :], other=0.0
                ).to(tl.float32)
                p_c = p_w + o_c[:, None] * stride_w_c
                w_lo = tl.load(p_c + o_lo[None, :] * stride_w_n, mask=m_w, other=0.0).to(tl.float32)
                w_hi = tl.load(p_c + o_hi[None, :] * stride_w_n, mask=m_w, other=0.0).to(tl.float32)
                d_lo = tl.dot(reads, w_lo, d_lo, input_precision=PRECISION)
                d_hi = tl.dot(reads, w_hi, d_hi, input_precision=PRECISION)
            lo += by * d_lo
            hi += by * d_hi
        if HAS_NORM:
            inverse = tl.rsqrt(tl.sum(lo * lo + hi * hi, axis=1) / DIM + eps)
            lo = lo * inverse[:, None] * norm_lo[None, :]
            hi = hi * inverse[:, None] * norm_hi[None, :]
        if HAS_ROPE:
            lo, hi = turned(lo, hi, cos_lo, sin_lo, cos_hi, sin_hi)
        tl.store(p_lo, lo.to(x_lo.dtype), mask=m_tile)
        tl.store(p_hi, hi.to(x_hi.dtype), mask=m_tile)
        p_lo += DIM
        p_hi += DIM
        x_lo, x_hi = next_lo, next_hi


@triton.jit
def steer_heads_kernel(
    x_ptr, reads_ptr, q_ptr, k_ptr, v_ptr, raw_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr,
    tokens, length, scale, scale_max, eps,
    stride_x_b, stride_x_t, stride_r_b, stride_r_t, stride_r_c,
    stride_q_n, stride_q_c, stride_k_n, stride_k_c, stride_v_n, stride_v_c, stride_raw, stride_q_norm, stride_k_norm,
    stride_cos_b, stride_cos_t, stride_cos_w, stride_sin_b, stride_sin_t, stride_sin_w,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    PAIRS: tl.constexpr, TOKENS: tl.constexpr, TURNS: tl.constexpr,
    Q_GROUPS: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    READ_WIDTH: tl.constexpr, READ_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, HAS_RAW: tl.constexpr,
):  # fmt: skip
    """A program: TOKENS tokens, TURNS heads of one kind. Kinds to which nothing is done have no groups."""
    GROUPS: tl.constexpr = Q_GROUPS + K_GROUPS + V_GROUPS
    group = tl.program_id(0) % GROUPS
    token = tl.program_id(0) // GROUPS * TOKENS + tl.arange(0, TOKENS)
    m_token = token < tokens
    b = (token // length).to(tl.int64)
    t = (token % length).to(tl.int64)
    p_x = x_ptr + b * stride_x_b + t * stride_x_t
    p_reads = reads_ptr + b * stride_r_b + t * stride_r_t
    turn = None
    if ROTARY > 0:
        if group < Q_GROUPS + K_GROUPS:
            o_j = tl.arange(0, PAIRS)
            o_lo, o_hi = pairs(o_j, DIM, ROTARY)
            m = m_token[:, None] & (o_j < ROTARY // 2)[None, :]
            p_cos = (cos_ptr + b * stride_cos_b + t * stride_cos_t)[:, None]
            p_sin = (sin_ptr + b * stride_sin_b + t * stride_sin_t)[:, None]
            turn = (
                tl.load(p_cos + o_lo[None, :] * stride_cos_w, mask=m, other=1.0),
                tl.load(p_sin + o_lo[None, :] * stride_sin_w, mask=m, other=0.0),
                tl.load(p_cos + o_hi[None, :] * stride_cos_w, mask=m, other=1.0),
                tl.load(p_sin + o_hi[None, :] * stride_sin_w, mask=m, other=0.0),
            )
