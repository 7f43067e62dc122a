"""What a lane computes by itself: moves, arithmetic, comparisons, conversions → lines of Python.

Each method takes an instruction and returns the lines; ``where`` restricts what they write to the lanes of the mask
``M``, or is empty. Helpers named ``h_…`` are in ``arithmetic``.
"""

from __future__ import annotations

from .errors import EmuError
from .operands import DTYPES, Operands

FLOATS = ("f32", "f16", "f64")
COMPARISONS = {
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
    "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal",
}  # fmt: skip
WIDE = {"u32": "U32", "s32": "I32", "u64": "U64", "s64": "I64"}


class LaneInstructions(Operands):
    """Instructions of single lanes."""

    def put(self, register: str, kind: str, expression: str, where: str) -> list[str]:
        """Assign an expression to a register."""
        if register == "_":
            return []
        return [f"copyto({self.slot(register, kind)}, {expression}, casting='unsafe'{where})"]

    def apply(self, function: str, instruction, kind: str, where: str) -> list[str]:
        """A numpy function of the operands, written into the first one."""
        to, *operands = instruction.arguments
        values = ", ".join(self.value(x, kind) for x in operands)
        return [f"{function}({values}, out={self.slot(to, kind)}{where})"]

    def call(self, function: str, instruction, kind: str, where: str, *more, of: str = "") -> list[str]:
        """A helper of the operands (of the type ``of``), assigned to the first one."""
        to, *operands = instruction.arguments
        values = ", ".join([self.value(x, of or kind) for x in operands] + [str(x) for x in more])
        return self.put(to, kind, f"{function}({values})", where)

    def op_mov(self, i, where):
        to, source, kind = *i.arguments, i.parts[-1]
        half, narrow, wide, shift = ("b16", "U16", "U32", 16) if kind == "b32" else ("b32", "U32", "U64", 32)
        if to.startswith("{"):
            low, high = self.vector(to)
            value = self.value(source, kind)
            upper = f"({value} >> {wide}({shift})).astype({narrow})"
            return self.put(low, half, f"{value}.astype({narrow})", where) + self.put(high, half, upper, where)
        if source.startswith("{"):
            low, high = (self.value(x, half) for x in self.vector(source))
            return self.put(to, kind, f"({high}.astype({wide}) << {wide}({shift})) | {low}", where)
        return self.put(to, kind, self.value(source, kind), where)

    def op_add(self, i, where):
        name = {"add": "add", "sub": "subtract", "mul": "multiply"}[i.parts[0]]
        kind = i.parts[-1]
        if kind not in FLOATS:
            return self.apply(name, i, "u" + kind[1:], where)
        lines = self.apply(name, i, kind, where)
        if "ftz" in i.parts:
            lines += self.put(i.arguments[0], kind, f"ftz({self.slot(i.arguments[0], kind)})", where)
        return lines

    op_sub = op_add

    def op_mul(self, i, where):
        kind = i.parts[-1]
        if kind in FLOATS:
            return self.op_add(i, where)
        if i.parts[1] == "lo":
            return self.op_add(i, where)
        if i.parts[1] == "wide":
            return self._wide(i, where)
        if kind == "u64":
            return self.call("h_mulhi_u64", i, kind, where)
        bits, wide = kind[1:], {"u": "U64", "s": "I64"}[kind[0]]
        a, b = (f"{self.value(x, kind)}.astype({wide})" for x in i.arguments[1:])
        return self.put(i.arguments[0], kind, f"({a} * {b}) >> {wide}({bits})", where)

    def _wide(self, i, where):
        kind = i.parts[-1]
        big = f"{kind[0]}{2 * int(kind[1:])}"
        to, a, b, *c = i.arguments
        product = " * ".join(f"{self.value(x, kind)}.astype({WIDE[big]})" for x in (a, b))
        return self.put(to, big, " + ".join([product, *(self.value(x, big) for x in c)]), where)

    def op_mad(self, i, where):
        if i.parts[1] == "wide":
            return self._wide(i, where)
        kind = "u" + i.parts[-1][1:]
        to, a, b, c = i.arguments
        return self.put(to, kind, f"{self.value(a, kind)} * {self.value(b, kind)} + {self.value(c, kind)}", where)

    def op_fma(self, i, where):
        if i.parts[-1] != "f32":
            raise EmuError(f"unknown instruction {i}")
        lines = self.call("h_fma", i, "f32", where)
        if "ftz" in i.parts:
            lines += self.put(i.arguments[0], "f32", f"ftz({self.slot(i.arguments[0], 'f32')})", where)
        return lines

    def op_div(self, i, where):
        kind = i.parts[-1]
        if kind == "f32":
            return self.call(f"h_div_{i.parts[1]}", i, kind, where)
        return self.call(f"h_{i.parts[0]}_{kind}", i, kind, where)

    op_rem = op_div

    def op_min(self, i, where):
        head, kind = i.parts[0], i.parts[-1]
        # Without .NaN the operand that is a number wins.
        number_wins = kind in FLOATS and "NaN" not in i.parts
        return self.apply(f"f{head}" if number_wins else f"{head}imum", i, kind, where)

    op_max = op_min

    def op_neg(self, i, where):
        kind = i.parts[-1]
        if kind in FLOATS:
            return self.apply("negative", i, kind, where)
        kind = "u" + kind[1:]
        to, a = i.arguments
        return self.put(to, kind, f"{self.constant(0, DTYPES[kind])} - {self.value(a, kind)}", where)

    def op_abs(self, i, where):
        return self.apply("absolute", i, i.parts[-1], where)

    def op_and(self, i, where):
        side = "logical_" if i.parts[-1] == "pred" else "bitwise_"
        return self.apply(side + i.parts[0], i, i.parts[-1], where)

    op_or = op_xor = op_and

    def op_not(self, i, where):
        return self.apply("logical_not" if i.parts[-1] == "pred" else "invert", i, i.parts[-1], where)

    def op_shl(self, i, where):
        head, kind = i.parts[0], i.parts[-1]
        name = "h_shl" if head == "shl" else "h_shr_s" if kind[0] == "s" else "h_shr_u"
        to, a, n = i.arguments
        return self.put(to, kind, f"{name}({self.value(a, kind)}, {self.value(n, 'u32')}, {kind[1:]})", where)

    op_shr = op_shl

    def op_bfe(self, i, where):
        return self.call(f"h_bfe_{i.parts[-1]}", i, i.parts[-1], where, of="u32")

    def op_bfi(self, i, where):
        return self.call("h_bfi_b32", i, "u32", where)

    def op_prmt(self, i, where):
        return self.call("h_prmt", i, "u32", where)

    def op_selp(self, i, where):
        to, a, b, p = i.arguments
        kind = i.parts[-1]
        return self.put(
            to, kind, f"where({self.value(p, 'pred')}, {self.value(a, kind)}, {self.value(b, kind)})", where
        )

    def op_ex2(self, i, where):
        return self.call("h_" + i.parts[0], i, i.parts[-1], where)

    op_lg2 = op_rcp = op_sqrt = op_tanh = op_ex2

    def op_rsqrt(self, i, where):
        return self.call("h_rsqrt", i, "f32", where, "ftz" in i.parts)

    def op_setp(self, i, where):
        kind, comparison = i.parts[-1], i.parts[1]
        to, _, second = (x.strip() for x in i.arguments[0].partition("|"))
        if kind == "bf16x2":
            if comparison == "ne":
                raise EmuError(f"unknown instruction {i}")
            lines = []
            for n, predicate in enumerate((to, second)):
                a, b = (f"bf16_to_f32(({self.value(x, 'b32')} >> U32({16 * n})).astype(U16))" for x in i.arguments[1:])
                lines += self.put(predicate, "pred", f"{COMPARISONS[comparison]}({a}, {b})", where)
            return lines
        if second:
            raise EmuError(f"unknown instruction {i}")
        a, b = (f"bf16_to_f32({self.value(x, 'b16')})" if kind == "bf16" else self.value(x, kind)
                for x in i.arguments[1:3])  # fmt: skip
        found = self._compare(comparison, a, b, kind in (*FLOATS, "bf16"))
        if i.parts[2] in ("and", "or", "xor"):
            found = f"logical_{i.parts[2]}({found}, {self.value(i.arguments[3], 'pred')})"
        return self.put(to, "pred", found, where)

    @staticmethod
    def _compare(comparison: str, a: str, b: str, floats: bool) -> str:
        unordered = f"(isnan({a}) | isnan({b}))"
        if not floats:
            return f"{COMPARISONS[comparison]}({a}, {b})"
        if comparison in ("num", "nan"):
            return f"~{unordered}" if comparison == "num" else unordered
        if comparison.endswith("u") and comparison[:-1] in COMPARISONS:
            return f"{COMPARISONS[comparison[:-1]]}({a}, {b}) | {unordered}"
        if comparison == "ne":
            return f"not_equal({a}, {b}) & ~{unordered}"
        return f"{COMPARISONS[comparison]}({a}, {b})"

    def op_cvt(self, i, where):
        to, source = i.arguments[0], i.arguments[-1]
        into, of = i.parts[-2:]
        if into in ("bf16x2", "f16x2"):
            return self.call(f"h_cvt_{into}", i, "b32", where, of="f32")
        if into == "tf32":
            if "rna" not in i.parts:
                raise EmuError(f"unknown instruction {i}")
            return self.call("h_tf32", i, "b32", where)
        if "bf16" in (into, of):
            wide = f"bf16_to_f32({self.value(source, 'b16')})" if of == "bf16" else self.value(source, of)
            if into == "bf16":
                return self.put(to, "b16", f"f32_to_bf16({wide}.astype(F32))", where)
            return self.put(to, into, wide, where)
        if of in FLOATS and into not in FLOATS:
            if not {"rzi", "rni"} & set(i.parts):
                raise EmuError(f"unknown instruction {i}")
            kind = f"np.{DTYPES[into].__name__}"
            return self.put(to, into, f"h_to_integer({self.value(source, of)}, {kind}, {'rzi' in i.parts})", where)
        if into in FLOATS:
            return self.put(to, into, self.value(source, of), where)
        return self._integers(i, where)

    def _integers(self, i, where):
        """Extend by the source's sign, or cut."""
        (to, source), (into, of) = i.arguments, i.parts[-2:]
        bits, signed = self.width(to), of[0] == "s"
        has = self.width(source) if self.is_register(source) else int(of[1:])
        value = self.value(source, f"{of[0]}{has}")
        if int(of[1:]) < has:
            shift = has - int(of[1:])
            value = f"(({value} << {shift}) >> {shift})"
        dtype = {16: ("U16", "I16"), 32: ("U32", "I32"), 64: ("U64", "I64")}[bits][signed]
        value = f"{value}.astype({dtype})"
        if int(into[1:]) < bits:
            value = f"({value} & {dtype}({(1 << int(into[1:])) - 1}))"
        return self.put(to, f"{'s' if signed else 'u'}{bits}", value, where)
