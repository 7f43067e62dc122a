"""The gradients of scan and read compiled for a CPU by numba, once per rank, and cached on disk.

With G = dL/dS_t, the gradient of the state after token t, and d = dL/dread_t (rows i, columns j):

    p = S_{t-1} k,   u = write v − erase p,   S_t = diag(keep) S_{t-1} + u kᵀ
    du     = G k             dv   = du write     dwrite = du v     derase = −du p     dp = −erase du
    dk     = Gᵀ u + S_{t-1}ᵀ dp                  dq     = S_{t-1}ᵀ d
    dkeep  = Σ_j G S_{t-1}                       dS_{t-1} = diag(keep) G + dp kᵀ + d qᵀ

A sequence is walked forwards once, and only the states at the starts of its blocks are kept. Then it is walked
backwards, block by block: the states inside the block are computed once more, into a buffer that fits the
first-level cache, and each token's gradients go through its gates and directions straight into the result. Nothing
else has the length of the sequence.
"""

from __future__ import annotations

import functools
import types

import numpy as np

from . import loops
from .loops import (
    BLOCK,
    EPS,
    LAMBDA_OUTSIDE,
    NO_LAMBDA,
    ONE,
    OPTIONS,
    ZERO,
    block_gates,
    copy_columns,
    held,
    is_finite,
    sigmoid_gate,
    tanh_in_place,
    to_unit_length,
    unit_directions,
)
from .machine import changed, njit

# The walk back runs the same instructions for every token too, so its sums over i may also be reordered.
_REORDERED = OPTIONS | {"fastmath": {"contract", "reassoc"}}
_FOUR = np.float32(4.0)
_FLOOR = np.float32(ONE / EPS)


@njit(**OPTIONS)
def _slopes(x):
    """x = 1 − tanh² for a flat array of exp(−2 |·|): no digits cancel where tanh is close to 1."""
    for i in range(x.size):
        more = ONE + x[i]
        x[i] = _FOUR * x[i] / (more * more)


@njit(inline="always")
def _directions_and_slopes(rows, start, heads, rank, normalize, out, slopes, inverses, powers):
    """``unit_directions``, and for the way back tanh's slopes [n · H · r] and the inverse norms [n · H]."""
    copy_columns(rows, start, heads * rank, out)
    if normalize:
        flat = out.reshape(-1)
        tanh_in_place(flat, slopes[: flat.size], powers[: flat.size])
        _slopes(slopes[: flat.size])
        to_unit_length(flat, rank, inverses)


@njit(inline="always")
def _valid_tokens(rows, mask, n, first, valid):
    """valid [n] = unmasked and finite."""
    all_finite = is_finite(rows)
    for t in range(rows.shape[0]):
        valid[t] = mask[n, first + t] and (all_finite or is_finite(rows[t]))


@njit(inline="always")
def _walk_forwards(rows, h, heads, rank, mode, value_max, valid, k, beta, keep, states, predicted, columns):
    """states [n + 1, j, i], the first given: the state of head h before each token and after the last.

    predicted and columns [n, r] are each token's p and u.
    """
    base = h * rank
    for t in range(rows.shape[0]):
        if not valid[t]:
            for j in range(rank):
                for i in range(rank):
                    states[t + 1, j, i] = states[t, j, i]
        else:
            for i in range(rank):
                total = ZERO
                for j in range(rank):
                    total += states[t, j, i] * k[t, base + j]
                b = beta[t, base + i]
                erase = keep[t, base + i] * b if mode == LAMBDA_OUTSIDE else b
                predicted[t, i] = total
                columns[t, i] = b * held(rows[t, 2 * heads * rank + base + i], value_max) - erase * total
            for j in range(rank):
                k_j = k[t, base + j]
                for i in range(rank):
                    states[t + 1, j, i] = keep[t, base + i] * states[t, j, i] + columns[t, i] * k_j


@njit(inline="always")
def _direction_backward(d_unit, unit, t, h, heads, rank, normalize, slopes, inverses, out, n, at, start):
    """out[n, at, start :] = the gradient of raw values from that of their direction, d_unit [r]."""
    base = h * rank
    if not normalize:
        for j in range(rank):
            out[n, at, start + base + j] = d_unit[j]
    else:
        inverse = inverses[t * heads + h]
        along = ZERO
        for j in range(rank):
            along += d_unit[j] * unit[t, base + j]
        if inverse >= _FLOOR:  # at the floor of the norm, unit() is a plain division
            along = ZERO
        for j in range(rank):
            slope = slopes[(t * heads + h) * rank + j]
            out[n, at, start + base + j] = (d_unit[j] - unit[t, base + j] * along) * inverse * slope


@functools.cache
def backward_loops(rank: int) -> types.SimpleNamespace:
    """``scan_backward_rows`` and ``read_backward_rows`` for one rank, which is a constant in them.

    They close over numbers alone, as ``loops.scan_loops`` do, and ``machine.changed`` is one of them.
    """
    stamp = changed(loops)

    @njit(**_REORDERED)
    def scan_backward_rows(
        projections, bias, mask, state, slots, heads, mode, row_gates, own_lambda, normalize, beta_max, keep_max,
        value_max, every, d_reads, d_saved, starts, d_state, d_projections, d_bias,
    ):  # fmt: skip
        """The gradients of B sequences, one after another.

        The first fourteen as in ``scan_rows``, with the states before the first tokens, which stay. d_reads
        [B, T, H·r], d_saved [B, T // every, H, r, r]; starts [⌈T / BLOCK⌉, H, r, r] is scratch; d_state [S, H, r, r]:
        of the last states on the way in, of the first ones on the way out; d_projections [B, T, W] (written);
        d_bias float64 [bias_width] (added to, row after row, tokens from the last to the first).
        """
        _ = stamp
        batch, length = projections.shape[0], projections.shape[1]
        width = heads * rank
        gates = width if row_gates else heads
        block = min(BLOCK, length)
        blocks = (length + BLOCK - 1) // BLOCK
        q_block, k_block = np.empty((block, width), np.float32), np.empty((block, width), np.float32)
        beta_block, keep_block = np.empty((block, width), np.float32), np.empty((block, width), np.float32)
        q_slopes, k_slopes = np.empty(block * width, np.float32), np.empty(block * width, np.float32)
        q_inverses, k_inverses = np.empty(block * width, np.float32), np.empty(block * width, np.float32)
        guarded = beta_max < ONE or keep_max < ONE
        open_beta_block = np.empty((block if guarded else 0, width), np.float32)
        open_keep_block = np.empty((block if guarded else 0, width), np.float32)
        powers, valid = np.empty(block * width, np.int32), np.empty(block, np.bool_)
        states = np.empty((block + 1, rank, rank), np.float32)  # [t, j, i]
        predicted, columns = np.empty((block, rank), np.float32), np.empty((block, rank), np.float32)
        grad = np.empty((heads, rank, rank), np.float32)  # [H, j, i]
        d_q, d_k = np.empty(rank, np.float32), np.empty(rank, np.float32)
        d_read, d_predicted = np.empty(rank, np.float32), np.empty(rank, np.float32)
        d_beta, d_keep = np.empty(rank, np.float32), np.empty(rank, np.float32)
        for n in range(batch):
            slot = slots[n]
            if slot < 0:
                d_projections[n] = ZERO
                continue
            if length == 0:
                continue
            for h in range(heads):
                for i in range(rank):
                    for j in range(rank):
                        starts[0, h, j, i] = state[slot, h, i, j]
                        grad[h, j, i] = d_state[slot, h, i, j]
            for b in range(blocks - 1):
                rows = projections[n, b * BLOCK : (b + 1) * BLOCK]
                _valid_tokens(rows, mask, n, b * BLOCK, valid)
                unit_directions(rows, width, heads, rank, normalize, k_block, k_slopes, powers)
                block_gates(
                    rows, bias, heads, rank, mode, row_gates, own_lambda, beta_max, keep_max, beta_block, keep_block,
                    powers,
                )  # fmt: skip
                for h in range(heads):
                    for j in range(rank):
                        for i in range(rank):
                            states[0, j, i] = starts[b, h, j, i]
                    _walk_forwards(
                        rows, h, heads, rank, mode, value_max, valid, k_block, beta_block, keep_block, states,
                        predicted, columns,
                    )  # fmt: skip
                    for j in range(rank):
                        for i in range(rank):
                            starts[b + 1, h, j, i] = states[BLOCK, j, i]
            for b in range(blocks - 1, -1, -1):
                first = b * BLOCK
                count = min(BLOCK, length - first)
                rows = projections[n, first : first + count]
                q, k, beta, keep = q_block[:count], k_block[:count], beta_block[:count], keep_block[:count]
                _valid_tokens(rows, mask, n, first, valid)
                _directions_and_slopes(rows, 0, heads, rank, normalize, q, q_slopes, q_inverses, powers)
                _directions_and_slopes(rows, width, heads, rank, normalize, k, k_slopes, k_inverses, powers)
                block_gates(
                    rows, bias, heads, rank, mode, row_gates, own_lambda, beta_max, keep_max, beta, keep, powers
                )
                open_beta, open_keep = beta, keep
                if guarded:  # what is held there has no gradient, what is there by itself has one
                    open_beta, open_keep = open_beta_block[:count], open_keep_block[:count]
                    block_gates(
                        rows, bias, heads, rank, mode, row_gates, own_lambda, beta_max, ONE, beta, open_keep, powers
                    )
                    sigmoid_gate(rows, 3 * width, bias, 0, heads, rank, row_gates, open_beta, powers)
                for h in range(heads):
                    base = h * rank
                    for j in range(rank):
                        for i in range(rank):
                            states[0, j, i] = starts[b, h, j, i]
                    _walk_forwards(
                        rows, h, heads, rank, mode, value_max, valid, k, beta, keep, states, predicted, columns
                    )
                    # No slices in here: each would be counted as a reference, which costs more than the arithmetic.
                    for t in range(count - 1, -1, -1):
                        at = first + t
                        if every > 0 and (at + 1) % every == 0:
                            for i in range(rank):
                                for j in range(rank):
                                    grad[h, j, i] += d_saved[n, (at + 1) // every - 1, h, i, j]
                        if not valid[t]:
                            for i in range(rank):
                                for part in range(3):
                                    d_projections[n, at, part * width + base + i] = ZERO
                            for i in range(rank if row_gates else 1):
                                g = base + i if row_gates else h
                                d_projections[n, at, 3 * width + g] = ZERO
                                if own_lambda:
                                    d_projections[n, at, 3 * width + gates + g] = ZERO
                            continue
                        for i in range(rank):
                            d_u, d_keep_i = ZERO, ZERO
                            for j in range(rank):
                                d_u += grad[h, j, i] * k[t, base + j]
                                d_keep_i += grad[h, j, i] * states[t, j, i]
                            b_i, keep_i = beta[t, base + i], keep[t, base + i]
                            value = rows[t, 2 * width + base + i]
                            d_erase = -d_u * predicted[t, i]
                            d_beta_i = d_u * held(value, value_max)
                            if mode == LAMBDA_OUTSIDE:
                                d_predicted[i] = -keep_i * b_i * d_u
                                d_beta_i += d_erase * keep_i
                                d_keep_i += d_erase * b_i
                            else:
                                d_predicted[i] = -b_i * d_u
                                d_beta_i += d_erase
                            if open_keep[t, base + i] > keep_max:
                                d_keep_i = ZERO
                            if not own_lambda and mode != NO_LAMBDA:
                                d_beta_i -= d_keep_i
                            if open_beta[t, base + i] > beta_max:
                                d_beta_i = ZERO
                            d_beta[i] = d_beta_i * b_i * (ONE - b_i)
                            d_keep[i] = d_keep_i * keep_i * (ONE - keep_i)
                            d_projections[n, at, 2 * width + base + i] = d_u * b_i if abs(value) <= value_max else ZERO
                            d_read[i] = d_reads[n, at, base + i]
                        for j in range(rank):
                            d_q_j, d_k_j = ZERO, ZERO
                            for i in range(rank):
                                d_q_j += states[t, j, i] * d_read[i]
                                d_k_j += grad[h, j, i] * columns[t, i] + states[t, j, i] * d_predicted[i]
                            d_q[j], d_k[j] = d_q_j, d_k_j
                        for j in range(rank):
                            q_j, k_j = q[t, base + j], k[t, base + j]
                            for i in range(rank):
                                grad[h, j, i] = (
                                    keep[t, base + i] * grad[h, j, i] + d_predicted[i] * k_j + d_read[i] * q_j
                                )
                        _direction_backward(
                            d_q, q, t, h, heads, rank, normalize, q_slopes, q_inverses, d_projections, n, at, 0
                        )
                        _direction_backward(
                            d_k, k, t, h, heads, rank, normalize, k_slopes, k_inverses, d_projections, n, at, width
                        )
                        if not row_gates:
                            for i in range(1, rank):
                                d_beta[0] += d_beta[i]
                                d_keep[0] += d_keep[i]
                        for i in range(rank if row_gates else 1):
                            g = base + i if row_gates else h
                            d_projections[n, at, 3 * width + g] = d_beta[i]
                            d_bias[g] += d_beta[i]
                            if own_lambda:
                                d_projections[n, at, 3 * width + gates + g] = d_keep[i]
                                d_bias[gates + g] += d_keep[i]
            for h in range(heads):
                for i in range(rank):
                    for j in range(rank):
                        d_state[slot, h, i, j] = grad[h, j, i]

    @njit(**_REORDERED)
    def read_backward_rows(projections, mask, state, slots, heads, normalize, d_reads, d_state, d_projections):
        """The gradients of reads of frozen states.

        The first six as in ``read_rows``; d_reads [B, T, H·r]; written: d_state [B, H, r, r], row n's share of its
        state's gradient, and d_projections [B, T, W], 0 but for q.
        """
        _ = stamp
        batch, length = projections.shape[0], projections.shape[1]
        width = heads * rank
        block = min(BLOCK, length)
        q_block, slopes = np.empty((block, width), np.float32), np.empty(block * width, np.float32)
        inverses, powers = np.empty(block * width, np.float32), np.empty(block * width, np.int32)
        valid = np.empty(block, np.bool_)
        grad = np.empty((heads, rank, rank), np.float64)
        d_q = np.empty(rank, np.float32)
        for n in range(batch):
            slot = slots[n]
            grad[:] = 0.0
            d_projections[n] = ZERO
            for first in range(0, length if slot >= 0 else 0, BLOCK):
                count = min(BLOCK, length - first)
                rows, q = projections[n, first : first + count], q_block[:count]
                _valid_tokens(rows, mask, n, first, valid)
                _directions_and_slopes(rows, 0, heads, rank, normalize, q, slopes, inverses, powers)
                for t in range(count):
                    at = first + t
                    if not valid[t]:
                        continue
                    for h in range(heads):
                        base = h * rank
                        for j in range(rank):
                            d_q[j] = ZERO
                        for i in range(rank):
                            d_read = d_reads[n, at, base + i]
                            for j in range(rank):
                                d_q[j] += state[slot, h, i, j] * d_read
                                grad[h, i, j] += d_read * q[t, base + j]
                        _direction_backward(
                            d_q, q, t, h, heads, rank, normalize, slopes, inverses, d_projections, n, at, 0
                        )
            for h in range(heads):
                for i in range(rank):
                    for j in range(rank):
                        d_state[n, h, i, j] = grad[h, i, j]

    return types.SimpleNamespace(scan_backward_rows=scan_backward_rows, read_backward_rows=read_backward_rows)
