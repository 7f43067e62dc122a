"""The recurrence compiled for a CPU by numba, once per rank, and cached on disk.

A sequence is taken in blocks of tokens that stay in the first-level cache. First every elementwise function of a
block (tanh, normalisation, gates) in flat loops, which the compiler vectorises; then the recurrence, token by
token, with the state transposed (key axis j outermost), so that the inner loops run over the rows i: no
reduction, so they vectorise too without reordering any sum.
"""

from __future__ import annotations

import functools
import types

import numpy as np

from .machine import changed, fma, njit, publish

STANDARD, LAMBDA_OUTSIDE, NO_LAMBDA = 0, 1, 2
BLOCK = 64
# No fast-math, not even fused multiply-add: the vectorised part of a loop and its scalar rest, and the copies of one
# loop in several functions, may fuse differently, and a token's bits would depend on its place in the block, and on
# who computes it. What the recurrence fuses is written out. Said aloud: numba hands a caller's fast-math down to what
# says nothing, so that the first caller, in this process or the one that filled the cache on disk, would choose.
OPTIONS = {"cache": True, "fastmath": False, "nogil": True, "error_model": "numpy"}
# Of functions that rows and gradients are made of too: only those are cached on disk, for they notice every file that
# changes.
PART_OPTIONS = OPTIONS | {"cache": False}
_EXPONENT = np.int32(0x7F800000)

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few mantissa bits, so that n · high is exact
_LN2_LOW = np.float32(0.6931471805599453 - 0.693359375)
ZERO, _HALF, ONE, _TWO = (np.float32(c) for c in (0.0, 0.5, 1.0, 2.0))
_LIMIT = np.float32(87.0)
_TINY = np.float32(1.7e-38)  # a little above 1 / (1 + exp(87))
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(1.0 / f) for f in (2, 6, 24, 120, 720, 5040))
# tanh x = x (1 + x² (T1 + x² (T2 + …))), the Taylor series: next term under 1e-8 relative for |x| < 0.25
_T1, _T2, _T3, _T4 = (np.float32(c) for c in (-1 / 3, 2 / 15, -17 / 315, 62 / 2835))
_SMALL = np.float32(0.25)
EPS = np.float32(1e-6)


@njit(**OPTIONS)
def _exp(x, powers):
    """x = exp(x) for a flat float32 array, within 2 ulp for |x| ≤ 87; ``powers`` is int32 scratch of its length."""
    for i in range(x.size):
        value = min(max(x[i], -_LIMIT), _LIMIT)
        n = np.float32(np.floor(value * _LOG2E + _HALF))
        r = (value - n * _LN2_HIGH) - n * _LN2_LOW
        p = _E7
        p = p * r + _E6
        p = p * r + _E5
        p = p * r + _E4
        p = p * r + _E3
        p = p * r + _E2
        p = p * r + ONE
        x[i] = p * r + ONE
        powers[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    scale = powers.view(np.float32)
    for i in range(x.size):
        x[i] *= scale[i]


@njit(**OPTIONS)
def _sigmoid(x, powers):
    """x = 1 / (1 + exp(−x)) for a flat float32 array; 0 below −87, where float32 has no normal number for it."""
    for i in range(x.size):
        x[i] = -x[i]
    _exp(x, powers)
    for i in range(x.size):
        value = ONE / (ONE + x[i])
        x[i] = ZERO if value < _TINY else value


@njit(**OPTIONS)
def tanh_in_place(x, scratch, powers):
    """x = tanh(x) for a flat float32 array, accurate relative to its size: a direction is made of it.

    ``scratch`` of its length is left as exp(−2 |x|).
    """
    for i in range(x.size):
        scratch[i] = -_TWO * abs(x[i])
    _exp(scratch, powers)
    for i in range(x.size):
        value = x[i]
        square = value * value
        near = value + value * square * (_T1 + square * (_T2 + square * (_T3 + square * _T4)))
        far = (ONE - scratch[i]) / (ONE + scratch[i])
        far = far if value >= ZERO else -far
        x[i] = near if abs(value) < _SMALL else far


@njit(**OPTIONS)
def squares(x, out):
    """out = x² for flat arrays; apart from the sum that it goes into, which could otherwise fuse with it."""
    for i in range(x.size):
        out[i] = x[i] * x[i]


@njit(**OPTIONS)
def is_finite(x):
    """Whether no value of a float32 array is NaN or Inf, from the exponents (integers: the loop vectorises)."""
    bits = x.reshape(-1).view(np.int32)
    broken = np.int32(0)
    for i in range(bits.size):
        broken |= np.int32((bits[i] & _EXPONENT) == _EXPONENT)
    return broken == 0


@njit(**PART_OPTIONS)
def copy_columns(rows, start, width, out):
    """out [n, width] = rows[:, start : start + width]."""
    for t in range(rows.shape[0]):
        for i in range(width):
            out[t, i] = rows[t, start + i]


@njit(inline="always")
def to_unit_length(flat, rank, scratch):
    """Each ``rank`` values of a flat array to unit length; scratch [n] = what the n-th were multiplied with."""
    squares(flat, scratch[: flat.size])
    for n in range(flat.size // rank):
        square = ZERO
        for j in range(rank):
            square += scratch[n * rank + j]
        scratch[n] = square  # behind what is still to be read
    for n in range(flat.size // rank):
        scratch[n] = ONE / max(np.float32(np.sqrt(scratch[n])), EPS)
    for n in range(flat.size // rank):
        inverse = scratch[n]
        for j in range(rank):
            flat[n * rank + j] *= inverse


@njit(**PART_OPTIONS)
def unit_directions(rows, start, heads, rank, normalize, out, scratch, powers):
    """out [n, H·r] = unit(tanh(rows[:, start : start + H·r])) per head, or the raw values."""
    copy_columns(rows, start, heads * rank, out)
    if normalize:
        flat = out.reshape(-1)
        tanh_in_place(flat, scratch[: flat.size], powers[: flat.size])
        to_unit_length(flat, rank, scratch)


@njit(**PART_OPTIONS)
def sigmoid_gate(rows, start, bias, offset, heads, rank, row_gates, out, powers):
    """out [n, H·r] = sigmoid(rows[:, start :] + bias[offset :]), a head's single gate spread over its rows."""
    for t in range(rows.shape[0]):
        for h in range(heads):
            for i in range(rank):
                g = h * rank + i if row_gates else h
                out[t, h * rank + i] = rows[t, start + g] + bias[offset + g]
    flat = out.reshape(-1)
    _sigmoid(flat, powers[: flat.size])


@njit(inline="always")
def block_gates(rows, bias, heads, rank, mode, row_gates, own_lambda, beta_max, keep_max, beta, keep, powers):
    """β and keep of a block's tokens, [n, H·r]; NaN, of a bias, stays NaN."""
    width = heads * rank
    gates = width if row_gates else heads
    sigmoid_gate(rows, 3 * width, bias, 0, heads, rank, row_gates, beta, powers)
    if beta_max < ONE:
        for t in range(rows.shape[0]):
            for i in range(width):
                beta[t, i] = beta_max if beta[t, i] > beta_max else beta[t, i]
    if own_lambda:
        sigmoid_gate(rows, 3 * width + gates, bias, gates, heads, rank, row_gates, keep, powers)
    else:
        for t in range(rows.shape[0]):
            for i in range(width):
                keep[t, i] = ONE if mode == NO_LAMBDA else ONE - beta[t, i]
    if keep_max < ONE:
        for t in range(rows.shape[0]):
            for i in range(width):
                keep[t, i] = keep_max if keep[t, i] > keep_max else keep[t, i]


@njit(inline="always")
def held(value, value_max):
    """v within ± value_max."""
    return min(max(value, -value_max), value_max)


@njit(**PART_OPTIONS)
def copy_matrices(source, target):
    """target = source, [H, r, r]."""
    for h in range(source.shape[0]):
        for j in range(source.shape[1]):
            for i in range(source.shape[2]):
                target[h, j, i] = source[h, j, i]


@njit(inline="always")
def read_and_write(rank, heads, mode, value_max, rows, t, q, k, beta, keep, column, work, reads, n, at):
    """Token t of a block, in all heads: reads[n, at] and the state, work [H, j, i]."""
    for h in range(heads):
        base = h * rank
        # j is unrolled (rank is a constant), then i vectorises: one store for each sum.
        for i in range(rank):
            read, predicted = ZERO, ZERO
            for j in range(rank):
                read = fma(work[h, j, i], q[t, base + j], read)
                predicted = fma(work[h, j, i], k[t, base + j], predicted)
            reads[n, at, base + i] = read
            b = beta[t, base + i]
            erase = keep[t, base + i] * b if mode == LAMBDA_OUTSIDE else b
            column[i] = fma(b, held(rows[t, 2 * heads * rank + base + i], value_max), -(erase * predicted))
        for j in range(rank):
            k_j = k[t, base + j]
            for i in range(rank):
                work[h, j, i] = fma(keep[t, base + i], work[h, j, i], column[i] * k_j)


@njit(inline="always")
def _save(work, saved, n, place):
    """saved[n, place] = the state, work [H, j, i]."""
    for h in range(work.shape[0]):
        for i in range(work.shape[1]):
            for j in range(work.shape[1]):
                saved[n, place, h, i, j] = work[h, j, i]


@njit(**PART_OPTIONS)
def _look_at_each(
    rank, heads, mode, value_max, rows, mask, q, k, beta, keep, column, work, before, reads, every, saved, says,
    written, n, first,
):  # fmt: skip
    """A block of tokens, with a look at the state after each; returns how many were left out.

    One that would leave NaN or Inf in any head is written in none, and reads 0.
    """
    left_out = 0
    for t in range(rows.shape[0]):
        at = first + t
        present = mask[n, at] != 0
        valid = present and is_finite(rows[t])
        if valid:
            copy_matrices(work, before)
            read_and_write(rank, heads, mode, value_max, rows, t, q, k, beta, keep, column, work, reads, n, at)
            if not is_finite(work):
                copy_matrices(before, work)
                valid = False
        if not valid:
            for i in range(heads * rank):
                reads[n, at, i] = ZERO
        left_out += present and not valid
        if says:
            written[n, at] = valid
        if every > 0 and (at + 1) % every == 0:
            _save(work, saved, n, (at + 1) // every - 1)
    return left_out


@njit(inline="always")
def scan_sequences(
    rank, projections, bias, mask, state, slots, heads, mode, row_gates, own_lambda, normalize, beta_max, keep_max,
    value_max, every, reads, saved, skipped, written, done,
):  # fmt: skip
    """Read and write B sequences, one after another.

    projections float32 [B, T, W], bias [bias_width], beta_max, keep_max and value_max the rule's guard, mask bool or
    uint8 [B, T], state [S, H, r, r] (in place), slots int64 [B] (row of the state, −1: neither read nor written), reads
    [B, T, H·r] and saved [B, T // every, H, r, r] (written; every = 0: never), skipped int32 [S] (adds the unmasked
    tokens that were not written, because they or the state after them are not finite), written uint8 [B, T] (says which
    were; T = 0: it is not wanted). done: the address of int64 [B], or 0; there other threads see up to which token a
    sequence's reads are written.

    What is not finite in a state stays so: Inf times a number, plus a number, is Inf or NaN. So a block of tokens is
    taken without a look at the states. Where the last one is not finite, the block is taken again, with a look at each.
    """
    batch, length = projections.shape[0], projections.shape[1]
    width = heads * rank
    block = min(BLOCK, length)
    q_block, k_block = np.empty((block, width), np.float32), np.empty((block, width), np.float32)
    beta_block, keep_block = np.empty((block, width), np.float32), np.empty((block, width), np.float32)
    scratch, powers = np.empty(block * width, np.float32), np.empty(block * width, np.int32)
    column = np.empty(rank, np.float32)
    work = np.empty((heads, rank, rank), np.float32)  # [H, j, i]
    block_start, token_start = np.empty_like(work), np.empty_like(work)
    says = written.shape[1] > 0
    for n in range(batch):
        slot = slots[n]
        if slot < 0:
            reads[n] = ZERO
            saved[n] = ZERO
            if says:
                written[n] = 0
            if done:
                publish(done + 8 * n, length)
            continue
        for h in range(heads):
            for i in range(rank):
                for j in range(rank):
                    work[h, j, i] = state[slot, h, i, j]
        for first in range(0, length, BLOCK):
            count = min(BLOCK, length - first)
            rows = projections[n, first : first + count]
            q, k = q_block[:count], k_block[:count]
            beta, keep = beta_block[:count], keep_block[:count]
            unit_directions(rows, 0, heads, rank, normalize, q, scratch, powers)
            unit_directions(rows, width, heads, rank, normalize, k, scratch, powers)
            block_gates(rows, bias, heads, rank, mode, row_gates, own_lambda, beta_max, keep_max, beta, keep, powers)
            # No slices in here: each would be counted as a reference, which costs more than the arithmetic.
            all_finite = is_finite(rows)
            copy_matrices(work, block_start)
            left_out = 0
            for t in range(count):
                at = first + t
                valid = mask[n, at] != 0
                if valid and not all_finite and not is_finite(rows[t]):
                    left_out += 1
                    valid = False
                if not valid:
                    for i in range(width):
                        reads[n, at, i] = ZERO
                else:
                    read_and_write(rank, heads, mode, value_max, rows, t, q, k, beta, keep, column, work, reads, n, at)
                if every > 0 and (first + t + 1) % every == 0:
                    _save(work, saved, n, (first + t + 1) // every - 1)
            if says:
                for t in range(count):
                    written[n, first + t] = mask[n, first + t] != 0 and (all_finite or is_finite(rows[t]))
            if not is_finite(work):
                copy_matrices(block_start, work)
                left_out = _look_at_each(
                    rank, heads, mode, value_max, rows, mask, q, k, beta, keep, column, work, token_start, reads,
                    every, saved, says, written, n, first,
                )  # fmt: skip
            skipped[slot] += left_out
            if done:
                publish(done + 8 * n, first + count)
        for h in range(heads):
            for i in range(rank):
                for j in range(rank):
                    state[slot, h, i, j] = work[h, j, i]


@njit(inline="always")
def read_sequences(rank, projections, mask, state, slots, heads, normalize, reads, done):
    """Reads of frozen states: projections [B, T, W], reads [B, T, H·r]; the rest as in ``scan_sequences``."""
    width = heads * rank
    q = np.empty((1, width), np.float32)
    scratch, powers = np.empty(width, np.float32), np.empty(width, np.int32)
    for n in range(projections.shape[0]):
        slot = slots[n]
        for t in range(projections.shape[1]):
            if slot < 0 or mask[n, t] == 0 or not is_finite(projections[n, t]):
                for i in range(width):
                    reads[n, t, i] = ZERO
            else:
                unit_directions(projections[n, t : t + 1], 0, heads, rank, normalize, q, scratch, powers)
                for h in range(heads):
                    for i in range(rank):
                        total = ZERO
                        for j in range(rank):
                            total += state[slot, h, i, j] * q[0, h * rank + j]
                        reads[n, t, h * rank + i] = total
            if done and (t + 1) % BLOCK == 0:
                publish(done + 8 * n, t + 1)
        if done:
            publish(done + 8 * n, projections.shape[1])


@functools.cache
def scan_loops(rank: int) -> types.SimpleNamespace:
    """``scan_rows`` and ``read_rows`` for one rank, which is a constant in them.

    They close over numbers alone: numba's cache on disk knows a function by its closure, and finds no other compiled
    function in it again.
    """
    stamp = changed()

    @njit(**OPTIONS)
    def scan_rows(
        projections, bias, mask, state, slots, heads, mode, row_gates, own_lambda, normalize, beta_max, keep_max,
        value_max, every, reads, saved, skipped, written,
    ):  # fmt: skip
        """``scan_sequences``."""
        _ = stamp
        scan_sequences(
            rank, projections, bias, mask, state, slots, heads, mode, row_gates, own_lambda, normalize, beta_max,
            keep_max, value_max, every, reads, saved, skipped, written, 0,
        )  # fmt: skip

    @njit(**OPTIONS)
    def read_rows(projections, mask, state, slots, heads, normalize, reads):
        """``read_sequences``."""
        _ = stamp
        read_sequences(rank, projections, mask, state, slots, heads, normalize, reads, 0)

    return types.SimpleNamespace(scan_rows=scan_rows, read_rows=read_rows)
