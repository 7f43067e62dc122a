"""A warp in its program's shared memory: loads, stores, matrices, asynchronous copies, and wgmma that reads there."""

from __future__ import annotations

import numpy as np

from .arithmetic import F32, F64, I64, LANES, U16, U32, U64, bf16_to_f32
from .errors import EmuError
from .global_memory import UNSIGNED
from .matrices import halves, tf32, wgmma_addresses


class SharedMemory:
    """The part of a warp that accesses shared memory."""

    def _shared(self, address, offset, total, mask, line, what):
        at = (address if mask is None else address[mask]).astype(I64) + offset
        if at.size == 0:
            return at
        if (at % total).any():
            raise EmuError(f"misaligned {what} of {total} bytes in shared memory: {self.where(line)}")
        if at.min() < 0 or at.max() + total > self.block.shared:
            raise EmuError(f"out of bounds {what} in shared memory, {at.min()} to {at.max()} of {self.block.shared}: "
                           f"{self.where(line)}")  # fmt: skip
        return at

    def _log(self, write, line, at, total, mask, values=None):
        if self.launch.races:
            self.launch.shared_access(self, write, line, at, total, mask, values)

    def ld_shared(self, address, offset, size, n, mask, line):
        """n vectors of numbers of ``size`` bytes, one number for each active lane; None if there is no such lane."""
        at = self._shared(address, offset, size * n, mask, line, "load")
        if at.size == 0:
            return None
        self._log(False, line, at, size * n, mask)
        view, index = self.block.memory.view(UNSIGNED[size]), at // size
        return [view[index + k] for k in range(n)]

    def st_shared(self, address, offset, size, values, mask, line):
        """Store one number of each of ``values`` for each active lane, one after another."""
        at = self._shared(address, offset, size * len(values), mask, line, "store")
        if at.size == 0:
            return
        values = [v.copy() if mask is None else v[mask] for v in values]
        self._log(True, line, at, size * len(values), mask, values)
        view, index = self.block.memory.view(UNSIGNED[size]), at // size
        for k, numbers in enumerate(values):
            view[index + k] = numbers

    def ldmatrix(self, address, offset, count, transposed, line):
        """``count`` matrices of 8 × 8 numbers of 2 bytes, rows where the first lanes say → 32-bit registers."""
        rows = self._shared(address[: 8 * count], offset, 16, None, line, "ldmatrix")
        self._log(False, line, rows, 16, "all")
        view, out = self.block.memory.view(U16), []
        for m in range(count):
            tile = view[(rows[8 * m : 8 * m + 8, None] // 2) + np.arange(8)]
            tile = tile.T if transposed else tile
            low, high = (tile[LANES // 4, 2 * (LANES % 4) + k].astype(U32) for k in (0, 1))
            out.append(low | (high << U32(16)))
        return out

    def stmatrix(self, address, offset, values, transposed, line):
        """What ``ldmatrix`` loads, stored."""
        rows = self._shared(address[: 8 * len(values)], offset, 16, None, line, "stmatrix")
        view = self.block.memory.view(U16)
        for m, registers in enumerate(values):
            tile = np.zeros((8, 8), U16)
            tile[LANES // 4, 2 * (LANES % 4)] = registers.astype(U16)
            tile[LANES // 4, 2 * (LANES % 4) + 1] = (registers >> U32(16)).astype(U16)
            tile = tile.T.copy() if transposed else tile
            here = rows[8 * m : 8 * m + 8]
            view[(here[:, None] // 2) + np.arange(8)] = tile
            self._log(True, line, here, 16, "all", list(tile.view(U32).T.copy()))

    def cp_async(self, into, into_offset, source, source_offset, size, used, mask, line):
        """Copy ``size`` bytes for each active lane, of which the first ``used`` come from global memory, then zeros.

        The bytes arrive when the group is waited for.
        """
        lanes = LANES if mask is None else np.flatnonzero(mask)
        if lanes.size == 0:
            return
        to = self._shared(into, into_offset, size, mask, line, "cp.async")
        data = np.zeros((lanes.size, size), np.uint8)
        for n in set(used[lanes].tolist()) - {0}:
            some = np.flatnonzero(used[lanes] == n)
            at = source[lanes[some]] + U64(source_offset & 0xFFFFFFFFFFFFFFFF)
            self.launch.counts.access(self.block.index, line, at, n, False)
            data[some, :n] = self._fetch(at, int(n), size, line)
        self.open_group.append((to, data, line))

    def _fetch(self, at, n, size, line):
        if n != size and (at % U64(size)).any():
            raise EmuError(f"misaligned cp.async of {size} bytes: {self.where(line)}")
        if n == size:
            self.locate(at, n, line, "cp.async")
        else:
            for k in range(n):
                self.locate(at + U64(k), 1, line, "cp.async")
        if self.launch.races:
            self.launch.access(self, False, line, at, n, "all")
        found = np.empty((at.size, n), np.uint8)
        for row, address in zip(found, at.tolist()):
            buffer = self.launch.find(address)
            row[:] = buffer.bytes[address - buffer.base : address - buffer.base + n]
        return found

    def cp_commit(self):
        self.groups.append(self.open_group)
        self.open_group = []

    def cp_wait(self, left):
        """Let all but the newest ``left`` groups arrive."""
        while len(self.groups) > left:
            for to, data, line in self.groups.pop(0):
                self.block.memory[to[:, None] + np.arange(data.shape[1])] = data
                self._log(True, line, to, data.shape[1], "all")

    def wgmma(self, d, a, b, scale, n, k, kind, transposed, sign, line):
        """d [16, n] of this warp += a [64, k], its 16 rows, times b [k, n]; a in registers or, as b, by descriptor.

        The four warps compute at once where a GPU does so later: nobody may change the operands meanwhile.
        """
        size = {"bf16": 2, "f16": 2, "tf32": 4}[kind]
        g, t = LANES >> 2, LANES & 3
        if isinstance(a, list):
            A = np.zeros((16, k))
            if size == 4:
                A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4] = (tf32(x) for x in a)
            else:
                for x, (r, c) in zip(a, ((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))):
                    A[r, c], A[r, c + 1] = halves(x, kind)
        else:
            rows = slice(16 * (self.number % 4), 16 * (self.number % 4) + 16)
            A = self._operand(wgmma_addresses(int(a[0]), 64, k, size, transposed[0])[rows], kind, size, line)
        B = self._operand(wgmma_addresses(int(b[0]), n, k, size, transposed[1]), kind, size, line).T
        product = A @ B * sign
        for j in range(n // 8):
            for x, (r, c) in zip(d[4 * j :], ((g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1))):
                x[...] = (np.where(scale, x.astype(F64), 0.0) + product[r, 8 * j + c]).astype(F32)

    def _operand(self, at, kind, size, line):
        flat = at.reshape(-1).astype(I64)
        if flat.max() + size > self.block.shared:
            raise EmuError(f"out of bounds wgmma in shared memory: {self.where(line)}")
        self._log(False, line, flat, size, "all")
        numbers = self.block.memory.view(UNSIGNED[size])[flat // size]
        wide = tf32(numbers) if size == 4 else bf16_to_f32(numbers) if kind == "bf16" else numbers.view(np.float16)
        return wide.astype(F64).reshape(at.shape)
