"""One launch: warps of the resident programs take turns, from a seed, until all have ended."""

from __future__ import annotations

import bisect
import random
from collections import Counter

import numpy as np

from .counting import Counts
from .errors import EmuError
from .global_memory import Buffer
from .machine import Block, Warp
from .races import Races

# How warps take turns: how many segments one goes on for at most, halved. ``starve`` holds some programs back,
# ``warps`` some warps of each program, ``blocks`` runs one program after another in the grid's order.
STRATEGIES = {"fine": 1, "coarse": 12, "starve": 4, "blocks": 1000, "warps": 4}
SHARED_LOG = 30_000  # accesses to shared memory, beyond which they are not searched for races


class Launch(Races):
    """A grid of programs over some buffers.

    Args:
        compiled: the kernel.
        grid: number of programs.
        params: the parameters as unsigned integers.
        buffers: the memory that the kernel may touch.
        shared: bytes of shared memory of a program.
        seed: of the schedule.
        races: whether to log accesses and search them for races (about twice the time).
        resident: warps that take turns; programs beyond them wait for their place.
        strategy: one of STRATEGIES; None draws one.

    Attributes:
        problems: what was found, and where: how often.
        counts: what the launch cost.
        suspects: (line, agent, lane) of loads that race with a store; see ``driver``.
    """

    def __init__(self, compiled, grid: int, params: list[int], buffers: list[Buffer], shared: int, seed: int, *,
                 races: bool = True, resident: int = 48, strategy: str | None = None):  # fmt: skip
        super().__init__(races)
        self.compiled, self.program = compiled, compiled.program
        self.grid, self.params, self.shared, self.threads = grid, params, shared, compiled.program.threads
        self.buffers = sorted(buffers, key=lambda b: b.base)
        self._starts = [b.base for b in self.buffers]
        self.seed, self.random = seed, random.Random(seed)
        self.strategy = strategy or self.random.choice([*STRATEGIES, "fine"])
        self.resident = resident
        self.problems, self.counts = Counter(), Counts()
        self.corrupt: dict[int, dict[int, set[int]]] = {}

    def problem(self, what: str, where: str) -> None:
        self.problems[what, where] += 1

    def find(self, address: int) -> Buffer | None:
        """The buffer that an address lies in."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i >= 0 and address < self.buffers[i].base + self.buffers[i].size:
            return self.buffers[i]
        return None

    def place(self, address: int) -> str:
        """Where an address lies among the buffers, for messages."""
        i, words = bisect.bisect_right(self._starts, address) - 1, []
        if i >= 0:
            b = self.buffers[i]
            words.append(f"{b.name} has {b.size} bytes, this is at {address - b.base}")
        if i + 1 < len(self.buffers):
            b = self.buffers[i + 1]
            words.append(f"{b.base - address} bytes before {b.name}")
        return "; ".join(words)

    def run(self) -> Counts:
        """Run all programs.

        Raises:
            EmuError: what a GPU would fault at, hang in or leave undefined.
        """
        for segment in self.program.segments:
            segment.executed = 0
        per_block = self.threads // 32
        waiting = list(range(self.grid))
        if self.strategy != "blocks":
            self.random.shuffle(waiting)
        held_back = self._held_back(waiting, per_block)
        waiting.reverse()
        live, runnable = [], []
        while waiting or live:
            while waiting and len(live) < max(1, self.resident // per_block):
                block = Block(self, waiting.pop(), per_block, self.shared)
                live.append(block)
                runnable += block.warps
            if not runnable:
                raise EmuError(f"{self.program.name}: deadlock at a barrier, programs {[b.index for b in live]}")
            i = self._next(runnable, held_back)
            warp = runnable[i]
            for _ in range(self.random.randint(1, 2 * STRATEGIES[self.strategy])):
                self.step(warp)
                if warp.done or warp.blocked:
                    runnable[i] = runnable[-1]
                    runnable.pop()
                    self._settle(warp.block, live, runnable)
                    break
        self._count()
        self.search(SHARED_LOG)
        return self.counts

    def _held_back(self, programs: list[int], per_block: int):
        """Which warps seldom get a turn: a function of the warp, or None."""
        draw = self.random.random
        if self.strategy == "starve":
            few = {program for program in programs if draw() < 0.3}
            return lambda warp: warp.block.index in few
        if self.strategy == "warps":
            few = {number for number in range(per_block) if draw() < 0.5}
            return lambda warp: warp.number in few
        return None

    def _next(self, runnable: list[Warp], held_back) -> int:
        """Whose turn it is."""
        if self.strategy == "blocks":
            first = min(warp.block.index for warp in runnable)
            return self.random.choice([n for n, warp in enumerate(runnable) if warp.block.index == first])
        i = self.random.randrange(len(runnable))
        if held_back and held_back(runnable[i]) and self.random.random() < 0.97:
            others = [n for n, warp in enumerate(runnable) if not held_back(warp)]
            return self.random.choice(others) if others else i
        return i

    def _settle(self, block: Block, live: list[Block], runnable: list[Warp]) -> None:
        """After a warp has ended or come to a barrier: does its program end, or go on behind the barrier?"""
        if not all(warp.done or warp.blocked for warp in block.warps):
            return
        if all(warp.done for warp in block.warps):
            live.remove(block)
            self.counts.longest = max(self.counts.longest, *(warp.executed for warp in block.warps))
            return
        if any(warp.done for warp in block.warps):
            raise EmuError(f"{self.program.name}: a barrier after some warps have ended")
        if len({warp.pc for warp in block.warps}) != 1:
            self.problem("warps at different barriers", self.program.name)
        self.block_barrier(block)
        for warp in block.warps:
            warp.blocked = False
        runnable += block.warps

    def _count(self) -> None:
        for segment in self.program.segments:
            self.counts.instructions += segment.executed * segment.size
            for op, n in segment.mix.items():
                if segment.executed:
                    self.counts.mix[op] += n * segment.executed

    def _taken(self, warp: Warp, segment) -> np.ndarray:
        """The lanes for which a segment's branch or exit is taken."""
        predicate = warp.G[self.compiled.predicates[segment.index]]
        return ~predicate if segment.branch.negated else predicate

    def step(self, warp: Warp) -> None:
        """Run the warp's next segment."""
        if warp.lanes_pc is not None:
            self._diverged(warp)
            return
        segment = self.program.segments[warp.pc]
        if len(warp.G) <= len(self.compiled.places):
            self.compiled.extend(warp.G)
        segment.function(warp.G, warp, None)
        segment.executed += 1
        warp.executed += segment.size
        kind, after = segment.kind, warp.pc + 1
        if kind in ("cbra", "cexit"):
            taken, target = self._taken(warp, segment), segment.target if kind == "cbra" else -1
            if not taken.any():
                warp.pc = after
            elif not taken.all():
                warp.lanes_pc = np.where(taken, target, after)
            elif kind == "cbra":
                warp.pc = target
            else:
                warp.done = True
        elif kind == "exit":
            warp.done = True
        else:
            warp.pc = segment.target if kind == "bra" else after
            warp.blocked = kind == "barrier"

    def _diverged(self, warp: Warp) -> None:
        """The lanes that are furthest behind go on, unless they wait for others at a ``*.sync``."""
        alive = warp.lanes_pc >= 0
        places = np.unique(warp.lanes_pc[alive]).tolist()
        for pc in places:
            segment, active = self.program.segments[pc], warp.lanes_pc == pc
            if not (segment.sync and (active != alive).any()):
                break
        else:
            waits = [self.program.segments[pc].instructions[0] for pc in places]
            raise EmuError(f"{self.program.name}: lanes wait for each other at {waits}")
        if segment.kind == "barrier" and not alive.all():
            raise EmuError(f"{self.program.name}: divergent barrier {segment.instructions[-1]}")
        if segment.masked is None:
            segment.masked = self.compiled.compile(segment, masked=True)
        if len(warp.G) <= len(self.compiled.places):
            self.compiled.extend(warp.G)
        segment.masked(warp.G, warp, active)
        segment.executed += 1
        warp.executed += segment.size
        warp.lanes_pc[active] = {"bra": segment.target, "exit": -1}.get(segment.kind, pc + 1)
        if segment.kind in ("cbra", "cexit"):
            taken = active & self._taken(warp, segment)
            warp.lanes_pc[taken] = segment.target if segment.kind == "cbra" else -1
        warp.blocked = segment.kind == "barrier"
        if (warp.lanes_pc < 0).all():
            warp.done = True
        elif (warp.lanes_pc == warp.lanes_pc[0]).all():
            warp.pc, warp.lanes_pc = int(warp.lanes_pc[0]), None
