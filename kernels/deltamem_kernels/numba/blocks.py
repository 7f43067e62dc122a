"""A decoded token of sequences whose states lie in blocks of a paged cache: read in one, written in another.

All of a step is one call. To gather states, run ``step``, scatter them and correct q takes eight operators, each of
which costs more than the recurrence once a large model's weights have emptied the processor's caches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, types

from ..errors import ArgumentError
from ..rule import DeltaRule
from . import loops, rows
from .loops import OPTIONS, ZERO, block_gates, copy_matrices, is_finite, read_and_write, unit_directions
from .machine import changed, floats, long_integers, njit
from .recurrence import guard, rule_flags
from .rows import add_deltas

MOST_ROWS = 16  # corrected in here; for more of them, and wide ones, a matmul is faster than its call is slow


# Of each head that is corrected the first column, W [columns, H·r], and scale: Δ = scale · W reads.
Corrections = Sequence[tuple[int, torch.Tensor, float] | None]


@njit(inline="always")
def transpose(matrices, out):
    """out [H, j, i] = matrices [H, i, j]."""
    for h in range(matrices.shape[0]):
        for i in range(matrices.shape[1]):
            for j in range(matrices.shape[2]):
                out[h, j, i] = matrices[h, i, j]


@functools.cache
def block_loop(rank: int):
    """``step_blocks`` for one rank, which is a constant in it; it closes over numbers alone, see ``loops``."""
    stamp = changed(loops, rows)

    @njit(types.void(*[types.int64] * 11), **OPTIONS)
    def step_blocks(
        layer, scales, bias, projections, count, sources, targets, reads, steered, stride, delta
    ):  # fmt: skip
        """``BlockStep`` of ``count`` sequences.

        Args:
            layer: int64: heads, mode, row_gates, own_lambda, normalize, the cache's address, how many bytes lie between
                two blocks' states, of q, k, v and o the first column, how many there are, and the address of the
                weight, transposed, or 0, and the cache's blocks.
            scales: float32, of q, k, v and o; then the guard.
            bias, projections, sources, targets, reads, steered, delta: addresses; reads 0: nobody asks for them;
                steered 0: nothing is corrected.
            stride: numbers from one of the steered rows to the next.
        """
        _ = stamp
        fixed = carray(long_integers(layer), (20,))
        heads, mode, row_gates, own_lambda, normalize = fixed[0], fixed[1], fixed[2] != 0, fixed[3] != 0, fixed[4] != 0
        width = heads * rank
        gates = (width if row_gates else heads) * (2 if own_lambda else 1)
        read_from, written_to = carray(long_integers(sources), (count,)), carray(long_integers(targets), (count,))
        rows = carray(floats(projections), (count, 3 * width + gates))
        for n in range(count):
            if min(read_from[n], written_to[n]) < 0 or max(read_from[n], written_to[n]) >= fixed[19]:
                raise IndexError("places: a block that the cache does not have")
        out = carray(floats(reads), (1, count, width)) if reads else np.empty((1, count, width), np.float32)
        # What is computed of each number alone: of all sequences at once, as ``scan_sequences`` does of many tokens.
        q, k = np.empty((count, width), np.float32), np.empty((count, width), np.float32)
        beta, keep = np.empty((count, width), np.float32), np.empty((count, width), np.float32)
        scratch, powers = np.empty(count * width, np.float32), np.empty(count * width, np.int32)
        unit_directions(rows, 0, heads, rank, normalize, q, scratch, powers)
        unit_directions(rows, width, heads, rank, normalize, k, scratch, powers)
        factors = carray(floats(scales), (7,))
        block_gates(
            rows, carray(floats(bias), (gates,)), heads, rank, mode, row_gates, own_lambda, factors[4], factors[5],
            beta, keep, powers,
        )  # fmt: skip
        column, work = np.empty(rank, np.float32), np.empty((heads, rank, rank), np.float32)  # [H, j, i]
        for n in range(count):
            source = carray(floats(fixed[5] + fixed[6] * read_from[n]), (heads, rank, rank))
            target = carray(floats(fixed[5] + fixed[6] * written_to[n]), (heads, rank, rank))
            valid = is_finite(rows[n])
            if valid:
                transpose(source, work)
                read_and_write(rank, heads, mode, factors[6], rows, n, q, k, beta, keep, column, work, out, 0, n)
                valid = is_finite(work)
            if valid:
                transpose(work, target)
            else:
                out[0, n] = ZERO
                copy_matrices(source, target)
        for c in range(4 if steered else 0):
            first, numbers, at = fixed[7 + 3 * c], fixed[8 + 3 * c], fixed[9 + 3 * c]
            if at:
                to, apart = (steered + 4 * first, stride) if c < 3 else (delta, numbers)
                if c == 3:
                    carray(floats(delta), (count * numbers,))[:] = ZERO
                columns = carray(floats(at), (width, numbers))
                add_deltas(to, apart, count, numbers, columns, 0, out[0], factors[c])

    return step_blocks


class BlockStep:
    """``step`` of one layer's sequences, the states of which lie in a cache, and what they read corrects q, k, v and o.

    The same bits as ``step``.

    Args:
        cache: float32 [blocks, H, r, r], each block's state in one piece; held, and written by every call.
        rule: of the recurrence.
        corrections: of q, k, v and o, as they are now; None: nothing is corrected.

    Raises:
        ValueError: a cache that cannot be taken as it lies.
    """

    def __init__(self, cache: torch.Tensor, rule: DeltaRule, corrections: Corrections | None):
        state = cache[0]
        if not (cache.is_cpu and cache.dtype == torch.float32 and state.is_contiguous()):
            raise ArgumentError(
                f"cache: got {cache.dtype} on {cache.device}, a state's strides {[*state.stride()]}, allowed float32 "
                "on a CPU, each state in one piece"
            )
        table, factors = (
            [*rule_flags(rule), cache.data_ptr(), 4 * cache.stride(0)],
            np.array((0, 0, 0, 0, *guard(rule)), np.float32),
        )
        columns, self._corrects = [], corrections is not None
        for n, each in enumerate(corrections or [None] * 4):
            if each is None:
                table += [0, 0, 0]
                continue
            first, weight, factors[n] = each
            self._corrects &= weight.dtype == torch.float32
            columns.append(weight.float().t().contiguous())
            table += [first, weight.shape[0], columns[-1].data_ptr()]
        table = np.array([*table, cache.shape[0]], np.int64)
        self._layer, self._scales = table.ctypes.data, factors.ctypes.data
        self._held, self._read_width = (cache, columns, table, factors), rule.read_width
        self._run = block_loop(rule.rank)

    def __call__(
        self,
        projections: torch.Tensor,
        gate_bias: torch.Tensor,
        places: tuple[int, int, int],
        steered: torch.Tensor,
        delta: torch.Tensor,
    ) -> torch.Tensor | None:
        """Read, then write, one token of N sequences. Little is checked: every decoded token of every layer pays.

        Args:
            projections: [N, W], raw, contiguous; float32 if the corrections are.
            gate_bias: of the gates, float32.
            places: N, and the addresses of int64 [N], the blocks that states are read from, and those that they are
                written to. What one sequence writes no other may read or write.
            steered: [N, q | k | v], each row's numbers in one piece; corrected where they lie.
            delta: [N, out], contiguous; written: Δo.

        Returns:
            None; or the reads, float32 [N, H·r], if the rows are not corrected: more than ``MOST_ROWS``, or corrections
            of another dtype than float32.

        Raises:
            IndexError: a block that the cache does not have; nothing is changed then.
        """
        count, sources, targets = places
        if self._corrects and count <= MOST_ROWS:
            self._run(
                self._layer, self._scales, gate_bias.data_ptr(), projections.data_ptr(), count, sources, targets, 0,
                steered.data_ptr(), steered.stride(0), delta.data_ptr(),
            )  # fmt: skip
            return None
        projections = projections.float()
        reads = torch.empty(count, self._read_width, dtype=torch.float32, device="cpu")
        self._run(
            self._layer, self._scales, gate_bias.data_ptr(), projections.data_ptr(), count, sources, targets,
            reads.data_ptr(), 0, 0, 0,
        )  # fmt: skip
        return reads
