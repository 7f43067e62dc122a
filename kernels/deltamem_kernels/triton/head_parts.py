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

from ..errors import ArgumentError
from ..layout import HeadLayout, Steering, check_heads
from ..rule import DeltaRule, check_arguments, check_together
from . import launch as _launch
from .launch import (
    MOST_REGISTERS,
    check_device,
    check_reach,
    compiler_sees,
    float32_only,
    half_or_single,
    launch,
    launch_again,
    matrix_precision,
    next_power_of_two,
    rule_flags,
    state_strides,
    tile,
    whole_keys,
)
from .primitives import (
    direction,
    dot,
    dot_rows,
    gates,
    load_bias,
    load_vector,
    load_write,
    lost,
    owned,
    sigmoid,
    state_pointers,
    written,
)

TOKENS = 16  # tokens of a tile of ``steer_heads_``: the least that fills a matrix instruction
HEADS_IN_TURN = 8  # heads that a program of it takes one after another, cosines and sines staying
READ_BLOCK = 16  # numbers of a read that are multiplied at once: a matrix instruction takes no fewer
ALONE = 512  # rows from which a program has a row to itself
PLANS = 1024  # launches of differing shapes that are kept
PROGRAMS = 4096  # of one warp each: what an H200 holds at once (132 × 32)


@triton.jit
def pairs(o_j, DIM: tl.constexpr, ROTARY: tl.constexpr):
    """The two places of pair j in its head."""
    if ROTARY == 0 or ROTARY == DIM:
        o_lo = o_j
        o_hi = o_j + DIM // 2
    else:
        TURN: tl.constexpr = ROTARY // 2
        HALF: tl.constexpr = DIM // 2
        # The compiler does not see through the choice: pieces of so many numbers lie together.
        PIECE: tl.constexpr = (TURN | HALF) & -(TURN | HALF)
        o_lo = tl.max_contiguous(tl.multiple_of(o_j + tl.where(o_j < TURN, 0, TURN), PIECE), PIECE)
        o_hi = tl.max_contiguous(tl.multiple_of(o_j + tl.where(o_j < TURN, TURN, HALF), PIECE), PIECE)
    return o_lo, o_hi


@triton.jit
def factor(raw, scale, scale_max):
    """scale · c"""
    return scale * sigmoid(raw.to(tl.float32)) * scale_max


@triton.jit
def turned(lo, hi, cos_lo, sin_lo, cos_hi, sin_hi):
    out_lo = tl.fma(lo, cos_lo.to(tl.float32), -hi * sin_lo.to(tl.float32))
    out_hi = tl.fma(hi, cos_hi.to(tl.float32), lo * sin_hi.to(tl.float32))
    return out_lo, out_hi


@triton.jit
def load_turn(p_cos, p_sin, o_lo, o_hi, stride_cos_w, stride_sin_w, m):
    """cos and sin of both numbers of a pair, raw; 1 and 0 where m is False."""
    cos_lo = tl.load(p_cos + o_lo * stride_cos_w, mask=m, other=1.0)
    sin_lo = tl.load(p_sin + o_lo * stride_sin_w, mask=m, other=0.0)
    cos_hi = tl.load(p_cos + o_hi * stride_cos_w, mask=m, other=1.0)
    sin_hi = tl.load(p_sin + o_hi * stride_sin_w, mask=m, other=0.0)
    return cos_lo, sin_lo, cos_hi, sin_hi


@triton.jit
def steer_group(
    p_x, p_reads, w_ptr, norm_ptr, raw_ptr, p_cos, p_sin, m_token, first, last, scale, scale_max, eps,
    stride_r_c, stride_w_n, stride_w_c, stride_norm, stride_cos_w, stride_sin_w,
    DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    READ_WIDTH: tl.constexpr, READ_BLOCK: tl.constexpr, PRECISION: tl.constexpr, DENSE: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, HAS_RAW: tl.constexpr,
):  # fmt: skip
    """Heads ``first`` to ``last`` − 1 of one kind, one after another, of TOKENS tokens."""
    if DENSE:
        stride_w_n = READ_WIDTH
        stride_w_c = 1
    o_j = tl.arange(0, PAIRS)
    m_j = o_j < DIM // 2
    o_lo, o_hi = pairs(o_j, DIM, ROTARY)
    m_tile = m_token[:, None] & m_j[None, :]
    p_x += first * DIM
    p_lo, p_hi = p_x[:, None] + o_lo[None, :], p_x[:, None] + o_hi[None, :]
    x_lo = tl.load(p_lo, mask=m_tile, other=0.0)
    x_hi = tl.load(p_hi, mask=m_tile, other=0.0)
    if HAS_ROPE:
        m_turn = m_token[:, None] & (o_j < ROTARY // 2)[None, :]
        cos_lo, sin_lo, cos_hi, sin_hi = load_turn(
            p_cos[:, None], p_sin[:, None], o_lo[None, :], o_hi[None, :], stride_cos_w, stride_sin_w, m_turn
        )
    if HAS_NORM:
        norm_lo = tl.load(norm_ptr + o_lo * stride_norm, mask=m_j, other=0.0).to(tl.float32)
        norm_hi = tl.load(norm_ptr + o_hi * stride_norm, mask=m_j, other=0.0).to(tl.float32)
    if HAS_DELTA:
        by = scale
        if HAS_RAW:
            by = factor(tl.load(raw_ptr), scale, scale_max)
        p_w = w_ptr + first.to(tl.int64) * DIM * stride_w_n
    for head in range(first, last):
        # The next head is on its way while this one is computed.
        m_next = m_tile & (o_j * 0 + head + 1 < last)[None, :]
        next_lo = tl.load(p_lo + DIM, mask=m_next, other=0.0)
        next_hi = tl.load(p_hi + DIM, mask=m_next, other=0.0)

        lo, hi = x_lo.to(tl.float32), x_hi.to(tl.float32)
        if HAS_DELTA:
            # The sum is short, but as outer products every thread would fetch the weights of its places one by one.
            d_lo = tl.zeros([TOKENS, PAIRS], tl.float32)
            d_hi = tl.zeros([TOKENS, PAIRS], tl.float32)
            for start in range(0, READ_WIDTH, READ_BLOCK):
                o_c = start + tl.arange(0, READ_BLOCK)
                m_c = o_c < READ_WIDTH
                m_w = m_c[:, None] & m_j[None, :]
                p_r = p_reads[:, None] + o_c[None, :] * stride_r_c
                reads = tl.load(p_r, mask=m_token[:, None] & m_c[None, :], other=0.0).to(tl.float32)
                p_c = p_w + o_c[:, None] * stride_w_c
                w_lo = tl.load(p_c + o_lo[None, :] * stride_w_n, mask=m_w, other=0.0).to(tl.float32)
                w_hi = tl.load(p_c + o_hi[None, :] * stride_w_n, mask=m_w, other=0.0).to(tl.float32)
                d_lo = tl.dot(reads, w_lo, d_lo, input_precision=PRECISION)
                d_hi = tl.dot(reads, w_hi, d_hi, input_precision=PRECISION)
            lo = tl.fma(d_lo, tl.zeros_like(d_lo) + by, lo)
            hi = tl.fma(d_hi, tl.zeros_like(d_hi) + by, hi)
            p_w += DIM * stride_w_n
        if HAS_NORM:
            inverse = tl.rsqrt(tl.sum(tl.fma(lo, lo, hi * hi), axis=1) / DIM + eps)
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
    READ_WIDTH: tl.constexpr, READ_BLOCK: tl.constexpr, PRECISION: tl.constexpr, DENSE: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, HAS_RAW: tl.constexpr,
):  # fmt: skip
    """A program: TOKENS tokens, up to TURNS heads of one kind. Kinds to which nothing is done have no groups."""
    GROUPS: tl.constexpr = Q_GROUPS + K_GROUPS + V_GROUPS
    group = tl.program_id(0) % GROUPS
    token = tl.program_id(0) // GROUPS * TOKENS + tl.arange(0, TOKENS)
    m_token = token < tokens
    b = (token // length).to(tl.int64)
    t = (token % length).to(tl.int64)
    p_x = x_ptr + b * stride_x_b + t * stride_x_t
    p_reads = reads_ptr
    if HAS_Q or HAS_K or HAS_V:
        p_reads += b * stride_r_b + t * stride_r_t
    p_cos, p_sin = cos_ptr, sin_ptr
    if ROTARY > 0:
        p_cos += b * stride_cos_b + t * stride_cos_t
        p_sin += b * stride_sin_b + t * stride_sin_t
    if Q_GROUPS > 0:
        if group < Q_GROUPS:
            first = group * TURNS
            steer_group(
                p_x, p_reads, q_ptr, q_norm_ptr, raw_ptr, p_cos, p_sin,
                m_token, first, tl.minimum(first + TURNS, Q), scale, scale_max, eps,
                stride_r_c, stride_q_n, stride_q_c, stride_q_norm, stride_cos_w, stride_sin_w,
                DIM, ROTARY, PAIRS, TOKENS, READ_WIDTH, READ_BLOCK, PRECISION, DENSE,
                HAS_Q, HAS_Q_NORM, ROTARY > 0, HAS_RAW,
            )  # fmt: skip
    if K_GROUPS > 0:
        if (group >= Q_GROUPS) & (group < Q_GROUPS + K_GROUPS):
            first = (group - Q_GROUPS) * TURNS
            steer_group(
                p_x + Q * DIM, p_reads, k_ptr, k_norm_ptr, raw_ptr + stride_raw if HAS_RAW else None, p_cos, p_sin,
                m_token, first, tl.minimum(first + TURNS, K), scale, scale_max, eps,
                stride_r_c, stride_k_n, stride_k_c, stride_k_norm, stride_cos_w, stride_sin_w,
                DIM, ROTARY, PAIRS, TOKENS, READ_WIDTH, READ_BLOCK, PRECISION, DENSE,
                HAS_K, HAS_K_NORM, ROTARY > 0, HAS_RAW,
            )  # fmt: skip
    if V_GROUPS > 0:
        if group >= Q_GROUPS + K_GROUPS:
            first = (group - Q_GROUPS - K_GROUPS) * TURNS
            steer_group(
                p_x + (Q + K) * DIM, p_reads, v_ptr, None, raw_ptr + 2 * stride_raw if HAS_RAW else None, None, None,
                m_token, first, tl.minimum(first + TURNS, V), scale, scale_max, eps,
                stride_r_c, stride_v_n, stride_v_c, 0, 0, 0,
                DIM, 0, PAIRS, TOKENS, READ_WIDTH, READ_BLOCK, PRECISION, DENSE,
                HAS_V, False, False, HAS_RAW,
            )  # fmt: skip


@triton.jit
def token_flag(p_x, p_mask, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, HAS_MASK: tl.constexpr):
    """1: the token counts. 2: it is unmasked, but not finite. 0: it is masked."""
    o_w = tl.arange(0, WIDTH_PAD)
    x = tl.load(p_x + o_w, mask=o_w < WIDTH, other=0.0).to(tl.float32)
    flag = tl.where(tl.sum(x * 0.0, axis=0) == 0.0, 1, 2)
    if HAS_MASK:
        flag = tl.where(tl.load(p_mask) != 0, flag, 0)
    return flag


@triton.jit
def state_tile(
    memory, first, HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    DENSE_STATE: tl.constexpr,
):  # fmt: skip
    """Places of the state's rows ``first`` to ``first`` + COLUMNS − 1, and which there are.

    memory: what a program needs of its row's memory, for every function here; see ``decode_kernel``.
    """
    _, _, _, _, p_state, stride_s_h, stride_s_i, stride_s_j, live = memory
    column = first + tl.arange(0, COLUMNS)
    m_live = (column < HEADS * RANK) & (column * 0 + live > 0)
    p_s = state_pointers(
        p_state + column * 0, column // RANK, column % RANK, stride_s_h, stride_s_i, stride_s_j, RANK, R, DENSE_STATE
    )  # fmt: skip
    return p_s, m_live[None, :] & (tl.arange(0, R) < RANK)[:, None], m_live


@triton.jit
def recall(
    memory, first, HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, WHOLE: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr, FROZEN: tl.constexpr, DENSE_STATE: tl.constexpr,
):  # fmt: skip
    """Columns ``first`` to ``first`` + COLUMNS − 1 → (their reads, their state after the token, the token's flag).

    The flag is 2 for a token that would leave NaN or Inf in these columns, too; then the reads are 0, here alone.
    The same operations in the same order as in ``step_kernel``, hence the same bits.
    """
    p_x, p_mask, bias_ptr, stride_bias, _, _, _, _, live = memory
    column = first + tl.arange(0, COLUMNS)
    h = column // RANK
    i = column % RANK
    m_column = column < HEADS * RANK
    p_s, m_tile, m_live = state_tile(memory, first, HEADS, RANK, R, COLUMNS, DENSE_STATE)
    s = tl.load(p_s, mask=m_tile, other=0.0)
    p_token = p_x + column * 0
    q = load_vector(p_token, h * RANK, 1, m_live, RANK, R, WHOLE)
    if not FROZEN:
        k = load_vector(p_token, (HEADS + h) * RANK, 1, m_live, RANK, R, WHOLE)
        v, beta, lam = load_write(p_token, h, i, 1, m_live, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
        beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    flag = tl.where(live > 0, token_flag(p_x, p_mask, WIDTH, WIDTH_PAD, HAS_MASK), 0)
    z, c = direction(q, NORMALIZE)
    read = dot(s, z) * c
    if not FROZEN:
        z, c = direction(k, NORMALIZE)
        keep, erase, write = gates(beta.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA)
        s = written(s, z, c, keep, erase, write * v.to(tl.float32))
        flag = tl.where((flag == 1) & (tl.sum(lost(s), axis=0) != 0.0), 2, flag)
    valid = column * 0 + flag == 1
    return tl.where(valid & m_live, read, 0.0), s, flag


@triton.jit
def remember(
    memory, first, s, flag, HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    DENSE_STATE: tl.constexpr,
):  # fmt: skip
    """Store columns of the state, if the token counts."""
    p_s, m_tile, _ = state_tile(memory, first, HEADS, RANK, R, COLUMNS, DENSE_STATE)
    column = first + tl.arange(0, COLUMNS)
    tl.store(p_s, s, mask=m_tile & (column * 0 + flag == 1)[None, :])


@triton.jit
def reads_block(read, p_scratch, block, READ_WIDTH: tl.constexpr, CHUNK: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """Reads ``block`` · CHUNK and following of this row, [CHUNK]."""
    if IN_REGISTERS:
        # All but one of the numbers added are 0: exact.
        rows = tl.reshape(read, [read.shape[0] // CHUNK, CHUNK])
        o_row = tl.arange(0, read.shape[0] // CHUNK)[:, None]
        return tl.sum(tl.where(o_row == block, rows, 0.0), axis=0)
    else:
        o_c = block * CHUNK + tl.arange(0, CHUNK)
        return tl.load(p_scratch + o_c, mask=o_c < READ_WIDTH, other=0.0)


@triton.jit
def load_weights(p_w, o_n, m_n, block, stride_w_n, stride_w_c, READ_WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Weights of one block of reads, raw, [numbers, CHUNK]."""
    o_c = block * CHUNK + tl.arange(0, CHUNK)
    p = p_w + o_n[:, None] * stride_w_n + o_c[None, :] * stride_w_c
    return tl.load(p, mask=m_n[:, None] & (o_c < READ_WIDTH)[None, :], other=0.0)


@triton.jit
def steer_unit(
    p_x, w_ptr, norm_ptr, raw_ptr, p_cos, p_sin, first, heads, scale, scale_max, eps,
    stride_w_n, stride_w_c, stride_norm, stride_cos_w, stride_sin_w,
    memory, known, p_scratch,
    DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, UNIT: tl.constexpr,
    READ_WIDTH: tl.constexpr, CHUNK: tl.constexpr, IN_REGISTERS: tl.constexpr, LATE: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, WHOLE: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr, FROZEN: tl.constexpr, DENSE_STATE: tl.constexpr, DENSE: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, HAS_RAW: tl.constexpr,
):  # fmt: skip
    """Heads ``first`` to ``first`` + UNIT − 1 of one kind and one token, all pairs in one row of numbers."""
    if DENSE:
        stride_w_n = READ_WIDTH
        stride_w_c = 1
    o = tl.arange(0, UNIT * PAIRS)
    o_j = o % PAIRS
    head = first + o // PAIRS
    m = (o_j < DIM // 2) & (head < heads)
    o_lo, o_hi = pairs(o_j, DIM, ROTARY)
    p_lo, p_hi = p_x + head * DIM + o_lo, p_x + head * DIM + o_hi
    x_lo = tl.load(p_lo, mask=m, other=0.0)
    x_hi = tl.load(p_hi, mask=m, other=0.0)
    if HAS_DELTA:
        p_w = w_ptr + first.to(tl.int64) * DIM * stride_w_n
        o_w = o // PAIRS * DIM
        w_lo = load_weights(p_w, o_w + o_lo, m, 0, stride_w_n, stride_w_c, READ_WIDTH, CHUNK)
        w_hi = load_weights(p_w, o_w + o_hi, m, 0, stride_w_n, stride_w_c, READ_WIDTH, CHUNK)
        if HAS_RAW:
            raw = tl.load(raw_ptr)
    if HAS_ROPE:
        cos_lo, sin_lo, cos_hi, sin_hi = load_turn(
            p_cos, p_sin, o_lo, o_hi, stride_cos_w, stride_sin_w, m & (o_j < ROTARY // 2)
        )
    if HAS_NORM:
        norm_lo = tl.load(norm_ptr + o_lo * stride_norm, mask=m, other=0.0)
        norm_hi = tl.load(norm_ptr + o_hi * stride_norm, mask=m, other=0.0)
    if LATE:
        known = recall(
            memory, 0, HEADS, RANK, R, COLUMNS, WIDTH, WIDTH_PAD, WHOLE,
            MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, HAS_MASK, FROZEN, DENSE_STATE,
        )  # fmt: skip
    lo, hi = x_lo.to(tl.float32), x_hi.to(tl.float32)
    if HAS_DELTA:
        reads = reads_block(known[0], p_scratch, 0, READ_WIDTH, CHUNK, IN_REGISTERS)
        d_lo = dot_rows(w_lo.to(tl.float32), reads[None, :])
        d_hi = dot_rows(w_hi.to(tl.float32), reads[None, :])
        for block in range(1, (READ_WIDTH + CHUNK - 1) // CHUNK):
            reads = reads_block(known[0], p_scratch, block, READ_WIDTH, CHUNK, IN_REGISTERS)
            w_lo = load_weights(p_w, o_w + o_lo, m, block, stride_w_n, stride_w_c, READ_WIDTH, CHUNK)
            w_hi = load_weights(p_w, o_w + o_hi, m, block, stride_w_n, stride_w_c, READ_WIDTH, CHUNK)
            d_lo += dot_rows(w_lo.to(tl.float32), reads[None, :])
            d_hi += dot_rows(w_hi.to(tl.float32), reads[None, :])
        by = scale
        if HAS_RAW:
            by = factor(raw, scale, scale_max)
        lo = tl.fma(d_lo, tl.zeros_like(d_lo) + by, lo)
        hi = tl.fma(d_hi, tl.zeros_like(d_hi) + by, hi)
    if HAS_NORM:
        square = tl.sum(tl.reshape(tl.fma(lo, lo, hi * hi), [UNIT, PAIRS]), axis=1, keep_dims=True)
        inverse = tl.reshape(tl.broadcast_to(tl.rsqrt(square / DIM + eps), [UNIT, PAIRS]), [UNIT * PAIRS])
        lo = lo * inverse * norm_lo.to(tl.float32)
        hi = hi * inverse * norm_hi.to(tl.float32)
    if HAS_ROPE:
        lo, hi = turned(lo, hi, cos_lo, sin_lo, cos_hi, sin_hi)
    tl.store(p_lo, lo.to(x_lo.dtype), mask=m)
    tl.store(p_hi, hi.to(x_hi.dtype), mask=m)
    return known


@triton.jit
def output_unit(
    p_delta, w_ptr, raw_ptr, first, n, scale, scale_max, stride_w_n, stride_w_c, memory, known, p_scratch,
    BLOCK: tl.constexpr, READ_WIDTH: tl.constexpr, CHUNK: tl.constexpr, IN_REGISTERS: tl.constexpr, LATE: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, WHOLE: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr, FROZEN: tl.constexpr, DENSE_STATE: tl.constexpr, DENSE: tl.constexpr,
    HAS_RAW: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of Δo = scale · c · W reads."""
    if DENSE:
        stride_w_n = READ_WIDTH
        stride_w_c = 1
    o = tl.arange(0, BLOCK)
    m = first + o < n
    p_w = w_ptr + first.to(tl.int64) * stride_w_n
    w = load_weights(p_w, o, m, 0, stride_w_n, stride_w_c, READ_WIDTH, CHUNK)
    if HAS_RAW:
        raw = tl.load(raw_ptr)
    if LATE:
        known = recall(
            memory, 0, HEADS, RANK, R, COLUMNS, WIDTH, WIDTH_PAD, WHOLE,
            MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, HAS_MASK, FROZEN, DENSE_STATE,
        )  # fmt: skip
    reads = reads_block(known[0], p_scratch, 0, READ_WIDTH, CHUNK, IN_REGISTERS)
    delta = dot_rows(w.to(tl.float32), reads[None, :])
    for block in range(1, (READ_WIDTH + CHUNK - 1) // CHUNK):
        reads = reads_block(known[0], p_scratch, block, READ_WIDTH, CHUNK, IN_REGISTERS)
        w = load_weights(p_w, o, m, block, stride_w_n, stride_w_c, READ_WIDTH, CHUNK)
        delta += dot_rows(w.to(tl.float32), reads[None, :])
    if HAS_RAW:
        scale = factor(raw, scale, scale_max)
    tl.store(p_delta + first + o, (scale * delta).to(p_delta.dtype.element_ty), mask=m)
    return known


@triton.jit
def decode_kernel(
    x_ptr, m_ptr, bias_ptr, s_ptr, slots_ptr, mask_ptr, reads_ptr, skipped_ptr, arrived_ptr, delta_ptr,
    q_ptr, k_ptr, v_ptr, o_ptr, raw_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr,
    batch, states, n, scale, scale_max, eps,
    stride_x_b, stride_bias, stride_mask_b, stride_skipped,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    stride_q_n, stride_q_c, stride_k_n, stride_k_c, stride_v_n, stride_v_c, stride_o_n, stride_o_c,
    stride_raw, stride_q_norm, stride_k_norm,
    stride_cos_b, stride_cos_t, stride_cos_w, stride_sin_b, stride_sin_t, stride_sin_w,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    PAIRS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    Q_UNITS: tl.constexpr, K_UNITS: tl.constexpr, V_UNITS: tl.constexpr, O_UNITS: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, WHOLE: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SKIPPED: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, HAS_RAW: tl.constexpr,
    PARTS: tl.constexpr, FROZEN: tl.constexpr, DENSE_STATE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """PARTS programs a row. Each computes the row's reads for itself, from the old state, and does its share of the
    units: UNIT heads, or BLOCK numbers of Δo.

    With one program, it also writes the state, which it alone reads. With several, all read the old state and one
    must replace it, and none may wait for another (nothing says that they run at the same time). So each announces
    that it is done with the old state by adding 1 to the row's count, and the one that finds PARTS − 1 there, the
    last, writes. Why no program can see the new state instead of the old one:

    - In a program, every thread's loads of the state come before ``debug_barrier``, and the barrier comes before the
      one thread's addition.
    - The addition is a release and an acquire at the scope of the GPU, on one location, and additions extend each
      other's release sequence: the last one to arrive synchronises with all the others.
    - Its result reaches the other threads of its program through shared memory and a barrier, and their stores to
      the state come after. So each load of the old state happens before each store of the new one.

    Whoever is last writes the same bits, from the same inputs: the result does not depend on the order of arrival.
    The last one also sets the count back to 0, for the next launch, which starts after this one has ended.
    """
    TILES: tl.constexpr = (HEADS * RANK + COLUMNS - 1) // COLUMNS
    READ_WIDTH: tl.constexpr = HEADS * RANK
    UNITS: tl.constexpr = Q_UNITS + K_UNITS + V_UNITS + O_UNITS
    IN_REGISTERS: tl.constexpr = TILES == 1
    # A program of one unit asks for its heads and weights first and computes the reads while they are on their way.
    LATE: tl.constexpr = IN_REGISTERS and PARTS == UNITS
    row = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    b = row.to(tl.int64)
    state_row = b
    if HAS_SLOTS:
        state_row = owned(tl.load(slots_ptr + row), states)
    live = tl.where(state_row >= 0, 1, 0)
    p_mask = m_ptr  # not None, which a tuple does not take
    if HAS_MASK:
        p_mask = mask_ptr + b * stride_mask_b
    memory = (
        m_ptr + b * stride_x_b, p_mask, bias_ptr, stride_bias,
        s_ptr + state_row * stride_s_n, stride_s_h, stride_s_i, stride_s_j, live,
    )  # fmt: skip
    p_x = x_ptr + b * stride_x_b
    p_cos, p_sin = cos_ptr, sin_ptr
    if ROTARY > 0:
        p_cos += b * stride_cos_b
        p_sin += b * stride_sin_b
    p_delta = delta_ptr
    if O_UNITS > 0:
        p_delta += b * n
    # Reads that registers do not hold: each program reads those that it has written itself.
    p_scratch = reads_ptr + b * READ_WIDTH
    if not IN_REGISTERS:
        p_scratch += part.to(tl.int64) * batch * READ_WIDTH

    # Alone with its row, a program writes the state as soon as it has read it, if it is in its registers as a whole.
    AT_ONCE: tl.constexpr = PARTS == 1 and not LATE and not FROZEN and IN_REGISTERS
    known = (tl.zeros([COLUMNS], tl.float32), tl.zeros([R, COLUMNS], tl.float32), live)
    if not LATE:
        flag = live * 0
        for first in tl.range(0, READ_WIDTH, COLUMNS, disable_licm=True):
            known = recall(
                memory, first, HEADS, RANK, R, COLUMNS, WIDTH, WIDTH_PAD, WHOLE,
                MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, HAS_MASK, FROZEN, DENSE_STATE,
            )  # fmt: skip
            if not IN_REGISTERS:
                o_c = first + tl.arange(0, COLUMNS)
                tl.store(p_scratch + o_c, known[0], mask=o_c < READ_WIDTH)
            if AT_ONCE:
                remember(memory, first, known[1], known[2], HEADS, RANK, R, COLUMNS, DENSE_STATE)
            flag = tl.maximum(flag, known[2])
        known = (known[0], known[1], flag)
        if not IN_REGISTERS:
            if flag == 2:
                # What some of the columns have read is taken back.
                tl.debug_barrier()
                for first in tl.range(0, READ_WIDTH, COLUMNS, disable_licm=True):
                    o_c = first + tl.arange(0, COLUMNS)
                    tl.store(p_scratch + o_c, tl.zeros([COLUMNS], tl.float32), mask=o_c < READ_WIDTH)
            tl.debug_barrier()

    # Nothing is hoisted out of these loops: addresses of all four kinds of units would fill the registers.
    turns = 1 if LATE else (UNITS - 1 - part) // PARTS + 1
    for turn in tl.range(0, turns, disable_licm=True):
        unit = part + turn * PARTS
        if Q_UNITS > 0 and unit < Q_UNITS:
            known = steer_unit(
                p_x, q_ptr, q_norm_ptr, raw_ptr, p_cos, p_sin, unit * UNIT, Q, scale, scale_max, eps,
                stride_q_n, stride_q_c, stride_q_norm, stride_cos_w, stride_sin_w, memory, known, p_scratch,
                DIM, ROTARY, PAIRS, UNIT, READ_WIDTH, CHUNK, IN_REGISTERS, LATE, HEADS, RANK, R, COLUMNS,
                WIDTH, WIDTH_PAD, WHOLE, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, HAS_MASK, FROZEN, DENSE_STATE, DENSE,
                HAS_Q, HAS_Q_NORM, ROTARY > 0, HAS_RAW,
            )  # fmt: skip
        elif K_UNITS > 0 and unit < Q_UNITS + K_UNITS:
            known = steer_unit(
                p_x + Q * DIM, k_ptr, k_norm_ptr, raw_ptr + stride_raw if HAS_RAW else None, p_cos, p_sin,
                (unit - Q_UNITS) * UNIT, K, scale, scale_max, eps,
                stride_k_n, stride_k_c, stride_k_norm, stride_cos_w, stride_sin_w, memory, known, p_scratch,
                DIM, ROTARY, PAIRS, UNIT, READ_WIDTH, CHUNK, IN_REGISTERS, LATE, HEADS, RANK, R, COLUMNS,
                WIDTH, WIDTH_PAD, WHOLE, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, HAS_MASK, FROZEN, DENSE_STATE, DENSE,
                HAS_K, HAS_K_NORM, ROTARY > 0, HAS_RAW,
            )  # fmt: skip
        elif V_UNITS > 0 and unit < Q_UNITS + K_UNITS + V_UNITS:
            known = steer_unit(
                p_x + (Q + K) * DIM, v_ptr, None, raw_ptr + 2 * stride_raw if HAS_RAW else None, None, None,
                (unit - Q_UNITS - K_UNITS) * UNIT, V, scale, scale_max, eps,
                stride_v_n, stride_v_c, 0, 0, 0, memory, known, p_scratch,
                DIM, 0, PAIRS, UNIT, READ_WIDTH, CHUNK, IN_REGISTERS, LATE, HEADS, RANK, R, COLUMNS,
                WIDTH, WIDTH_PAD, WHOLE, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, HAS_MASK, FROZEN, DENSE_STATE, DENSE,
                HAS_V, False, False, HAS_RAW,
            )  # fmt: skip
        elif O_UNITS > 0:
            known = output_unit(
                p_delta, o_ptr, raw_ptr + 3 * stride_raw if HAS_RAW else None,
                (unit - Q_UNITS - K_UNITS - V_UNITS) * BLOCK, n, scale, scale_max,
                stride_o_n, stride_o_c, memory, known, p_scratch,
                BLOCK, READ_WIDTH, CHUNK, IN_REGISTERS, LATE, HEADS, RANK, R, COLUMNS,
                WIDTH, WIDTH_PAD, WHOLE, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, HAS_MASK, FROZEN, DENSE_STATE, DENSE,
                HAS_RAW,
            )  # fmt: skip

    if IN_REGISTERS:
        if part == 0:
            o_c = tl.arange(0, COLUMNS)
            tl.store(p_scratch + o_c, known[0], mask=o_c < READ_WIDTH)
    if not FROZEN:
        last = part == 0
        if PARTS > 1:
            tl.debug_barrier()
            last = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu") == PARTS - 1
        if last:
            if IN_REGISTERS and not AT_ONCE:
                remember(memory, 0, known[1], known[2], HEADS, RANK, R, COLUMNS, DENSE_STATE)
            elif not AT_ONCE:
                for first in tl.range(0, READ_WIDTH, COLUMNS, disable_licm=True):
                    _, s, _ = recall(
                        memory, first, HEADS, RANK, R, COLUMNS, WIDTH, WIDTH_PAD, WHOLE,
                        MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, HAS_MASK, FROZEN, DENSE_STATE,
                    )  # fmt: skip
                    remember(memory, first, s, known[2], HEADS, RANK, R, COLUMNS, DENSE_STATE)
            if HAS_SKIPPED:
                # No state is given to two rows, so nobody else touches this count.
                p_skipped = skipped_ptr + state_row * stride_skipped
                if known[2] == 2:
                    tl.store(p_skipped, tl.load(p_skipped) + 1)
            if PARTS > 1:
                tl.store(arrived_ptr + row, 0)


def _check(packed: torch.Tensor, steering: Steering, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    check_device(packed)
    check_reach("packed", packed, 1)
    half_or_single("packed", packed)
    named = {"cos": cos, "sin": sin, "q": steering.q, "k": steering.k, "v": steering.v, "o": steering.o}
    named |= {"q_norm": steering.q_norm, "k_norm": steering.k_norm, "scale_raw": steering.scale_raw}
    for name, tensor in named.items():
        if tensor is not None:
            half_or_single(name, tensor)
            # Rows and tokens of the tables have 64-bit offsets.
            check_reach(name, tensor, 1 if name in ("cos", "sin") else tensor.ndim)
    check_together("packed", packed, **named)


def _arguments(layout: HeadLayout, steering: Steering, cos: torch.Tensor | None, sin: torch.Tensor | None) -> dict:
    """What both kernels take alike."""
    found: dict = {"raw_ptr": steering.scale_raw, "cos_ptr": cos, "sin_ptr": sin}
    found |= {"scale": float(steering.scale), "scale_max": float(steering.scale_max), "eps": float(steering.eps)}
    # Rows of weights that lie end to end have a length that the compiler knows, hence the alignment of each.
    weights = [getattr(steering, head) for head in "qkvo"]
    found["DENSE"] = all(w is None or w.is_contiguous() for w in weights)
    # One raw for all heads is one raw each, a stride of 0 apart.
    raw = steering.scale_raw
    found["stride_raw"] = raw.stride(0) if raw is not None and raw.numel() == 4 else 0
    for head in "qkv":
        weight = getattr(steering, head)
        found |= {f"{head}_ptr": weight, f"HAS_{head.upper()}": weight is not None}
        for name, stride in zip("nc", weight.stride() if weight is not None else (0, 0)):
            found[f"stride_{head}_{name}"] = stride
    for name in ("q_norm", "k_norm"):
        weight = getattr(steering, name)
        found |= {f"{name}_ptr": weight, f"HAS_{name.upper()}": weight is not None}
        found[f"stride_{name}"] = weight.stride(0) if weight is not None else 0
    for name, tensor in (("cos", cos), ("sin", sin)):
        b, t, w = tensor.stride() if tensor is not None else (0, 0, 0)
        found |= {f"stride_{name}_b": b if tensor is not None and tensor.shape[0] > 1 else 0}
        found |= {f"stride_{name}_t": t, f"stride_{name}_w": w}
    return found | {
        "Q": layout.q, "K": layout.k, "V": layout.v, "DIM": layout.dim, "ROTARY": layout.rotary,
        "PAIRS": next_power_of_two(layout.dim // 2), "HAS_RAW": raw is not None,
    }  # fmt: skip


def _heads(layout: HeadLayout, steering: Steering) -> tuple[int, int, int]:
    """How many q, k and v heads have something done to them."""
    q = layout.rotary or steering.q is not None or steering.q_norm is not None
    k = layout.rotary or steering.k is not None or steering.k_norm is not None
    return layout.q if q else 0, layout.k if k else 0, layout.v if steering.v is not None else 0


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
        _check(packed, steering, cos, sin)
        half_or_single("reads", reads)
        check_together("packed", packed, reads=reads)
        check_reach("reads", reads, 1)
        if reads.shape[:-1] != packed.shape[:-1]:
            raise ArgumentError(
                f"reads: got shape {list(reads.shape)}, allowed {[*packed.shape[:-1], reads.shape[-1]]}"
            )
    heads = _heads(layout, steering)
    tokens = packed.shape[0] * packed.shape[1]
    if tokens == 0 or sum(heads) == 0:
        return
    blocks = triton.cdiv(tokens, TOKENS)
    turns = min(HEADS_IN_TURN, max(2, blocks * sum(heads) // 1024))
    groups = [triton.cdiv(n, turns) for n in heads]
    arguments = _arguments(layout, steering, cos, sin)
    # 16 bytes of a 16-bit tile are a thread's.
    launch(
        steer_heads_kernel, blocks * sum(groups), packed, num_warps=max(1, min(16, arguments["PAIRS"] // 16)),
        x_ptr=packed, reads_ptr=reads, tokens=tokens, length=packed.shape[1],
        stride_x_b=packed.stride(0), stride_x_t=packed.stride(1),
        stride_r_b=reads.stride(0), stride_r_t=reads.stride(1), stride_r_c=reads.stride(2),
        TOKENS=TOKENS, TURNS=turns, Q_GROUPS=groups[0], K_GROUPS=groups[1], V_GROUPS=groups[2],
        READ_WIDTH=reads.shape[-1], READ_BLOCK=READ_BLOCK,
        PRECISION=matrix_precision(),
        **arguments,
    )  # fmt: skip


def decode_(
    packed: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    layout: HeadLayout,
    steering: Steering,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    skipped: torch.Tensor | None = None,
    arrived: torch.Tensor | None = None,
    frozen: bool = False,
    check: bool = True,
    prepared: dict | None = None,
    parts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One decoded token per row: read, write, and the heads corrected, normalised and rotated. Not differentiable.

        read = S q,   S <- diag(keep) S − diag(erase) (S k) kᵀ + diag(write) v kᵀ
        x <- RoPE(rms_norm(x + scale · c · W read))

    Args:
        packed: bfloat16, float16 or float32 [B, N], last stride 1: q, k, v (changed in place), then the memory's W
            projections, raw. Heads to which nothing is done are neither read nor written.
        gate_bias: [β's (and λ's) biases], of any floating dtype up to float32; not used if frozen.
        state: float32 [B, H, r, r], of any strides, or [S, H, r, r] with ``slots``; changed in place.
        rule: the recurrence.
        layout: which heads lie where.
        steering: corrections and norms.
        cos, sin: [B or 1, 1, rotary], of any floating dtype up to float32, or None without RoPE.
        mask: bool [B], True = a real token. A masked token reads 0 and leaves the state bit-equal; so does a
            token one of whose projections is not finite, and one that would leave NaN or Inf in the state of any
            memory head. Its heads are steered all the same, with reads of 0.
        slots: int [B], which row of ``state`` each token belongs to, no row twice; −1 = reads 0, writes nothing.
        skipped: int32 with a row per row of ``state``, or None; incremented where an unmasked token was not written
            because it, or the state after it, is not finite.
        arrived: int32 [B], contiguous zeros, or None; zero again afterwards. With it, a few rows are spread over many
            programs (see ``decode_kernel``); no other launch may use it at the same time.
        frozen: read only; state, skipped and arrived stay as they are.
        check: as in ``steer_heads_``.
        prepared: not used here.
        parts: programs per row, None to choose (tests set it).

    Returns:
        reads, float32 [B, H·r], the bits that ``step`` (``read`` if frozen) gives, and Δo = scale · c · W_o reads in
        packed's dtype, [B, N_o], or None without ``o``.

    Raises:
        ValueError, TypeError: see ``check_arguments`` and ``layout.check_heads``; a float64 tensor; tensors that
            are not on a GPU.
    """
    if check:
        _check_decode(packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, arrived)
    batch = packed.shape[0]
    if slots is not None:
        slots = slots.contiguous()
    rows = packed.narrow(1, layout.width, rule.width)
    weights = steering.q, steering.k, steering.v, steering.o, steering.q_norm, steering.k_norm, steering.scale_raw
    key = (
        rule, layout, packed.device, batch, packed.stride(0), whole_keys(rule, rows), frozen, parts,
        steering.scale, steering.scale_max, steering.eps,
        *((None if t is None else (t.dtype, *t.shape, *t.stride())) for t in (cos, sin, *weights)),
        *((None if t is None else (t.dtype, *t.stride())) for t in (packed, gate_bias, state, mask, slots, skipped)),
        arrived is None, None if slots is None else state.shape[0],
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= PLANS:
            _plans.clear()
        plan = _plans[key] = _Plan(
            packed, rows, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, arrived, frozen,
            parts,
        )  # fmt: skip
    reads = _launch.empty((plan.scratch, batch, rule.read_width), dtype=torch.float32, device=packed.device)
    addend = None
    if steering.o is not None:
        addend = _launch.empty((batch, steering.o.shape[0]), dtype=packed.dtype, device=packed.device)
    if batch:
        plan.launch(
            packed, rows, gate_bias, state, slots, None if mask is None else mask.view(torch.uint8), reads,
            None if frozen else skipped, arrived if plan.parts > 1 else None, addend, cos, sin, *weights,
        )  # fmt: skip
    return reads[0], addend


# What a launch takes besides its tensors, by everything that it follows from.
_plans: dict[tuple, _Plan] = {}


def _check_decode(packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, arrived) -> None:
    check_heads(packed, layout, steering, cos, sin, rule.read_width, rule)
    _check(packed, steering, cos, sin)
    rows = packed[:, layout.width : layout.width + rule.width]
    check_arguments(rows, gate_bias, state, rule, mask=mask, slots=slots)
    float32_only("state", state)
    half_or_single("gate_bias", gate_bias)
    check_reach("gate_bias", gate_bias, 1)
    check_together("packed", packed, skipped=skipped, arrived=arrived)
    for name, counts, length in (("skipped", skipped, state.shape[0]), ("arrived", arrived, packed.shape[0])):
        if counts is not None and (counts.dtype != torch.int32 or tuple(counts.shape) != (length,)):
            raise ValueError(f"{name}: got {counts.dtype} {list(counts.shape)}, allowed int32 [{length}]")
    if arrived is not None and not arrived.is_contiguous():
        raise ArgumentError(f"arrived: got a stride of {arrived.stride(0)}, allowed 1")


class _Plan:
    """The launch of ``decode_kernel`` for tensors of given shapes, strides and dtypes; ``launch`` adds the tensors.

    Attributes:
        arguments: all but the tensors.
        parts, warps, registers: programs per row, warps of each, registers of a thread (see ``launch``).
        scratch: rows of reads that it needs; programs whose reads do not fit into registers keep them there, each its
            own; all the same, the first's are returned.
    """

    TENSORS = (
        "x_ptr", "m_ptr", "bias_ptr", "s_ptr", "slots_ptr", "mask_ptr", "reads_ptr", "skipped_ptr", "arrived_ptr",
        "delta_ptr", "cos_ptr", "sin_ptr", "q_ptr", "k_ptr", "v_ptr", "o_ptr", "q_norm_ptr", "k_norm_ptr", "raw_ptr",
    )  # fmt: skip

    def __init__(
        self, packed, rows, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, arrived, frozen,
        parts,
    ):  # fmt: skip
        batch = packed.shape[0]
        outputs = 0 if steering.o is None else steering.o.shape[0]
        arguments = _arguments(layout, steering, cos, sin)
        count = _heads(layout, steering)
        pairs = arguments["PAIRS"]
        units = sum(count) + triton.cdiv(outputs, pairs)
        if parts is None:
            # One head a program while they all fit on the device at once.
            parts = min(units, PROGRAMS // max(batch, 1)) if batch < ALONE else 1
        if parts > 1 and arrived is None and not frozen:
            parts = 1
        self.parts = parts = max(1, parts)
        # A program that has a row to itself has as many threads for it as eight (or four) of the others.
        self.warps = warps = 1 if parts > 1 else 8 if rule.rank <= 16 else 4
        self.programs = batch * parts
        self.registers = None if rule.read_width <= 16 else MOST_REGISTERS
        count = [triton.cdiv(n, warps) for n in count]
        _, cols = tile(rule)
        cols *= warps
        self.scratch = 1 if rule.read_width <= cols else parts
        arguments |= state_strides(state)
        arguments |= rule_flags(rule, rows)
        arguments |= {
            "batch": batch, "states": state.shape[0] if slots is not None else 0, "n": outputs,
            "stride_x_b": packed.stride(0), "stride_bias": gate_bias.stride(0),
            "stride_mask_b": mask.stride(0) if mask is not None else 0,
            "stride_skipped": skipped.stride(0) if skipped is not None else 0,
            "stride_o_n": steering.o.stride(0) if outputs else 0, "stride_o_c": steering.o.stride(1) if outputs else 0,
            "UNIT": warps, "BLOCK": warps * pairs, "CHUNK": min(8, next_power_of_two(rule.read_width)),
            "Q_UNITS": count[0], "K_UNITS": count[1], "V_UNITS": count[2],
            "O_UNITS": triton.cdiv(outputs, warps * pairs),
            "COLUMNS": cols, "WIDTH": rule.width, "WIDTH_PAD": next_power_of_two(rule.width),
            "HAS_SLOTS": slots is not None, "HAS_MASK": mask is not None,
            "HAS_SKIPPED": skipped is not None and not frozen, "PARTS": parts, "FROZEN": frozen,
        }  # fmt: skip
        self.arguments = {name: value for name, value in arguments.items() if name not in self.TENSORS}
        names = [parameter.name for parameter in decode_kernel.params] if hasattr(decode_kernel, "params") else []
        self._values = [self.arguments.get(name) for name in names]
        self._places = [names.index(name) for name in self.TENSORS] if names else []
        self._compiled: dict[tuple, object] = {}

    def launch(self, *tensors: torch.Tensor | None) -> None:
        """Launch with the tensors in the order of TENSORS."""
        known = compiler_sees(tensors)
        compiled = self._compiled.get(known)
        if compiled is None:
            self._compiled[known] = launch(
                decode_kernel, self.programs, tensors[0], num_warps=self.warps, registers=self.registers,
                **dict(zip(self.TENSORS, tensors)), **self.arguments,
            )  # fmt: skip
            return
        values = self._values.copy()
        for place, tensor in zip(self._places, tensors):
            values[place] = tensor
        launch_again(compiled, self.programs, tensors[0], values)
