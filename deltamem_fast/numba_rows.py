"""Packed rows in one call: the memory read and written, and the heads steered. Compiled by numba, once per rank.

Every tensor comes as its address: to hand an array to a compiled function costs more than what a decoded token is
computed with. What does not change from token to token lies in a table of integers, made once a layer.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import carray, njit

from . import numba_loops
from .numba_loops import _ONE, _OPTIONS, _ZERO, read_sequences, scan_sequences
from .numba_machine import bytes_, changed, floats, fma, integers, long_integers

# The table, in this order: the rule, the heads, and addresses of float32 arrays, 0 = there is none.
TABLE = (
    "heads", "mode", "row_gates", "own_lambda", "normalize", "q", "k", "v", "dim", "rotary", "o_rows",
    "gate_bias", "q_weight", "k_weight", "v_weight", "o_weight", "q_norm", "k_norm",
)  # fmt: skip
_LENGTH = len(TABLE)
_ANY = 1 << 40  # as many as there are


# Every head takes the same instructions in the same order, wherever it lies, so this sum may be reordered for the
# vector unit. NaN and Inf keep their meaning.
@njit(**_OPTIONS | {"fastmath": {"contract", "reassoc"}})
def _square(head):
    """Σ of squares."""
    total = _ZERO
    for j in range(head.size):
        total += head[j] * head[j]
    return total


@njit(inline="always")
def turn_heads(row, heads, dim, norm, eps, cos, sin):
    """RMS norm (norm [dim] or empty) and RoPE (cos, sin [rotary] or empty) of the heads in row [heads · dim]."""
    half = cos.size // 2
    for h in range(heads):
        head = row[h * dim : (h + 1) * dim]
        low, high = head[:half], head[half : 2 * half]
        if norm.size:
            inverse = _ONE / np.float32(np.sqrt(_square(head) / np.float32(dim) + eps))
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


@njit(inline="always")
def _add_delta(rank, row, weight, reads, factor):
    """row += factor · weight reads: row [n], weight [n, H, r], reads [H·r]."""
    for n in range(row.size):
        total = _ZERO
        for h in range(weight.shape[1]):
            for c in range(rank):
                total = fma(weight[n, h, c], reads[h * rank + c], total)
        row[n] = fma(factor, total, row[n])


@njit(inline="always")
def _add_delta_by_columns(rank, row, columns, reads, factor, scaled):
    """``_add_delta`` of columns [H, r, n]; scaled is scratch, [r]."""
    for h in range(columns.shape[0]):
        for c in range(rank):
            scaled[c] = factor * reads[h * rank + c]
        for n in range(row.size):
            total = row[n]
            for c in range(rank):
                total = fma(columns[h, c, n], scaled[c], total)
            row[n] = total


@functools.cache
def turn_loop():
    """``turn_tokens``: norms and RoPE of rows whose heads are corrected already."""
    stamp = changed(numba_loops)

    @njit(**_OPTIONS)
    def turn_tokens(packed, stride, batch, length, q, k, dim, q_norm, k_norm, eps, cos, sin, rotary, step):
        """Norms and RoPE for packed float32 [B, T, stride] and cos, sin [1 or B, T, rotary], all by address.

        ``step`` is 0 where every sequence has the same cos and sin, else 1; q_norm and k_norm [dim] or empty.
        """
        _ = stamp
        rows = carray(floats(packed), (batch * length, stride))
        for b in range(batch):
            for t in range(length):
                row, at = rows[b * length + t], (b * length * step + t) * rotary
                c = carray(floats(cos), (at + rotary,))[at:]
                s = carray(floats(sin), (at + rotary,))[at:]
                turn_heads(row[: q * dim], q, dim, q_norm, eps, c, s)
                turn_heads(row[q * dim : (q + k) * dim], k, dim, k_norm, eps, c, s)

    return turn_tokens


@functools.cache
def row_loop(rank: int):
    """``steer_rows`` for one rank, which is a constant in it; it closes over numbers alone, see ``loops``."""
    stamp = changed(numba_loops)

    @njit(**_OPTIONS)
    def steer_rows(
        table, factors, packed, stride, batch, length, state, slots, mask, skipped, cos, sin, step, frozen, reads, delta
    ):  # fmt: skip
        """Read, write and steer B sequences of T packed rows: ``reference_heads.decode_`` for any T.

        Args:
            table: int64, as ``TABLE``.
            factors: float32 [5], scale · c of q, k, v and o, and the norms' eps.
            packed: float32 [B, T, N], ``stride`` numbers from row to row.
            state: float32 [S, H, r, r]. slots: int64 [B], or 0: sequence n's state is the n-th.
            mask: bool [B, T], or 0: all are real. skipped: int32 [S].
            cos, sin: float32 [1 or B, T, rotary], ``step`` numbers from one sequence to the next (0: all have the
                same); 0 without RoPE.
            frozen: state and skipped are not written.
            reads: float32 [B, T, H·r], written.
            delta: float32 [B, o_rows], written for T = 1 where the table has an o_weight; else Δo is not computed.
        """
        _ = stamp
        fixed = carray(long_integers(table), (_LENGTH,))
        heads, mode, row_gates, own_lambda, normalize = fixed[0], fixed[1], fixed[2] != 0, fixed[3] != 0, fixed[4] != 0
        dim, rotary, o_rows = fixed[8], fixed[9], fixed[10]
        # q, k and v lie in a row from bounds[n] to bounds[n + 1].
        bounds = (0, fixed[5] * dim, (fixed[5] + fixed[6]) * dim, (fixed[5] + fixed[6] + fixed[7]) * dim)
        width = heads * rank
        used = 3 * width + (width if row_gates else heads) * (2 if own_lambda else 1)
        bias = carray(floats(fixed[11]), (used - 3 * width,))
        factor = carray(floats(factors), (5,))
        rows = carray(floats(packed), (batch, length, stride))
        states = carray(floats(state), (_ANY, heads, rank, rank))
        out = carray(floats(reads), (batch, length, width))

        projections = np.empty((batch, length, used), np.float32)
        for b in range(batch):
            for t in range(length):
                for i in range(used):
                    projections[b, t, i] = rows[b, t, bounds[3] + i]
        places = carray(long_integers(slots), (batch,)) if slots else np.arange(batch)
        real = carray(bytes_(mask), (batch, length)) if mask else np.ones((batch, length), np.uint8)
        if frozen:
            read_sequences(rank, projections, real, states, places, heads, normalize, out)
        else:
            nothing = np.empty((batch, 0, heads, rank, rank), np.float32)
            scan_sequences(
                rank, projections, bias, real, states, places, heads, mode, row_gates, own_lambda, normalize, 0, out,
                nothing, carray(integers(skipped), (_ANY,)),
            )  # fmt: skip

        # Of many tokens, the weights as [H, r, n], whose loop over n vectorises. One loop over the heads, not a copy
        # of its body for each: it is compiled on every machine anew.
        columns = np.empty((heads, rank, bounds[3] if length > 1 else 0), np.float32)
        if length > 1:
            for n in range(3):
                if fixed[12 + n]:
                    weight = carray(floats(fixed[12 + n]), (bounds[n + 1] - bounds[n], heads, rank))
                    for i in range(weight.shape[0]):
                        for h in range(heads):
                            for c in range(rank):
                                columns[h, c, bounds[n] + i] = weight[i, h, c]
        scaled = np.empty(rank, np.float32)
        for b in range(batch):
            for t in range(length):
                row, read = packed + 4 * (b * length + t) * stride, out[b, t]
                for n in range(4 if length == 1 else 3):
                    if fixed[12 + n]:
                        first, count = bounds[n % 3], o_rows if n == 3 else bounds[n + 1] - bounds[n]
                        target = carray(floats(delta + 4 * b * o_rows if n == 3 else row + 4 * first), (count,))
                        if length > 1:
                            _add_delta_by_columns(
                                rank, target, columns[:, :, first : first + count], read, factor[n], scaled
                            )
                        else:
                            if n == 3:
                                target[:] = _ZERO
                            weight = carray(floats(fixed[12 + n]), (count, heads, rank))
                            _add_delta(rank, target, weight, read, factor[n])
                if fixed[16] or fixed[17] or rotary:
                    at = 4 * (b * step + t * rotary)
                    c, s = carray(floats(cos + at), (rotary,)), carray(floats(sin + at), (rotary,))
                    for n in range(2):
                        norm = carray(floats(fixed[16 + n]), (dim if fixed[16 + n] else 0,))
                        target = carray(floats(row + 4 * bounds[n]), (bounds[n + 1] - bounds[n],))
                        turn_heads(target, fixed[5 + n], dim, norm, factor[4], c, s)

    return steer_rows
