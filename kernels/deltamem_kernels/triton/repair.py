"""A sequence of tokens through the delta rule.

    read_t = S_{t-1} q_t
    S_t    = diag(keep_t) S_{t-1} − diag(erase_t) (S_{t-1} k_t) k_tᵀ + diag(write_t) v_t k_tᵀ

Row i of S goes through an affine map per token, s_i <- s_i (keep_i I − erase_i k kᵀ) + write_i v_i kᵀ, and affine
maps compose. A long sequence is therefore cut into chunks:

    1. ``map_kernel``: the map of each chunk, a matrix [r, r] and a vector [r] per row, all chunks at once;
    2. ``carry_kernel``: the state before each chunk, one chunk after another, T / C short steps;
    3. ``scan_kernel``: the reads of each chunk from the state before it, all chunks at once.

A short sequence, or a rank above 16, is one chunk: kernel 3 alone. ``flag_kernel`` says beforehand which tokens
count, one byte each; with narrow tokens in one chunk, kernel 3 looks for itself.

A token that would leave NaN or Inf in the state of any head is written in none. No kernel of these looks at every
state: what is not finite stays so (Inf times a number, plus a number, is Inf or NaN), so the last ones tell of all.
Where one is not finite, ``repair_kernel`` takes the sequence once more, token by token, all heads at once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from ..rule import DeltaRule, ScanOutput, check_arguments
from . import launch as _launch
from .launch import (
    check_device,
    check_reach,
    float32_only,
    half_or_single,
    launch,
    next_power_of_two,
    rule_flags,
    state_strides,
    tile,
)
from .primitives import (
    columns,
    direction,
    dot,
    gates,
    load_bias,
    load_flag,
    load_vector,
    load_write,
    locate,
    lost,
    owned,
    state_pointers,
    written,
    zero_or_nan,
)

SHORT = 128  # tokens up to which one launch beats three
CHUNKED_RANK = 16  # a chunk's map has r³ numbers; above this rank they outweigh the tokens
MAP_WARPS = 2  # of a map's program: r (r + 1) columns a head look at the same tokens, which then lie in L1
LOOK_WIDTH = 40  # widest token that each thread of a scan checks for itself, registers permitting
BROKEN = tl.constexpr(2**30)  # a bit in the count of skipped tokens: a state inside a chunk is not finite


@triton.jit
def flag_kernel(
    x_ptr, mask_ptr, flags_ptr,
    tokens, length, stride_x_b, stride_x_t, stride_x_w, stride_mask_b, stride_mask_t,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, TOKENS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """flags[b, t] = 1 if the token counts, 2 if it is unmasked but not finite, 0 if masked."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m_token = token < tokens
    b = (token // length).to(tl.int64)
    t = (token % length).to(tl.int64)
    o_w = tl.arange(0, WIDTH_PAD)
    p_x = x_ptr + (b * stride_x_b + t * stride_x_t)[:, None] + o_w[None, :] * stride_x_w
    x = tl.load(p_x, mask=m_token[:, None] & (o_w < WIDTH)[None, :], other=0.0).to(tl.float32)
    flag = tl.where(zero_or_nan(x) == 0.0, 1, 2)
    if HAS_MASK:
        present = tl.load(mask_ptr + b * stride_mask_b + t * stride_mask_t, mask=m_token, other=0)
        flag = tl.where(present != 0, flag, 0)
    tl.store(flags_ptr + token, flag.to(tl.uint8), mask=m_token)


@triton.jit
def map_kernel(
    x_ptr, bias_ptr, flags_ptr, maps_ptr, cu_ptr, chunk_sequence_ptr, chunk_first_ptr,
    total_groups, length, chunk_length, chunks_per_sequence,
    stride_x_b, stride_x_t, stride_x_w, stride_bias,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """maps[chunk, h, i, a, :] = row a of the chunk's matrix; a = r: its vector.

    Row a of a product of matrices starts as e_a and obeys the state's own recurrence without the addend; the
    vector starts as 0 and obeys all of it. So the r + 1 of them are columns like any other.
    """
    group, place, m_column = columns(total_groups, RANK * (RANK + 1), COLUMNS)
    i = place // (RANK + 1)
    a = place % (RANK + 1)
    chunk = group // HEADS
    h = group % HEADS
    _, _, row, begin, count = locate(
        chunk, m_column, length, chunk_length, chunks_per_sequence,
        cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED,
    )  # fmt: skip
    p_x = x_ptr + row.to(tl.int64) * stride_x_b + begin.to(tl.int64) * stride_x_t
    p_flag = flags_ptr + row.to(tl.int64) * length + begin
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    o_k = (HEADS + h) * RANK
    o_j = tl.arange(0, R)[:, None]
    s = tl.where(o_j == a[None, :], 1.0, 0.0) * tl.where(o_j < RANK, 1.0, 0.0)

    steps = tl.max(count, axis=0)
    k = load_vector(p_x, o_k, stride_x_w, count > 0, RANK, R, WHOLE)
    v, b, lam = load_write(p_x, h, i, stride_x_w, count > 0, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    flag = tl.load(p_flag, mask=count > 0, other=0)
    for t in range(steps):
        # The next token is on its way while this one is computed.
        m_next = t + 1 < count
        p_x += stride_x_t
        p_flag += 1
        k_next = load_vector(p_x, o_k, stride_x_w, m_next, RANK, R, WHOLE)
        v_next, b_next, lam_next = load_write(p_x, h, i, stride_x_w, m_next, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
        flag_next = tl.load(p_flag, mask=m_next, other=0)

        z, c = direction(k, NORMALIZE)
        keep, erase, write = gates(b.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA)
        added = tl.where(a == RANK, write * v.to(tl.float32), 0.0)
        s = tl.where((flag == 1)[None, :], written(s, z, c, keep, erase, added), s)
        k, v, b, lam, flag = k_next, v_next, b_next, lam_next, flag_next

    o_map = (group.to(tl.int64) * (RANK * (RANK + 1)) + place) * RANK
    tl.store(maps_ptr + o_map[None, :] + o_j, s, mask=m_column[None, :] & (o_j < RANK))


@triton.jit
def carry(
    s, p_map, p_vector, p_start, count, step_map, step_start, stride_m_a, stride_m_j, stride_v_j,
    RANK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Take the column s [R, 1] through ``count`` maps, store it before each of them, and return it.

    s <- s M + n turns a column into a row, so maps go in pairs: the first with M as it lies, the second with M
    transposed, and no step has to turn its result round.
    """
    o_0 = tl.arange(0, R)[:, None]
    o_1 = tl.arange(0, R)[None, :]
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

    m_1 = tl.load(p_map + o_down, mask=m_tile & (o_none < count), other=0.0)
    n_1 = tl.load(p_vector + n_down, mask=m_down & (o_none < count), other=0.0)
    m_2 = tl.load(p_map + step_map + o_up, mask=m_tile & (o_none + 1 < count), other=0.0)
    n_2 = tl.load(p_vector + step_map + n_up, mask=m_up & (o_none + 1 < count), other=0.0)
    for c in range(0, count, 2):
        p_map += 2 * step_map
        p_vector += 2 * step_map
        m_1_next = tl.load(p_map + o_down, mask=m_tile & (o_none + c + 2 < count), other=0.0)
        n_1_next = tl.load(p_vector + n_down, mask=m_down & (o_none + c + 2 < count), other=0.0)
        m_2_next = tl.load(p_map + step_map + o_up, mask=m_tile & (o_none + c + 3 < count), other=0.0)
        n_2_next = tl.load(p_vector + step_map + n_up, mask=m_up & (o_none + c + 3 < count), other=0.0)

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
# own and moves every map through shared memory to where the sum wants it.
@triton.jit(do_not_specialize=["stride_m_a", "stride_m_j"])
def carry_kernel(
    maps_ptr, s_ptr, slots_ptr, starts_ptr, final_ptr, chunk_first_ptr,
    chunks_per_sequence, states, stride_m_a, stride_m_j, stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, DENSE_STATE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """starts[chunk, h, i, :] = s_i before the chunk; final[n, h, i, :] = s_i after the last one.

    One program per sequence, head and row.
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
    o_0 = tl.arange(0, R)[:, None]
    o_none = o_0 * 0  # makes a tile of a number: the interpreter does not mix the two in a mask
    s = tl.zeros([R, 1], tl.float32)
    state_row = sequence.to(tl.int64)
    if HAS_SLOTS:
        state_row = owned(tl.load(slots_ptr + sequence), states)
    m_s = (o_0 < RANK) & (o_none + state_row >= 0)
    if HAS_STATE:
        p_s = s_ptr + state_row * stride_s_n + h.to(tl.int64) * stride_s_h + i.to(tl.int64) * stride_s_i
        s = tl.load(p_s + o_0.to(tl.int64) * stride_s_j, mask=m_s, other=0.0)

    MAP: tl.constexpr = HEADS * RANK * RANK * (RANK + 1)
    ROW: tl.constexpr = HEADS * RANK * RANK
    p_map = maps_ptr + chunk.to(tl.int64) * MAP + (h * RANK + i) * (RANK * (RANK + 1))
    p_vector = p_map + RANK * stride_m_a
    p_start = starts_ptr + chunk.to(tl.int64) * ROW + (h * RANK + i) * RANK
    s = carry(s, p_map, p_vector, p_start, end - chunk, MAP, ROW, stride_m_a, stride_m_j, stride_m_j, RANK, R)
    o_final = ((sequence.to(tl.int64) * HEADS + h) * RANK + i) * RANK
    tl.store(final_ptr + o_final + o_0, tl.where(m_s, s, 0.0), mask=o_0 < RANK)


@triton.jit
def scan_kernel(
    x_ptr, bias_ptr, s_ptr, slots_ptr, flags_ptr, mask_ptr, cu_ptr, chunk_sequence_ptr, chunk_first_ptr,
    reads_ptr, final_ptr, skipped_ptr, checkpoints_ptr, checkpoint_first_ptr,
    total_groups, states, length, chunk_length, chunks_per_sequence, every,
    stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_mask_b, stride_mask_t,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, DENSE_STATE: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_CHECKPOINTS: tl.constexpr, IS_PACKED: tl.constexpr, IS_CHUNKED: tl.constexpr,
):  # fmt: skip
    """Reads, and with one chunk per sequence the final state, token after token from the state before.

    s_ptr: the states before each chunk if IS_CHUNKED, else the initial states.
    """
    group, i, m_column = columns(total_groups, RANK, COLUMNS)
    chunk = group // HEADS
    h = group % HEADS
    sequence, place, row, begin, count = locate(
        chunk, m_column, length, chunk_length, chunks_per_sequence,
        cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED,
    )  # fmt: skip
    o_j = tl.arange(0, R)[:, None]
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
        s = tl.load(p_s, mask=m_state[None, :] & (o_j < RANK), other=0.0)
    else:
        s = tl.zeros([R, COLUMNS], tl.float32)

    token = row.to(tl.int64) * length + begin
    p_x = x_ptr + row.to(tl.int64) * stride_x_b + begin.to(tl.int64) * stride_x_t
    p_flag = flags_ptr
    p_mask = mask_ptr
    if HAS_FLAGS:
        p_flag += token
    if HAS_MASK:
        p_mask += row.to(tl.int64) * stride_mask_b + begin.to(tl.int64) * stride_mask_t
    p_read = reads_ptr + token * (HEADS * RANK) + h * RANK + i
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    o_q = h * RANK
    o_k = (HEADS + h) * RANK
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
    m_first = count > 0
    q = load_vector(p_x, o_q, stride_x_w, m_first, RANK, R, WHOLE)
    k = load_vector(p_x, o_k, stride_x_w, m_first, RANK, R, WHOLE)
    v, b, lam = load_write(p_x, h, i, stride_x_w, m_first, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    flag = load_flag(p_x, p_flag, p_mask, stride_x_w, m_first, WIDTH, WHOLE, HAS_FLAGS, HAS_MASK)
    for t in range(steps):
        # The next token is on its way while this one is computed.
        m_next = t + 1 < count
        p_x += stride_x_t
        if HAS_FLAGS:
            p_flag += 1
        if HAS_MASK:
            p_mask += stride_mask_t
        q_next = load_vector(p_x, o_q, stride_x_w, m_next, RANK, R, WHOLE)
        k_next = load_vector(p_x, o_k, stride_x_w, m_next, RANK, R, WHOLE)
        v_next, b_next, lam_next = load_write(p_x, h, i, stride_x_w, m_next, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
        flag_next = load_flag(p_x, p_flag, p_mask, stride_x_w, m_next, WIDTH, WHOLE, HAS_FLAGS, HAS_MASK)

        valid = (flag == 1) & live
        z, c = direction(q, NORMALIZE)
        read = dot(s, z) * c
        tl.store(p_read, tl.where(valid, read, 0.0), mask=t < count)
        z, c = direction(k, NORMALIZE)
        keep, erase, write = gates(b.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA)
        s = tl.where(valid[None, :], written(s, z, c, keep, erase, write * v.to(tl.float32)), s)
        skipped += tl.where((flag == 2) & live, 1, 0)
        if HAS_CHECKPOINTS:
            until -= 1
            o_checkpoint = ((checkpoint * HEADS + h) * RANK + i) * RANK
            m_checkpoint = (until == 0) & (t < count)
            tl.store(checkpoints_ptr + o_checkpoint[None, :] + o_j, s, mask=m_checkpoint[None, :] & (o_j < RANK))
            checkpoint += tl.where(until == 0, 1, 0)
            until = tl.where(until == 0, every, until)
        p_read += HEADS * RANK
        q, k, v, b, lam, flag = q_next, k_next, v_next, b_next, lam_next, flag_next

    m_count = m_column & (h == 0) & (i == 0)
    if IS_CHUNKED:
        # Integers: the order of the additions does not show.
        tl.atomic_add(skipped_ptr + sequence, skipped, mask=m_count & (skipped > 0), sem="relaxed")
        broken = m_column & (lost(s) != 0.0)
        tl.atomic_or(skipped_ptr + sequence, BROKEN, mask=broken, sem="relaxed")
    else:
        tl.store(skipped_ptr + sequence, skipped, mask=m_count)
        o_final = ((sequence.to(tl.int64) * HEADS + h) * RANK + i) * RANK
        tl.store(final_ptr + o_final[None, :] + o_j, s, mask=m_column[None, :] & (o_j < RANK))


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
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_CHECKPOINTS: tl.constexpr, IS_PACKED: tl.constexpr, IS_CHUNKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence, which leaves at once where all states are finite. Else the sequence from its first token
    on; the state lies in ``final`` meanwhile. HAS_FLAGS: what a token is found to be is noted there, too."""
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
        o_j = tl.arange(0, R)[:, None]
        for first in range(0, HEADS * RANK, COLUMNS):
            column = first + o_column
            h = column // RANK
            i = column % RANK
            m_tile = (column < HEADS * RANK)[None, :] & (o_j < RANK)
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
                    MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE,
                )  # fmt: skip
                nothing += lost(s)
            flag = tl.where((flag == 1) & (tl.sum(nothing, axis=0) != 0.0), 2, flag)
            m_valid = o_column * 0 + flag == 1
            for first in range(0, HEADS * RANK, COLUMNS):
                before, p_s, s, read = repaired(
                    p_x, p_final, bias_ptr, first, stride_x_w, stride_bias, HEADS, RANK, R, COLUMNS, WHOLE,
                    MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE,
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
):  # fmt: skip
    """Columns ``first`` and following of one state → (as they are, where they lie, after the token, their reads)."""
    column = first + tl.arange(0, COLUMNS)
    h = column // RANK
    i = column % RANK
    m_column = column < HEADS * RANK
    o_j = tl.arange(0, R)[:, None]
    p_s = p_state + column[None, :] * RANK + o_j
    s = tl.load(p_s, mask=m_column[None, :] & (o_j < RANK), other=0.0)
    p_token = p_x + column * 0
    q = load_vector(p_token, h * RANK, stride_x_w, m_column, RANK, R, WHOLE)
    k = load_vector(p_token, (HEADS + h) * RANK, stride_x_w, m_column, RANK, R, WHOLE)
    v, b, lam = load_write(p_token, h, i, stride_x_w, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    z, c = direction(q, NORMALIZE)
    read = dot(s, z) * c
    z, c = direction(k, NORMALIZE)
    keep, erase, write = gates(b.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA)
    return s, p_s, written(s, z, c, keep, erase, write * v.to(tl.float32)), read


def choose_chunk(rule: DeltaRule, length: int) -> int:
    """Tokens per chunk, or 0 for one chunk a sequence.

    2 C + T / C dependent steps are fewest at C = √(T / 2). The maps, 4 r² (r + 1) bytes a chunk and head, are no
    more than the tokens, 8 r C bytes in bfloat16, from C = r (r + 1) / 2 on. It depends on nothing that changes
    from call to call but T: a row's bits do not depend on the rows beside it.
    """
    shortest = max(16, next_power_of_two(rule.rank * (rule.rank + 1) // 2))
    if length <= max(SHORT, shortest) or rule.rank > CHUNKED_RANK:
        return 0
    return max(shortest, 1 << round(math.log2(length / 2) / 2))


def depth(rule: DeltaRule, length: int) -> int:
    """How many steps of a scan depend on each other: T in one chunk, else C (map), T / C (carry) and C (reads)."""
    chunk = choose_chunk(rule, length)
    return 2 * chunk + triton.cdiv(length, chunk) if chunk else length


def find_flags(projections: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """uint8 [B, T]: 1 where the token counts, 2 where it is unmasked but not finite, 0 where it is masked.

    A token that would leave a state that is not finite is 1 here, and 2 where a scan has gone over them.
    """
    batch, length, width = projections.shape
    flags = _launch.empty((batch, length), dtype=torch.uint8, device=projections.device)
    width_pad = next_power_of_two(width)
    tokens = max(1, 2048 // width_pad)
    launch(
        flag_kernel, triton.cdiv(batch * length, tokens), projections, num_warps=4,
        x_ptr=projections, mask_ptr=mask, flags_ptr=flags, tokens=batch * length, length=length,
        stride_x_b=projections.stride(0), stride_x_t=projections.stride(1), stride_x_w=projections.stride(2),
        stride_mask_b=mask.stride(0) if mask is not None else 0,
        stride_mask_t=mask.stride(1) if mask is not None else 0,
        WIDTH=width, WIDTH_PAD=width_pad, TOKENS=tokens, HAS_MASK=mask is not None,
    )  # fmt: skip
    return flags


def chunk_table(cu_seqlens: torch.Tensor, length: int, chunk: int):
    """Packed sequences → (sequence of each chunk, −1 past the last; first chunk of each sequence, then the total).

    T // C + N chunks are always enough, so the host need not know how many there are.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).clamp(min=0)
    sequences = lengths.numel()
    if not chunk:
        first = torch.arange(sequences + 1, dtype=torch.int32, device=cu_seqlens.device)
        return first[:-1], first
    first = torch.zeros(sequences + 1, dtype=torch.int32, device=cu_seqlens.device)
    torch.cumsum((lengths + chunk - 1) // chunk, 0, dtype=torch.int32, out=first[1:])
    most = length // chunk + sequences
    first.clamp_(max=most)  # starts past T are wrong and not seen: still, nothing is written past the chunks
    chunks = torch.arange(most, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(first[1:], chunks, right=True, out_int32=True)
    return torch.where(sequence < sequences, sequence, -1), first


def scan(
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    chunk: int | None = None,
) -> ScanOutput:
    """Read and write a sequence of tokens.

        read_t = S_{t-1} q_t
        S_t    = diag(keep_t) S_{t-1} − diag(erase_t) (S_{t-1} k_t) k_tᵀ + diag(write_t) v_t k_tᵀ

    Args:
        projections: bfloat16, float16 or float32 [B, T, W], raw, of any strides; or [1, T, W] packed, with
            ``cu_seqlens``.
        gate_bias: [β's (and λ's) biases], of any floating dtype.
        state: float32 [N, H, r, r] before the first token, of any strides, or None for zeros. With ``slots``:
            [S, H, r, r]. Not changed.
        rule: the recurrence.
        mask: bool [B, T], True = a real token. A masked token reads 0 and leaves the state bit-equal; so does
            a token with a value that is not finite, and one that would leave NaN or Inf in the state of any head.
        cu_seqlens: int [N + 1] on the device, where each packed sequence starts, then the total; non-decreasing
            from 0 to T, which is not checked (the host would have to wait). A token of no sequence reads 0.
        slots: int [N], which row of ``state`` each sequence starts from; −1 = neither read nor written.
        checkpoint_every: n > 0 also returns the state after every n-th token of each sequence.
        chunk: tokens per chunk, 0 for one chunk a sequence, None to choose (tests set it).

    Returns:
        ScanOutput, all float32 but ``skipped``. A sequence whose slot is −1 has reads and state 0.

    Raises:
        ValueError, TypeError: see ``check_arguments``; a float64 input; tensors that are not on a GPU.
    """
    return scan_with_flags(
        projections, gate_bias, state, rule, mask=mask, cu_seqlens=cu_seqlens, slots=slots,
        checkpoint_every=checkpoint_every, chunk=chunk, says=False,
    )[0]  # fmt: skip


def scan_with_flags(
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    chunk: int | None = None,
    says: bool = True,
) -> tuple[ScanOutput, torch.Tensor | None]:
    """``scan``, and if it ``says`` so the tokens' flags, uint8 [B, T], as ``scan_backward`` takes them.

    1: the token was written. 2: it was not, because it or the state after it is not finite. 0: it is masked.
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
    heads, rank, every = rule.heads, rule.rank, checkpoint_every
    device, packed = projections.device, cu_seqlens is not None
    if chunk is None:
        chunk = choose_chunk(rule, length)
    if projections.numel() == 0:
        chunk = 0
    if chunk and rank > CHUNKED_RANK:
        raise ArgumentError(f"chunk: got {chunk} at rank {rank}, allowed 0 above rank {CHUNKED_RANK}")
    if mask is not None:
        mask = mask.view(torch.uint8)
    states = 0 if state is None else state.shape[0]
    if slots is not None:
        slots = slots.contiguous()
    if packed:
        cu_seqlens = cu_seqlens.contiguous()

    # Tokens outside of every packed sequence, and checkpoints past the last, are written by no kernel.
    allocate = torch.zeros if packed else _launch.empty
    float32 = {"dtype": torch.float32, "device": device}
    reads = allocate((batch, length, heads * rank), **float32)
    final = _launch.empty((sequences, heads, rank, rank), **float32)
    checkpoints = None
    if every:
        shape = (length // every,) if packed else (batch, length // every)
        checkpoints = allocate((*shape, heads, rank, rank), **float32)
    skipped = (torch.zeros if chunk else _launch.empty)((sequences,), dtype=torch.int32, device=device)
    flags = None
    if projections.numel() and (says or (sequences and (chunk or width > LOOK_WIDTH))):
        flags = find_flags(projections, mask)
    elif says:
        flags = torch.zeros((batch, length), dtype=torch.uint8, device=device)
    if sequences == 0:
        return ScanOutput(reads, final, skipped, checkpoints), flags

    chunk_sequence = chunk_first = checkpoint_first = None
    if packed:
        chunk_sequence, chunk_first = chunk_table(cu_seqlens, length, chunk)
        chunks, chunks_per_sequence = chunk_sequence.numel(), 0
        if every:
            taken = (cu_seqlens[1:] - cu_seqlens[:-1]) // every
            checkpoint_first = taken.cumsum(0, dtype=torch.int64) - taken
    else:
        chunks_per_sequence = triton.cdiv(length, chunk) if chunk else 1
        chunks = sequences * chunks_per_sequence
    place = {"length": length, "chunk_length": chunk or length, "chunks_per_sequence": chunks_per_sequence}
    place |= {"cu_ptr": cu_seqlens, "chunk_sequence_ptr": chunk_sequence, "chunk_first_ptr": chunk_first}
    strides = {f"stride_x_{name}": stride for name, stride in zip("btw", projections.stride())}
    strides["stride_bias"] = gate_bias.stride(0)

    rows, cols = tile(rule)
    masked = mask if flags is None else None  # the flags know of the mask
    start = state
    if chunk:
        start = _launch.empty((chunks, heads, rank, rank), **float32)
        maps = _launch.empty((chunks, heads, rank, rank + 1, rank), **float32)
        launch(
            map_kernel, triton.cdiv(chunks * heads * rank * (rank + 1), MAP_WARPS * cols), projections,
            num_warps=MAP_WARPS,
            x_ptr=projections, bias_ptr=gate_bias, flags_ptr=flags, maps_ptr=maps,
            total_groups=chunks * heads, COLUMNS=MAP_WARPS * cols, IS_PACKED=packed,
            **place, **strides, **rule_flags(rule, projections),
        )  # fmt: skip
        launch(
            carry_kernel, sequences * heads * rank, projections, num_warps=1,
            maps_ptr=maps, s_ptr=state, slots_ptr=slots, starts_ptr=start, final_ptr=final,
            chunk_first_ptr=chunk_first, chunks_per_sequence=chunks_per_sequence, states=states,
            stride_m_a=rank, stride_m_j=1, **state_strides(state), HEADS=heads, RANK=rank, R=rows,
            HAS_STATE=state is not None, HAS_SLOTS=slots is not None, IS_PACKED=packed,
        )  # fmt: skip
    launch(
        scan_kernel, triton.cdiv(chunks * heads * rank, cols), projections, num_warps=1,
        x_ptr=projections, bias_ptr=gate_bias, s_ptr=start, slots_ptr=slots, flags_ptr=flags, mask_ptr=masked,
        reads_ptr=reads, final_ptr=None if chunk else final, skipped_ptr=skipped,
        checkpoints_ptr=checkpoints, checkpoint_first_ptr=checkpoint_first,
        total_groups=chunks * heads, states=states, every=every, **place, **strides,
        stride_mask_b=masked.stride(0) if masked is not None else 0,
        stride_mask_t=masked.stride(1) if masked is not None else 0,
        **state_strides(start), WIDTH=width, COLUMNS=cols,
        **rule_flags(rule, projections),
        HAS_STATE=start is not None, HAS_SLOTS=slots is not None, HAS_FLAGS=flags is not None,
        HAS_MASK=masked is not None, HAS_CHECKPOINTS=bool(every), IS_PACKED=packed, IS_CHUNKED=bool(chunk),
    )  # fmt: skip
    launch(
        repair_kernel, sequences, projections, num_warps=1,
        x_ptr=projections, bias_ptr=gate_bias, s_ptr=state, slots_ptr=slots, mask_ptr=mask,
        flags_ptr=flags if says else None, cu_ptr=cu_seqlens, checkpoint_first_ptr=checkpoint_first,
        reads_ptr=reads, final_ptr=final, skipped_ptr=skipped, checkpoints_ptr=checkpoints,
        states=states, length=length, every=every, **strides,
        stride_mask_b=mask.stride(0) if mask is not None else 0,
        stride_mask_t=mask.stride(1) if mask is not None else 0,
        **state_strides(state), COLUMNS=cols, WIDTH=width, WIDTH_PAD=next_power_of_two(width),
        **rule_flags(rule, projections),
        HAS_STATE=state is not None, HAS_SLOTS=slots is not None, HAS_FLAGS=says, HAS_MASK=mask is not None,
        HAS_CHECKPOINTS=bool(every), IS_PACKED=packed, IS_CHUNKED=bool(chunk),
        BLOCK=min(1024, next_power_of_two(heads * rank * rank)),
    )  # fmt: skip
    return ScanOutput(reads, final, skipped, checkpoints), flags
