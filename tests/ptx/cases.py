"""Calls of every launcher at the released adapter's sizes (bfloat16, r 8, H 1), whose costs are counted.

Inputs, what they must give and the least bytes that a call moves are those of ``bench.speed.problems``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from bench.speed import problems
from deltamem_kernels.triton import decode, heads, read, read_backward, scan, scan_backward, steer, steer_backward, step


@dataclass(frozen=True)
class Case:
    """One call of one launcher.

    Attributes:
        name: the launcher's.
        of: its sizes, as the benchmarks have them; ``…_gradient`` for a backward pass, of which this is that alone.
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
        return whole - problems.least_bytes(replace(self.of, kernel=self.of.forward))

    def inputs(self) -> dict[str, torch.Tensor]:
        """Random arguments on the CPU, the same every time."""
        torch.manual_seed(0)
        return problems.random_inputs(self.of, "cpu")

    def call(self, inputs: dict[str, torch.Tensor] | None = None) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The call on some inputs, some of which it changes; it returns what ``exact`` does."""
        inputs = self.inputs() if inputs is None else inputs
        if self.of.kernel == self.of.forward:
            return lambda: problems.apply(self.of, inputs, _with(self.options))
        return lambda: _backward(self.name, inputs, self.of.rule, self.options)

    def exact(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the reference makes of the inputs in float64."""
        found = problems.apply(self.of, problems.wide(inputs), problems.Exact)
        return found[:2] if self.name == "steer_backward" else found  # the base's gradient is that of the result

    def wrong(self, found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> str:
        """What is wrong with results, or ""."""
        for number, (ours, wanted) in enumerate(zip(found, exact, strict=True)):
            error = problems.relative_error(ours, wanted)
            allowed = problems.TOLERANCES[str(ours.dtype).removeprefix("torch.")]
            if not error < allowed:
                return f"{self}: result {number}: relative error {error:.1e} against float64, allowed {allowed:.0e}"
        return ""


def _with(options: dict[str, Any]) -> SimpleNamespace:
    """The launchers as ``problems.apply`` calls them, with further arguments."""
    return SimpleNamespace(
        scan=lambda *given: scan.scan(*given, **options), step=step.step, read=read.read, steer=steer.steer,
        steer_heads_=heads.steer_heads_, workspace=decode.workspace,
        decode_=lambda *given, **more: decode.decode_(*given, **more, **options),
    )  # fmt: skip


def _backward(name: str, i: dict[str, torch.Tensor], rule, options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    if name == "steer_backward":
        return steer_backward.steer_backward(i["d_out"], i["reads"], i["o"], 2.0)[:2]
    if name == "read_backward":
        return read_backward.read_backward(i["d_reads"], i["projections"], i["state"], rule)
    given = i["d_reads"], i["d_state"], i["projections"], i["bias"], i["state"]
    return scan_backward.scan_backward(*given, rule, **options)


def _of(kernel: str, batch: int = 1, tokens: int = 1) -> problems.Case:
    return problems.Case(kernel, tokens, batch)


CASES = (
    Case("scan", _of("scan", 1, 512), {"chunk": 64}),
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
    Case("scan_backward", _of("scan_gradient", 1, 256), {"chunk": 64}),
    Case("read_backward", _of("read_gradient", 1, 64)),
    Case("steer_backward", _of("steer_gradient", 1, 32)),
)
