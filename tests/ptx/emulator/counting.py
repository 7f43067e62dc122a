"""What a launch costs, counted while it runs: executed warp instructions, and the 32-byte sectors that it asks for."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

SECTOR = 32  # bytes; what the caches of an NVIDIA GPU move


@dataclass
class Line:
    """What one load, store or atomic of the PTX has asked for, over all its executions."""

    executions: int = 0
    lanes: int = 0
    bytes: int = 0
    sectors: int = 0


class Counts:
    """Counts of one launch.

    Attributes:
        instructions: executed warp instructions (one for 32 lanes, however many take part).
        longest: of these, what the warp that executed most has executed.
        mix: instructions by opcode.
        lines: by line of the PTX, what its accesses to global memory asked for.
        load_bytes, store_bytes: bytes that lanes take.
        load_sectors, store_sectors: sectors asked for: the distinct ones of each warp instruction, added up. An atomic
            is a store.
        load_repeats: load sectors that a warp of the same program had loaded before, and might find in L1.
        store_repeats: the same for stores, which L1 does not keep.
        loaded, stored: the distinct sectors.
    """

    def __init__(self):
        self.instructions = self.longest = 0
        self.mix = Counter()
        self.lines = defaultdict(Line)
        self.load_bytes = self.store_bytes = self.load_sectors = self.store_sectors = 0
        self.load_repeats = self.store_repeats = 0
        self.loaded, self.stored = set(), set()
        self._of_program = defaultdict(set)  # (program, whether stored) -> its sectors

    def access(self, program: int, line: int, addresses: np.ndarray, size: int, write: bool) -> None:
        """One access of a warp: ``size`` bytes, at most 16 and aligned, at each of ``addresses`` [lanes], uint64."""
        sectors = set((addresses >> np.uint64(5)).tolist())
        row = self.lines[line]
        row.executions += 1
        row.lanes += addresses.size
        row.bytes += addresses.size * size
        row.sectors += len(sectors)
        before = self._of_program[program, write]
        repeats = len(sectors & before)
        before |= sectors
        if write:
            self.store_bytes += addresses.size * size
            self.store_sectors += len(sectors)
            self.store_repeats += repeats
            self.stored |= sectors
        else:
            self.load_bytes += addresses.size * size
            self.load_sectors += len(sectors)
            self.load_repeats += repeats
            self.loaded |= sectors

    @property
    def asked(self) -> int:
        """Sectors asked for."""
        return self.load_sectors + self.store_sectors

    @property
    def distinct(self) -> int:
        """Sectors that there are; one that is loaded and stored counts twice."""
        return len(self.loaded) + len(self.stored)

    @property
    def beyond_l1(self) -> int:
        """Sectors asked for, but for loads that the same program had made before."""
        return self.asked - self.load_repeats
