"""Calls of every launcher at the released adapter's sizes (bfloat16, r 8, H 1), whose costs are counted.

Their floor is what ``bench.problems`` says a call must move: each input read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench import problems
from deltamem_kernels import heads, read, read_backward, scan, scan_backward, steer, steer_backward, step


@dataclass(frozen=True)
class Case:
    """One call of one launcher.

    Attributes:
        name: the launcher's.
        of: its sizes, as the benchmarks have them.
        options: further arguments of the launcher.
    """

    name: str
    of: problems.Case
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        sizes = [f"{letter} {getattr(self.of, name)}" for letter, name in (("B", "batch"), ("T", "tokens"))]
        return " ".join([self.name, *sizes, *(f"{name} {value}" for name, value in self.options.items())])

    @property
    def parameters(self) -> dict[str, Any]:
        """Of a row of results."""
        return self.of.parameters | self.options

    @property
    def floor(self) -> int:
        """The least bytes that the call must move."""
        whole = problems.least_bytes(self.of)
        if self.of.kernel == self.of.forward:
            return whole
        return whole - problems.least_bytes(replace(self.of, kernel=self.of.forward))  # of the backward pass alone

    def call(self) -> Callable[[], object]:
        """The call on fresh random inputs, on the CPU."""
        torch.manual_seed(0)
        return _calls(problems.random_inputs(self.of, "cpu"), self.of.rule, self.options)[self.name]


def _calls(i: dict[str, torch.Tensor], rule, options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    x, turn = i.get("projections"), (i.get("cos"), i.get("sin"))
    steering = {w: problems._steering(i, w) for w in (False, True)} if "q" in i else {}
    return {
        "scan": lambda: scan.scan(x, i["bias"], i["state"], rule, **options),
        "step": lambda: step.step(x, i["bias"], i["state"], rule, skipped=i["skipped"]),
        "read": lambda: read.read(x, i["state"], rule),
        "steer": lambda: steer.steer(i["base"], i["reads"], i["o"], 2.0),
        "steer_heads": lambda: heads.steer_heads_(i["packed"], i["reads"], problems.LAYOUT, steering[False], *turn),
        "decode": lambda: heads.decode_(
            i["packed"], i["bias"], i["state"], rule, problems.LAYOUT, steering[True], *turn,
            skipped=i["skipped"], arrived=i["arrived"], **options,
        ),
        "scan_backward": lambda: scan_backward.scan_backward(
            i["d_reads"], i["d_state"], x, i["bias"], i["state"], rule, **options
        ),
        "read_backward": lambda: read_backward.read_backward(i["d_reads"], x, i["state"], rule),
        "steer_backward": lambda: steer_backward.steer_backward(i["d_out"], i["reads"], i["o"], 2.0),
    }  # fmt: skip


def _of(kernel: str, batch: int = 1, tokens: int = 1) -> problems.Case:
    return problems.Case(kernel, tokens, batch)


CASES = (
    Case("scan", _of("scan", 1, 256), {"chunk": 64}),
    Case("scan", _of("scan", 1, 64)),
    Case("step", _of("step", 32)),
    Case("step", _of("step", 1)),
    Case("read", _of("read", 1, 64)),
    Case("decode", _of("decode_")),
    Case("decode", _of("decode_"), {"parts": 1}),
    Case("decode", _of("decode_", 4)),
    Case("steer_heads", _of("steer_heads_", 1, 32)),
    Case("steer", _of("steer", 1, 32)),
    Case("steer", _of("steer", 1, 1)),
    Case("scan_backward", _of("scan_gradient", 1, 128), {"chunk": 64}),
    Case("read_backward", _of("read_gradient", 1, 64)),
    Case("steer_backward", _of("steer_gradient", 1, 32)),
)
