"""The gradient of the raw projections, of tokens whose states and gradients at the bounds of their block are known.

See ``scan_backward``, which launches this kernel, for the equations.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..rule import DeltaRule
from . import launch as _launch
from .chunk_scan_backward import checkpoint_gradient, checkpoints_before, run_token, run_tokens
from .launch import next_power_of_two
from .primitives import (
    across,
    columns,
    delta_update,
    direction,
    direction_backward,
    dot,
    gates_backward,
    group_sum,
    held_gates,
    held_value,
    held_value_backward,
    load_bias,
    load_vector,
    load_write,
    locate_chunk,
    open_gates,
    owned,
)


@triton.jit
def run_to_part(
    s, g, p_x, p_flag, p_d, p_checkpoint, passed, first, rest, count, h, i, beta_bias, lambda_bias, every,
    stride_x_t, stride_x_w, stride_d_t,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr, ROW_GATES: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    WHOLE: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr,
):  # fmt: skip
    """Take s up through tokens 0 to ``first`` − 1, then g down through ``count`` − 1 to ``rest`` → (s, g).

    One loop for both: every part of a block has as far to go, so the parts can be warps of one program.
    """
    o_q = h * RANK
    o_k = (HEADS + h) * RANK
    Q_WAITS: tl.constexpr = R <= 8 or not HAS_CHECKPOINTS  # see run_tokens
    total = first + count - rest
    steps = tl.max(total, axis=0)
    t = tl.where(first > 0, 0, count - 1)
    m = total > 0
    down = first <= 0
    p_now = p_x + t.to(tl.int64) * stride_x_t
    q = load_vector(p_now, o_q, stride_x_w, m & down, RANK, R, WHOLE)  # [R, COLUMNS]
    k = load_vector(p_now, o_k, stride_x_w, m, RANK, R, WHOLE)  # [R, COLUMNS]
    v, b, lam = load_write(p_now, h, i, stride_x_w, m, HEADS, RANK, ROW_GATES, HAS_LAMBDA)  # [COLUMNS] each
    d = tl.load(p_d + t.to(tl.int64) * stride_d_t, mask=m & down, other=0.0)  # [COLUMNS]
    flag = tl.load(p_flag + t, mask=m, other=0)  # [COLUMNS]
    for n in range(steps):
        if not Q_WAITS:
            q = load_vector(p_now, o_q, stride_x_w, (n < total) & down, RANK, R, WHOLE)
        # The next token is on its way while this one is computed.
        m_next = n + 1 < total
        down_next = n + 1 >= first
        t_next = tl.where(down_next, count - 1 - (n + 1 - first), n + 1)
        p_now = p_x + t_next.to(tl.int64) * stride_x_t
        q_next = q
        if Q_WAITS:
            q_next = load_vector(p_now, o_q, stride_x_w, m_next & down_next, RANK, R, WHOLE)
        k_next = load_vector(p_now, o_k, stride_x_w, m_next, RANK, R, WHOLE)
        v_next, b_next, lam_next = load_write(p_now, h, i, stride_x_w, m_next, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
        d_next = tl.load(p_d + t_next.to(tl.int64) * stride_d_t, mask=m_next & down_next, other=0.0)
        flag_next = tl.load(p_flag + t_next, mask=m_next, other=0)

        turns = (n == first)[None, :]
        s, g = tl.where(turns, g, s), tl.where(turns, s, g)
        if HAS_CHECKPOINTS:
            s += checkpoint_gradient(p_checkpoint, passed + t + 1, every, down & (n < total), HEADS, RANK, R)
        s = run_token(
            s, q, k, v, b, lam, d, flag, down == 0, beta_bias, lambda_bias, R,
            MODE, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
        )  # fmt: skip
        q, k, v, b, lam, d, flag = q_next, k_next, v_next, b_next, lam_next, d_next, flag_next
        t, down = t_next, down_next
    # The column that is taken on is s, which at its turn changes places with g.
    turned = (first < steps)[None, :]
    return tl.where(turned, g, s), tl.where(turned, s, g)


@triton.jit
def projection_gradient_kernel(
    x_ptr, bias_ptr, slots_ptr, flags_ptr, d_reads_ptr, d_checkpoints_ptr, bounds_ptr, d_x_ptr, d_bias_ptr,
    cu_ptr, block_sequence_ptr, block_first_ptr, checkpoint_first_ptr,
    total_groups, states, blocks, padded_blocks, length, blocks_per_sequence, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_d_b, stride_d_t, stride_d_c,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    WHOLE: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr, IS_PACKED: tl.constexpr,
    WIDTH: tl.constexpr, SPACING: tl.constexpr, PART: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Rows of the projections' gradient, and d_bias[program, :, :], the sums of the gates' over the program's tokens.

    Equals autograd's gradients of ``reference.recurrence.scan``.

    A head is R columns here, a power of two, so that its rows are neighbours within a warp. A program is one head and
    TOGETHER parts of several blocks, as many as ``padded_blocks`` is a multiple of: all have as far to go, and the
    parts of a block start from the same bounds.
    """
    BLOCKS: tl.constexpr = COLUMNS // R // TOGETHER
    PARTS: tl.constexpr = SPACING // PART
    group, i, m_column = columns(total_groups, R, COLUMNS)  # [COLUMNS] each
    rest = group // BLOCKS
    part = rest % PARTS
    rest = rest // PARTS
    block = rest % (padded_blocks // BLOCKS) * BLOCKS + group % BLOCKS
    h = rest // (padded_blocks // BLOCKS)
    m_column = m_column & (i < RANK) & (block < blocks)
    sequence, here, row, begin, count = locate_chunk(
        block, m_column, length, SPACING, blocks_per_sequence,
        cu_ptr, block_sequence_ptr, block_first_ptr, IS_PACKED,
    )  # fmt: skip
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    m_row = (m_column & (count > 0))[None, :] & (o_j < RANK)
    p_bound = bounds_ptr + (block.to(tl.int64) * HEADS + h) * (2 * RANK * RANK) + i * RANK
    s = tl.load(p_bound[None, :] + o_j, mask=m_row, other=0.0)  # [R, COLUMNS]
    g = tl.load(p_bound[None, :] + RANK * RANK + o_j, mask=m_row, other=0.0)  # [R, COLUMNS]
    live = m_column
    if HAS_SLOTS:
        live = m_column & (owned(tl.load(slots_ptr + sequence, mask=m_column, other=-1), states) >= 0)
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    p_x = x_ptr + row.to(tl.int64) * stride_x_b + begin.to(tl.int64) * stride_x_t
    p_flag = flags_ptr + row.to(tl.int64) * length + begin
    p_d = d_reads_ptr + row.to(tl.int64) * stride_d_b + begin.to(tl.int64) * stride_d_t
    p_d += (h * RANK + i).to(tl.int64) * stride_d_c
    p_checkpoint = d_checkpoints_ptr
    if HAS_CHECKPOINTS:
        checkpoint = checkpoints_before(sequence, length, every, checkpoint_first_ptr, m_column, IS_PACKED)
        p_checkpoint += ((checkpoint * HEADS + h) * RANK + i) * RANK
    first = tl.minimum(part * PART, count)
    own = tl.minimum(count - first, PART)
    passed = here * SPACING
    if SPACING > PART and TOGETHER == 1:
        s = run_tokens(
            s, m_column, m_column, p_x, p_flag, p_d, p_checkpoint, bounds_ptr, passed, first, h, i,
            beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
            HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
            WHOLE, HAS_CHECKPOINTS, 0,
        )  # fmt: skip
        rest = first + own
        g = run_tokens(
            g, m_column & False, m_column, p_x + rest.to(tl.int64) * stride_x_t, p_flag + rest,
            p_d + rest.to(tl.int64) * stride_d_t, p_checkpoint, bounds_ptr, passed + rest, count - rest, h, i,
            beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
            HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
            WHOLE, HAS_CHECKPOINTS, 0,
        )  # fmt: skip
    elif SPACING > PART:
        s, g = run_to_part(
            s, g, p_x, p_flag, p_d, p_checkpoint, passed, first, first + own, count, h, i,
            beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
            HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
            WHOLE, HAS_CHECKPOINTS,
        )  # fmt: skip
    p_x += first.to(tl.int64) * stride_x_t
    p_flag += first
    p_d += first.to(tl.int64) * stride_d_t
    p_row = d_x_ptr + (row.to(tl.int64) * length + begin + first) * WIDTH
    o_q = h * RANK
    o_k = (HEADS + h) * RANK
    o_v = (2 * HEADS + h) * RANK + i
    if ROW_GATES:
        o_beta = (3 * HEADS + h) * RANK + i
        o_lambda = (4 * HEADS + h) * RANK + i
        m_gate = m_column
    else:
        o_beta = 3 * HEADS * RANK + h
        o_lambda = 3 * HEADS * RANK + HEADS + h
        m_gate = m_column & (i == 0)

    held = ()
    for n in tl.static_range(PART):
        m = n < own
        k = load_vector(p_x, o_k, stride_x_w, m, RANK, R, WHOLE)  # [R, COLUMNS]
        v, b, lam = load_write(p_x, h, i, stride_x_w, m, HEADS, RANK, ROW_GATES, HAS_LAMBDA)  # [COLUMNS] each
        v = v.to(tl.float32)
        flag = tl.load(p_flag + n, mask=m, other=0)  # [COLUMNS]
        open_keep, beta = open_gates(
            b.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA, BETA_MAX
        )
        keep, erase, write = held_gates(open_keep, beta, MODE, BETA_MAX, KEEP_MAX)
        z, c = direction(k, NORMALIZE)  # [R, COLUMNS], [COLUMNS]
        held = held + ((s, z, c, v, open_keep, beta, flag),)
        # One stride after another: the pointers are 64 bits wide, n strides may not fit 32.
        p_x += stride_x_t
        p_d += stride_d_t
        if n + 1 < PART:
            s = tl.where((flag == 1)[None, :], delta_update(s, z, c, keep, erase, write * held_value(v, VALUE_MAX)), s)

    d_beta_bias = tl.zeros([COLUMNS], tl.float32)
    d_lambda_bias = tl.zeros([COLUMNS], tl.float32)
    mine = o_j == i[None, :]  # [R, COLUMNS]
    kind: tl.constexpr = d_x_ptr.dtype.element_ty
    for n in tl.static_range(PART - 1, -1, -1):
        s, z_k, c_k, v, open_keep, beta, flag = held[n]
        keep, erase, write = held_gates(open_keep, beta, MODE, BETA_MAX, KEEP_MAX)
        held_v = held_value(v, VALUE_MAX)
        m = n < own
        valid = (flag == 1) & live
        p_x -= stride_x_t
        p_d -= stride_d_t
        q = load_vector(p_x, o_q, stride_x_w, m, RANK, R, WHOLE)  # [R, COLUMNS]
        d = tl.load(p_d, mask=m & m_column, other=0.0).to(tl.float32)  # [COLUMNS]
        z_q, c_q = direction(q, NORMALIZE)  # [R, COLUMNS], [COLUMNS]
        if HAS_CHECKPOINTS:
            g += checkpoint_gradient(p_checkpoint, passed + first + n + 1, every, m & m_column, HEADS, RANK, R)

        along = dot(s, z_k) * c_k  # [COLUMNS]
        u = tl.fma(-erase, along, write * held_v)
        d_u = dot(g, z_k) * c_k  # [COLUMNS]
        d_along = -erase * d_u
        d_keep = dot(g, s)  # [COLUMNS]
        d_q = direction_backward(group_sum(s * d[None, :], R), z_q, c_q, NORMALIZE)  # [R, COLUMNS]
        d_k = direction_backward(group_sum(tl.fma(g, across(u, R), s * d_along[None, :]), R), z_k, c_k, NORMALIZE)
        d_beta, d_lambda = gates_backward(
            open_keep, beta, d_keep, -along * d_u, held_v * d_u, MODE, HAS_LAMBDA, BETA_MAX, KEEP_MAX
        )
        d_beta = tl.where(valid, d_beta, 0.0)
        d_lambda = tl.where(valid, d_lambda, 0.0)
        if not ROW_GATES:
            d_beta = tl.sum(group_sum(d_beta[None, :], R), axis=0)
            d_lambda = tl.sum(group_sum(d_lambda[None, :], R), axis=0)
        d_beta_bias += d_beta
        d_lambda_bias += d_lambda

        p_out = p_row + n * WIDTH
        m_out = m & m_column
        # Every thread of a head has all of dq and dk; each stores its own.
        d_q = tl.where(valid, tl.sum(tl.where(mine, d_q, 0.0), axis=0), 0.0)
        d_k = tl.where(valid, tl.sum(tl.where(mine, d_k, 0.0), axis=0), 0.0)
        tl.store(p_out + o_q + i, d_q.to(kind), mask=m_out)
        tl.store(p_out + o_k + i, d_k.to(kind), mask=m_out)
        tl.store(p_out + o_v, tl.where(valid, held_value_backward(write * d_u, v, VALUE_MAX), 0.0).to(kind), mask=m_out)
        tl.store(p_out + o_beta, d_beta.to(kind), mask=m & m_gate)
        if HAS_LAMBDA:
            tl.store(p_out + o_lambda, d_lambda.to(kind), mask=m & m_gate)
        if n > 0:
            before = tl.fma(across(d_along * c_k, R), z_k, keep[None, :] * g)
            before = tl.fma(across(d * c_q, R), z_q, before)
            g = tl.where(valid[None, :], before, g)

    KINDS: tl.constexpr = 2 if HAS_LAMBDA else 1
    p_bias = d_bias_ptr + tl.program_id(0).to(tl.int64) * (KINDS * R) + tl.arange(0, R)
    tl.store(p_bias, tl.sum(tl.reshape(d_beta_bias, [COLUMNS // R, R]), axis=0))
    if HAS_LAMBDA:
        tl.store(p_bias + R, tl.sum(tl.reshape(d_lambda_bias, [COLUMNS // R, R]), axis=0))


def token_tile(rule: DeltaRule) -> tuple[int, int]:
    """Columns and warps of a program of ``projection_gradient_kernel``: whole heads, and 8 numbers of a tile for each
    thread (at r = 64 16, and 4 on AMD, whose scalar registers hold the masks), of which it has a dozen tiles."""
    rows = next_power_of_two(rule.rank)
    cols = max(rows, min(_launch.WARP, 8 * _launch.WARP // rows))
    numbers = max(8, rows // 4) if _launch.WARP == 32 else 4 if rows == 64 else 8
    return cols, max(1, rows * cols // (numbers * _launch.WARP))


def parts_together(rule: DeltaRule, parts: int) -> int:
    """Parts of a block in one program of ``projection_gradient_kernel``: the bounds that they share then lie in L1.

    Above r = 8 the one loop that they need for both ways has too few registers.
    """
    return math.gcd(parts, 4) if rule.rank <= 8 else 1
