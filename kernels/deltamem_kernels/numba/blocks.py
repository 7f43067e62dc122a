"""A decoded token of sequences whose states lie in blocks of a paged cache: read in one, written in another.

All of a step is one call: to gather states, to run ``step`` and to scatter them takes six operators, each of which costs
more than the recurrence once a large model's weights have emptied the processor's caches.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray, types

from ..rule import DeltaRule
from . import loops
from .loops import OPTIONS, scan_sequences
from .machine import changed, floats, long_integers, njit
from .recurrence import rule_flags


@functools.cache
def block_loop(rank: int):
    """``step_blocks`` for one rank, which is a constant in it; it closes over numbers alone, see ``loops``."""
    stamp = changed(loops)

    @njit(types.void(*[types.int64] * 6), **OPTIONS)
    def step_blocks(layer, projections, count, sources, targets, reads):
        """``BlockStep`` of ``count`` sequences; all else are addresses.

        layer: int64 [8], the rule's flags, the addresses of the gates' bias and of the cache, and how many bytes lie
        between two blocks' states.
        """
        _ = stamp
        fixed = carray(long_integers(layer), (8,))
        heads, mode, row_gates, own_lambda, normalize = fixed[0], fixed[1], fixed[2] != 0, fixed[3] != 0, fixed[4] != 0
        width = heads * rank
        gates = (width if row_gates else heads) * (2 if own_lambda else 1)
        read_from, written_to = carray(long_integers(sources), (count,)), carray(long_integers(targets), (count,))
        states = np.empty((count, heads, rank, rank), np.float32)
        for n in range(count):
            states[n] = carray(floats(fixed[6] + fixed[7] * read_from[n]), (heads, rank, rank))
        scan_sequences(
            rank, carray(floats(projections), (count, 1, 3 * width + gates)), carray(floats(fixed[5]), (gates,)),
            np.ones((count, 1), np.uint8), states, np.arange(count), heads, mode, row_gates, own_lambda, normalize, 0,
            carray(floats(reads), (count, 1, width)), np.empty((count, 0, heads, rank, rank), np.float32),
            np.zeros(count, np.int32), np.empty((count, 0), np.uint8), 0,
        )  # fmt: skip
        for n in range(count):
            carray(floats(fixed[6] + fixed[7] * written_to[n]), (heads, rank, rank))[:] = states[n]

    return step_blocks


class BlockStep:
    """``step`` of one layer's sequences, the states of which lie in a cache [blocks, H, r, r]; the same bits.

    Holds addresses: it is of use as long as ``holds_for`` says so.

    Attributes:
        gate_bias, cache: the tensors that it was made of, float32.
        rule: of the recurrence.
    """

    def __init__(self, gate_bias: torch.Tensor, cache: torch.Tensor, rule: DeltaRule):
        self.gate_bias, self.cache, self.rule = gate_bias, cache, rule
        self._addresses = gate_bias.data_ptr(), cache.data_ptr()
        self._table = np.array([*rule_flags(rule), *self._addresses, 4 * cache.stride(0)], np.int64)
        self._layer = self._table.ctypes.data
        self._run = block_loop(rule.rank)

    @staticmethod
    def takes(gate_bias: torch.Tensor, cache: torch.Tensor) -> bool:
        """Whether these tensors can be taken as they lie: float32, and each block's state in one piece."""
        return (
            gate_bias.dtype == cache.dtype == torch.float32
            and gate_bias.is_contiguous()
            and cache.device.type == "cpu"
            and cache[0].is_contiguous()
        )

    def holds_for(self, gate_bias: torch.Tensor, cache: torch.Tensor) -> bool:
        """Whether it was made of these tensors, and they lie where they lay."""
        return (gate_bias.data_ptr(), cache.data_ptr()) == self._addresses

    def __call__(
        self, projections: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, reads: torch.Tensor
    ) -> None:
        """Read, then write, one token of N sequences.

        Args:
            projections: [N, W], raw.
            sources, targets: int64 [N], contiguous: the blocks that states are read from and written to. What one
                sequence writes no other may write. Not checked.
            reads: float32 [N, H·r], contiguous; written.
        """
        rows = projections
        if rows.dtype != torch.float32 or not rows.is_contiguous():
            rows = rows.float().contiguous()
        self._run(
            self._layer, rows.data_ptr(), rows.shape[0], sources.data_ptr(), targets.data_ptr(), reads.data_ptr()
        )
