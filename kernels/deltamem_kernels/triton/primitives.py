"""The parts that the recurrence's kernels share, all in registers.

One row i of a state, s_i = S[i, :], never meets another row:

    read_i = s_i · q
    s_i   <- keep_i s_i − erase_i (s_i · k) k + write_i v_i k

so a row is one *column* of a tile [R, COLUMNS] whose axis 0 runs over the keys j. Triton spreads the last axis
over the threads of a warp and keeps axis 0 inside a thread: a column is then a thread, and s_i · k is a sum in
its registers, with no exchange. Columns of several heads, sequences or chunks lie side by side, so a warp is
full at r = 8 too.

Names in all kernels: ``x_ptr`` an argument's first number, ``p_`` a pointer made of it, ``o_`` an offset, ``m_`` a
mask, ``stride_x_t`` a stride, ``d_`` a gradient; x the raw projections, s a state's rows, g their gradients, h a head,
i its row, j a key, b a row of the batch, t a token. A tile's shape stands where it is made.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIGN = tl.constexpr(-(2**31))  # the bit of a float32


@triton.jit
def tanh(x):
    """To 2 ulp of the *result* everywhere: unit() divides by the norm, so a small tanh counts as a large one.

    Below 0.5 an odd polynomial (minimax in the relative error, 1.5e-8); above it (1 − e) / (1 + e), which loses
    nothing there.
    """
    size = tl.abs(x)
    e = tl.exp2(size * -2.885390081777927)  # e^(-2 size)
    far = (1.0 - e) / (1.0 + e)
    z = size * size
    near = tl.fma(z, tl.fma(z, tl.fma(z, 0.01724148997, -0.05304549362), 0.1332587895), -0.333331439)
    near = tl.fma(size * z, near, size)
    y = tl.where(size < 0.5, near, far).to(tl.int32, bitcast=True)
    return (y | (x.to(tl.int32, bitcast=True) & SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def pairwise(x):
    """Σ over axis 0 of [N, COLUMNS], N a power of two: neighbours are added, then neighbouring sums, and so on.

    ``tl.sum`` adds in an order that the layout decides, and with it the compiler and the strides; one addition at a
    time has one order whatever they decide.
    """
    for _ in tl.static_range(6):  # up to 64 numbers
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), axis=1)
    return tl.reshape(x, [x.shape[1]])


@triton.jit
def across(x, R: tl.constexpr):
    """One number per column → the same on R rows: ``tl.fma`` does not broadcast."""
    return tl.broadcast_to(x[None, :], [R, x.shape[0]])


@triton.jit
def quarters(x):
    """[R, COLUMNS] → rows 0, 4, 8, ..., rows 1, 5, 9, ..., and so on: four tiles of a quarter of the rows."""
    x = tl.permute(tl.reshape(x, [x.shape[0] // 4, 2, 2, x.shape[1]]), (0, 3, 1, 2))
    even, odd = tl.split(x)
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3


@triton.jit
def dot(a, b):
    """Σ_j a b over axis 0 of two tiles [R, COLUMNS]: four keys at a time with fma, these sums ``pairwise``.

    Above 8 rows plain products, ``pairwise``: taken apart, tiles of 16 leave ``projection_gradient_kernel`` too few
    registers.
    """
    if a.shape[0] == 4 or a.shape[0] == 8:
        a_0, a_1, a_2, a_3 = quarters(a)
        b_0, b_1, b_2, b_3 = quarters(b)
        total = tl.fma(a_3, b_3, tl.fma(a_2, b_2, tl.fma(a_1, b_1, a_0 * b_0)))
    else:
        total = a * b
    return pairwise(total)


@triton.jit
def dot_rows(a, b):
    """Σ_c a b of a tile [N, C] and a row [1, C] of numbers, float32 [N]; as ``dot``, along the other axis."""
    return dot(tl.trans(a), tl.broadcast_to(tl.trans(b), [a.shape[1], a.shape[0]]))


@triton.jit
def zero_or_nan_rows(x):
    """[N, W], W of 4 or more → [N]: 0 where all numbers of a row are finite, else NaN. 0 · x is 0, or NaN."""
    x_0, x_1, x_2, x_3 = quarters(tl.trans(x))
    return tl.sum(tl.fma(x_3, 0.0, tl.fma(x_2, 0.0, tl.fma(x_1, 0.0, x_0 * 0.0))), axis=0)


@triton.jit
def direction(raw, NORMALIZE: tl.constexpr):
    """Raw q or k [R, COLUMNS] → (z, c) with unit(tanh(raw)) = c z; see ``reference.recurrence.split_projections``.

    c [COLUMNS] joins a product that is one number per column, which spares R multiplications.
    """
    z = raw.to(tl.float32)
    if NORMALIZE:
        z = tanh(z)
        c = tl.rsqrt(tl.maximum(dot(z, z), 1e-12))  # 1 / max(‖z‖, 1e-6)
    else:
        c = tl.full([raw.shape[1]], 1.0, tl.float32)
    return z, c


@triton.jit
def held_gate(gate, MOST: tl.constexpr):
    """A gate at MOST or below. Not by a minimum: NaN stays NaN, and a token with it is not written."""
    if MOST < 1.0:
        most = tl.full(gate.shape, MOST, tl.float32)
        gate = tl.where(gate > most, most, gate)
    return gate


@triton.jit
def held_value(v, VALUE_MAX: tl.constexpr):
    """v, float32, between −VALUE_MAX and VALUE_MAX."""
    if VALUE_MAX < float("inf"):
        most = tl.full(v.shape, VALUE_MAX, tl.float32)
        v = tl.where(v > most, most, tl.where(v < -most, -most, v))
    return v


@triton.jit
def open_gates(beta_raw, lambda_raw, MODE: tl.constexpr, HAS_LAMBDA: tl.constexpr, BETA_MAX: tl.constexpr):
    """Raw gates, bias included → keep and β before they are held (keep is 1 − the held β if it follows from it)."""
    beta = sigmoid(beta_raw)
    if MODE == "no_lambda":
        keep = tl.full(beta.shape, 1.0, tl.float32)
    elif HAS_LAMBDA:
        keep = sigmoid(lambda_raw)
    else:
        keep = 1.0 - held_gate(beta, BETA_MAX)
    return keep, beta


@triton.jit
def held_gates(keep, beta, MODE: tl.constexpr, BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr):
    """``open_gates`` → keep, erase, write, as they are used."""
    keep = held_gate(keep, KEEP_MAX)
    beta = held_gate(beta, BETA_MAX)
    if MODE == "lambda_outside":
        erase = keep * beta
    else:
        erase = beta
    return keep, erase, beta


@triton.jit
def gates(
    beta_raw, lambda_raw,
    MODE: tl.constexpr, HAS_LAMBDA: tl.constexpr, BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr,
):  # fmt: skip
    """Raw gates, bias included → keep, erase, write, each [COLUMNS]; see ``reference.recurrence.split_projections``."""
    keep, beta = open_gates(beta_raw, lambda_raw, MODE, HAS_LAMBDA, BETA_MAX)
    return held_gates(keep, beta, MODE, BETA_MAX, KEEP_MAX)


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
def locate_chunk(
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
def owned(slot, states):
    """A slot → the row of the state that it names, int64; −1 where it names none: no kernel leaves the state."""
    return tl.where((slot >= 0) & (slot < states), slot, -1).to(tl.int64)


@triton.jit
def state_pointers(
    p_state, h, i, stride_s_h, stride_s_i, stride_s_j, RANK: tl.constexpr, R: tl.constexpr, DENSE_STATE: tl.constexpr
):  # fmt: skip
    """Where the rows i of the heads h of states lie, [R, COLUMNS]; p_state: the states' first numbers.

    Rows that lie end to end have an alignment that the compiler knows: a thread loads 16 bytes at a time, and stores
    go through shared memory, so that neighbouring threads write neighbouring pieces. Any other strides may be as
    large as they like; see ``load_vector`` for the hint.
    """
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    if DENSE_STATE:
        p = (p_state + (h * RANK + i) * RANK)[None, :] + o_j
    else:
        p_row = p_state + h.to(tl.int64) * stride_s_h + i.to(tl.int64) * stride_s_i
        p = p_row[None, :] + o_j.to(tl.int64) * stride_s_j
        p = tl.multiple_of(tl.max_contiguous(p, [1, 2]), [1, 1])
    return p


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
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
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
        flag = tl.load(p_flag, mask=m_token, other=0).to(tl.int32)  # [COLUMNS]
    else:
        # Each thread looks at the whole token, so that no thread waits for another. 0 · x is 0, or NaN.
        nothing = tl.zeros([8, m_token.shape[0]], tl.float32)
        for first in range(0, WIDTH, 8):
            o_w = first + tl.arange(0, 8)[:, None]
            p = p_token[None, :] + o_w * stride_x_w
            if not WHOLE:
                p = tl.multiple_of(tl.max_contiguous(p, [1, 2]), [1, 1])  # see load_vector
            x = tl.load(p, mask=(o_w < WIDTH) & m_token[None, :], other=0.0).to(tl.float32)
            nothing = tl.fma(x, 0.0, nothing)
        flag = tl.where(pairwise(nothing) == 0.0, 1, 2)
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
def delta_update(s, z, c, keep, erase, added):
    """s [R, COLUMNS] after a token: keep s − erase (s · k) k + added k, with k = c z and added = write v.

    Equals a row of S_t in ``reference.recurrence.delta_rule``.
    """
    along = dot(s, z) * c  # [COLUMNS]
    u = tl.fma(-erase, along, added) * c
    return tl.fma(across(u, s.shape[0]), z, keep[None, :] * s)


@triton.jit
def zero_or_nan(s):
    """[R, COLUMNS] → [COLUMNS]: 0 where all numbers of a column are finite, else NaN. 0 · x is 0, or NaN."""
    return pairwise(s * 0.0)


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
        along = dot(grad, z) * c * c  # [COLUMNS]
        # At the floor of the norm unit() is a plain division.
        along = tl.where(dot(z, z) > 1e-12, along, 0.0)
        grad = tl.fma(across(-along, z.shape[0]), z, grad) * c[None, :] * tl.fma(-z, z, 1.0)
    return grad


@triton.jit
def unless_held(grad, gate, MOST: tl.constexpr):
    """The gradient of ``held_gate`` → that of the gate, 0 where it was held."""
    if MOST < 1.0:
        grad = tl.where(gate > tl.full(gate.shape, MOST, tl.float32), 0.0, grad)
    return grad


@triton.jit
def held_value_backward(grad, v, VALUE_MAX: tl.constexpr):
    """The gradient of ``held_value`` → that of v, 0 where it was held."""
    if VALUE_MAX < float("inf"):
        grad = tl.where(tl.abs(v) > tl.full(v.shape, VALUE_MAX, tl.float32), 0.0, grad)
    return grad


@triton.jit
def gates_backward(
    keep, beta, d_keep, d_erase, d_write,
    MODE: tl.constexpr, HAS_LAMBDA: tl.constexpr, BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr,
):  # fmt: skip
    """Gradients of keep, erase and write (= β) → those of raw β and raw λ (0 without a projection of its own).

    keep, beta: as ``open_gates`` gives them. What was held has no gradient.
    """
    d_beta = d_write
    if MODE == "lambda_outside":
        d_beta += d_erase * held_gate(keep, KEEP_MAX)
        d_keep += d_erase * held_gate(beta, BETA_MAX)
    else:
        d_beta += d_erase
    d_keep = unless_held(d_keep, keep, KEEP_MAX)
    d_lambda = tl.zeros(keep.shape, tl.float32)
    if HAS_LAMBDA:
        d_lambda = d_keep * keep * (1.0 - keep)
    elif MODE != "no_lambda":
        d_beta -= d_keep
    return unless_held(d_beta * beta * (1.0 - beta), beta, BETA_MAX), d_lambda


@triton.jit
def three_parts(x):
    """float32 as a sum of three bfloat16 numbers, of 8 bits each, the largest first."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def read_parts(p_reads, m_token, stride, WIDTH: tl.constexpr):
    """Reads of up to 8 numbers, in three parts of bfloat16 each (8 + 8 + 8 bits) → two tiles [TOKENS, 16]: the first
    parts beside the second ones, and the third ones beside zeros. See ``times_reads``.

    p_reads, m_token: [TOKENS]. stride: of a read's numbers. WIDTH: of a read.
    """
    o = tl.arange(0, 16)
    m = m_token[:, None] & (o % 8 < WIDTH)[None, :]
    reads = tl.load(p_reads[:, None] + (o % 8)[None, :] * stride, mask=m, other=0.0).to(tl.float32)
    first, second, third = three_parts(reads)
    beside = (o < 8)[None, :]
    return tl.where(beside, first, second), tl.where(beside, third, tl.zeros_like(third))


@triton.jit
def load_weights(p_w, stride, m_n, WIDTH: tl.constexpr):
    """bfloat16 weights [16, N] for ``times_reads``: each column twice, one below the other.

    p_w, m_n: [N], where the weights of each place lie, and which there are. stride: of a place's weights.
    """
    o = tl.max_contiguous(tl.multiple_of(tl.arange(0, 16) % 8, 8), 8)
    return tl.load(p_w[None, :] + o[:, None] * stride, mask=(o < WIDTH)[:, None] & m_n[None, :], other=0.0)


@triton.jit
def times_reads(most, rest, w):
    """reads · w [TOKENS, N] in float32, of ``read_parts`` and ``load_weights``: two matrix instructions deep, each
    product exact, and the weights stay what they are."""
    return tl.dot(most, w, tl.dot(rest, w))
