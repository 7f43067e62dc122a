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
from .loops import OPTIONS, ZERO, scan_sequences
from .machine import changed, floats, long_integers, njit
from .recurrence import rule_flags
from .rows import add_deltas

MOST_ROWS = 16  # corrected in here; for more of them, and wide ones, a matmul is faster than its call is slow


# Of each head that is corrected the first column, W [columns, H·r], and scale: Δ = scale · W reads.
Corrections = Sequence[tuple[int, torch.Tensor, float] | None]


@functools.cache
def block_loop(rank: int):
    """``step_blocks`` for one rank, which is a constant in it; it closes over numbers alone, see ``loops``."""
    stamp = changed(loops, rows)

    @njit(types.void(*[types.int64] * 10), **OPTIONS)
    def step_blocks(layer, scales, projections, count, sources, targets, reads, steered, stride, delta):
        """``BlockStep`` of ``count`` sequences.

        Args:
            layer: int64: heads, mode, row_gates, own_lambda, normalize, the addresses of the gates' bias and of the
                cache, how many bytes lie between two blocks' states, and of q, k, v and o the first column, how many
                there are, and the address of the weight, transposed, or 0.
            scales: float32, of q, k, v and o.
            projections, sources, targets, reads, steered, delta: addresses; steered 0: nothing is corrected.
            stride: numbers from one of the steered rows to the next.
        """
        _ = stamp
        fixed = carray(long_integers(layer), (20,))
        heads, mode, row_gates, own_lambda, normalize = fixed[0], fixed[1], fixed[2] != 0, fixed[3] != 0, fixed[4] != 0
        width = heads * rank
        gates = (width if row_gates else heads) * (2 if own_lambda else 1)
        read_from, written_to = carray(long_integers(sources), (count,)), carray(long_integers(targets), (count,))
        states, out = np.empty((count, heads, rank, rank), np.float32), carray(floats(reads), (count, 1, width))
        for n in range(count):
            states[n] = carray(floats(fixed[6] + fixed[7] * read_from[n]), (heads, rank, rank))
        scan_sequences(
            rank, carray(floats(projections), (count, 1, 3 * width + gates)), carray(floats(fixed[5]), (gates,)),
            np.ones((count, 1), np.uint8), states, np.arange(count), heads, mode, row_gates, own_lambda, normalize, 0,
            out, np.empty((count, 0, heads, rank, rank), np.float32), np.zeros(count, np.int32),
            np.empty((count, 0), np.uint8), 0,
        )  # fmt: skip
        for n in range(count):
            carray(floats(fixed[6] + fixed[7] * written_to[n]), (heads, rank, rank))[:] = states[n]
        factors = carray(floats(scales), (4,))
        for c in range(4 if steered else 0):
            first, numbers, at = fixed[8 + 3 * c], fixed[9 + 3 * c], fixed[10 + 3 * c]
            if at:
                to, apart = (steered + 4 * first, stride) if c < 3 else (delta, numbers)
                if c == 3:
                    carray(floats(delta), (count * numbers,))[:] = ZERO
                columns = carray(floats(at), (width, numbers))
                add_deltas(to, apart, count, numbers, columns, 0, out[:, 0], factors[c])

    return step_blocks


class BlockStep:
    """``step`` of one layer's sequences, the states of which lie in a cache, and what they read corrects q, k, v and o.

    The same bits as ``step``. Holds addresses, so it is of use as long as ``holds_for`` says so.

    Args:
        gate_bias: of the gates, float32.
        cache: float32 [blocks, H, r, r], each block's state in one piece.
        rule: of the recurrence.
        corrections: of q, k, v and o, as they are now; None: nothing is corrected.

    Raises:
        ValueError: a tensor that cannot be taken as it lies.
    """

    def __init__(self, gate_bias: torch.Tensor, cache: torch.Tensor, rule: DeltaRule, corrections: Corrections | None):
        self._addresses = gate_bias.data_ptr(), cache.data_ptr()
        self._corrects = corrections is not None
        corrections = corrections or [None] * 4
        for name, tensor in (("gate_bias", gate_bias), ("cache", cache[0])):
            if not (tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()):
                raise ArgumentError(
                    f"{name}: got {tensor.dtype} on {tensor.device}, strides {[*tensor.stride()]}, allowed float32 on "
                    "a CPU in one piece"
                )
        columns = [None if each is None else each[1].float().t().contiguous() for each in corrections]
        table = [*rule_flags(rule), *self._addresses, 4 * cache.stride(0)]
        for each, transposed in zip(corrections, columns, strict=True):
            table += [0, 0, 0] if each is None else [each[0], transposed.shape[1], transposed.data_ptr()]
        self._table = np.array(table, np.int64)
        self._scales = np.array([0.0 if each is None else each[2] for each in corrections], np.float32)
        self._layer = self._table.ctypes.data, self._scales.ctypes.data
        self._held, self._read_width = (gate_bias, cache, columns), rule.read_width
        self._run = block_loop(rule.rank)

    def holds_for(self, gate_bias: torch.Tensor, cache: torch.Tensor) -> bool:
        """Whether it was made of these tensors, and they lie where they lay."""
        return (gate_bias.data_ptr(), cache.data_ptr()) == self._addresses

    def __call__(
        self,
        projections: torch.Tensor,
        sources: torch.Tensor,
        targets: torch.Tensor,
        steered: torch.Tensor,
        delta: torch.Tensor,
    ) -> torch.Tensor | None:
        """Read, then write, one token of N sequences.

        Args:
            projections: [N, W], raw.
            sources, targets: int64 [N], contiguous: the blocks that states are read from and written to. What one
                sequence writes no other may read or write. Not checked.
            steered: [N, q | k | v], each row's numbers in one piece; corrected where they lie.
            delta: [N, out], contiguous; written: Δo.

        Returns:
            None; or the reads, float32 [N, H·r], if the rows are not corrected: more than ``MOST_ROWS``, or of another
            dtype than float32.
        """
        if projections.dtype != torch.float32 or not projections.is_contiguous():
            projections = projections.float().contiguous()
        count = projections.shape[0]
        reads = torch.empty(count, self._read_width, dtype=torch.float32, device="cpu")
        corrects = self._corrects and count <= MOST_ROWS and steered.dtype == torch.float32
        self._run(
            *self._layer, projections.data_ptr(), count, sources.data_ptr(), targets.data_ptr(), reads.data_ptr(),
            steered.data_ptr() if corrects else 0, steered.stride(0), delta.data_ptr(),
        )  # fmt: skip
        return None if corrects else reads
