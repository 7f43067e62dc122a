"""The gradient of ``scan``: every token's, from the states before it and the gradients of the states after it.

With G = dL/dS_t, the gradient of the state after token t, d = dL/dread_t, and for row i (s of S_{t-1}, g of G)

    p = s · k        u = write v − erase p        S_t = keep s + u k
    du = g · k       dp = −erase du
    dq = Σ_i d s     dk = Σ_i (u g + dp s)        dv = write du
    dkeep = g · s    derase = −p du               dwrite = v du
    g <- g (keep I − erase k kᵀ) + d q

the rows of G obey, backwards in time, the affine recurrence of the rows of S with the same symmetric matrices: the
matrix of a chunk is the forward one transposed. What the forward pass did with chunks is done here with both at once:

    1. ``map_both_kernel``: each chunk's matrix, and its vector in either direction, all chunks at once;
    2. ``carry_both_kernel``: the states before the chunks and the gradients after them, both ways side by side;
    3. ``walk_kernel``: inside the chunks the same at the bounds of blocks of SPACING tokens;
    4. ``token_kernel``: every PART of a block walks to its own few tokens from the block's two bounds, holds their
       states in registers, and goes back through them: a row of the projections' gradient each.

A short sequence, or a rank above 16, is one chunk: 3 and 4 alone. Nothing of the forward pass is kept; no state is
stored but at the bounds, 2 r² numbers for 2 r tokens. Sums over the rows of a head are sums over neighbouring columns,
that is threads; sums over tokens (of the gates' biases) are made in two passes: no atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from ..rule import DeltaRule, check_arguments, check_together
from . import launch as _launch
from .launch import (
    MOST_REGISTERS,
    check_device,
    check_reach,
    dense_state,
    float32_only,
    half_or_single,
    launch,
    next_power_of_two,
    rule_flags,
    state_strides,
    tile,
)
from .primitives import (
    across,
    columns,
    direction,
    direction_backward,
    dot,
    gates,
    gates_backward,
    group_sum,
    load_bias,
    load_vector,
    load_write,
    locate,
    owned,
    state_pointers,
    written,
)
from .scan import CHUNKED_RANK, MAP_WARPS, carry, choose_chunk, chunk_table, find_flags


@triton.jit
def checkpoint_gradient(
    p_checkpoint, passed, every, m_column, HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr
):
    """The gradient [R, COLUMNS] that comes in by a checkpoint after ``passed`` tokens, 0 where there is none."""
    o_j = tl.arange(0, R)[:, None]
    o_checkpoint = (passed // every - 1).to(tl.int64) * (HEADS * RANK * RANK)
    m = (m_column & (passed % every == 0))[None, :] & (o_j < RANK)
    return tl.load((p_checkpoint + o_checkpoint)[None, :] + o_j, mask=m, other=0.0)


@triton.jit
def through(
    s, q, k, v, b, lam, d, flag, up, beta_bias, lambda_bias, R: tl.constexpr, MODE: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Take each column through one token, raw: up adds write v k, where d is 0; else what is added is d q."""
    keep, erase, write = gates(b.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA)
    added = tl.where(up, write * v.to(tl.float32), 0.0)
    z, c = direction(k, NORMALIZE)
    after = written(s, z, c, keep, erase, added)
    z, c = direction(q, NORMALIZE)
    after = tl.fma(across(d.to(tl.float32) * c, R), z, after)
    return tl.where((flag == 1)[None, :], after, s)


@triton.jit
def walk(
    s, up, adds, p_x, p_flag, p_d, p_checkpoint, p_bound, passed, count, h, i, beta_bias, lambda_bias, every,
    stride_x_t, stride_x_w, stride_d_t,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr, ROW_GATES: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr, WHOLE: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr,
    SPACING: tl.constexpr,
):  # fmt: skip
    """Take each column through ``count`` tokens, and return it.

    up: through rising tokens, adding write v k; else through falling ones, adding d q and what comes in by
    checkpoints. adds: whether anything is added at all. The pointers are to the first token; ``passed`` tokens of the
    sequence lie before it. SPACING > 0: what a column is before each block that it enters is stored.
    """
    o_j = tl.arange(0, R)[:, None]
    down = adds & (up == 0)
    turn = tl.where(up, 1, -1)
    t = tl.where(up, 0, tl.maximum(count - 1, 0))
    p_x += t.to(tl.int64) * stride_x_t
    p_flag += t
    p_d += t.to(tl.int64) * stride_d_t
    o_q = h * RANK
    o_k = (HEADS + h) * RANK
    # With a checkpoint's gradient too, a column of 16 numbers has no registers left for a q that waits; where bounds
    # are stored the compiler finds some.
    Q_WAITS: tl.constexpr = R <= 8 or SPACING > 0 or not HAS_CHECKPOINTS
    steps = tl.max(count, axis=0)
    m = count > 0
    q = load_vector(p_x, o_q, stride_x_w, m & down, RANK, R, WHOLE)
    k = load_vector(p_x, o_k, stride_x_w, m, RANK, R, WHOLE)
    v, b, lam = load_write(p_x, h, i, stride_x_w, m, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    d = tl.load(p_d, mask=m & down, other=0.0)
    flag = tl.load(p_flag, mask=m, other=0)
    for n in range(steps):
        # The next token is on its way while this one is computed.
        m_next = n + 1 < count
        if not Q_WAITS:
            q = load_vector(p_x, o_q, stride_x_w, (n < count) & down, RANK, R, WHOLE)
        p_x += turn.to(tl.int64) * stride_x_t
        p_flag += turn
        p_d += turn.to(tl.int64) * stride_d_t
        q_next = q
        if Q_WAITS:
            q_next = load_vector(p_x, o_q, stride_x_w, m_next & down, RANK, R, WHOLE)
        k_next = load_vector(p_x, o_k, stride_x_w, m_next, RANK, R, WHOLE)
        v_next, b_next, lam_next = load_write(p_x, h, i, stride_x_w, m_next, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
        d_next = tl.load(p_d, mask=m_next & down, other=0.0)
        flag_next = tl.load(p_flag, mask=m_next, other=0)

        if SPACING > 0:
            edge = tl.where(up, t % SPACING == 0, ((t + 1) % SPACING == 0) | (n == 0))
            o_bound = (t // SPACING).to(tl.int64) * (HEADS * 2 * RANK * RANK)
            m_bound = edge & (n < count)
            tl.store((p_bound + o_bound)[None, :] + o_j, s, mask=m_bound[None, :] & (o_j < RANK))
        if HAS_CHECKPOINTS:
            s += checkpoint_gradient(p_checkpoint, passed + t + 1, every, down & (n < count), HEADS, RANK, R)
        s = through(
            s, q, k, v, b, lam, d, flag, adds & up, beta_bias, lambda_bias, R, MODE, HAS_LAMBDA, NORMALIZE
        )  # fmt: skip
        q, k, v, b, lam, d, flag = q_next, k_next, v_next, b_next, lam_next, d_next, flag_next
        t += turn
    return s


@triton.jit
def meet(
    s, g, p_x, p_flag, p_d, p_checkpoint, passed, first, rest, count, h, i, beta_bias, lambda_bias, every,
    stride_x_t, stride_x_w, stride_d_t,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr, ROW_GATES: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr, WHOLE: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr,
):  # fmt: skip
    """Take s up through tokens 0 to ``first`` − 1, then g down through ``count`` − 1 to ``rest`` → (s, g).

    One loop for both: every part of a block has as far to walk, so the parts can be warps of one program.
    """
    o_q = h * RANK
    o_k = (HEADS + h) * RANK
    Q_WAITS: tl.constexpr = R <= 8 or not HAS_CHECKPOINTS  # see walk
    total = first + count - rest
    steps = tl.max(total, axis=0)
    t = tl.where(first > 0, 0, count - 1)
    m = total > 0
    down = first <= 0
    p_now = p_x + t.to(tl.int64) * stride_x_t
    q = load_vector(p_now, o_q, stride_x_w, m & down, RANK, R, WHOLE)
    k = load_vector(p_now, o_k, stride_x_w, m, RANK, R, WHOLE)
    v, b, lam = load_write(p_now, h, i, stride_x_w, m, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    d = tl.load(p_d + t.to(tl.int64) * stride_d_t, mask=m & down, other=0.0)
    flag = tl.load(p_flag + t, mask=m, other=0)
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
        s = through(
            s, q, k, v, b, lam, d, flag, down == 0, beta_bias, lambda_bias, R, MODE, HAS_LAMBDA, NORMALIZE
        )  # fmt: skip
        q, k, v, b, lam, d, flag = q_next, k_next, v_next, b_next, lam_next, d_next, flag_next
        t, down = t_next, down_next
    # The column that walks is s, which at its turn changes places with g.
    turned = (first < steps)[None, :]
    return tl.where(turned, g, s), tl.where(turned, s, g)


@triton.jit
def first_checkpoint(sequence, length, every, checkpoint_first_ptr, m_column, IS_PACKED: tl.constexpr):
    """How many checkpoints the sequences before this one have."""
    if IS_PACKED:
        return tl.load(checkpoint_first_ptr + sequence, mask=m_column, other=0).to(tl.int64)
    else:
        return sequence.to(tl.int64) * (length // every)


@triton.jit
def map_both_kernel(
    x_ptr, bias_ptr, flags_ptr, d_reads_ptr, d_checkpoints_ptr, maps_ptr,
    cu_ptr, chunk_sequence_ptr, chunk_first_ptr, checkpoint_first_ptr,
    total_groups, length, chunk_length, chunks_per_sequence, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_d_b, stride_d_t, stride_d_c,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """maps[chunk, h, i, a, :] = row a of the chunk's matrix backwards; a = r: its vector; a = r + 1: the vector
    forwards."""
    group, place, m_column = columns(total_groups, RANK * (RANK + 2), COLUMNS)
    i = place // (RANK + 2)
    a = place % (RANK + 2)
    chunk = group // HEADS
    h = group % HEADS
    sequence, here, row, begin, count = locate(
        chunk, m_column, length, chunk_length, chunks_per_sequence,
        cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED,
    )  # fmt: skip
    p_x = x_ptr + row.to(tl.int64) * stride_x_b + begin.to(tl.int64) * stride_x_t
    p_flag = flags_ptr + row.to(tl.int64) * length + begin
    p_d = d_reads_ptr + row.to(tl.int64) * stride_d_b + begin.to(tl.int64) * stride_d_t
    p_d += (h * RANK + i).to(tl.int64) * stride_d_c
    p_checkpoint = d_checkpoints_ptr
    if HAS_CHECKPOINTS:
        checkpoint = first_checkpoint(sequence, length, every, checkpoint_first_ptr, m_column, IS_PACKED)
        p_checkpoint += ((checkpoint * HEADS + h) * RANK + i) * RANK
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    o_j = tl.arange(0, R)[:, None]
    s = tl.where(o_j == a[None, :], 1.0, 0.0) * tl.where(o_j < RANK, 1.0, 0.0)
    s = walk(
        s, a == RANK + 1, a >= RANK, p_x, p_flag, p_d, p_checkpoint, maps_ptr, here * chunk_length, count, h, i,
        beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
        HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, WHOLE, HAS_CHECKPOINTS, 0,
    )  # fmt: skip
    o_map = (group.to(tl.int64) * (RANK * (RANK + 2)) + place) * RANK
    tl.store(maps_ptr + o_map[None, :] + o_j, s, mask=m_column[None, :] & (o_j < RANK))


@triton.jit(do_not_specialize=["stride_m_a", "stride_m_j"])
def carry_both_kernel(
    maps_ptr, s_ptr, slots_ptr, d_state_ptr, edges_ptr, d_initial_ptr, chunk_first_ptr,
    chunks_per_sequence, states, stride_m_a, stride_m_j,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j, stride_d_n, stride_d_h, stride_d_i, stride_d_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, DENSE_STATE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """edges[chunk, h, 0, i, :] = s_i before the chunk, edges[chunk, h, 1, i, :] = g_i after it, and the gradient of
    the initial state. One program per sequence, head, row and direction; see ``scan.carry_kernel``."""
    back = tl.program_id(0) % 2
    i = tl.program_id(0) // 2 % RANK
    h = tl.program_id(0) // (2 * RANK) % HEADS
    sequence = tl.program_id(0) // (2 * RANK * HEADS)
    if IS_PACKED:
        chunk = tl.load(chunk_first_ptr + sequence)
        count = tl.load(chunk_first_ptr + sequence + 1) - chunk
    else:
        chunk = sequence * chunks_per_sequence
        count = chunks_per_sequence + sequence * 0
    o_j = tl.arange(0, R)[:, None]
    o_none = o_j * 0  # makes a tile of a number: the interpreter does not mix the two in a mask
    s = tl.zeros([R, 1], tl.float32)
    row = sequence.to(tl.int64)
    if HAS_STATE:
        state_row = row
        if HAS_SLOTS:
            state_row = owned(tl.load(slots_ptr + sequence), states)
        p_s = s_ptr + state_row * stride_s_n + h.to(tl.int64) * stride_s_h + i.to(tl.int64) * stride_s_i
        s = tl.load(
            p_s + o_j.to(tl.int64) * stride_s_j,
            mask=(o_j < RANK) & (o_none + state_row >= 0) & (o_none + back == 0),
            other=0.0,
        )
    p_g = d_state_ptr + row * stride_d_n + h.to(tl.int64) * stride_d_h + i.to(tl.int64) * stride_d_i
    s += tl.load(p_g + o_j.to(tl.int64) * stride_d_j, mask=(o_j < RANK) & (o_none + back == 1), other=0.0).to(
        tl.float32
    )

    MAP: tl.constexpr = HEADS * RANK * RANK * (RANK + 2)
    EDGE: tl.constexpr = HEADS * 2 * RANK * RANK
    # Backwards the matrix as it lies, from the last chunk; forwards its transpose, from the first.
    chunk += tl.where(back == 1, tl.maximum(count - 1, 0), 0)
    step = tl.where(back == 1, -1, 1).to(tl.int64)
    p_map = maps_ptr + chunk.to(tl.int64) * MAP + (h * RANK + i) * (RANK * (RANK + 2))
    p_vector = p_map + (RANK + 1 - back) * RANK
    p_edge = edges_ptr + chunk.to(tl.int64) * EDGE + ((h * 2 + back) * RANK + i) * RANK
    stride_a = tl.where(back == 1, stride_m_a, stride_m_j)
    stride_j = tl.where(back == 1, stride_m_j, stride_m_a)
    s = carry(s, p_map, p_vector, p_edge, count, step * MAP, step * EDGE, stride_a, stride_j, stride_m_j, RANK, R)
    o_initial = ((row * HEADS + h) * RANK + i) * RANK
    tl.store(d_initial_ptr + o_initial + o_j, s, mask=(o_j < RANK) & (o_none + back == 1))


@triton.jit
def walk_kernel(
    x_ptr, bias_ptr, s_ptr, slots_ptr, d_state_ptr, edges_ptr, flags_ptr, d_reads_ptr, d_checkpoints_ptr,
    bounds_ptr, d_initial_ptr,
    cu_ptr, chunk_sequence_ptr, chunk_first_ptr, block_first_ptr, checkpoint_first_ptr,
    total_groups, states, length, chunk_length, chunks_per_sequence, blocks_per_sequence, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_d_b, stride_d_t, stride_d_c,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j, stride_g_n, stride_g_h, stride_g_i, stride_g_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr, DENSE_STATE: tl.constexpr, DENSE_GRADIENT: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr,
    IS_PACKED: tl.constexpr, IS_CHUNKED: tl.constexpr, SPACING: tl.constexpr,
):  # fmt: skip
    """bounds[block, h, 0, i, :] = s_i before the block of SPACING tokens, bounds[block, h, 1, i, :] = g_i after it;
    with one chunk per sequence also the gradient of the initial state."""
    group, place, m_column = columns(total_groups, 2 * RANK, COLUMNS)
    i = place % RANK
    back = place // RANK
    up = back == 0
    chunk = group // HEADS
    h = group % HEADS
    sequence, here, row, begin, count = locate(
        chunk, m_column, length, chunk_length, chunks_per_sequence,
        cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED,
    )  # fmt: skip
    o_j = tl.arange(0, R)[:, None]
    m_row = m_column[None, :] & (o_j < RANK)
    if IS_CHUNKED:
        o_edge = ((chunk.to(tl.int64) * HEADS + h) * 2 + back) * (RANK * RANK) + i * RANK
        s = tl.load(edges_ptr + o_edge[None, :] + o_j, mask=m_row & (count > 0)[None, :], other=0.0)
    else:
        p_g = state_pointers(
            d_state_ptr + sequence.to(tl.int64) * stride_g_n, h, i, stride_g_h, stride_g_i, stride_g_j,
            RANK, R, DENSE_GRADIENT,
        )  # fmt: skip
        s = tl.load(p_g, mask=m_row & (back == 1)[None, :], other=0.0).to(tl.float32)
        if HAS_STATE:
            state_row = sequence.to(tl.int64)
            if HAS_SLOTS:
                state_row = owned(tl.load(slots_ptr + sequence, mask=m_column, other=-1), states)
            p_s = state_pointers(
                s_ptr + state_row * stride_s_n, h, i, stride_s_h, stride_s_i, stride_s_j, RANK, R, DENSE_STATE
            )  # fmt: skip
            s += tl.load(p_s, mask=m_row & (up & (state_row >= 0))[None, :], other=0.0)

    if IS_PACKED:
        block = tl.load(block_first_ptr + sequence, mask=m_column, other=0)
    else:
        block = sequence * blocks_per_sequence
    block += here * (chunk_length // SPACING)
    p_bound = bounds_ptr + ((block.to(tl.int64) * HEADS + h) * 2 + back) * (RANK * RANK) + i * RANK
    p_x = x_ptr + row.to(tl.int64) * stride_x_b + begin.to(tl.int64) * stride_x_t
    p_flag = flags_ptr + row.to(tl.int64) * length + begin
    p_d = d_reads_ptr + row.to(tl.int64) * stride_d_b + begin.to(tl.int64) * stride_d_t
    p_d += (h * RANK + i).to(tl.int64) * stride_d_c
    p_checkpoint = d_checkpoints_ptr
    if HAS_CHECKPOINTS:
        checkpoint = first_checkpoint(sequence, length, every, checkpoint_first_ptr, m_column, IS_PACKED)
        p_checkpoint += ((checkpoint * HEADS + h) * RANK + i) * RANK
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    s = walk(
        s, up, m_column, p_x, p_flag, p_d, p_checkpoint, p_bound, here * chunk_length, count, h, i,
        beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
        HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, WHOLE, HAS_CHECKPOINTS, SPACING,
    )  # fmt: skip
    if not IS_CHUNKED:
        o_initial = ((sequence.to(tl.int64) * HEADS + h) * RANK + i) * RANK
        tl.store(d_initial_ptr + o_initial[None, :] + o_j, s, mask=m_row & (back == 1)[None, :])


@triton.jit
def token_kernel(
    x_ptr, bias_ptr, slots_ptr, flags_ptr, d_reads_ptr, d_checkpoints_ptr, bounds_ptr, d_x_ptr, d_bias_ptr,
    cu_ptr, block_sequence_ptr, block_first_ptr, checkpoint_first_ptr,
    total_groups, states, blocks, padded_blocks, length, blocks_per_sequence, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_d_b, stride_d_t, stride_d_c,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr, IS_PACKED: tl.constexpr,
    WIDTH: tl.constexpr, SPACING: tl.constexpr, PART: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Rows of the projections' gradient, and d_bias[program, :, :], the sums of the gates' over the program's tokens.

    A head is R columns here, a power of two, so that its rows are neighbours within a warp. A program is one head and
    TOGETHER parts of several blocks, as many as ``padded_blocks`` is a multiple of: all have as far to walk, and the
    parts of a block start from the same bounds.
    """
    BLOCKS: tl.constexpr = COLUMNS // R // TOGETHER
    PARTS: tl.constexpr = SPACING // PART
    group, i, m_column = columns(total_groups, R, COLUMNS)
    rest = group // BLOCKS
    part = rest % PARTS
    rest = rest // PARTS
    block = rest % (padded_blocks // BLOCKS) * BLOCKS + group % BLOCKS
    h = rest // (padded_blocks // BLOCKS)
    m_column = m_column & (i < RANK) & (block < blocks)
    sequence, here, row, begin, count = locate(
        block, m_column, length, SPACING, blocks_per_sequence,
        cu_ptr, block_sequence_ptr, block_first_ptr, IS_PACKED,
    )  # fmt: skip
    o_j = tl.arange(0, R)[:, None]
    m_row = (m_column & (count > 0))[None, :] & (o_j < RANK)
    p_bound = bounds_ptr + (block.to(tl.int64) * HEADS + h) * (2 * RANK * RANK) + i * RANK
    s = tl.load(p_bound[None, :] + o_j, mask=m_row, other=0.0)
    g = tl.load(p_bound[None, :] + RANK * RANK + o_j, mask=m_row, other=0.0)
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
        checkpoint = first_checkpoint(sequence, length, every, checkpoint_first_ptr, m_column, IS_PACKED)
        p_checkpoint += ((checkpoint * HEADS + h) * RANK + i) * RANK
    first = tl.minimum(part * PART, count)
    own = tl.minimum(count - first, PART)
    passed = here * SPACING
    if SPACING > PART and TOGETHER == 1:
        s = walk(
            s, m_column, m_column, p_x, p_flag, p_d, p_checkpoint, bounds_ptr, passed, first, h, i,
            beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
            HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, WHOLE, HAS_CHECKPOINTS, 0,
        )  # fmt: skip
        rest = first + own
        g = walk(
            g, m_column & False, m_column, p_x + rest.to(tl.int64) * stride_x_t, p_flag + rest,
            p_d + rest.to(tl.int64) * stride_d_t, p_checkpoint, bounds_ptr, passed + rest, count - rest, h, i,
            beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
            HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, WHOLE, HAS_CHECKPOINTS, 0,
        )  # fmt: skip
    elif SPACING > PART:
        s, g = meet(
            s, g, p_x, p_flag, p_d, p_checkpoint, passed, first, first + own, count, h, i,
            beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
            HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, WHOLE, HAS_CHECKPOINTS,
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
        k = load_vector(p_x, o_k, stride_x_w, m, RANK, R, WHOLE)
        v, b, lam = load_write(p_x, h, i, stride_x_w, m, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
        v = v.to(tl.float32)
        flag = tl.load(p_flag + n, mask=m, other=0)
        keep, erase, write = gates(b.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA)
        z, c = direction(k, NORMALIZE)
        held = held + ((s, z, c, v, keep, erase, write, flag),)
        # One stride after another: the pointers are 64 bits wide, n strides may not fit 32.
        p_x += stride_x_t
        p_d += stride_d_t
        if n + 1 < PART:
            s = tl.where((flag == 1)[None, :], written(s, z, c, keep, erase, write * v), s)

    d_beta_bias = tl.zeros([COLUMNS], tl.float32)
    d_lambda_bias = tl.zeros([COLUMNS], tl.float32)
    mine = o_j == i[None, :]
    kind: tl.constexpr = d_x_ptr.dtype.element_ty
    for n in tl.static_range(PART - 1, -1, -1):
        s, z_k, c_k, v, keep, erase, write, flag = held[n]
        m = n < own
        valid = (flag == 1) & live
        p_x -= stride_x_t
        p_d -= stride_d_t
        q = load_vector(p_x, o_q, stride_x_w, m, RANK, R, WHOLE)
        d = tl.load(p_d, mask=m & m_column, other=0.0).to(tl.float32)
        z_q, c_q = direction(q, NORMALIZE)
        if HAS_CHECKPOINTS:
            g += checkpoint_gradient(p_checkpoint, passed + first + n + 1, every, m & m_column, HEADS, RANK, R)

        along = dot(s, z_k) * c_k
        u = tl.fma(-erase, along, write * v)
        d_u = dot(g, z_k) * c_k
        d_along = -erase * d_u
        d_keep = dot(g, s)
        d_q = direction_backward(group_sum(s * d[None, :], R), z_q, c_q, NORMALIZE)
        d_k = direction_backward(group_sum(tl.fma(g, across(u, R), s * d_along[None, :]), R), z_k, c_k, NORMALIZE)
        d_beta, d_lambda = gates_backward(keep, write, d_keep, -along * d_u, v * d_u, MODE, HAS_LAMBDA)
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
        tl.store(p_out + o_v, tl.where(valid, write * d_u, 0.0).to(kind), mask=m_out)
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


def choose_spacing(rule: DeltaRule) -> tuple[int, int]:
    """Tokens between two stored bounds, and tokens of a part.

    2 r² numbers for 2 r tokens weigh what the reads do. As many states as a part has tokens stay in registers.
    """
    rows = next_power_of_two(rule.rank)
    return max(16, 2 * rows), 4 if rows <= 8 else 2


def token_tile(rule: DeltaRule) -> tuple[int, int]:
    """Columns and warps of a program of ``token_kernel``: whole heads, and 8 numbers of a tile for each thread (at
    r = 64 16, and 4 on AMD, whose scalar registers hold the masks), of which it has a dozen tiles."""
    rows = next_power_of_two(rule.rank)
    cols = max(rows, min(_launch.WARP, 8 * _launch.WARP // rows))
    numbers = max(8, rows // 4) if _launch.WARP == 32 else 4 if rows == 64 else 8
    return cols, max(1, rows * cols // (numbers * _launch.WARP))


def parts_together(rule: DeltaRule, parts: int) -> int:
    """Parts of a block in one program of ``token_kernel``: the bounds that they share then lie in L1. Above r = 8 the
    one loop that they need for both ways has too few registers."""
    return math.gcd(parts, 4) if rule.rank <= 8 else 1


def depth(rule: DeltaRule, length: int) -> int:
    """How many steps of the gradient wait for one another: C, T / C and C, or T; then those of a block and a part."""
    chunk = choose_chunk(rule, length)
    block, part = choose_spacing(rule)
    return (2 * chunk + triton.cdiv(length, chunk) if chunk else length) + block + part


def scatter_rows(grad: torch.Tensor, state: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """The gradient of the rows [N, H, r, r] → that of the state they were taken from."""
    if slots is None:
        return grad
    live = (slots >= 0) & (slots < state.shape[0])
    grad = torch.where(live[:, None, None, None], grad, 0.0)
    # index_put_ sorts where index_add_ takes atomics: two sequences may start from one slot.
    return torch.zeros_like(state, memory_format=torch.contiguous_format).index_put_(
        (torch.where(live, slots, 0).long(),), grad, accumulate=True
    )


def check_gradient(name: str, grad: torch.Tensor, shape: tuple[int, ...], projections: torch.Tensor) -> None:
    """Raises: ValueError unless the gradient has the shape of what it is the gradient of, beside the projections;
    TypeError unless it is bfloat16, float16 or float32."""
    if tuple(grad.shape) != shape:
        raise ValueError(f"{name}: got shape {list(grad.shape)}, allowed {list(shape)}")
    half_or_single(name, grad)
    check_together("projections", projections, **{name: grad})


def scan_backward(
    d_reads: torch.Tensor,
    d_state: torch.Tensor,
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    d_checkpoints: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    flags: torch.Tensor | None = None,
    chunk: int | None = None,
    spacing: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient of ``scan``, of which it takes the arguments.

    Args:
        d_reads: [B, T, H·r], the gradient of ``reads``, of any strides.
        d_state: [N, H, r, r], of the final ``state``, of any strides.
        d_checkpoints: of ``checkpoints``, in their layout, or None.
        flags: uint8 [B, T], which tokens the scan has written (``scan_with_flags``); None: all that are unmasked and
            finite, which is right where the states after them are finite, too.
        chunk: tokens per chunk, 0 for one chunk a sequence, None to choose (tests set it).
        spacing: tokens of a block, which divide the chunk's, and of a part, which divide the block's (tests set it).

    Returns:
        The gradients of projections, gate_bias and state (None without a state), each in the dtype and shape of
        what it belongs to, computed in float32. A token that was not written gets 0, and so does a sequence whose
        slot is −1. The same bits on every run.

    Raises:
        ValueError, TypeError: see ``scan``; a gradient of another shape than what it belongs to.
    """
    sequences = check_arguments(
        projections, gate_bias, state, rule,
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    check_device(projections)
    check_reach("projections", projections, 1)
    half_or_single("projections", projections)
    float32_only("state", state)
    check_reach("gate_bias", gate_bias, 1)
    batch, length, width = projections.shape
    heads, rank, every = rule.heads, rule.rank, checkpoint_every if d_checkpoints is not None else 0
    device, packed = projections.device, cu_seqlens is not None
    if chunk is None:
        chunk = choose_chunk(rule, length)
    if projections.numel() == 0 or sequences == 0:
        chunk = 0
    block, part = spacing or choose_spacing(rule)
    if (chunk and rank > CHUNKED_RANK) or chunk % block or block % part:
        raise ArgumentError(f"chunk, spacing: got {chunk}, {(block, part)}, allowed multiples, no chunk above rank 16")
    check_gradient("d_reads", d_reads, (batch, length, rule.read_width), projections)
    check_gradient("d_state", d_state, (sequences, heads, rank, rank), projections)
    if every:
        lead = (length // every,) if packed else (batch, length // every)
        check_gradient("d_checkpoints", d_checkpoints, (*lead, heads, rank, rank), projections)
    if mask is not None:
        mask = mask.view(torch.uint8)
    states = 0 if state is None else state.shape[0]
    if slots is not None:
        slots = slots.contiguous()
    if packed:
        cu_seqlens = cu_seqlens.contiguous()
    if every:
        d_checkpoints = d_checkpoints.contiguous()

    float32 = {"dtype": torch.float32, "device": device}
    d_initial = _launch.empty((sequences, heads, rank, rank), **float32)
    tokens = projections.numel() // width if width else 0

    chunk_sequence = chunk_first = block_sequence = block_first = checkpoint_first = None
    if packed:
        chunk_sequence, chunk_first = chunk_table(cu_seqlens, length, chunk)
        block_sequence, block_first = chunk_table(cu_seqlens, length, block)
        chunks, chunks_per_sequence = chunk_sequence.numel(), 0
        # A block more than the tokens fill for each sequence, but none where there is no token or no sequence.
        blocks, blocks_per_sequence = block_sequence.numel() if tokens and sequences else 0, 0
        if every:
            taken = (cu_seqlens[1:] - cu_seqlens[:-1]) // every
            checkpoint_first = taken.cumsum(0, dtype=torch.int64) - taken
    else:
        chunks_per_sequence = triton.cdiv(length, chunk) if chunk else 1
        blocks_per_sequence = triton.cdiv(length, block)
        chunks, blocks = sequences * chunks_per_sequence, sequences * blocks_per_sequence
    if flags is None:
        flags = find_flags(projections, mask) if tokens else projections.new_empty(0, dtype=torch.uint8)
    common = {
        "x_ptr": projections, "bias_ptr": gate_bias, "flags_ptr": flags, "d_reads_ptr": d_reads,
        "d_checkpoints_ptr": d_checkpoints if every else None, "checkpoint_first_ptr": checkpoint_first,
        "cu_ptr": cu_seqlens, "length": length, "every": every, "stride_bias": gate_bias.stride(0),
        "HAS_CHECKPOINTS": bool(every), "IS_PACKED": packed,
    }  # fmt: skip
    common |= {f"stride_x_{name}": stride for name, stride in zip("btw", projections.stride())}
    common |= {f"stride_d_{name}": stride for name, stride in zip("btc", d_reads.stride())}
    common |= rule_flags(rule, projections)
    place = {"chunk_length": chunk or length, "chunks_per_sequence": chunks_per_sequence}
    place |= {"chunk_sequence_ptr": chunk_sequence, "chunk_first_ptr": chunk_first}
    initial = {"s_ptr": state, "slots_ptr": slots, "d_state_ptr": d_state, "d_initial_ptr": d_initial, "states": states}
    initial |= {"HAS_STATE": state is not None, "HAS_SLOTS": slots is not None, **state_strides(state)}
    rows, cols = tile(rule)

    edges = None
    if chunk:
        edges = _launch.empty((chunks, heads, 2, rank, rank), **float32)
        maps = _launch.empty((chunks, heads, rank, rank + 2, rank), **float32)
        launch(
            map_both_kernel, triton.cdiv(chunks * heads * rank * (rank + 2), MAP_WARPS * cols), projections,
            num_warps=MAP_WARPS, maps_ptr=maps, total_groups=chunks * heads, COLUMNS=MAP_WARPS * cols,
            **common, **place,
        )  # fmt: skip
        launch(
            carry_both_kernel, 2 * sequences * heads * rank, projections, num_warps=1,
            maps_ptr=maps, edges_ptr=edges, chunk_first_ptr=chunk_first, chunks_per_sequence=chunks_per_sequence,
            stride_m_a=rank, stride_m_j=1, HEADS=heads, RANK=rank, R=rows, IS_PACKED=packed, **initial,
            **{f"stride_d_{name}": stride for name, stride in zip("nhij", d_state.stride())},
        )  # fmt: skip
        del maps
    bounds = _launch.empty((blocks, heads, 2, rank, rank), **float32)
    if sequences:
        launch(
            walk_kernel, triton.cdiv(chunks * heads * 2 * rank, cols), projections, num_warps=1,
            registers=None if rank <= 8 else MOST_REGISTERS,
            edges_ptr=edges, bounds_ptr=bounds, block_first_ptr=block_first, blocks_per_sequence=blocks_per_sequence,
            total_groups=chunks * heads, COLUMNS=cols, IS_CHUNKED=bool(chunk), SPACING=block,
            DENSE_GRADIENT=dense_state(d_state),
            **{f"stride_g_{name}": stride for name, stride in zip("nhij", d_state.stride())},
            **common, **place, **initial,
        )  # fmt: skip
    del edges
    # Tokens outside of every packed sequence are written by no kernel.
    d_x = (torch.zeros if packed else _launch.empty)(projections.shape, dtype=projections.dtype, device=device)
    cols, warps = token_tile(rule)
    padded = triton.cdiv(blocks, cols // rows) * (cols // rows)
    kinds = 2 if rule.has_lambda else 1
    together = parts_together(rule, block // part)
    d_bias = _launch.empty((heads, padded * rows // cols * (block // part) // together, kinds, rows), **float32)
    if d_bias.numel():
        launch(
            token_kernel, d_bias.numel() // (kinds * rows), projections, num_warps=together * warps,
            registers=None if rank <= 8 else MOST_REGISTERS,
            slots_ptr=slots, bounds_ptr=bounds, d_x_ptr=d_x, d_bias_ptr=d_bias,
            block_sequence_ptr=block_sequence, block_first_ptr=block_first, blocks_per_sequence=blocks_per_sequence,
            total_groups=block // part * heads * padded, blocks=blocks, padded_blocks=padded,
            states=states, COLUMNS=together * cols, TOGETHER=together,
            HAS_SLOTS=slots is not None, WIDTH=width, SPACING=block, PART=part, **common,
        )  # fmt: skip
    # One gate a row, or one a head, which every row of it has.
    d_bias = d_bias.sum(1).transpose(0, 1)[..., : rank if rule.row_gates else 1]
    d_bias = d_bias.reshape(rule.bias_width).to(gate_bias.dtype)
    return d_x, d_bias, None if state is None else scatter_rows(d_initial, state, slots)
