"""What reaches beyond a lane: memory, atomics, barriers, shuffles, tensor cores → lines of Python.

The lines call methods of the warp ``W`` (``machine``); ``mask`` is the text of the mask of active lanes, ``M`` or
``None`` for all of them.
"""

from __future__ import annotations

import re

import numpy as np

from .arithmetic import U32, h_shfl_index
from .errors import EmuError
from .instructions import LaneInstructions

STORE_TYPES = {1: "np.uint8", 2: "U16", 4: "U32", 8: "U64"}
OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch")
ORDERS = ("relaxed", "acquire", "release", "acq_rel")


class WarpInstructions(LaneInstructions):
    """Instructions that need the warp, its program or memory."""

    def _where(self, mask: str) -> str:
        return "" if mask == "None" else ", where=M"

    def _values(self, registers: list[str], kind: str) -> str:
        return "[" + ", ".join(self.value(x, kind) for x in registers) + "]"

    def _address(self, text: str, space: str) -> tuple[str, int]:
        base, offset = self.address(text)
        kind = "u64" if space == "global" else "u32"
        return (self.value(base, kind) if base else self.constant(0, np.uint64 if kind == "u64" else U32)), offset

    def op_ld(self, i, mask):
        if i.parts[1] == "param":
            return self._parameter(i, mask)
        space, kind = i.parts[1], i.parts[-1]
        registers, size = self.vector(i.arguments[0]), int(kind[1:]) // 8
        address, offset = self._address(i.arguments[1], space)
        lines = []
        for n, register in enumerate(registers):
            if register == "_":
                continue
            bits = self.width(register)
            extend = kind[0] == "s" and bits > size * 8  # by the sign
            into = self.slot(register, f"{'s' if extend else 'b'}{bits}")
            value = f"T[{n}].view(np.int{size * 8})" if extend else f"T[{n}]"
            lines.append(f"    {into}[{'...' if mask == 'None' else 'M'}] = {value}")
        loaded = f"T = W.ld_{space}({address}, {offset}, {size}, {len(registers)}, {mask}, {i.line})"
        return [loaded, "if T is not None:", *(lines or ["    pass"])]

    def _parameter(self, i, mask):
        name, offset = re.match(r"^\[(\w+)(?:\+(\d+))?\]$", i.arguments[1]).groups()
        if offset and int(offset):
            raise EmuError(f"unknown instruction {i}")
        index = next(n for n, (param, _) in enumerate(self.program.params) if param == name)
        kind, bits = i.parts[-1], self.width(i.arguments[0])
        value = f"W.param({index}, {int(kind[1:])}, {kind.startswith('s')}, {bits})"
        return self.put(i.arguments[0], f"b{bits}", value, self._where(mask))

    def op_st(self, i, mask):
        space, kind = i.parts[1], i.parts[-1]
        size = int(kind[1:]) // 8
        address, offset = self._address(i.arguments[0], space)
        values = []
        for text in self.vector(i.arguments[1]):
            if self.is_register(text):
                bits = self.width(text)
                value = self.slot(text, f"b{bits}")
                values.append(value if bits == size * 8 else f"{value}.astype({STORE_TYPES[size]})")
            else:
                values.append(self.value(text, f"b{size * 8}") + (".astype(np.uint8)" if size == 1 else ""))
        return [f"W.st_{space}({address}, {offset}, {size}, [{', '.join(values)}], {mask}, {i.line})"]

    def op_atom(self, i, mask):
        returns, kind = i.parts[0] == "atom", i.parts[-1]
        at, value = i.arguments[returns], i.arguments[returns + 1]
        operation = next((p for p in i.parts if p in OPERATIONS), None)
        if i.parts[1] != "global" or operation is None or kind[0] == "f":
            raise EmuError(f"unknown instruction {i}")
        order = next((p for p in i.parts if p in ORDERS), "relaxed")
        address, offset = self._address(at, "global")
        size = int(kind[1:]) // 8
        lines = [f"T = W.atomic({address}, {offset}, {size}, {operation!r}, {order!r}, {self.value(value, kind)}, "
                 f"{mask}, {i.line})"]  # fmt: skip
        return lines + (self.put(i.arguments[0], f"b{kind[1:]}", "T", self._where(mask)) if returns else [])

    op_red = op_atom

    def op_shfl(self, i, mask):
        to, _, flag = i.arguments[0].partition("|")
        _, source, by, clamp, members = i.arguments
        value, members, where = self.value(source, "b32"), int(members, 0) & 0xFFFFFFFF, self._where(mask)
        if not (self.is_register(by) or self.is_register(clamp) or flag):
            index, _ = h_shfl_index(i.parts[2], *(np.full(32, int(x, 0)) for x in (by, clamp)))
            key = f"I{len(self.namespace)}"
            self.namespace[key] = index
            return [f"W.need({members}, {mask}, {i.line})"] + self.put(to, "b32", f"{value}[{key}]", where)
        call = f"J, OK = h_shfl_index({i.parts[2]!r}, {self.value(by, 'b32')}, {self.value(clamp, 'b32')})"
        # A register may be shuffled into itself: indexing copies.
        lines = [call, f"W.need({members}, {mask}, {i.line})", f"T = {value}[J]"]
        return lines + (self.put(flag, "pred", "OK", where) if flag else []) + self.put(to, "b32", "T", where)

    def op_redux(self, i, mask):
        kind = i.parts[-1]
        value = f"W.redux({i.parts[2]!r}, {self.value(i.arguments[1], kind)}, {mask})"
        return self.put(i.arguments[0], kind, value, self._where(mask))

    def op_vote(self, i, mask):
        value = f"W.vote({i.parts[2]!r}, {self.value(i.arguments[1], 'pred')}, {mask})"
        return self.put(i.arguments[0], "b32" if i.parts[2] == "ballot" else "pred", value, self._where(mask))

    def op_bar(self, i, mask):
        return ["W.warp_barrier()"] if i.parts[1] == "warp" else []  # those of a program end a segment: see ``launch``

    op_barrier = op_bar

    def op_fence(self, i, mask):
        return ["W.fence()"] if "proxy" not in i.parts else []

    op_membar = op_fence

    def op_nop(self, i, mask):
        return []

    op_pragma = op_nop

    def op_mma(self, i, mask):
        to, a, b, c = (self.vector(x) for x in i.arguments)
        if "m16n8k8" in i.parts and "tf32" in i.parts:
            call = f"T = h_mma_k8_tf32({self._values(a, 'f32')}, {self._values(b, 'f32')}, {self._values(c, 'f32')})"
        elif "m16n8k16" in i.parts:
            kind = "bf16" if "bf16" in i.parts else "f16"
            operands = f"{self._values(a, 'b32')}, {self._values(b, 'b32')}, {self._values(c, 'f32')}"
            call = f"T = h_mma_k16({operands}, {kind!r})"
        else:
            raise EmuError(f"unknown instruction {i}")
        return [call] + [line for n, x in enumerate(to) for line in self.put(x, "f32", f"T[{n}]", self._where(mask))]

    def op_ldmatrix(self, i, mask):
        loads = i.parts[0] == "ldmatrix"
        count, transposed = int(next(p for p in i.parts if re.match(r"^x\d$", p))[1:]), "trans" in i.parts
        at, registers = i.arguments[loads], self.vector(i.arguments[not loads])
        address, offset = self._address(at, "shared")
        if not loads:
            return [f"W.stmatrix({address}, {offset}, {self._values(registers, 'b32')}, {transposed}, {i.line})"]
        lines = [f"T = W.ldmatrix({address}, {offset}, {count}, {transposed}, {i.line})"]
        return lines + [
            line for n, x in enumerate(registers) for line in self.put(x, "b32", f"T[{n}]", self._where(mask))
        ]

    op_stmatrix = op_ldmatrix

    def op_cp(self, i, mask):
        if i.parts[2] == "commit_group":
            return ["W.cp_commit()"]
        if i.parts[2] in ("wait_group", "wait_all"):
            return [f"W.cp_wait({int(i.arguments[0]) if i.arguments else 0})"]
        (into, into_offset), (of, of_offset) = (
            self._address(text, space) for text, space in zip(i.arguments, ("shared", "global"))
        )
        size = int(i.arguments[2], 0)
        used = self.value(i.arguments[3], "u32") if len(i.arguments) > 3 else self.constant(size, U32)
        return [f"W.cp_async({into}, {into_offset}, {of}, {of_offset}, {size}, {used}, {mask}, {i.line})"]

    def op_wgmma(self, i, mask):
        if i.parts[1] != "mma_async":
            return []
        n, k = (
            int(x) for x in re.match(r"^m64n(\d+)k(\d+)$", next(p for p in i.parts if p.startswith("m64"))).groups()
        )
        to, a, b, scale = i.arguments[:4]
        scale = self.value(scale, "pred") if self.is_register(scale) else self.constant(int(scale) != 0, np.bool_)
        signs, transposed = [int(x) for x in i.arguments[4:6]], [int(x) for x in i.arguments[6:]]
        if a.startswith("{"):  # in registers it is never transposed
            a, transposed = self._values(self.vector(a), "b32"), [0, *(transposed or [0])]
        else:
            a, transposed = self.value(a, "u64"), transposed or [0, 0]
        into = ", ".join(self.slot(x, "f32") for x in self.vector(to))
        return [f"W.wgmma([{into}], {a}, {self.value(b, 'u64')}, {scale}, {n}, {k}, {i.parts[-1]!r}, {transposed}, "
                f"{signs[0] * signs[1]}, {i.line})"]  # fmt: skip
