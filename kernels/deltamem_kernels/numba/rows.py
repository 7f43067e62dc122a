"""Packed rows in one call: the memory read and written, and the heads steered. Compiled by numba, once per rank.

Every tensor comes as its address: to hand an array to a compiled function costs more than what a decoded token is
computed with. What does not change from token to token lies in a table of integers, made once a layer.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import carray, types

from . import loops
from .loops import BLOCK, ONE, OPTIONS, PART_OPTIONS, ZERO, read_sequences, scan_sequences
from .machine import bytes_, changed, floats, fma, integers, long_integers, njit, pause, seen, take

# The table, in this order: the rule, the heads, and addresses of float32 arrays, 0 = there is none.
TABLE = (
    "heads", "mode", "row_gates", "own_lambda", "normalize", "q", "k", "v", "dim", "rotary", "o_rows",
    "gate_bias", "q_weight", "k_weight", "v_weight", "o_weight", "q_norm", "k_norm",
)  # fmt: skip
_LENGTH = len(TABLE)
_ANY = 1 << 40  # as many as there are


# Every head takes the same instructions in the same order, wherever it lies, so this sum may be reordered for the
# vector unit. NaN and Inf keep their meaning.
@njit(**OPTIONS | {"fastmath": {"contract", "reassoc"}})
def _square(head):
    """Σ of squares."""
    total = ZERO
    for j in range(head.size):
        total += head[j] * head[j]
    return total


@njit(inline="always")
def _turn_heads(row, dim, norm, eps, cos, sin):
    """RMS norm (norm [dim] or empty) and RoPE (cos, sin [rotary] or empty) of the heads in row [heads · dim]."""
    half = cos.size // 2
    for h in range(row.size // dim):
        head = row[h * dim : (h + 1) * dim]
        low, high = head[:half], head[half : 2 * half]
        if norm.size:
            inverse = ONE / np.float32(np.sqrt(_square(head) / np.float32(dim) + eps))
            for j in range(half):
                x, y = low[j] * inverse * norm[j], high[j] * inverse * norm[half + j]
                low[j] = fma(x, cos[j], -(y * sin[j]))
                high[j] = fma(y, cos[half + j], x * sin[half + j])
            for j in range(2 * half, dim):
                head[j] = head[j] * inverse * norm[j]
        else:
            for j in range(half):
                x, y = low[j], high[j]
                low[j] = fma(x, cos[j], -(y * sin[j]))
                high[j] = fma(y, cos[half + j], x * sin[half + j])


@njit(**PART_OPTIONS)
def _turn_rows(rows, stride, count, q, k, dim, q_norm, k_norm, eps, cos, sin, rotary):
    """Norms and RoPE of q and k heads of ``dim`` numbers in ``count`` packed rows.

    Addresses: rows (``stride`` numbers from one to the next), cos and sin [count, rotary], and q_norm and k_norm [dim]
    or 0.
    """
    for t in range(count):
        c = carray(floats(cos + 4 * t * rotary), (rotary,))
        s = carray(floats(sin + 4 * t * rotary), (rotary,))
        row = rows + 4 * t * stride
        for heads, at, norm in ((q, row, q_norm), (k, row + 4 * q * dim, k_norm)):
            weight = carray(floats(norm), (dim if norm else 0,))
            _turn_heads(carray(floats(at), (heads * dim,)), dim, weight, eps, c, s)


@functools.cache
def turn_loop():
    """``turn_rows``, for rows whose heads are corrected already."""
    stamp = changed(loops)

    @njit(types.void(*[types.int64] * 15), **OPTIONS)
    def turn_rows(packed, stride, batch, length, q, k, dim, q_norm, k_norm, factors, cos, sin, rotary, step, work):
        """``_turn_rows`` of B sequences; factors, step and work as ``steer_rows`` takes them."""
        _ = stamp
        blocks = (length + BLOCK - 1) // BLOCK
        item = take(work) if work else 0
        while item < batch * blocks:
            b, t = item // blocks, item % blocks * BLOCK
            _turn_rows(
                packed + 4 * (b * length + t) * stride, stride, min(BLOCK, length - t), q, k, dim, q_norm, k_norm,
                carray(floats(factors), (5,))[4], cos + 4 * (b * step + t * rotary), sin + 4 * (b * step + t * rotary),
                rotary,
            )  # fmt: skip
            if work:
                take(work + 8)
            item = take(work) if work else item + 1

    return turn_rows


@njit(inline="always")
def _add_delta(rank, row, weight, reads, factor):
    """row += factor · weight reads: row [n], weight [n, H, r], reads [H·r]."""
    for n in range(row.size):
        total = ZERO
        for h in range(weight.shape[1]):
            for c in range(rank):
                total = fma(weight[n, h, c], reads[h * rank + c], total)
        row[n] = fma(factor, total, row[n])


# A function of its own, and every array from its first number: an index of which the compiler does not know that it is
# not negative costs a comparison for each number, and the loop over n does not vectorise. Four columns at a time, so
# that a row is loaded and stored for every fourth.
@njit(**PART_OPTIONS)
def add_deltas(rows, stride, count, width, columns, first, reads, factor):
    """``width`` numbers of ``count`` rows += factor · columns reads.

    rows: an address, ``stride`` numbers from one to the next. columns: [H·r, ≥ first + width], from the first on.
    reads: [count, H·r].
    """
    start, columns_stride = columns.ctypes.data + 4 * first, columns.shape[1]
    for t in range(count):
        row = carray(floats(rows + 4 * t * stride), (width,))
        for c in range(reads.shape[1] // 4):
            at = start + 16 * c * columns_stride
            w0 = carray(floats(at), (width,))
            w1 = carray(floats(at + 4 * columns_stride), (width,))
            w2 = carray(floats(at + 8 * columns_stride), (width,))
            w3 = carray(floats(at + 12 * columns_stride), (width,))
            r0, r1 = reads[t, 4 * c] * factor, reads[t, 4 * c + 1] * factor
            r2, r3 = reads[t, 4 * c + 2] * factor, reads[t, 4 * c + 3] * factor
            for n in range(width):
                row[n] = fma(w3[n], r3, fma(w2[n], r2, fma(w1[n], r1, fma(w0[n], r0, row[n]))))
        for c in range(reads.shape[1] // 4 * 4, reads.shape[1]):
            w0, r0 = carray(floats(start + 4 * c * columns_stride), (width,)), reads[t, c] * factor
            for n in range(width):
                row[n] = fma(w0[n], r0, row[n])


@functools.cache
def row_loop(rank: int):
    """``steer_rows`` for one rank, which is a constant in it; it closes over numbers alone, see ``loops``."""
    stamp = changed(loops)

    @njit(types.void(*[types.int64] * 18), **OPTIONS)
    def steer_rows(
        table, factors, packed, stride, batch, length, state, slots, mask, skipped, cos, sin, step, frozen, reads,
        delta, scratch, work,
    ):  # fmt: skip
        """Read, write and steer B sequences of T packed rows: ``reference.heads.decode_`` for any T.

        Args:
            table: int64, as ``TABLE``.
            factors: float32 [8], scale · c of q, k, v and o, the norms' eps, and the guard.
            packed: float32 [B, T, N], ``stride`` numbers from row to row.
            state: float32 [S, H, r, r]. slots: int64 [B], or 0: sequence n's state is the n-th.
            mask: bool [B, T], or 0: all are real. skipped: int32 [S].
            cos, sin: float32 [1 or B, T, rotary], ``step`` numbers from one sequence to the next (0: all have the
                same); 0 without RoPE.
            frozen: state and skipped are not written.
            reads: float32 [B, T, H·r], written.
            delta: float32 [B, T, o_rows], written: Δo; 0: it is not computed.
            scratch: float32 [B, T, the memory's projections], written; 0: the function's own, for a few tokens. (Where
                threads share the work little is allocated: a failure would leave those waiting who follow.)
            work: int64 [2 + B], zeros, where the threads of one call take what is to be done and count what is done,
                and see how far each sequence's reads are; 0: there is one thread. No two sequences may have the same
                slot then.
        """
        _ = stamp
        fixed = carray(long_integers(table), (_LENGTH,))
        heads, mode, row_gates, own_lambda, normalize = fixed[0], fixed[1], fixed[2] != 0, fixed[3] != 0, fixed[4] != 0
        dim, rotary, o_rows = fixed[8], fixed[9], fixed[10]
        # q, k and v lie in a row from bounds[n] to bounds[n + 1]; o's numbers come after them in the columns alone.
        bounds = np.array((0, fixed[5], fixed[5] + fixed[6], fixed[5] + fixed[6] + fixed[7], 0)) * dim
        bounds[4] = bounds[3] + o_rows
        width = heads * rank
        used = 3 * width + (width if row_gates else heads) * (2 if own_lambda else 1)
        bias = carray(floats(fixed[11]), (used - 3 * width,))
        factor = carray(floats(factors), (8,))
        rows = carray(floats(packed), (batch, length, stride))
        states = carray(floats(state), (_ANY, heads, rank, rank))
        out = carray(floats(reads), (batch, length, width))
        places = carray(long_integers(slots), (batch,)) if slots else np.arange(batch)
        real = carray(bytes_(mask), (batch, length)) if mask else np.ones((batch, length), np.uint8)
        columns = np.empty((width, 0), np.float32)

        # First the recurrence, for all sequences or, where threads share the work, for one at a time. Then blocks of
        # rows, which stay in the second-level cache from one loop over them to the next: the first block of every
        # sequence, the second … A thread that has come to them follows those that are still at the recurrence.
        at_once, scans = (1, batch) if work else (batch, min(batch, 1))
        blocks = (length + BLOCK - 1) // BLOCK
        item = take(work) if work else 0
        while item < scans + batch * blocks:
            if item < scans:
                first, last = item * at_once, (item + 1) * at_once
                if scratch:
                    projections = carray(floats(scratch + 4 * first * length * used), (at_once, length, used))
                else:
                    projections = np.empty((at_once, length, used), np.float32)
                for b in range(at_once):
                    for t in range(length):
                        for i in range(used):
                            projections[b, t, i] = rows[first + b, t, bounds[3] + i]
                done = work + 8 * (2 + item) if work else 0
                if frozen:
                    read_sequences(
                        rank, projections, real[first:last], states, places[first:last], heads, normalize,
                        out[first:last], done,
                    )  # fmt: skip
                else:
                    nothing = np.empty((at_once, 0, heads, rank, rank), np.float32)
                    unwanted = real[first:last, :0]
                    scan_sequences(
                        rank, projections, bias, real[first:last], states, places[first:last], heads, mode, row_gates,
                        own_lambda, normalize, factor[5], factor[6], factor[7], 0, out[first:last], nothing,
                        carray(integers(skipped), (_ANY,)), unwanted, done,
                    )  # fmt: skip
            else:
                b, t = (item - scans) % batch, (item - scans) // batch * BLOCK
                count, row = min(BLOCK, length - t), packed + 4 * (b * length + t) * stride
                if length > 1 and columns.shape[1] == 0:
                    columns = np.empty((width, bounds[4]), np.float32)
                    for n in range(4):
                        if fixed[12 + n]:
                            weight = carray(floats(fixed[12 + n]), (bounds[n + 1] - bounds[n], width))
                            for i in range(weight.shape[0]):
                                for c in range(width):
                                    columns[c, bounds[n] + i] = weight[i, c]
                if work:
                    while seen(work + 8 * (2 + b)) < t + count:
                        pause()
                for n in range(4 if delta else 3):
                    if not fixed[12 + n]:
                        continue
                    numbers, apart = bounds[n + 1] - bounds[n], o_rows if n == 3 else stride
                    to = delta + 4 * (b * length + t) * o_rows if n == 3 else row + 4 * bounds[n]
                    if n == 3:
                        carray(floats(to), (count * o_rows,))[:] = ZERO
                    if length > 1:
                        add_deltas(to, apart, count, numbers, columns, bounds[n], out[b, t : t + count], factor[n])
                    else:
                        weight = carray(floats(fixed[12 + n]), (numbers, heads, rank))
                        _add_delta(rank, carray(floats(to), (numbers,)), weight, out[b, 0], factor[n])
                if fixed[16] or fixed[17] or rotary:
                    at = 4 * (b * step + t * rotary)
                    _turn_rows(
                        row, stride, count, fixed[5], fixed[6], dim, fixed[16], fixed[17], factor[4], cos + at,
                        sin + at, rotary,
                    )  # fmt: skip
            if work:
                take(work + 8)
            item = take(work) if work else item + 1

    return steer_rows
