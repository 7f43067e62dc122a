"""The parts of a run on a GPU, most telling first. Each is a generator of rows and runs in a process of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..instrument import timing
from ..instrument.rows import Row, absent, counted, refused
from . import budget, counters, decode, kernels, model
from .budget import Estimate

MAIN = "Qwen3-4B"  # what most parts measure
PREFILL_TURNS = 4
COMPILED = ("compile", "reduce-overhead")  # modes of decoding on a static cache


@dataclass(frozen=True)
class Plan:
    """How much is measured, and on what.

    Attributes:
        device: ``cuda``, or ``cpu`` for a dry run.
        dry: tiny sizes and a stub compiler, to see that everything runs.
        full: the full sweep, not what fits nine minutes.
        progress: gets a line for each thing that takes time.
    """

    device: str
    dry: bool = False
    full: bool = False
    progress: Callable[[str], None] = lambda text: None

    @property
    def dtype(self) -> str:
        """Of models."""
        return "float32" if self.dry else "bfloat16"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of a long prompt."""
        return (48,) if self.dry else (8192, 32768)

    @property
    def scans(self) -> tuple[int, ...]:
        """Tokens of the scans that peers are timed beside."""
        return (128, 2048, 8192, 32768, 131_072) if self.full and not self.dry else self.lengths

    @property
    def gradients(self) -> tuple[int, ...]:
        """The same of their gradients."""
        return (48,) if self.dry else (8192, 2048, 32768)

    @property
    def turns(self) -> int:
        """How often a kernel is timed."""
        return 3 if self.dry else 30 if self.full else 20

    @property
    def eager(self) -> model.Sizes:
        """Sizes of the eager model benchmark."""
        if self.dry:
            return model.Sizes(prefill=16, decode=3, turns=(2, 2))
        return model.Sizes(prefill=512, decode=24, turns=(5, 9 if self.full else 6), budget=12.0)

    @property
    def static(self) -> dict[str, int]:
        """Sizes of decode on a static cache."""
        return {"context": 16, "tokens": 2, "turns": 2} if self.dry else {"context": 512, "tokens": 24, "turns": 7}


def _models(plan: Plan, name: str, peer: bool = True) -> model.Models:
    made = model.make(name, plan.device, plan.dtype, tiny=plan.dry, peer=peer)
    plan.progress(f"{name}: {made.count:,} parameters, checked")
    return made


def _static(plan: Plan, models: model.Models, *runs: tuple[str, int]) -> Iterator[Row]:
    for mode, batch in runs:
        try:
            yield from decode.rows(models, mode, batch, progress=plan.progress, dry=plan.dry, **plan.static)
        except torch.OutOfMemoryError:
            yield absent("decode/patched", "does not fit the device", models.parameters(mode=mode, batch=batch))
        except Exception as error:  # the compiler has many ways to fail; the other modes go on
            note = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            yield refused("decode/patched", models.parameters(mode=mode, batch=batch), note)


def model_decode(plan: Plan) -> Iterator[Row]:
    """Decode at 1 row, then at 16: eager after short prompts, then the hand-captured CUDA graph."""
    models = _models(plan, MAIN)
    for batch in (1, 16):
        yield from model.eager_rows(models, plan.eager, batch)
        yield from _static(plan, models, ("graph", batch))


def model_compiled(plan: Plan) -> Iterator[Row]:
    """Decode with a static cache under torch.compile: one row, then 16, then the compiler's own CUDA graphs."""
    models = _models(plan, MAIN, peer=False)
    yield from _static(plan, models, *((mode, batch) for batch in (1, 16) for mode in COMPILED))


def model_prefill(plan: Plan) -> Iterator[Row]:
    """Long prompts: seconds and peak memory. The released scan, a token at a time, is in the first length alone."""
    models = _models(plan, MAIN)
    for length in plan.lengths:
        try:
            yield from model.prefill_rows(models, length, turns=3 if plan.dry else PREFILL_TURNS)
        except torch.OutOfMemoryError:
            yield absent("prefill/patched", "does not fit the device", models.parameters(batch=1, tokens=length))
        if models.variants.pop("released", None) is not None:
            models.refusals["released"] = absent("", f"left out beyond {plan.lengths[0]} tokens: no time")


def other_model(plan: Plan, name: str) -> Iterator[Row]:
    """What the first backbone gets in several parts, for another one."""
    models = _models(plan, name, peer=plan.full)
    yield from _static(plan, models, ("graph", 1), ("graph", 16))
    yield from model.eager_rows(models, plan.eager, 1)
    for length in plan.lengths if plan.full else plan.lengths[:1]:
        yield from model.prefill_rows(models, length, turns=3)
    if plan.full:
        yield from model.eager_rows(models, plan.eager, 16)
        yield from _static(plan, models, *((mode, batch) for mode in COMPILED for batch in (1, 16)))


def scan_peers(plan: Plan) -> Iterator[Row]:
    """The scan and its gradient against peers."""
    yield from kernels.released_rows(plan.scans, plan.gradients, plan.device, plan.turns)
    yield from kernels.fla_rows(plan.scans, plan.device, plan.turns)


def microbenchmarks(plan: Plan) -> Iterator[Row]:
    """Every kernel, against the roofline."""
    bandwidth = timing.copy_bandwidth(plan.device)
    yield counted("copy", {"device": plan.device}, "one tensor onto another, read and written", bandwidth=bandwidth)
    cases = kernels.full_sweep() if plan.full else kernels.short_sweep()
    yield from kernels.rows(kernels.tiny_sweep() if plan.dry else cases, plan.device, plan.turns)


def compiled_kernels(plan: Plan) -> Iterator[Row]:
    """Kernels beside what torch.compile makes of the reference."""
    cases = [kernels.Case("decode_"), kernels.Case("steer_heads_", 8192), kernels.Case("step"), kernels.Case("scan")]
    yield from kernels.compiled_rows(cases[-1:] if plan.dry else cases, plan.device, plan.turns)


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        run: its rows.
        steps: what it launches and compiles, and how long that should take.
    """

    run: Callable[[Plan], Iterator[Row]]
    steps: Callable[[Plan], Iterable[Estimate]]

    def estimate(self, plan: Plan) -> Estimate:
        """All of it, the start of the process too; that and half as much again is its limit (none in a full sweep)."""
        return sum(self.steps(plan), Estimate(seconds=budget.START))


PEERS = ("unpatched", "patched", "released")
OURS = PEERS[:2]


def _decode_steps(plan: Plan) -> Iterator[Estimate]:
    yield budget.of_model(MAIN)
    for _ in range(2):  # batch sizes
        yield budget.of_eager(MAIN, plan.eager, PEERS)
        yield budget.of_graph(MAIN, **plan.static)


def _prefill_steps(plan: Plan) -> Iterator[Estimate]:
    yield budget.of_model(MAIN)
    for length in plan.lengths:
        yield budget.of_prefill(MAIN, length, PREFILL_TURNS, PEERS if length == plan.lengths[0] else OURS)


def _other(name: str) -> Part:
    def steps(plan: Plan) -> Iterator[Estimate]:
        yield budget.of_model(name)
        yield from [budget.of_graph(name, **plan.static)] * 2
        yield budget.of_eager(name, plan.eager, OURS)
        yield budget.of_prefill(name, plan.lengths[0], 3, OURS)

    return Part(functools.partial(other_model, name=name), steps)


# What tells most comes first, so that a run that is cut off has it: decode, the scan, each kernel. The compiler takes
# minutes for whole models: what takes seconds comes before it.
PARTS = {
    "decode": Part(model_decode, _decode_steps),
    "scan-peers": Part(scan_peers, lambda plan: [budget.of_scan_peers(plan.scans, plan.gradients, plan.turns)]),
    "kernels": Part(microbenchmarks, lambda plan: [budget.of_kernels(kernels.short_sweep(), plan.turns)]),
    "counters": Part(counters.rows, lambda plan: [budget.of_counters(counters.CASES)]),
    "prefill": Part(model_prefill, _prefill_steps),
    "compiled": Part(model_compiled, lambda plan: [budget.of_compiled(MAIN, 4, plan.static)]),
    "compiled-kernels": Part(compiled_kernels, lambda plan: [budget.of_compiled_kernels(3)]),
    **{name: _other(name) for name in ("Qwen3-8B", "SmolLM3-3B")},
}
