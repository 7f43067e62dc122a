"""The targets as data: each says which rows of a result satisfy it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .rows import Row


@dataclass(frozen=True)
class Target:
    """A number that a row should reach.

    Attributes:
        what: the line's text in the table of targets.
        name: of the row that satisfies it; ``*`` stands for any text.
        parameters: what that row's parameters must contain. Where several rows do, the worst one counts.
        goal, stretch: the number to reach, and the one beyond it or None.
        baseline: the row's ratio to this variant is taken (its median), or
        value: the row's value of this name.
        at_most: the number should be ``goal`` or less, not or more.
        most: the number should not be more than this, either.
    """

    what: str
    name: str
    goal: float
    stretch: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = ""
    value: str = ""
    at_most: bool = False
    most: float = math.inf

    def of(self, row: Row) -> bool:
        """Whether ``row`` is one that this target is for."""
        wanted = self.parameters.items()
        return fnmatchcase(row.name, self.name) and all(row.parameters.get(key) == value for key, value in wanted)

    def number(self, row: Row) -> float | None:
        """What counts of ``row``, or None if it has no such number."""
        if self.baseline:
            return row.ratios[self.baseline][1] if self.baseline in row.ratios else None
        return row.values.get(self.value)

    def met(self, number: float) -> bool:
        """Whether ``number`` reaches the goal."""
        return self._room(number) >= 0

    def _room(self, number: float) -> float:
        """How far ``number`` is within the goal."""
        return self.goal - number if self.at_most else min(number - self.goal, self.most - number)

    def worst(self, rows: Iterable[Row]) -> Row | None:
        """The row of this target that is furthest from it, or None if none has the number."""
        found = [row for row in rows if self.of(row) and row.status == "measured" and self.number(row) is not None]
        return min(found, key=lambda row: self._room(self.number(row)), default=None)

    def bound(self, number: float | None) -> str:
        """A goal as text, such as ≥ 0.99, or 0.99 to 1.01; "" for None."""
        if number is None:
            return ""
        return f"{'≤' if self.at_most else '≥'} {number:g}" if self.most == math.inf else f"{number:g} to {self.most:g}"

    def open(self, row: Row) -> bool:
        """Whether the spread of the row's ratio lies on both sides of the goal."""
        if not self.baseline:
            return False
        low, _, high = row.ratios[self.baseline]
        return self.met(low) != self.met(high)


def _decode(mode: str, text: str, batch: int, goal: float, stretch: float | None, **more) -> Target:
    parameters = {"model": "Qwen3-4B", "mode": mode, "batch": batch}
    return Target(
        f"decode tok/s, patched ÷ {more.get('baseline', 'unpatched')}, {text}, B = {batch}",
        "decode/patched", goal, stretch, parameters, **({"baseline": "unpatched"} | more),
    )  # fmt: skip


def _scan(length: int, goal: float, stretch: float) -> Target:
    what = f"scan forward, ours ÷ released, T = {length // 1024} k, B = 1"
    return Target(what, "scan/triton", goal, stretch, {"tokens": length, "batch": 1, "rank": 8}, baseline="released")


RELEASED_GRADIENT = {"tokens": 8192, "batch": 1, "rank": 8}
TARGETS = (
    *(_decode("eager", "eager", batch, 1.0, 1.25) for batch in (1, 16)),
    *(_decode("compile", "static cache, torch.compile", batch, 0.97, 1.0) for batch in (1, 16)),
    *(_decode("reduce-overhead", "static cache, reduce-overhead", batch, 0.97, 1.0) for batch in (1, 16)),
    *(_decode("graph", "static cache, captured CUDA graph", batch, 0.97, 1.0) for batch in (1, 16)),
    *(_decode("eager", "eager", batch, 2.5, 3.5, baseline="released") for batch in (1, 16)),
    *(
        Target(
            f"prefill {length // 1024} k, patched ÷ unpatched", "prefill/patched", 0.99, 1.02,
            {"model": "Qwen3-4B", "tokens": length, "batch": 1}, baseline="unpatched",
        )
        for length in (8192, 32768)
    ),
    _scan(8192, 50, 100),
    _scan(32768, 100, 300),
    Target("scan forward + backward, ours ÷ released, T = 8 k", "scan-gradient/triton", 50, None,
           RELEASED_GRADIENT, baseline="released"),
    Target("memory of scan forward + backward, ours ÷ released, T = 8 k", "scan-gradient/triton", 1 / 8, None,
           RELEASED_GRADIENT, value="memory_to_released", at_most=True),
    Target("memory-bound kernels, achieved ÷ copy bandwidth, sizes over L2 (the worst)", "kernel/*", 0.80,
           0.90, value="streaming"),
    Target("extra peak memory of the patch, prefill 32 k", "prefill/patched", 0.01, None,
           {"model": "Qwen3-4B", "tokens": 32768, "batch": 1}, value="extra_memory", at_most=True),
    Target("CPU: scan ÷ the per-token PyTorch loop, T = 8 k", "scan/numba", 500, None,
           {"tokens": 8192, "rank": 8, "heads": 1}, baseline="reference"),
    *(
        Target(f"CPU: {phase}, patched ÷ unpatched, {text}, B = {batch}", f"{phase}/patched", 1.0, stretch,
               {"model": model, "batch": batch}, baseline="unpatched")
        for model, text, stretch in (
            ("Qwen3-48M", "a 48 M-parameter backbone", 1.05), ("SmolLM2-135M", "SmolLM2-135M's shape", None),
        )
        for phase in ("prefill", "decode")
        for batch in (1, 4)
    ),
    Target("tensor operations + kernel launches per decoded token and layer, fast path (unpatched: 56)",
           "operations/patched", 56, 34, {"backend": "triton"}, value="operations", at_most=True),
    *(
        Target(f"spills and stack bytes, kernels compiled for {target}", "compiled", 0, None,
               {"target": target}, value="spills_and_stack", at_most=True)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    ),
)  # fmt: skip


def verdict(row: Row) -> str:
    """What the targets say of a row: each goal and whether it is met, or ""."""
    said = []
    for target in TARGETS:
        number = target.number(row) if target.of(row) else None
        if number is None:
            continue
        text = f"{target.bound(target.goal)}: {'yes' if target.met(number) else 'no'}"
        said.append(text + (", the spread includes it" if target.open(row) else ""))
    return "; ".join(said)
