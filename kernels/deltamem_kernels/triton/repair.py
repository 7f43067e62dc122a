"""A sequence taken once more, token by token, where a scan has left a state that is not finite."""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_scan import BROKEN
from .primitives import (
    delta_update,
    direction,
    dot,
    gates,
    held_value,
    load_bias,
    load_vector,
    load_write,
    owned,
    state_pointers,
    zero_or_nan,
)


@triton.jit
def repair_kernel(
    x_ptr, bias_ptr, s_ptr, slots_ptr, mask_ptr, flags_ptr, cu_ptr, checkpoint_first_ptr,
    reads_ptr, final_ptr, skipped_ptr, checkpoints_ptr,
    states, length, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_mask_b, stride_mask_t,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, WHOLE: tl.constexpr, DENSE_STATE: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_CHECKPOINTS: tl.constexpr, IS_PACKED: tl.constexpr, IS_CHUNKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence, which leaves at once where all states are finite. Else the sequence from its first token
    on; the state lies in ``final`` meanwhile. HAS_FLAGS: what a token is found to be is noted there, too.

    Equals ``reference.recurrence.scan``, by ``all_finite`` there.
    """
    sequence = tl.program_id(0)
    p_final = final_ptr + sequence.to(tl.int64) * (HEADS * RANK * RANK)
    last = tl.zeros([BLOCK], tl.float32)
    for first in range(0, HEADS * RANK * RANK, BLOCK):
        o = first + tl.arange(0, BLOCK)
        last += tl.load(p_final + o, mask=o < HEADS * RANK * RANK, other=0.0) * 0.0
    broken = tl.sum(last, axis=0) != 0.0
    if IS_CHUNKED:
        broken = broken | (tl.load(skipped_ptr + sequence) >= BROKEN)
    if broken:
        row = sequence
        begin = sequence * 0
        end = begin + length
        if IS_PACKED:
            row = sequence * 0
            begin = tl.load(cu_ptr + sequence).to(tl.int32)
            end = tl.minimum(tl.load(cu_ptr + sequence + 1).to(tl.int32), length)
        state_row = sequence.to(tl.int64)
        if HAS_SLOTS:
            state_row = owned(tl.load(slots_ptr + sequence), states)
        o_column = tl.arange(0, COLUMNS)
        o_j = tl.arange(0, R)[:, None]  # [R, 1]
        for first in range(0, HEADS * RANK, COLUMNS):
            column = first + o_column
            h = column // RANK
            i = column % RANK
            m_tile = (column < HEADS * RANK)[None, :] & (o_j < RANK)  # [R, COLUMNS]
            s = tl.zeros([R, COLUMNS], tl.float32)
            if HAS_STATE:
                p_s = state_pointers(
                    s_ptr + state_row * stride_s_n + column * 0, h, i, stride_s_h, stride_s_i, stride_s_j,
                    RANK, R, DENSE_STATE,
                )  # fmt: skip
                s = tl.load(p_s, mask=m_tile & (o_j * 0 + state_row >= 0), other=0.0)
            tl.store(p_final + column[None, :] * RANK + o_j, s, mask=m_tile)
        tl.debug_barrier()

        o_w = tl.arange(0, WIDTH_PAD)
        checkpoint = sequence.to(tl.int64) * 0
        if HAS_CHECKPOINTS:
            if IS_PACKED:
                checkpoint = tl.load(checkpoint_first_ptr + sequence).to(tl.int64)
            else:
                checkpoint = sequence.to(tl.int64) * (length // every)
        skipped = sequence * 0
        for n in range(end - begin):
            t = begin + n
            p_x = x_ptr + row.to(tl.int64) * stride_x_b + t.to(tl.int64) * stride_x_t
            token = row.to(tl.int64) * length + t
            x = tl.load(p_x + o_w * stride_x_w, mask=o_w < WIDTH, other=0.0).to(tl.float32)
            flag = tl.where(tl.sum(x * 0.0, axis=0) == 0.0, 1, 2)
            if HAS_MASK:
                p_mask = mask_ptr + row.to(tl.int64) * stride_mask_b + t.to(tl.int64) * stride_mask_t
                flag = tl.where(tl.load(p_mask) != 0, flag, 0)
            flag = tl.where(state_row >= 0, flag, 0)
            # First a look at all columns, then they are written, or none is.
            nothing = tl.zeros([COLUMNS], tl.float32)
            for first in range(0, HEADS * RANK, COLUMNS):
                _, _, s, _ = repaired(
                    p_x, p_final, bias_ptr, first, stride_x_w, stride_bias, HEADS, RANK, R, COLUMNS, WHOLE,
                    MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
                )  # fmt: skip
                nothing += zero_or_nan(s)
            flag = tl.where((flag == 1) & (tl.sum(nothing, axis=0) != 0.0), 2, flag)
            m_valid = o_column * 0 + flag == 1
            for first in range(0, HEADS * RANK, COLUMNS):
                before, p_s, s, read = repaired(
                    p_x, p_final, bias_ptr, first, stride_x_w, stride_bias, HEADS, RANK, R, COLUMNS, WHOLE,
                    MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
                )  # fmt: skip
                column = first + o_column
                m_column = column < HEADS * RANK
                m_tile = m_column[None, :] & (o_j < RANK)
                tl.store(reads_ptr + token * (HEADS * RANK) + column, tl.where(m_valid, read, 0.0), mask=m_column)
                s = tl.where(m_valid[None, :], s, before)
                tl.store(p_s, s, mask=m_tile)
                if HAS_CHECKPOINTS:
                    m_checkpoint = m_tile & (o_j * 0 + (n + 1) % every == 0)
                    p_checkpoint = checkpoints_ptr + checkpoint * (HEADS * RANK * RANK)
                    tl.store(p_checkpoint + column[None, :] * RANK + o_j, s, mask=m_checkpoint)
            if HAS_CHECKPOINTS:
                checkpoint += tl.where((n + 1) % every == 0, 1, 0)
            if HAS_FLAGS:
                tl.store(flags_ptr + token, flag.to(tl.uint8))
            skipped += tl.where(flag == 2, 1, 0)
            tl.debug_barrier()
        tl.store(skipped_ptr + sequence, skipped)


@triton.jit
def repaired(
    p_x, p_state, bias_ptr, first, stride_x_w, stride_bias,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
):  # fmt: skip
    """Columns ``first`` and following of one state → (as they are, where they lie, after the token, their reads).

    Each [R, COLUMNS], the reads [COLUMNS].
    """
    column = first + tl.arange(0, COLUMNS)
    h = column // RANK
    i = column % RANK
    m_column = column < HEADS * RANK
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    p_s = p_state + column[None, :] * RANK + o_j
    s = tl.load(p_s, mask=m_column[None, :] & (o_j < RANK), other=0.0)  # [R, COLUMNS]
    p_token = p_x + column * 0
    q = load_vector(p_token, h * RANK, stride_x_w, m_column, RANK, R, WHOLE)  # [R, COLUMNS]
    k = load_vector(p_token, (HEADS + h) * RANK, stride_x_w, m_column, RANK, R, WHOLE)  # [R, COLUMNS]
    v, b, lam = load_write(p_token, h, i, stride_x_w, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)  # [COLUMNS] each
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    z, c = direction(q, NORMALIZE)  # [R, COLUMNS], [COLUMNS]
    read = dot(s, z) * c  # [COLUMNS]
    z, c = direction(k, NORMALIZE)
    keep, erase, write = gates(
        b.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA, BETA_MAX, KEEP_MAX
    )
    return s, p_s, delta_update(s, z, c, keep, erase, write * held_value(v.to(tl.float32), VALUE_MAX)), read
