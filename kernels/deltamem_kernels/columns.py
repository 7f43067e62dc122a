"""The parts that the recurrence's kernels share, all in registers.

One row i of a state, s_i = S[i, :], never meets another row:

    read_i = s_i · q
    s_i   <- keep_i s_i − erase_i (s_i · k) k + write_i v_i k

so a row is one *column* of a tile [R, COLUMNS] whose axis 0 runs over the keys j. Triton spreads the last axis
over the threads of a warp and keeps axis 0 inside a thread: a column is then a thread, and s_i · k is a sum in
its registers, with no exchange. Columns of several heads, sequences or chunks lie side by side, so a warp is
full at r = 8 too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """To 2 ulp of the *result* everywhere: unit() divides by the norm, so a small tanh counts as a large one.

    Below 0.5 an odd polynomial (minimax in the relative error, 1.5e-8); above it (1 − e) / (1 + e), which loses
    nothing there.
    """
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    z = size * size
    near = size + size * z * (-0.333331439 + z * (0.1332587895 + z * (-0.05304549362 + z * 0.01724148997)))
    y = tl.where(size < 0.5, near, far)
    return tl.where(x < 0, -y, y)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def direction(raw, NORMALIZE: tl.constexpr):
    """Raw q or k [R, COLUMNS] → (z, c) with unit(tanh(raw)) = c z. c [COLUMNS] joins a product that is one
    number per column, which spares R multiplications."""
    z = raw.to(tl.float32)
    if NORMALIZE:
        z = tanh(z)
        c = tl.rsqrt(tl.maximum(tl.sum(z * z, axis=0), 1e-12))  # 1 / max(‖z‖, 1e-6)
    else:
        c = tl.full([raw.shape[1]], 1.0, tl.float32)
    return z, c


@triton.jit
def gates(beta_raw, lambda_raw, MODE: tl.constexpr, HAS_LAMBDA: tl.constexpr):
    """Raw gates, bias included → keep, erase, write."""
    beta = sigmoid(beta_raw)
    if MODE == "no_lambda":
        keep = tl.full(beta.shape, 1.0, tl.float32)
    elif HAS_LAMBDA:
        keep = sigmoid(lambda_raw)
    else:
        keep = 1.0 - beta
    if MODE == "lambda_outside":
        erase = keep * beta
    else:
        erase = beta
    return keep, erase, beta


@triton.jit
def columns(total_groups, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's columns → (group, place in the group, whether it exists).

    The number of columns may pass 2^31, that of groups may not: one 64-bit division a program, none a thread.
    """
    first = tl.program_id(0).to(tl.int64) * COLUMNS
    place = (first % GROUP).to(tl.int32) + tl.arange(0, COLUMNS)
    group = (first // GROUP).to(tl.int32) + place // GROUP
    return group, place % GROUP, group < total_groups


@triton.jit
def locate(
    chunk, m_chunk, length, chunk_length, chunks_per_sequence,
    cu_ptr, chunk_sequence_ptr, chunk_first_ptr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """A chunk → (its sequence, its place there, its row of the batch, its first token there, its tokens)."""
    if IS_PACKED:
        sequence = tl.load(chunk_sequence_ptr + chunk, mask=m_chunk, other=-1)
        m_chunk = m_chunk & (sequence >= 0)  # the number of chunks is an upper bound
        sequence = tl.maximum(sequence, 0)
        place = chunk - tl.load(chunk_first_ptr + sequence, mask=m_chunk, other=0)
        start = tl.load(cu_ptr + sequence, mask=m_chunk, other=0).to(tl.int32)
        end = tl.load(cu_ptr + sequence + 1, mask=m_chunk, other=0).to(tl.int32)
        begin = start + place * chunk_length
        end = tl.minimum(end, length)
        row = sequence * 0
    else:
        sequence = chunk // chunks_per_sequence
        place = chunk % chunks_per_sequence
        begin = place * chunk_length
        end = length
        row = sequence
    count = tl.where(m_chunk, tl.minimum(tl.maximum(end - begin, 0), chunk_length), 0)
    return sequence, place, row, begin, count


@triton.jit
def load_vector(
    p_token, o_first, stride_x_w, m_token, RANK: tl.constexpr, R: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """q or k of each column's token and head, raw, [R, COLUMNS]; 0 past the rank.

    Triton spreads a contiguous axis over the threads in pieces of 16 bytes. Where 16 bytes hold the WHOLE of q,
    that is one wide access a thread, as wished. Where they do not, s · k would cross threads, in an order that
    depends on strides and dtype: so the compiler is told that the columns, if anything, are contiguous, two by two,
    and aligned to nothing. The first makes it spread them over the threads; told that nothing is contiguous, Triton
    3.6 takes the keys, and each sum becomes shuffles. The second keeps it from fetching two at once. (It notes this
    with the operation that made the pointer, which therefore has to stand in the same function.)
    """
    o_j = tl.arange(0, R)[:, None]
    p = p_token[None, :] + (o_first[None, :] + o_j) * stride_x_w
    if not WHOLE:
        p = tl.multiple_of(tl.max_contiguous(p, [1, 2]), [1, 1])
    return tl.load(p, mask=(o_j < RANK) & m_token[None, :], other=0.0)


@triton.jit
def load_flag(
    p_token, p_flag, p_mask, stride_x_w, m_token,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """1: the token counts. 2: it is unmasked, but not finite. 0: it is masked."""
    if HAS_FLAGS:
        flag = tl.load(p_flag, mask=m_token, other=0).to(tl.int32)
    else:
        # Each thread looks at the whole token, so that no thread waits for another. 0 · x is 0, or NaN.
        nothing = tl.zeros(m_token.shape, tl.float32)
        for first in range(0, WIDTH, 8):
            o_w = first + tl.arange(0, 8)[:, None]
            p = p_token[None, :] + o_w * stride_x_w
            if not WHOLE:
                p = tl.multiple_of(tl.max_contiguous(p, [1, 2]), [1, 1])  # see load_vector
            x = tl.load(p, mask=(o_w < WIDTH) & m_token[None, :], other=0.0).to(tl.float32)
            nothing += tl.sum(x * 0.0, axis=0)
        flag = tl.where(nothing == 0.0, 1, 2)
        if HAS_MASK:
            m_token = m_token & (tl.load(p_mask, mask=m_token, other=0) != 0)
        flag = tl.where(m_token, flag, 0)
    return flag


@triton.jit
def load_write(
    p_token, h, i, stride_x_w, m_token,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr,
):  # fmt: skip
    """v, β and λ (β again if λ has no projection) of each column, raw, [COLUMNS]."""
    o_row = h * RANK + i
    v = tl.load(p_token + (2 * HEADS * RANK + o_row) * stride_x_w, mask=m_token, other=0.0)
    if ROW_GATES:
        o_beta = 3 * HEADS * RANK + o_row
        o_lambda = 4 * HEADS * RANK + o_row
    else:
        o_beta = 3 * HEADS * RANK + h
        o_lambda = 3 * HEADS * RANK + HEADS + h
    b = tl.load(p_token + o_beta * stride_x_w, mask=m_token, other=0.0)
    if HAS_LAMBDA:
        lam = tl.load(p_token + o_lambda * stride_x_w, mask=m_token, other=0.0)
    else:
        lam = b
    return v, b, lam


@triton.jit
def load_bias(
    bias_ptr, stride_bias, h, i, m_column,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr,
):  # fmt: skip
    """The biases of β and λ of each column, float32."""
    if ROW_GATES:
        o_beta = h * RANK + i
        o_lambda = HEADS * RANK + o_beta
    else:
        o_beta = h
        o_lambda = HEADS + h
    b = tl.load(bias_ptr + o_beta * stride_bias, mask=m_column, other=0.0).to(tl.float32)
    if HAS_LAMBDA:
        lam = tl.load(bias_ptr + o_lambda * stride_bias, mask=m_column, other=0.0).to(tl.float32)
    else:
        lam = b
    return b, lam


@triton.jit
def written(s, z, c, keep, erase, added):
    """keep s − erase (s · k) k + added k, with k = c z."""
    along = tl.sum(s * z, axis=0) * c
    u = (added - erase * along) * c
    return keep[None, :] * s + u[None, :] * z


@triton.jit
def group_sum(x, GROUP: tl.constexpr):
    """[N, COLUMNS] → the same shape, each column the sum over its group of GROUP neighbours.

    With a column a thread these are shuffles, in an order that is the same for every group.
    """
    parts = tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP])
    total = tl.broadcast_to(tl.sum(parts, axis=2, keep_dims=True), parts.shape)
    return tl.reshape(total, x.shape)


@triton.jit
def direction_backward(grad, z, c, NORMALIZE: tl.constexpr):
    """The gradient of unit(tanh(raw)) = c z, a tile as z → that of raw."""
    if NORMALIZE:
        along = tl.sum(grad * z, axis=0) * c * c
        # At the floor of the norm unit() is a plain division.
        along = tl.where(tl.sum(z * z, axis=0) > 1e-12, along, 0.0)
        grad = (grad - along[None, :] * z) * c[None, :] * (1.0 - z * z)
    return grad


@triton.jit
def gates_backward(keep, beta, d_keep, d_erase, d_write, MODE: tl.constexpr, HAS_LAMBDA: tl.constexpr):
    """Gradients of keep, erase and write (= β) → those of raw β and raw λ (0 without a projection of its own)."""
    d_beta = d_write
    if MODE == "lambda_outside":
        d_beta += d_erase * keep
        d_keep += d_erase * beta
    else:
        d_beta += d_erase
    d_lambda = tl.zeros(keep.shape, tl.float32)
    if HAS_LAMBDA:
        d_lambda = d_keep * keep * (1.0 - keep)
    elif MODE != "no_lambda":
        d_beta -= d_keep
    return d_beta * beta * (1.0 - beta), d_lambda
