"""Loads, stores and atomics of a warp in global memory: inside of a tensor's storage, aligned to their width."""

from __future__ import annotations

import ctypes

import numpy as np

from .arithmetic import LANES, U16, U32, U64
from .errors import EmuError

UNSIGNED = {1: np.uint8, 2: U16, 4: U32, 8: U64}
RUBBISH = {1: 0x3, 2: 0x2A5A, 4: 0x2A5A5A5A, 8: 0x2A5A5A5A2A5A5A5A}


class Buffer:
    """Memory that a kernel may touch: ``size`` bytes at an address, seen as numbers of 1, 2, 4 and 8 bytes."""

    __slots__ = ("base", "name", "size", "views")

    def __init__(self, base: int, size: int, name: str):
        self.base, self.size, self.name = base, size, name
        whole = (ctypes.c_uint8 * size).from_address(base)
        self.views = {n: np.frombuffer(whole, dtype, size // n) for n, dtype in UNSIGNED.items()}

    @property
    def bytes(self) -> np.ndarray:
        return self.views[1]

    def index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Addresses, uint64, as indices into the view of numbers of ``size`` bytes."""
        return ((addresses - U64(self.base)) >> U64(size.bit_length() - 1)).astype(np.intp)


class GlobalMemory:
    """The part of a warp that accesses global memory."""

    def locate(self, addresses: np.ndarray, total: int, line: int, what: str) -> Buffer | None:
        """The buffer in which all of ``addresses`` lie, or None if they lie in several.

        Raises:
            EmuError: an access of ``total`` bytes is misaligned or not inside of any.
        """
        wrong = addresses & U64(total - 1)
        if wrong.any():
            bad = int(addresses[wrong != 0][0])
            raise EmuError(f"misaligned {what} of {total} bytes at {bad:#x}: {self.where(line)}; "
                           f"{self.launch.place(bad)}")  # fmt: skip
        low, high = int(addresses.min()), int(addresses.max()) + total
        found = self.launch.find(low)
        if found is not None and high <= found.base + found.size:
            return found
        for address in addresses.tolist():
            buffer = self.launch.find(address)
            if buffer is None or address + total > buffer.base + buffer.size:
                raise EmuError(f"out of bounds {what} of {total} bytes at {address:#x}: {self.where(line)}; "
                               f"{self.launch.place(address)}")  # fmt: skip
        return None

    def _addresses(self, address, offset, mask):
        chosen = address if mask is None else address[mask]
        return chosen + U64(offset & 0xFFFFFFFFFFFFFFFF) if offset else chosen

    def ld_global(self, address, offset, size, n, mask, line):
        """n vectors of numbers of ``size`` bytes, one number for each active lane; None if there is no such lane."""
        at = self._addresses(address, offset, mask)
        if at.size == 0:
            return None
        buffer = self.locate(at, size * n, line, "load")
        self.launch.counts.access(self.block.index, line, at, size * n, False)
        if self.launch.races:
            self.launch.access(self, False, line, at, size * n, mask)
        if buffer is None:
            return self._load_apart(at, size, n)
        view, index = buffer.views[size], buffer.index(at, size)
        found = [view[index + k] for k in range(n)]
        if line in self.launch.corrupt:
            self._spoil(found, size, line, mask)
        return found

    def _load_apart(self, at, size, n):
        out = [np.zeros(at.size, UNSIGNED[size]) for _ in range(n)]
        for lane, address in enumerate(at.tolist()):
            buffer = self.launch.find(address)
            for k in range(n):
                out[k][lane] = buffer.views[size][(address - buffer.base) // size + k]
        return out

    def _spoil(self, found, size, line, mask):
        """Rubbish for the lanes whose load races, to see whether anybody uses what they read."""
        lanes = self.launch.corrupt[line].get(self.agent)
        if lanes:
            bad = np.isin(LANES if mask is None else np.flatnonzero(mask), list(lanes))
            for numbers in found:
                numbers[bad] ^= numbers.dtype.type(RUBBISH[size])

    def st_global(self, address, offset, size, values, mask, line):
        """Store one number of each of ``values`` for each active lane, one after another."""
        at = self._addresses(address, offset, mask)
        if at.size == 0:
            return
        n = len(values)
        buffer = self.locate(at, size * n, line, "store")
        self.launch.counts.access(self.block.index, line, at, size * n, True)
        values = [v.copy() if mask is None else v[mask] for v in values]
        if self.launch.races:
            self.launch.access(self, True, line, at, size * n, mask, values)
        if np.unique(at).size < at.size:
            self._one_value_each(at, values, line)
        if buffer is None:
            for lane, address_ in enumerate(at.tolist()):
                there = self.launch.find(address_)
                for k in range(n):
                    there.views[size][(address_ - there.base) // size + k] = values[k][lane]
            return
        view, index = buffer.views[size], buffer.index(at, size)
        for k in range(n):
            view[index + k] = values[k]

    def _one_value_each(self, at, values, line):
        seen = {}
        for lane, address in enumerate(at.tolist()):
            value = tuple(int(v[lane]) for v in values)
            if seen.setdefault(address, value) != value:
                self.launch.problem("two lanes store different values to one address", self.where(line))

    def atomic(self, address, offset, size, operation, order, value, mask, line):
        """The old numbers [32]; lanes take turns."""
        out = np.zeros(32, UNSIGNED[size])
        for lane in range(32) if mask is None else np.flatnonzero(mask).tolist():
            at = np.array([(int(address[lane]) + offset) & 0xFFFFFFFFFFFFFFFF], U64)
            buffer = self.locate(at, size, line, "atomic")
            self.launch.counts.access(self.block.index, line, at, size, True)
            view, index = buffer.views[size], int(buffer.index(at, size)[0])
            signed = value.dtype.kind == "i"
            old = int(view[index : index + 1].view(value.dtype)[0]) if signed else int(view[index])
            v = int(value[lane])
            new = {"add": old + v, "min": min(old, v), "max": max(old, v), "and": old & v, "or": old | v,
                   "xor": old ^ v, "exch": v}[operation]  # fmt: skip
            out[lane] = old & ((1 << (8 * size)) - 1)
            view[index] = new & ((1 << (8 * size)) - 1)
            if self.launch.races:
                self.launch.access(self, "atomic", line, at, size, None)
                self.launch.atomic_clock(self, int(at[0]), order)
        return out
