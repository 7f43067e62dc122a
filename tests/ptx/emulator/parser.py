"""PTX text → a kernel: its parameters, registers and instructions."""

from __future__ import annotations

import re

from .errors import EmuError
from .segments import cut


class Instruction:
    """One instruction.

    Attributes:
        op, parts: opcode with its modifiers, and split at the dots.
        guard, negated: the predicate register in front of it, or None, and whether it is negated.
        arguments: operands as text; ``{…}`` and ``[…]`` are one operand.
        line: of the text, from 1.
        text: all of it.
        source: file, line and column that the last ``.loc`` named, or "".
    """

    __slots__ = ("arguments", "guard", "line", "negated", "op", "parts", "source", "text")

    def __init__(self, text: str, line: int, source: str):
        self.text, self.line, self.source = text, line, source
        guarded = re.match(r"^@(!?)(%\w+)\s+(.*)$", text, re.S)
        self.guard, self.negated = (guarded[2], guarded[1] == "!") if guarded else (None, False)
        op, operands = re.match(r"^([\w.:]+)\s*(.*)$", guarded[3] if guarded else text, re.S).groups()
        self.op, self.parts, self.arguments = op, op.split("."), split_operands(operands)

    def __repr__(self):
        return f"line {self.line}: {self.text}" + (f" ({self.source})" if self.source else "")


def split_operands(text: str) -> list[str]:
    """Operands as they stand between commas, but for those inside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


class Program:
    """The kernel of a PTX text.

    Attributes:
        name, threads: of the kernel, of a program.
        params: (name, type) of each parameter.
        regs: by prefix as ``%r``: (type, how many).
        instructions, segments: the code; see ``segments``.

    Raises:
        EmuError: a declaration that is not understood.
    """

    def __init__(self, ptx: str):
        self.text = ptx
        self.name, self.threads = "", 0
        self.params: list[tuple[str, str]] = []
        self.regs: dict[str, tuple[str, int]] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        lines = enumerate(ptx.splitlines(), 1)
        self._head(lines)
        self._body(lines)
        self.by_line = {i.line: i for i in self.instructions}
        self.segments = cut(self.instructions, self.labels)

    def _head(self, lines) -> None:
        for _, raw in lines:
            line = raw.split("//")[0].strip()
            if found := re.search(r"\.entry\s+(\w+)\s*\(", line):
                self.name = found[1]
            elif found := re.match(r"\.param\s+\.(\w+)\s.*?(\w+_param_\d+)", line):
                self.params.append((found[2], found[1]))
            elif found := re.match(r"\.(?:reqntid|maxntid)\s+(\d+)", line):
                self.threads = int(found[1])
            if self.name and line == "{":
                return
        raise EmuError("no .entry with a body")

    def _body(self, lines) -> None:
        source, unfinished = "", ""
        for number, raw in lines:
            if raw.lstrip().startswith(".loc"):
                found = re.search(r"//\s*(\S+)\s*$", raw)
                source = found[1] if found else source
                continue
            line = raw.split("//")[0].strip()
            if line == "}":
                return
            if line.startswith(".reg"):
                found = re.match(r"\.reg\s+\.(\w+)\s+(%\w+?)<(\d+)>", line)
                if not found:
                    raise EmuError(f"line {number}: {line}")
                self.regs[found[2]] = (found[1], int(found[3]))
            elif found := re.match(r"^(\$?[\w$]+):$", line):
                self.labels[found[1]] = len(self.instructions)
            elif line and not line.startswith("."):
                *whole, unfinished = (unfinished + " " + line).split(";")
                self.instructions += [Instruction(text.strip(), number, source) for text in whole if text.strip()]
        raise EmuError(f"{self.name}: the body does not end")
