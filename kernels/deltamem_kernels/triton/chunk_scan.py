"""The kernels of a chunked scan: one transition a chunk, the states before the chunks, the reads inside.

Row i of S goes through an affine map per token, s_i <- s_i (keep_i I − erase_i k kᵀ) + write_i v_i kᵀ, and affine maps
compose: the map of a chunk, its *transition*, is a matrix [r, r] and a vector [r] a row. See ``scan``, which launches
these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import columns, delta_update, dot, load_bias, locate_chunk, owned, state_pointers, zero_or_nan
from .token_parts import first_token, load_token, prepared

BROKEN = tl.constexpr(2**30)  # a bit in the count of skipped tokens: a state inside a chunk is not finite


@triton.jit
def chunk_transition_kernel(
    x_ptr, bias_ptr, flags_ptr, transitions_ptr, cu_ptr, chunk_sequence_ptr, chunk_first_ptr,
    total_groups, length, chunk_length, chunks_per_sequence,
    stride_x_b, stride_x_t, stride_x_w, stride_bias,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    WHOLE: tl.constexpr, IS_PACKED: tl.constexpr, PREPARED: tl.constexpr,
):  # fmt: skip
    """transitions[chunk, h, i, a, :] = row a of the chunk's matrix; a = r: its vector.

    Row a of a product of matrices starts as e_a and obeys the state's own recurrence without the addend; the
    vector starts as 0 and obeys all of it. So the r + 1 of them are columns like any other. Row i of the state after
    the chunk, s_i · matrix + vector, equals that of ``reference.recurrence.delta_rule`` over its tokens.
    """
    group, place, m_column = columns(total_groups, RANK * (RANK + 1), COLUMNS)  # [COLUMNS] each
    i = place // (RANK + 1)
    a = place % (RANK + 1)
    chunk = group // HEADS
    h = group % HEADS
    _, _, row, begin, count = locate_chunk(
        chunk, m_column, length, chunk_length, chunks_per_sequence,
        cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED,
    )  # fmt: skip
    first = row.to(tl.int64) * length + begin
    p_flag = flags_ptr + first
    p_x, step_x = first_token(x_ptr, h, row, begin, length, stride_x_b, stride_x_t, HEADS, R, PREPARED)
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    s = tl.where(o_j == a[None, :], 1.0, 0.0) * tl.where(o_j < RANK, 1.0, 0.0)  # [R, COLUMNS]

    steps = tl.max(count, axis=0)
    # Two tokens are on their way while one is computed.
    raw = load_token(
        p_x, p_flag, h, i, count > 0, stride_x_w,
        HEADS, RANK, R, ROW_GATES, HAS_LAMBDA, WHOLE, False, PREPARED,
    )  # fmt: skip
    raw_2 = load_token(
        p_x + step_x, p_flag + 1, h, i, count > 1, stride_x_w,
        HEADS, RANK, R, ROW_GATES, HAS_LAMBDA, WHOLE, False, PREPARED,
    )  # fmt: skip
    for t in range(steps):
        p_x += step_x
        p_flag += 1
        raw_3 = load_token(
            p_x + step_x, p_flag + 1, h, i, t + 2 < count, stride_x_w,
            HEADS, RANK, R, ROW_GATES, HAS_LAMBDA, WHOLE, False, PREPARED,
        )  # fmt: skip
        token = prepared(
            raw, beta_bias, lambda_bias,
            MODE, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX, False, PREPARED,
        )  # fmt: skip
        added = tl.where(a == RANK, token.added, 0.0)
        after = delta_update(s, token.k, token.c_k, token.keep, token.erase, added)
        s = tl.where((token.flag == 1)[None, :], after, s)
        raw = raw_2
        raw_2 = raw_3

    o_transition = (group.to(tl.int64) * (RANK * (RANK + 1)) + place) * RANK
    tl.store(transitions_ptr + o_transition[None, :] + o_j, s, mask=m_column[None, :] & (o_j < RANK))


@triton.jit
def pass_state(
    s, p_transition, p_vector, p_start, count, step_transition, step_start, stride_m_a, stride_m_j, stride_v_j,
    RANK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Take the column s [R, 1] through ``count`` transitions, store it before each of them, and return it.

    s <- s M + n turns a column into a row, so transitions go in pairs: the first with M as it lies, the second with M
    transposed, and no step has to turn its result round.
    """
    o_0 = tl.arange(0, R)[:, None]  # [R, 1]
    o_1 = tl.arange(0, R)[None, :]  # [1, R]
    m_tile = (o_0 < RANK) & (o_1 < RANK)
    o_none = o_0 * 0  # makes a tile of a number: the interpreter does not mix the two in a mask
    identity = tl.where(o_0 == o_1, 1.0, 0.0)
    o_down = o_0 * stride_m_a + o_1 * stride_m_j  # axis 0 over a, axis 1 over j
    o_up = o_1 * stride_m_a + o_0 * stride_m_j  # axis 0 over j, axis 1 over a
    # The vector rides in the row (column) a = 0 of a tile of its own: it joins the sum with no exchange.
    n_down = o_1 * stride_v_j + o_0 * 0
    n_up = o_0 * stride_v_j + o_1 * 0
    m_down = m_tile & (o_0 == 0)
    m_up = m_tile & (o_1 == 0)

    # m: [R, R]. n: [R, R], 0 but for its row (column) of a = 0. s: [R, 1], turned: [1, R].
    m_1 = tl.load(p_transition + o_down, mask=m_tile & (o_none < count), other=0.0)
    n_1 = tl.load(p_vector + n_down, mask=m_down & (o_none < count), other=0.0)
    m_2 = tl.load(p_transition + step_transition + o_up, mask=m_tile & (o_none + 1 < count), other=0.0)
    n_2 = tl.load(p_vector + step_transition + n_up, mask=m_up & (o_none + 1 < count), other=0.0)
    for c in range(0, count, 2):
        p_transition += 2 * step_transition
        p_vector += 2 * step_transition
        m_1_next = tl.load(p_transition + o_down, mask=m_tile & (o_none + c + 2 < count), other=0.0)
        n_1_next = tl.load(p_vector + n_down, mask=m_down & (o_none + c + 2 < count), other=0.0)
        m_2_next = tl.load(p_transition + step_transition + o_up, mask=m_tile & (o_none + c + 3 < count), other=0.0)
        n_2_next = tl.load(p_vector + step_transition + n_up, mask=m_up & (o_none + c + 3 < count), other=0.0)

        tl.store(p_start + o_0, s, mask=o_0 < RANK)
        turned = tl.sum(tl.fma(tl.broadcast_to(s, m_1.shape), m_1, n_1), axis=0, keep_dims=True)
        tl.store(p_start + step_start + o_1, turned, mask=(o_1 < RANK) & (o_1 * 0 + c + 1 < count))
        # A pair cut short ends with the identity, which changes no bit.
        m_2 = tl.where(o_none + c + 1 < count, m_2, identity)
        s = tl.sum(tl.fma(tl.broadcast_to(turned, m_2.shape), m_2, n_2), axis=1, keep_dims=True)
        p_start += 2 * step_start
        m_1, n_1, m_2, n_2 = m_1_next, n_1_next, m_2_next, n_2_next
    return s


# Strides of 1 and r that the compiler cannot see: told that a tile is contiguous, it loads it in a layout of its
# own and moves every transition through shared memory to where the sum wants it.
@triton.jit(do_not_specialize=["stride_m_a", "stride_m_j"])
def state_passing_kernel(
    transitions_ptr, s_ptr, slots_ptr, starts_ptr, final_ptr, chunk_first_ptr,
    chunks_per_sequence, states, stride_m_a, stride_m_j, stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, DENSE_STATE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """starts[chunk, h, i, :] = s_i before the chunk; final[n, h, i, :] = s_i after the last one.

    One program per sequence, head and row. Equals the states that ``reference.recurrence.delta_rule`` returns, at the
    ends of the chunks.
    """
    i = tl.program_id(0) % RANK
    h = tl.program_id(0) // RANK % HEADS
    sequence = tl.program_id(0) // (RANK * HEADS)
    if IS_PACKED:
        chunk = tl.load(chunk_first_ptr + sequence)
        end = tl.load(chunk_first_ptr + sequence + 1)
    else:
        chunk = sequence * chunks_per_sequence
        end = chunk + chunks_per_sequence
    o_0 = tl.arange(0, R)[:, None]  # [R, 1]
    o_none = o_0 * 0  # makes a tile of a number: the interpreter does not mix the two in a mask
    s = tl.zeros([R, 1], tl.float32)
    state_row = sequence.to(tl.int64)
    if HAS_SLOTS:
        state_row = owned(tl.load(slots_ptr + sequence), states)
    m_s = (o_0 < RANK) & (o_none + state_row >= 0)
    if HAS_STATE:
        p_s = s_ptr + state_row * stride_s_n + h.to(tl.int64) * stride_s_h + i.to(tl.int64) * stride_s_i
        s = tl.load(p_s + o_0.to(tl.int64) * stride_s_j, mask=m_s, other=0.0)

    TRANSITION: tl.constexpr = HEADS * RANK * RANK * (RANK + 1)
    ROW: tl.constexpr = HEADS * RANK * RANK
    p_transition = transitions_ptr + chunk.to(tl.int64) * TRANSITION + (h * RANK + i) * (RANK * (RANK + 1))
    p_vector = p_transition + RANK * stride_m_a
    p_start = starts_ptr + chunk.to(tl.int64) * ROW + (h * RANK + i) * RANK
    s = pass_state(
        s, p_transition, p_vector, p_start, end - chunk, TRANSITION, ROW, stride_m_a, stride_m_j, stride_m_j, RANK, R
    )
    o_final = ((sequence.to(tl.int64) * HEADS + h) * RANK + i) * RANK
    tl.store(final_ptr + o_final + o_0, tl.where(m_s, s, 0.0), mask=o_0 < RANK)


@triton.jit
def chunk_scan_kernel(
    x_ptr, bias_ptr, flags_ptr, s_ptr, slots_ptr, cu_ptr, chunk_sequence_ptr, chunk_first_ptr,
    reads_ptr, final_ptr, skipped_ptr, checkpoints_ptr, checkpoint_first_ptr,
    total_groups, states, length, chunk_length, chunks_per_sequence, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    WHOLE: tl.constexpr, DENSE_STATE: tl.constexpr, HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr,
    HAS_CHECKPOINTS: tl.constexpr, IS_PACKED: tl.constexpr, IS_CHUNKED: tl.constexpr, PREPARED: tl.constexpr,
):  # fmt: skip
    """Reads, and with one chunk per sequence the final state, token after token from the state before.

    Equals ``reference.recurrence.scan``. s_ptr: the states before each chunk if IS_CHUNKED, else the initial states.
    """
    group, i, m_column = columns(total_groups, RANK, COLUMNS)  # [COLUMNS] each
    chunk = group // HEADS
    h = group % HEADS
    sequence, place, row, begin, count = locate_chunk(
        chunk, m_column, length, chunk_length, chunks_per_sequence,
        cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED,
    )  # fmt: skip
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    m_state = m_column
    state_row = sequence.to(tl.int64)
    if HAS_SLOTS:
        state_row = owned(tl.load(slots_ptr + sequence, mask=m_column, other=-1), states)
        m_state = m_column & (state_row >= 0)
    live = m_state
    if IS_CHUNKED:
        state_row = chunk.to(tl.int64)
        m_state = live & (count > 0)
    if HAS_STATE:
        p_s = state_pointers(
            s_ptr + state_row * stride_s_n, h, i, stride_s_h, stride_s_i, stride_s_j, RANK, R, DENSE_STATE
        )  # fmt: skip
        s = tl.load(p_s, mask=m_state[None, :] & (o_j < RANK), other=0.0)  # [R, COLUMNS]
    else:
        s = tl.zeros([R, COLUMNS], tl.float32)

    first = row.to(tl.int64) * length + begin
    p_flag = flags_ptr + first
    p_x, step_x = first_token(x_ptr, h, row, begin, length, stride_x_b, stride_x_t, HEADS, R, PREPARED)
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    p_read = reads_ptr + first * (HEADS * RANK) + h * RANK + i
    if HAS_CHECKPOINTS:
        if IS_PACKED:
            checkpoint = tl.load(checkpoint_first_ptr + sequence, mask=m_column, other=0).to(tl.int64)
        else:
            checkpoint = sequence.to(tl.int64) * (length // every)
        checkpoint += (place * chunk_length) // every
        # What is left until the next one.
        until = every - (place * chunk_length) % every

    skipped = count * 0
    steps = tl.max(count, axis=0)
    # Two tokens are on their way while one is computed.
    raw = load_token(
        p_x, p_flag, h, i, count > 0, stride_x_w,
        HEADS, RANK, R, ROW_GATES, HAS_LAMBDA, WHOLE, True, PREPARED,
    )  # fmt: skip
    raw_2 = load_token(
        p_x + step_x, p_flag + 1, h, i, count > 1, stride_x_w,
        HEADS, RANK, R, ROW_GATES, HAS_LAMBDA, WHOLE, True, PREPARED,
    )  # fmt: skip
    for t in range(steps):
        p_x += step_x
        p_flag += 1
        raw_3 = load_token(
            p_x + step_x, p_flag + 1, h, i, t + 2 < count, stride_x_w,
            HEADS, RANK, R, ROW_GATES, HAS_LAMBDA, WHOLE, True, PREPARED,
        )  # fmt: skip
        token = prepared(
            raw, beta_bias, lambda_bias,
            MODE, HAS_LAMBDA, NORMALIZE, BETA_MAX, KEEP_MAX, VALUE_MAX, True, PREPARED,
        )  # fmt: skip
        valid = (token.flag == 1) & live
        tl.store(p_read, tl.where(valid, dot(s, token.q) * token.c_q, 0.0), mask=t < count)
        after = delta_update(s, token.k, token.c_k, token.keep, token.erase, token.added)
        s = tl.where(valid[None, :], after, s)
        skipped += tl.where((token.flag == 2) & live, 1, 0)
        if HAS_CHECKPOINTS:
            until -= 1
            o_checkpoint = ((checkpoint * HEADS + h) * RANK + i) * RANK
            m_checkpoint = (until == 0) & (t < count)
            tl.store(checkpoints_ptr + o_checkpoint[None, :] + o_j, s, mask=m_checkpoint[None, :] & (o_j < RANK))
            checkpoint += tl.where(until == 0, 1, 0)
            until = tl.where(until == 0, every, until)
        p_read += HEADS * RANK
        raw = raw_2
        raw_2 = raw_3

    m_count = m_column & (h == 0) & (i == 0)
    if IS_CHUNKED:
        # Integers: the order of the additions does not show.
        tl.atomic_add(skipped_ptr + sequence, skipped, mask=m_count & (skipped > 0), sem="relaxed")
        broken = m_column & (zero_or_nan(s) != 0.0)
        tl.atomic_or(skipped_ptr + sequence, BROKEN, mask=broken, sem="relaxed")
    else:
        tl.store(skipped_ptr + sequence, skipped, mask=m_count)
        o_final = ((sequence.to(tl.int64) * HEADS + h) * RANK + i) * RANK
        tl.store(final_ptr + o_final[None, :] + o_j, s, mask=m_column[None, :] & (o_j < RANK))
