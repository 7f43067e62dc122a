"""Operands: where registers lie, what text stands for in generated code, constants."""

from __future__ import annotations

import re

import numpy as np

from .arithmetic import F32, F64, I16, I32, I64, U16, U32, U64
from .errors import EmuError
from .parser import Program

BITS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "s32": 32, "u32": 32}
DTYPES = {
    "f32": F32, "u32": U32, "s32": I32, "b32": U32, "u64": U64, "s64": I64, "b64": U64, "u16": U16, "s16": I16,
    "b16": U16, "f16": np.float16, "bf16": U16, "pred": np.bool_, "u8": U16, "b8": U16, "s8": U16, "f64": F64,
}  # fmt: skip
SPECIAL = ("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid", "%warpid")
STORED = {1: np.bool_, 16: U16, 32: U32, 64: U64}
# Registers start as rubbish, as on a device: NaN where a float is read.
RUBBISH = {1: 1, 16: 0x7FC1, 32: 0x7FC12345, 64: 0x7FC12345}


class Operands:
    """Text of operands → Python expressions over ``G``, the slots of a warp's registers, and ``K``, the constants.

    A slot is a register seen as one type: ``%r1`` as ``u32`` and as ``s32`` are two slots on the same memory.
    """

    def __init__(self, program: Program):
        self.program = program
        self.bits = {prefix: BITS[kind] for prefix, (kind, _) in program.regs.items()}
        self.slots: dict[tuple[str, str], int] = {}
        self.places: list[tuple[str, np.dtype, int]] = []  # of each slot: prefix, type, number
        self.constants: list[np.ndarray] = []
        self._constants: dict[tuple[str, bytes], int] = {}

    @staticmethod
    def prefix(register: str) -> str:
        return register.rstrip("0123456789")

    def width(self, register: str) -> int:
        """Bits of a register."""
        return self.bits[self.prefix(register)]

    @staticmethod
    def is_register(text: str) -> bool:
        return text.startswith("%") and not text.startswith(SPECIAL)

    def slot(self, register: str, kind: str) -> str:
        """The register as a vector of the type ``kind``, to be read and written."""
        return f"G[{self.slot_number(register, kind)}]"

    def slot_number(self, register: str, kind: str) -> int:
        key = (register, kind)
        if key not in self.slots:
            self.slots[key] = len(self.places)
            prefix = self.prefix(register)
            self.places.append((prefix, np.dtype(DTYPES[kind]), int(register[len(prefix) :])))
        return self.slots[key]

    def constant(self, value, dtype) -> str:
        """A vector whose 32 lanes hold ``value``."""
        vector = np.full(32, value, dtype)
        key = (vector.dtype.str, vector[:1].tobytes())
        if key not in self._constants:
            self._constants[key] = len(self.constants)
            vector.flags.writeable = False
            self.constants.append(vector)
        return f"K[{self._constants[key]}]"

    def value(self, text: str, kind: str) -> str:
        """An operand as a vector of the type ``kind``, to be read.

        Raises:
            EmuError: it is not understood, or a register is too narrow.
        """
        if text.startswith("!"):
            return f"~{self.value(text[1:], kind)}"
        if text.startswith(SPECIAL):
            return f"W.special[{text!r}]"
        if text.startswith("%"):
            return self._register(text, kind)
        if found := re.match(r"^0[fF]([0-9a-fA-F]{8})$", text):
            return self.constant(np.uint32(int(found[1], 16)).view(F32 if kind == "f32" else U32), DTYPES[kind])
        if text in ("true", "false"):
            return self.constant(text == "true", np.bool_)
        if re.match(r"^-?(0x[0-9a-fA-F]+|\d+)U?$", text):
            return self._integer(int(text.rstrip("U"), 0), kind)
        if re.match(r"^[A-Za-z_]\w*$", text):  # a variable in shared memory, of which there is one, at 0
            return self.constant(0, DTYPES[kind])
        raise EmuError(f"operand {text!r}")

    def _register(self, text: str, kind: str) -> str:
        bits, wanted = self.width(text), 1 if kind == "pred" else np.dtype(DTYPES[kind]).itemsize * 8
        if bits == wanted:
            return self.slot(text, kind)
        if bits > wanted > 1:  # the low part
            return f"{self.slot(text, f'b{bits}')}.astype({'U16' if wanted == 16 else 'U32'})"
        raise EmuError(f"{text} as {kind}")

    def _integer(self, number: int, kind: str) -> str:
        if kind == "pred":
            return self.constant(number != 0, np.bool_)
        if kind == "f16":
            return self.constant(np.uint16(number & 0xFFFF).view(np.float16), np.float16)
        dtype = np.dtype(DTYPES[kind])
        bits = dtype.itemsize * 8
        number &= (1 << bits) - 1
        if dtype.kind == "i" and number >> (bits - 1):
            number -= 1 << bits
        return self.constant(number, dtype)

    @staticmethod
    def address(text: str) -> tuple[str | None, int]:
        """``[%rd1 + 8]`` → register and offset; the register is None for a variable in shared memory."""
        base, offset = re.match(r"^\[\s*(%?\w+)\s*(?:\+\s*(-?(?:0x)?[0-9a-fA-F]+))?\s*\]$", text).groups()
        return (base if base.startswith("%") else None), int(offset or "0", 0)

    @staticmethod
    def vector(text: str) -> list[str]:
        """``{%r1, %r2}`` or ``%r1`` → registers."""
        return [part.strip() for part in text.strip("{} ").split(",")]

    def registers(self) -> list[np.ndarray]:
        """Registers of a fresh warp, one vector for each slot, and behind them the whole arrays; see ``extend``."""
        rows = {
            (prefix, np.dtype(STORED[bits])): np.full((n, 32), RUBBISH[bits], STORED[bits])
            for (prefix, (_, n)), bits in zip(self.program.regs.items(), self.bits.values())
        }
        found = [rows]
        self.extend(found)
        return found

    def extend(self, G: list) -> None:
        """Add the slots that code generated since has asked for."""
        rows, cut = G.pop(), {}
        for prefix, dtype, number in self.places[len(G) :]:
            key = (prefix, dtype)
            if key not in cut:
                whole = rows[prefix, np.dtype(STORED[self.bits[prefix]])]
                cut[key] = list(whole.view(dtype))
            G.append(cut[key][number])
        G.append(rows)
