"""The kernels of the chunks in the gradient of ``scan``: states forwards and their gradients backwards, side by side.

See ``scan_backward``, which launches these kernels, for the equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_scan import pass_state
from .primitives import (
    across,
    columns,
    delta_update,
    direction,
    gates,
    held_value,
    load_bias,
    load_vector,
    load_write,
    locate_chunk,
    owned,
    state_pointers,
)


@triton.jit
def checkpoint_gradient(
    p_checkpoint, passed, every, m_column, HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr
):
    """The gradient [R, COLUMNS] that comes in by a checkpoint after ``passed`` tokens, 0 where there is none."""
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    o_checkpoint = (passed // every - 1).to(tl.int64) * (HEADS * RANK * RANK)
    m = (m_column & (passed % every == 0))[None, :] & (o_j < RANK)
    return tl.load((p_checkpoint + o_checkpoint)[None, :] + o_j, mask=m, other=0.0)


@triton.jit
def run_token(
    s, q, k, v, b, lam, d, flag, up, beta_bias, lambda_bias, R: tl.constexpr, MODE: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
):  # fmt: skip
    """Take each column of s [R, COLUMNS] through one token, raw [R, COLUMNS] or [COLUMNS].

    up adds write v k, where d is 0; else what is added is d q. A token that does not count changes nothing.
    """
    keep, erase, write = gates(
        b.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA, BETA_MAX, KEEP_MAX
    )
    added = tl.where(up, write * held_value(v.to(tl.float32), VALUE_MAX), 0.0)
    z, c = direction(k, NORMALIZE)  # [R, COLUMNS], [COLUMNS]
    after = delta_update(s, z, c, keep, erase, added)
    z, c = direction(q, NORMALIZE)
    after = tl.fma(across(d.to(tl.float32) * c, R), z, after)
    return tl.where((flag == 1)[None, :], after, s)


@triton.jit
def run_tokens(
    s, up, adds, p_x, p_flag, p_d, p_checkpoint, p_bound, passed, count, h, i, beta_bias, lambda_bias, every,
    stride_x_t, stride_x_w, stride_d_t,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr, ROW_GATES: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    WHOLE: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr,
    SPACING: tl.constexpr,
):  # fmt: skip
    """Take each column of s [R, COLUMNS] through ``count`` tokens, and return it.

    up: through rising tokens, adding write v k; else through falling ones, adding d q and what comes in by
    checkpoints. adds: whether anything is added at all. The pointers are to the first token; ``passed`` tokens of the
    sequence lie before it. SPACING > 0: what a column is before each block that it enters is stored.
    """
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
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
    q = load_vector(p_x, o_q, stride_x_w, m & down, RANK, R, WHOLE)  # [R, COLUMNS]
    k = load_vector(p_x, o_k, stride_x_w, m, RANK, R, WHOLE)  # [R, COLUMNS]
    v, b, lam = load_write(p_x, h, i, stride_x_w, m, HEADS, RANK, ROW_GATES, HAS_LAMBDA)  # [COLUMNS] each
    d = tl.load(p_d, mask=m & down, other=0.0)  # [COLUMNS]
    flag = tl.load(p_flag, mask=m, other=0)  # [COLUMNS]
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
        s = run_token(
            s, q, k, v, b, lam, d, flag, adds & up, beta_bias, lambda_bias, R,
            MODE, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
        )  # fmt: skip
        q, k, v, b, lam, d, flag = q_next, k_next, v_next, b_next, lam_next, d_next, flag_next
        t += turn
    return s


@triton.jit
def checkpoints_before(sequence, length, every, checkpoint_first_ptr, m_column, IS_PACKED: tl.constexpr):
    """How many checkpoints the sequences before this one have."""
    if IS_PACKED:
        return tl.load(checkpoint_first_ptr + sequence, mask=m_column, other=0).to(tl.int64)
    else:
        return sequence.to(tl.int64) * (length // every)


@triton.jit
def chunk_transition_backward_kernel(
    x_ptr, bias_ptr, flags_ptr, d_reads_ptr, d_checkpoints_ptr, transitions_ptr,
    cu_ptr, chunk_sequence_ptr, chunk_first_ptr, checkpoint_first_ptr,
    total_groups, length, chunk_length, chunks_per_sequence, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_d_b, stride_d_t, stride_d_c,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    WHOLE: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """transitions[chunk, h, i, a, :] = row a of the chunk's matrix backwards; a = r: its vector; a = r + 1: the vector
    forwards. As ``chunk_scan.chunk_transition_kernel``, for both ways.

    Backwards: autograd's gradient of the states of ``reference.recurrence.delta_rule``, which a chunk maps affinely.
    """
    group, place, m_column = columns(total_groups, RANK * (RANK + 2), COLUMNS)  # [COLUMNS] each
    i = place // (RANK + 2)
    a = place % (RANK + 2)
    chunk = group // HEADS
    h = group % HEADS
    sequence, here, row, begin, count = locate_chunk(
        chunk, m_column, length, chunk_length, chunks_per_sequence,
        cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED,
    )  # fmt: skip
    p_x = x_ptr + row.to(tl.int64) * stride_x_b + begin.to(tl.int64) * stride_x_t
    p_flag = flags_ptr + row.to(tl.int64) * length + begin
    p_d = d_reads_ptr + row.to(tl.int64) * stride_d_b + begin.to(tl.int64) * stride_d_t
    p_d += (h * RANK + i).to(tl.int64) * stride_d_c
    p_checkpoint = d_checkpoints_ptr
    if HAS_CHECKPOINTS:
        checkpoint = checkpoints_before(sequence, length, every, checkpoint_first_ptr, m_column, IS_PACKED)
        p_checkpoint += ((checkpoint * HEADS + h) * RANK + i) * RANK
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    s = tl.where(o_j == a[None, :], 1.0, 0.0) * tl.where(o_j < RANK, 1.0, 0.0)  # [R, COLUMNS]
    s = run_tokens(
        s, a == RANK + 1, a >= RANK, p_x, p_flag, p_d, p_checkpoint, transitions_ptr, here * chunk_length, count, h, i,
        beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
        HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
        WHOLE, HAS_CHECKPOINTS, 0,
    )  # fmt: skip
    o_transition = (group.to(tl.int64) * (RANK * (RANK + 2)) + place) * RANK
    tl.store(transitions_ptr + o_transition[None, :] + o_j, s, mask=m_column[None, :] & (o_j < RANK))


@triton.jit(do_not_specialize=["stride_m_a", "stride_m_j"])
def state_passing_backward_kernel(
    transitions_ptr, s_ptr, slots_ptr, d_state_ptr, edges_ptr, d_initial_ptr, chunk_first_ptr,
    chunks_per_sequence, states, stride_m_a, stride_m_j,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j, stride_d_n, stride_d_h, stride_d_i, stride_d_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, DENSE_STATE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """edges[chunk, h, 0, i, :] = s_i before the chunk, edges[chunk, h, 1, i, :] = g_i after it, and the gradient of
    the initial state. One program per sequence, head, row and direction; see ``chunk_scan.state_passing_kernel``.

    s equals the states of ``reference.recurrence.delta_rule``, g autograd's gradients of them.
    """
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
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
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

    TRANSITION: tl.constexpr = HEADS * RANK * RANK * (RANK + 2)
    EDGE: tl.constexpr = HEADS * 2 * RANK * RANK
    # Backwards the matrix as it lies, from the last chunk; forwards its transpose, from the first.
    chunk += tl.where(back == 1, tl.maximum(count - 1, 0), 0)
    step = tl.where(back == 1, -1, 1).to(tl.int64)
    p_transition = transitions_ptr + chunk.to(tl.int64) * TRANSITION + (h * RANK + i) * (RANK * (RANK + 2))
    p_vector = p_transition + (RANK + 1 - back) * RANK
    p_edge = edges_ptr + chunk.to(tl.int64) * EDGE + ((h * 2 + back) * RANK + i) * RANK
    stride_a = tl.where(back == 1, stride_m_a, stride_m_j)
    stride_j = tl.where(back == 1, stride_m_j, stride_m_a)
    s = pass_state(
        s,
        p_transition,
        p_vector,
        p_edge,
        count,
        step * TRANSITION,
        step * EDGE,
        stride_a,
        stride_j,
        stride_m_j,
        RANK,
        R,
    )
    o_initial = ((row * HEADS + h) * RANK + i) * RANK
    tl.store(d_initial_ptr + o_initial + o_j, s, mask=(o_j < RANK) & (o_none + back == 1))


@triton.jit
def block_states_kernel(
    x_ptr, bias_ptr, s_ptr, slots_ptr, d_state_ptr, edges_ptr, flags_ptr, d_reads_ptr, d_checkpoints_ptr,
    bounds_ptr, d_initial_ptr,
    cu_ptr, chunk_sequence_ptr, chunk_first_ptr, block_first_ptr, checkpoint_first_ptr,
    total_groups, states, length, chunk_length, chunks_per_sequence, blocks_per_sequence, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_d_b, stride_d_t, stride_d_c,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j, stride_g_n, stride_g_h, stride_g_i, stride_g_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    WHOLE: tl.constexpr, DENSE_STATE: tl.constexpr, DENSE_GRADIENT: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_CHECKPOINTS: tl.constexpr,
    IS_PACKED: tl.constexpr, IS_CHUNKED: tl.constexpr, SPACING: tl.constexpr,
):  # fmt: skip
    """bounds[block, h, 0, i, :] = s_i before the block of SPACING tokens, bounds[block, h, 1, i, :] = g_i after it;
    with one chunk per sequence also the gradient of the initial state.

    s equals the states of ``reference.recurrence.delta_rule``, g autograd's gradients of them.
    """
    group, place, m_column = columns(total_groups, 2 * RANK, COLUMNS)  # [COLUMNS] each
    i = place % RANK
    back = place // RANK
    up = back == 0
    chunk = group // HEADS
    h = group % HEADS
    sequence, here, row, begin, count = locate_chunk(
        chunk, m_column, length, chunk_length, chunks_per_sequence,
        cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED,
    )  # fmt: skip
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    m_row = m_column[None, :] & (o_j < RANK)  # [R, COLUMNS]
    if IS_CHUNKED:
        o_edge = ((chunk.to(tl.int64) * HEADS + h) * 2 + back) * (RANK * RANK) + i * RANK
        s = tl.load(edges_ptr + o_edge[None, :] + o_j, mask=m_row & (count > 0)[None, :], other=0.0)  # [R, COLUMNS]
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
        checkpoint = checkpoints_before(sequence, length, every, checkpoint_first_ptr, m_column, IS_PACKED)
        p_checkpoint += ((checkpoint * HEADS + h) * RANK + i) * RANK
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    s = run_tokens(
        s, up, m_column, p_x, p_flag, p_d, p_checkpoint, p_bound, here * chunk_length, count, h, i,
        beta_bias, lambda_bias, every, stride_x_t, stride_x_w, stride_d_t,
        HEADS, RANK, R, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX,
        WHOLE, HAS_CHECKPOINTS, SPACING,
    )  # fmt: skip
    if not IS_CHUNKED:
        o_initial = ((sequence.to(tl.int64) * HEADS + h) * RANK + i) * RANK
        tl.store(d_initial_ptr + o_initial[None, :] + o_j, s, mask=m_row & (back == 1)[None, :])
