"""Programs (blocks) and their warps: registers, special registers, what the lanes of a warp do together."""

from __future__ import annotations

import numpy as np

from .arithmetic import LANES, U16, U32, U64
from .errors import EmuError
from .global_memory import GlobalMemory
from .shared_memory import SharedMemory

REDUCTIONS = {
    "max": np.max, "min": np.min, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}  # fmt: skip


class Block:
    """One program of the grid: its warps and ``shared`` bytes of memory, which start as rubbish."""

    def __init__(self, launch, index: int, warps: int, shared: int):
        self.index, self.shared = index, shared
        self.memory = np.full(max(16, (shared + 15) // 16 * 16), 0xCD, np.uint8)
        self.warps = [Warp(launch, self, number) for number in range(warps)]


class Warp(GlobalMemory, SharedMemory):
    """32 lanes.

    Attributes:
        G: its registers; see ``operands``.
        pc: index of the segment that comes next, while all lanes are together.
        lanes_pc: of each lane, once they have diverged (-1: it has ended); None while they are together.
        done, blocked: whether it has ended, waits at a barrier of the program.
        executed: instructions so far.
        agent, epoch, meetings, bars: what ``races`` needs to know of its order among accesses.
    """

    def __init__(self, launch, block: Block, number: int):
        self.launch, self.block, self.number = launch, block, number
        self.agent = launch.new_agent()
        self.pc, self.lanes_pc, self.done, self.blocked = 0, None, False, False
        self.epoch = self.meetings = self.bars = self.executed = 0
        self.G = launch.compiled.registers()

        def everywhere(value):
            return np.full(32, value, U32)

        self.special = {
            "%tid.x": (number * 32 + LANES).astype(U32), "%ctaid.x": everywhere(block.index),
            "%ntid.x": everywhere(launch.threads), "%nctaid.x": everywhere(launch.grid),
            "%laneid": LANES.astype(U32), "%warpid": everywhere(number),
        }  # fmt: skip
        for axis in "yz":  # grids and programs have one dimension
            self.special |= {f"%{name}.{axis}": everywhere(0) for name in ("tid", "ctaid")}
            self.special |= {f"%{name}.{axis}": everywhere(1) for name in ("ntid", "nctaid")}
        self.groups, self.open_group = [], []

    def where(self, line: int) -> str:
        """A place in the program, for messages."""
        program = self.launch.program
        return f"{program.name}, program {self.block.index}, warp {self.number}: {program.by_line[line]}"

    def param(self, index, bits, signed, out):
        """A parameter of ``bits`` bits as a register of ``out``."""
        raw = self.launch.params[index] & ((1 << bits) - 1)
        if signed and raw >> (bits - 1):
            raw |= ((1 << out) - 1) ^ ((1 << bits) - 1)
        return {16: U16, 32: U32, 64: U64}[out](raw)

    def need(self, members, mask, line):
        """Raises: EmuError unless exactly the lanes ``members`` have come to a ``*.sync``."""
        self.meetings += 1
        if mask is None and members == 0xFFFFFFFF:
            return
        have = sum(1 << int(i) for i in np.flatnonzero(np.ones(32, bool) if mask is None else mask))
        if have != members:
            raise EmuError(f"*.sync for the lanes {members:#x}, {have:#x} have come: {self.where(line)}")

    def redux(self, operation, value, mask):
        self.meetings += 1
        return REDUCTIONS[operation](value if mask is None else value[mask]).astype(value.dtype)

    def vote(self, mode, value, mask):
        self.meetings += 1
        active = value if mask is None else value[mask]
        if mode == "ballot":
            return U32(sum(1 << int(i) for i in np.flatnonzero(value if mask is None else value & mask)))
        return np.bool_(active.any() if mode == "any" else active.all())

    def warp_barrier(self):
        self.epoch += 1
        self.meetings += 1

    def fence(self):
        self.launch.problem("fence not modelled", self.launch.program.name)
