"""One launch: warps of the resident blocks take turns at random; statistics; see ``races`` for the rest."""

from __future__ import annotations

import bisect
import random
import re
from collections import Counter

import numpy as np

from .arithmetic import U16, U32, U64
from .counting import Counts
from .generator import Generator
from .machine import Block
from .parser import EmuError
from .races import Races


class Launch(Races):
    def __init__(self, compiled, grid, params, buffers, shared, seed, races=True, resident=48, strategy=None):
        self.program, self.generator = compiled.program, compiled.generator
        self.compiled = compiled
        self.grid, self.params, self.shared = grid, params, shared
        self.threads = self.program.threads
        self.buffers = sorted(buffers, key=lambda b: b.base)
        self.starts = [b.base for b in self.buffers]
        self.seed, self.random = seed, random.Random(seed)
        self.races = races
        self.agents = 0
        self.clocks, self.snapshots, self.snapshot_of = [], [], []
        self.location_clock = {}
        self.log, self.shared_log = [], []
        self.problems = Counter()
        self.suspects, self.hard, self.corrupt = set(), False, {}
        self.shared_unchecked = False
        self.counts = Counts()
        self.resident = resident
        # How the warps take turns: how long one goes on, and whether some are held back.
        self.strategy = strategy or self.random.choice(["fine", "coarse", "fine", "starve", "blocks", "warps"])

    # -- bookkeeping
    def problem(self, what, where):
        self.problems[(what, where)] += 1

    def count(self, warp, line, addresses, total, write):
        self.counts.access(warp.block.index, line, addresses, total, write)

    def find(self, address):
        i = bisect.bisect_right(self.starts, address) - 1
        if i >= 0 and address < self.buffers[i].base + self.buffers[i].size:
            return self.buffers[i]
        return None

    def place(self, address):
        i = bisect.bisect_right(self.starts, address) - 1
        words = []
        if i >= 0:
            b = self.buffers[i]
            words.append(f"{b.name} has {b.size} bytes, this is at {address - b.base}")
        if i + 1 < len(self.buffers):
            b = self.buffers[i + 1]
            words.append(f"{b.base - address} bytes before {b.name}")
        return "; ".join(words)

    def make_registers(self):
        program, rows = self.program, {}
        dtypes = {"pred": np.bool_, "b16": U16, "b32": U32, "b64": U64, "f32": U32, "f64": U64}
        for prefix, (kind, n) in program.regs.items():
            # Registers start as rubbish, as on the device.
            data = np.full((n, 32), 0x7FC1 if kind == "b16" else 1 if kind == "pred" else 0x7FC12345, dtypes[kind])
            rows[prefix] = data
        G = []
        for reg, view in self.generator.slot_list:
            m = re.match(r"(%[a-z]+)(\d+)", reg)
            row = rows[m[1]][int(m[2])]
            dt = Generator.DT[view]
            G.append(row if row.dtype == dt else row.view(dt))
        self_rows = rows
        G.append(self_rows)
        return G

    def extend(self, warp):
        """Slots that masked code, generated later, has added."""
        have = len(warp.G) - 1
        if have < len(self.generator.slot_list):
            rows = warp.G.pop()
            for reg, view in self.generator.slot_list[have:]:
                m = re.match(r"(%[a-z]+)(\d+)", reg)
                row = rows[m[1]][int(m[2])]
                dt = Generator.DT[view]
                warp.G.append(row if row.dtype == dt else row.view(dt))
            warp.G.append(rows)

    # -- running
    def run(self):
        segments = self.program.segments
        for s in segments:
            s.executed = s.executed_masked = 0
        warps_per_block = self.threads // 32
        order = list(range(self.grid))
        if self.strategy != "blocks":
            self.random.shuffle(order)
        waiting = order[::-1]
        most = max(1, self.resident // warps_per_block)
        live, runnable = [], []
        rnd = self.random
        burst = {"fine": 1, "coarse": 12, "starve": 4, "blocks": 1000, "warps": 4}[self.strategy]
        late = {n for n in range(warps_per_block) if rnd.random() < 0.5} if self.strategy == "warps" else set()
        starved = set()
        if self.strategy == "starve":
            starved = {b for b in order if rnd.random() < 0.3}
        while waiting or runnable or live:
            while waiting and len(live) < most:
                b = Block(self, waiting.pop(), warps_per_block, self.shared)
                live.append(b)
                runnable += b.warps
            if not runnable:
                raise EmuError(f"{self.program.name}: deadlock at a barrier, blocks {[b.index for b in live]}")
            i = rnd.randrange(len(runnable))
            w = runnable[i]
            if starved and w.block.index in starved and rnd.random() < 0.97 and len(runnable) > 1:
                if any(v.block.index not in starved for v in runnable):
                    continue
            if w.number in late and rnd.random() < 0.98 and any(v.number not in late for v in runnable):
                continue
            for _ in range(rnd.randint(1, 2 * burst)):
                self.step(w, segments)
                if w.done or w.blocked:
                    break
            if w.done or w.blocked:
                runnable[i] = runnable[-1]
                runnable.pop()
                block = w.block
                if all(v.done for v in block.warps):
                    live.remove(block)
                    self.counts.longest = max(self.counts.longest, *(v.executed for v in block.warps))
                elif all(v.done or v.blocked for v in block.warps):
                    if any(v.done for v in block.warps):
                        raise EmuError(f"{self.program.name}: a barrier after some warps have ended")
                    if len({v.pc for v in block.warps}) != 1:
                        self.problem("warps at different barriers", str({v.pc for v in block.warps}))
                    self.block_barrier(block)
                    for v in block.warps:
                        v.blocked = False
                        runnable.append(v)
        for s in segments:
            n = s.executed + s.executed_masked
            if n:
                self.counts.instructions += n * s.n
                for op, k in s.mix.items():
                    self.counts.mix[op] += k * n
        if self.races:
            self.find_races(self.log, "global")
            if len(self.shared_log) < 30000:
                self.find_races(self.shared_log, "shared")
            else:
                self.shared_unchecked = True
        return self.counts

    def step(self, w, segments):
        if w.lpc is None:
            s = segments[w.pc]
            if s.fn is None:
                s.fn = self.generator.compile(s, False)
                self.extend(w)
            if len(w.G) - 1 < len(self.generator.slot_list):
                self.extend(w)
            s.fn(w.G, w, None)
            s.executed += 1
            w.executed += s.n
            kind = s.kind
            if kind == "fall":
                w.pc += 1
            elif kind == "bra":
                w.pc = s.target
            elif kind == "cbra":
                p = w.G[self.pred_slot(s)]
                if s.branch.neg:
                    p = ~p
                if p.all():
                    w.pc = s.target
                elif not p.any():
                    w.pc += 1
                else:
                    w.lpc = np.where(p, s.target, w.pc + 1)
            elif kind == "exit":
                w.done = True
            elif kind == "cexit":
                p = w.G[self.pred_slot(s)]
                if s.branch.neg:
                    p = ~p
                if p.all():
                    w.done = True
                elif not p.any():
                    w.pc += 1
                else:
                    w.lpc = np.where(p, -1, w.pc + 1)
            elif kind == "barrier":
                w.pc += 1
                w.blocked = True
            return
        # Diverged: the lanes that are furthest behind go on, unless they wait for others at a *.sync.
        pcs = sorted(set(w.lpc[w.lpc >= 0].tolist()))
        alive = w.lpc >= 0
        if not pcs:
            w.done = True
            return
        for pc in pcs:
            s = segments[pc]
            active = w.lpc == pc
            if s.sync and (active != alive).any():
                continue
            break
        else:
            raise EmuError(f"{self.program.name}: lanes wait for each other at {[segments[p].instrs[0] for p in pcs]}")
        if s.kind == "barrier" and not alive.all():
            raise EmuError(f"{self.program.name}: divergent bar.sync {s.instrs[-1]}")
        if s.masked is None:
            s.masked = self.generator.compile(s, True)
        self.extend(w)
        s.masked(w.G, w, active)
        s.executed_masked += 1
        w.executed += s.n
        if s.kind == "fall":
            w.lpc[active] = pc + 1
        elif s.kind == "bra":
            w.lpc[active] = s.target
        elif s.kind in ("cbra", "cexit"):
            p = w.G[self.pred_slot(s)]
            if s.branch.neg:
                p = ~p
            w.lpc[active & p] = s.target if s.kind == "cbra" else -1
            w.lpc[active & ~p] = pc + 1
        elif s.kind == "exit":
            w.lpc[active] = -1
        elif s.kind == "barrier":
            w.lpc[active] = pc + 1
            w.blocked = True
        if (w.lpc < 0).all():
            w.done = True
        elif (w.lpc == w.lpc[0]).all():
            w.pc, w.lpc = int(w.lpc[0]), None

    def pred_slot(self, s):
        key = (s.branch.guard, "pred")
        if key not in self.generator.slots:
            self.generator.slot(*key)
        return self.generator.slots[key]
