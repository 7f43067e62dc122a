"""Blocks and warps: registers, memory, what a warp does as a whole. Bounds and alignment are checked."""

from __future__ import annotations

import ctypes

import numpy as np

from .arithmetic import F32, F64, I64, LANES, U16, U32, U64, _pairs, bf16_to_f32, wgmma_matrix
from .parser import EmuError


class Buffer:
    __slots__ = ("base", "name", "size", "u8", "u16", "u32", "u64")

    def __init__(self, base, size, name):
        self.base, self.size, self.name = base, size, name
        whole = (ctypes.c_uint8 * size).from_address(base)
        self.u8 = np.frombuffer(whole, np.uint8)
        self.u16 = np.frombuffer(whole, U16, size // 2)
        self.u32 = np.frombuffer(whole, U32, size // 4)
        self.u64 = np.frombuffer(whole, U64, size // 8)

    def view(self, size):
        return {1: self.u8, 2: self.u16, 4: self.u32, 8: self.u64}[size]


class Block:
    def __init__(self, launch, index, warps, shared):
        self.index = index
        self.smem = np.full(max(16, (shared + 15) // 16 * 16), 0xCD, np.uint8)
        self.shared = shared
        self.warps = [Warp(launch, self, w) for w in range(warps)]
        self.waiting = 0
        self.collect = {}


class Warp:
    def __init__(self, launch, block, number):
        self.launch, self.block, self.number = launch, block, number
        self.agent = launch.new_agent()
        self.pc, self.lpc, self.done, self.blocked = 0, None, False, False
        self.warp_epoch = self.meetings = self.bars = self.executed = 0
        self.G = launch.make_registers()
        tid = (number * 32 + LANES).astype(U32)
        one = np.ones(32, U32)
        self.special = {
            "%tid.x": tid, "%tid.y": 0 * one, "%tid.z": 0 * one, "%ctaid.x": one * U32(block.index),
            "%ctaid.y": 0 * one, "%ctaid.z": 0 * one, "%ntid.x": one * U32(launch.threads), "%ntid.y": one,
            "%nctaid.x": one * U32(launch.grid), "%laneid": LANES.astype(U32), "%warpid": one * U32(number),
        }  # fmt: skip
        self.groups, self.open_group = [], []
        self.pending = []

    # -- parameters
    def param(self, index, bits, signed, out):
        raw = self.launch.params[index]
        raw &= (1 << bits) - 1
        if signed and raw >> (bits - 1):
            raw |= ((1 << out) - 1) ^ ((1 << bits) - 1)
        return {16: U16, 32: U32, 64: U64}[out](raw)

    # -- global memory
    def locate(self, addresses, total, line, what):
        if (addresses & U64(total - 1)).any():
            bad = int(addresses[(addresses & U64(total - 1)) != 0][0])
            raise EmuError(
                f"misaligned {what} of {total} bytes at {bad:#x}: {self.where(line)} {self.launch.place(bad)}"
            )
        low, high = int(addresses.min()), int(addresses.max()) + total
        found = self.launch.find(low)
        if found is not None and high <= found.base + found.size:
            return found
        for a in addresses.tolist():
            b = self.launch.find(a)
            if b is None or a + total > b.base + b.size:
                raise EmuError(f"out of bounds {what} of {total} bytes at {a:#x}: {self.where(line)} "
                               f"{self.launch.place(a)}")  # fmt: skip
        return None

    def where(self, line):
        ins = next(i for i in self.launch.program.instrs if i.line == line)
        return f"{self.launch.program.name} block {self.block.index} warp {self.number}: {ins}"

    def ld_global(self, address, off, size, n, mask, line, log=True):
        a = address if mask is None else address[mask]
        if a.size == 0:
            return None
        if off:
            a = a + U64(off & 0xFFFFFFFFFFFFFFFF)
        total = size * n
        buffer = self.locate(a, total, line, "load")
        self.launch.count(self, line, a, total, False)
        self.launch.access(self, False, line, a, total, mask)
        if buffer is not None:
            view = buffer.view(size)
            at = ((a - U64(buffer.base)) >> U64(size.bit_length() - 1)).astype(np.intp)
            found = [view[at + k] for k in range(n)]
            if line in self.launch.corrupt:
                lanes = self.launch.corrupt[line].get(self.agent)
                if lanes:
                    bad = np.isin(LANES if mask is None else np.flatnonzero(mask), list(lanes))
                    for f in found:
                        f[bad] ^= f.dtype.type({1: 0x3, 2: 0x2A5A, 4: 0x2A5A5A5A, 8: 0x2A5A5A5A2A5A5A5A}[size])
            return found
        out = [np.zeros(a.size, {1: np.uint8, 2: U16, 4: U32, 8: U64}[size]) for _ in range(n)]
        for i, x in enumerate(a.tolist()):
            b = self.launch.find(x)
            for k in range(n):
                out[k][i] = b.view(size)[(x - b.base) // size + k]
        return out

    def st_global(self, address, off, size, values, mask, line):
        a = address if mask is None else address[mask]
        if a.size == 0:
            return
        if off:
            a = a + U64(off & 0xFFFFFFFFFFFFFFFF)
        n = len(values)
        total = size * n
        buffer = self.locate(a, total, line, "store")
        self.launch.count(self, line, a, total, True)
        values = [v.copy() if mask is None else v[mask] for v in values]
        self.launch.access(self, True, line, a, total, mask, values)
        if buffer is not None:
            view = buffer.view(size)
            at = ((a - U64(buffer.base)) >> U64(size.bit_length() - 1)).astype(np.intp)
            if at.size > 1 and np.unique(at).size < at.size:
                self.same_store(at, values, line)
            for k in range(n):
                view[at + k] = values[k]
            return
        for i, x in enumerate(a.tolist()):
            b = self.launch.find(x)
            for k in range(n):
                b.view(size)[(x - b.base) // size + k] = values[k][i]

    def same_store(self, at, values, line):
        seen = {}
        for i, x in enumerate(at.tolist()):
            v = tuple(int(u[i]) for u in values)
            if seen.setdefault(x, v) != v:
                self.launch.problem("two lanes store different values to one address", self.where(line))

    def atomic(self, address, off, size, operation, sem, value, mask, line):
        out = np.zeros(32, U32 if size == 4 else U64)
        lanes = range(32) if mask is None else np.flatnonzero(mask).tolist()
        if value.dtype == F32:
            raise EmuError("float atomics")
        for lane in lanes:
            a = np.array([int(address[lane]) + off], U64)
            b = self.locate(a, size, line, "atomic")
            self.launch.count(self, line, a, size, True)
            view, at = b.view(size), int(a[0] - U64(b.base)) // size
            old = int(view[at])
            v = int(value[lane])
            new = {"add": old + v, "min": min(old, v), "max": max(old, v), "and": old & v, "or": old | v,
                   "xor": old ^ v, "exch": v}[operation]  # fmt: skip
            view[at] = new & ((1 << (8 * size)) - 1)
            out[lane] = old
            self.launch.access(self, "atomic", line, a, size, None)
            self.launch.atomic_clock(self, int(a[0]), sem)
        return out

    # -- shared memory
    def shared_at(self, address, off, total, mask, line, what):
        a = address if mask is None else address[mask]
        a = a.astype(I64) + off
        if a.size == 0:
            return a
        if (a % total).any():
            raise EmuError(f"misaligned {what} of {total} bytes in shared memory: {self.where(line)}")
        if a.min() < 0 or a.max() + total > self.block.shared:
            raise EmuError(
                f"{what} out of shared memory ({a.min()} .. {a.max()} of {self.block.shared}): {self.where(line)}"
            )
        return a

    def ld_shared(self, address, off, size, n, mask, line):
        a = self.shared_at(address, off, size * n, mask, line, "load")
        if a.size == 0:
            return None
        self.launch.shared_access(self, False, line, a, size * n, mask)
        view = self.block.smem.view({1: np.uint8, 2: U16, 4: U32, 8: U64}[size])
        at = a // size
        return [view[at + k] for k in range(n)]

    def st_shared(self, address, off, size, values, mask, line):
        a = self.shared_at(address, off, size * len(values), mask, line, "store")
        if a.size == 0:
            return
        values = [v.copy() if mask is None else v[mask] for v in values]
        self.launch.shared_access(self, True, line, a, size * len(values), mask, values)
        view = self.block.smem.view({1: np.uint8, 2: U16, 4: U32, 8: U64}[size])
        at = a // size
        for k, v in enumerate(values):
            view[at + k] = v

    def ldmatrix(self, address, off, count, trans, line):
        rows = self.shared_at(address[: 8 * count], off, 16, None, line, "ldmatrix")
        self.launch.shared_access(self, False, line, rows, 16, "all")
        view = self.block.smem.view(U16)
        out = []
        for m in range(count):
            tile = view[(rows[8 * m : 8 * m + 8, None] // 2) + np.arange(8)]  # [8, 8]
            if trans:
                tile = tile.T
            lo = tile[LANES // 4, 2 * (LANES % 4)].astype(U32)
            hi = tile[LANES // 4, 2 * (LANES % 4) + 1].astype(U32)
            out.append(lo | (hi << U32(16)))
        return out

    def stmatrix(self, address, off, values, trans, line):
        count = len(values)
        rows = self.shared_at(address[: 8 * count], off, 16, None, line, "stmatrix")
        view = self.block.smem.view(U16)
        for m in range(count):
            tile = np.zeros((8, 8), U16)
            lo, hi = values[m].astype(U16), (values[m] >> U32(16)).astype(U16)
            tile[LANES // 4, 2 * (LANES % 4)] = lo
            tile[LANES // 4, 2 * (LANES % 4) + 1] = hi
            if trans:
                tile = tile.T.copy()
            view[(rows[8 * m : 8 * m + 8, None] // 2) + np.arange(8)] = tile
            words = tile.view(U32)
            self.launch.shared_access(self, True, line, rows[8 * m : 8 * m + 8], 16, "all", list(words.T.copy()))

    def cp_async(self, to, to_off, source, off, size, used, mask, line):
        lanes = LANES if mask is None else np.flatnonzero(mask)
        for lane in lanes.tolist():
            n = int(used[lane])
            data = np.zeros(size, np.uint8)
            if n:
                a = np.array([int(source[lane]) + off], U64)
                b = self.locate(a, size if n == size else 1, line, "cp.async")
                start = int(a[0]) - b.base
                data[:n] = b.u8[start : start + n]
                self.launch.access(self, False, line, a, n, None)
            at = int(to[lane]) + to_off
            if at % size or at + size > self.block.shared:
                raise EmuError(f"cp.async: {self.where(line)}")
            self.open_group.append((at, data, lane, line))
        used_lanes = [lane for lane in lanes.tolist() if int(used[lane])]
        if used_lanes:
            self.launch.count(self, line, (source[used_lanes] + U64(off)), size, False)

    def cp_commit(self):
        self.groups.append(self.open_group)
        self.open_group = []

    def cp_wait(self, left, line):
        while len(self.groups) > left:
            for at, data, _, at_line in self.groups.pop(0):
                self.block.smem[at : at + data.size] = data
                self.launch.shared_access(self, True, at_line, np.array([at]), data.size, "all")

    # -- warp-wide
    def need(self, members, mask, line, index):
        self.meetings += 1
        if mask is None:
            if members != 0xFFFFFFFF:
                active = np.ones(32, bool)
            else:
                return
        else:
            active = mask
        have = sum(1 << int(i) for i in np.flatnonzero(active))
        if have & members != members or have & ~members:
            raise EmuError(f"*.sync with lanes {have:#x}, members {members:#x}: {self.where(line)}")

    def redux(self, operation, value, mask):
        self.meetings += 1
        v = value if mask is None else value[mask]
        f = {"max": np.max, "min": np.min, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce,
             "xor": np.bitwise_xor.reduce}[operation]  # fmt: skip
        return f(v).astype(value.dtype)

    def vote(self, mode, value, mask):
        v = value if mask is None else value & mask
        if mode == "any":
            return np.bool_(v.any())
        if mode == "all":
            return np.bool_(v.all() if mask is None else value[mask].all())
        return U32(sum(1 << int(i) for i in np.flatnonzero(v)))

    def warp_barrier(self):
        self.warp_epoch += 1
        self.meetings += 1

    def fence(self):
        self.launch.problem("fence not modelled", self.launch.program.name)

    def wgmma(self, d, regs, adesc, bdesc, scale, n, k, kind, trans_a, trans_b, sign_a, sign_b, line):
        """Executed by each of the four warps for its own 16 rows (nobody changes the operands meanwhile)."""
        size = {"bf16": 2, "f16": 2, "tf32": 4}[kind]
        quarter = self.number % 4
        smem = self.block.smem
        g, t = LANES >> 2, LANES & 3

        def fetch(at):
            flat = at.reshape(-1)
            if flat.max() + size > self.block.shared:
                raise EmuError(f"wgmma out of shared memory: {self.where(line)}")
            self.launch.shared_access(self, False, line, flat.astype(I64), size, "all")
            if size == 4:
                u = smem.view(U32)[flat // 4] & U32(0xFFFFE000)
                return u.view(F32).reshape(at.shape).astype(F64)
            u = smem.view(U16)[flat // 2]
            f = bf16_to_f32(u) if kind == "bf16" else u.view(np.float16).astype(F32)
            return f.reshape(at.shape).astype(F64)

        if regs is not None:
            A = np.zeros((16, k))
            if size == 4:
                A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4] = ((x & U32(0xFFFFE000)).view(F32) for x in regs)
            else:
                for i, (r, c) in enumerate(((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))):
                    A[r, c], A[r, c + 1] = _pairs(regs[i], kind)
        else:
            A = fetch(wgmma_matrix(smem, int(adesc[0]), 64, k, size, trans_a, "a"))[16 * quarter : 16 * quarter + 16]
        B = fetch(wgmma_matrix(smem, int(bdesc[0]), n, k, size, trans_b, "b")).T  # [k, n]
        product = A @ B * (sign_a * sign_b)
        for i in range(n // 8):
            for half in range(2):
                for two in range(2):
                    x = d[4 * i + 2 * half + two]
                    old = np.where(scale, x.astype(F64), 0.0)
                    x[...] = (old + product[g + 8 * half, 8 * i + 2 * t + two]).astype(F32)
