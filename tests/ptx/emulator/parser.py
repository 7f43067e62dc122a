"""PTX text → a kernel of instructions, cut into segments that a warp runs without looking up."""

from __future__ import annotations

import re
from collections import Counter


class EmuError(Exception):
    pass


class Instr:
    __slots__ = ("args", "guard", "line", "neg", "op", "parts", "source", "text")

    def __init__(self, op, guard, neg, args, line, text, source):
        self.op, self.guard, self.neg, self.args, self.line, self.text = op, guard, neg, args, line, text
        self.parts = op.split(".")
        self.source = source

    def __repr__(self):
        return f"line {self.line}: {self.text} ({self.source})"


def split_args(text):
    found, depth, now = [], 0, ""
    for c in text:
        if c in "{[":
            depth += 1
        if c in "}]":
            depth -= 1
        if c == "," and depth == 0:
            found.append(now.strip())
            now = ""
        else:
            now += c
    if now.strip():
        found.append(now.strip())
    return found


class Segment:
    __slots__ = (
        "branch",
        "executed",
        "executed_masked",
        "fn",
        "index",
        "instrs",
        "kind",
        "masked",
        "mix",
        "n",
        "sync",
        "target"
    )  # fmt: skip


SYNC = ("shfl", "vote", "redux", "bar", "barrier", "mma", "ldmatrix", "stmatrix", "wgmma", "match", "activemask")
GLOBAL_STOP = ("ld.global", "st.global", "atom", "red.", "cp.async")


class Program:
    """A parsed kernel."""

    def __init__(self, ptx: str):
        self.text = ptx
        lines = ptx.splitlines()
        self.name = None
        self.params, self.regs = [], {}
        self.threads = None
        state, body, buffer = "head", [], ""
        source = ""
        for number, raw in enumerate(lines, 1):
            line = raw.split("//")[0].strip() if not raw.lstrip().startswith(".loc") else raw.strip()
            if not line:
                continue
            if state == "head":
                m = re.search(r"\.entry\s+(\w+)\(", line)
                if m:
                    self.name, state = m[1], "params"
                continue
            if state == "params":
                m = re.match(r"\.param\s+\.(\w+)\s.*?(\w+_param_\d+)", line)
                if m:
                    self.params.append((m[2], m[1]))
                m = re.match(r"\.(?:reqntid|maxntid)\s+(\d+)", line)
                if m:
                    self.threads = int(m[1])
                if line == "{":
                    state = "body"
                continue
            if state == "body":
                if line == "}":
                    break
                if line.startswith(".loc"):
                    m = re.search(r"//\s*(\S+)\s*$", raw)
                    source = m[1] if m else source
                    continue
                if line.startswith(".reg"):
                    m = re.match(r"\.reg\s+\.(\w+)\s+(%\w+?)<(\d+)>", line)
                    if m:
                        self.regs[m[2]] = (m[1], int(m[3]))
                        continue
                    raise EmuError(f"line {number}: {line}")
                if line.startswith("."):
                    continue
                m = re.match(r"^(\$?[\w$]+):$", line)
                if m:
                    body.append(("label", m[1], number))
                    continue
                buffer += " " + line
                while ";" in buffer:
                    one, buffer = buffer.split(";", 1)
                    one = one.strip()
                    if one:
                        body.append(("instr", one, number, source))
        self._instrs(body)

    def _instrs(self, body):
        labels, instrs = {}, []
        for item in body:
            if item[0] == "label":
                labels[item[1]] = len(instrs)
                continue
            text, number, source = item[1], item[2], item[3]
            guard, neg, rest = None, False, text
            m = re.match(r"^@(!?)(%\w+)\s+(.*)$", text, re.S)
            if m:
                guard, neg, rest = m[2], m[1] == "!", m[3]
            op, _, tail = rest.partition(" ")
            if "\t" in op:
                op, _, tail = rest.partition("\t")
            m = re.match(r"^([\w.:]+)\s*(.*)$", rest, re.S)
            op, tail = m[1], m[2]
            instrs.append(Instr(op, guard, neg, split_args(tail), number, text, source))
        self.instrs, self.labels = instrs, labels
        targets = {labels[i.args[0]] for i in instrs if i.parts[0] == "bra"}
        # Segments.
        segments, start_of = [], {}
        now, start = [], 0

        def close(kind, target=None, branch=None):
            nonlocal now, start
            s = Segment()
            s.index, s.instrs, s.kind, s.target, s.branch = len(segments), now, kind, target, branch
            s.sync = bool(now) and now[0].parts[0] in SYNC
            s.fn = s.masked = None
            s.n = len(now)
            s.mix = Counter(i.op for i in now)
            s.executed = s.executed_masked = 0
            segments.append(s)
            start_of[start] = s.index
            now = []

        for n, ins in enumerate(instrs):
            if n in targets and now:
                close("fall")
                start = n
            head = ins.parts[0]
            if head in SYNC and now:
                close("fall")
                start = n
            now.append(ins)
            if head == "bra":
                close("cbra" if ins.guard else "bra", ins.args[0], ins)
                start = n + 1
            elif head in ("ret", "exit"):
                close("cexit" if ins.guard else "exit", None, ins)
                start = n + 1
            elif head in ("bar", "barrier") and ins.parts[1] != "warp":
                close("barrier")
                start = n + 1
            elif head in SYNC or ins.op.startswith(GLOBAL_STOP):
                close("fall")
                start = n + 1
        if now:
            close("exit")
        self.segments = segments
        for s in segments:
            if s.target is not None:
                s.target = start_of[labels[s.target]]
