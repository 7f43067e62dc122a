"""Instructions, cut into segments that a warp runs in one go.

A segment ends with a branch, and before and after whatever other warps can see or wait for: accesses to global memory,
atomics, barriers, and instructions in which all lanes of a warp take part. Between two segments another warp may run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# Lanes meet in these.
SYNC = ("shfl", "vote", "redux", "bar", "barrier", "mma", "ldmatrix", "stmatrix", "wgmma", "match", "activemask")
SEEN_BY_OTHERS = ("ld.global", "st.global", "atom", "red.", "cp.async")


@dataclass(slots=True)
class Segment:
    """Some instructions.

    Attributes:
        kind: how it ends: ``fall`` into the next, ``bra``, ``exit``, with a predicate ``cbra``, ``cexit``; ``barrier``.
        target: index of the segment that a branch leads to.
        branch: the instruction at its end, of a branch or exit.
        sync: whether all lanes of a warp have to come.
        function, masked: compiled code for all lanes and for some, or None until it is needed.
        executed: how often a warp ran it in the present launch.
    """

    index: int
    instructions: list
    kind: str
    target: Any = None
    branch: Any = None
    sync: bool = False
    function: Any = None
    masked: Any = None
    executed: int = 0
    size: int = 0
    mix: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.sync = self.instructions[0].parts[0] in SYNC
        self.size = len(self.instructions)
        self.mix = Counter(i.op for i in self.instructions)


def _ending(instruction) -> str | None:
    """How a segment ends with this instruction; None if it goes on."""
    head = instruction.parts[0]
    if head == "bra":
        return "cbra" if instruction.guard else "bra"
    if head in ("ret", "exit"):
        return "cexit" if instruction.guard else "exit"
    if head in ("bar", "barrier") and instruction.parts[1] != "warp":
        return "barrier"
    return "fall" if head in SYNC or instruction.op.startswith(SEEN_BY_OTHERS) else None


def cut(instructions: list, labels: dict[str, int]) -> list[Segment]:
    """All segments, in the order of the text."""
    targets = {labels[i.arguments[0]] for i in instructions if i.parts[0] == "bra"}
    segments, starts, now = [], {}, []

    def close(number: int, kind: str) -> None:
        last = now[-1] if kind in ("bra", "cbra", "exit", "cexit") else None
        starts[number - len(now)] = len(segments)
        segments.append(Segment(len(segments), list(now), kind, branch=last))
        now.clear()

    for number, instruction in enumerate(instructions):
        if now and (number in targets or instruction.parts[0] in SYNC):
            close(number, "fall")
        now.append(instruction)
        if kind := _ending(instruction):
            close(number + 1, kind)
    if now:
        close(len(instructions), "fall")
    for segment in segments:
        if segment.kind in ("bra", "cbra"):
            segment.target = starts[labels[segment.branch.arguments[0]]]
    return segments
