"""Gradients on a CPU: the scan's forward and backward against the per-token PyTorch loop, and a training step."""

from __future__ import annotations

import copy
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model
from deltamem_kernels.dispatch import installed
from deltamem_kernels.reference import recurrence as reference

from ..instrument import backbones
from ..instrument.rows import Row, absent, compare, measured, refused
from ..instrument.timing import in_turns, wall
from .model import loud, random_ids
from .problems import relative_error
from .scan import NO_NUMBA, Case, compared, random_inputs
from .scan import implementations as scan_implementations

MODEL_TOLERANCE = 1e-4  # of all gradients of a model in float32, against the reference's
CASES = (Case(512), Case(2048), Case(8192), Case(200, batch=32))
QUICK_CASES = (Case(64), Case(96, batch=2))
WRITTEN, READ = 512, 64  # tokens of a training step's two passes


def per_token(projections, gate_bias, state, rule) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain PyTorch loop, of which autograd keeps everything: reads and the last state."""
    factors = reference.split_projections(projections, gate_bias, rule)
    reads, states = reference.delta_rule(*factors, state)
    return torch.stack(reads, 1).flatten(2), states[-1]


def implementations() -> dict[str, Callable]:
    """What is measured, by name; ``per-token`` is the baseline. Each returns reads and the last state first."""
    return {"per-token": per_token, **scan_implementations()}


def gradients(scan: Callable, rule, inputs, weights) -> tuple[torch.Tensor, ...]:
    """One forward and backward: the gradients of projections, gate biases and first state."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(scan(*leaves, rule)[:2], leaves, weights)


def random_problem(case: Case) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Fresh inputs of a scan, and gradients of what it returns."""
    inputs = random_inputs(case)
    reads = torch.randn(case.batch, case.tokens, case.rule.read_width)
    return inputs, (reads, torch.randn_like(inputs[2]))


def seconds(scan: Callable, case: Case) -> float:
    """How long the gradient of one scan of fresh inputs takes."""
    problem = random_problem(case)
    return wall(lambda: gradients(scan, case.rule, *problem), "cpu")


def error_of(scan: Callable, case: Case, problem, exact) -> float:
    """The largest relative error of the three gradients; NaN if one is not finite."""
    errors = [relative_error(*pair) for pair in zip(gradients(scan, case.rule, *problem), exact, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def _status(name: str) -> int:
    """A size of this process in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) << 10


def peak_here(name: str, case: Case) -> int | None:
    """Bytes that this process grows by at the peak of a forward and backward; None where nobody counts them."""
    torch.set_num_threads(1)
    scan = implementations()[name]
    gradients(scan, case.rule, *random_problem(Case(80, case.rank, case.heads)))  # what is loaded once is loaded now
    problem = random_problem(case)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    except OSError:
        return None
    before = _status("VmRSS")
    gradients(scan, case.rule, *problem)
    return _status("VmHWM") - before


def peak_memory(name: str, case: Case) -> int | None:
    """``peak_here`` in a fresh process, where no memory is left over to be used again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_here, name, case).result()


def measure(case: Case, turns: int, calls: int, memory: bool = True) -> list[Row]:
    """Check every implementation against the float64 reference, and time it (see ``scan.compared``).

    Args:
        memory: measure peak memory too.
    """
    parameters, problem = asdict(case) | {"dtype": "float32"}, random_problem(case)
    wide = [[t.double() for t in tensors] for tensors in problem]
    exact = gradients(lambda *t: reference.scan(*t, dtype=torch.float64), case.rule, *wide)
    rows = compared(
        "scan-gradient", implementations(), parameters, "per-token",
        lambda scan: error_of(scan, case, problem, exact), lambda scan: seconds(scan, case), turns, calls,
    )  # fmt: skip
    timed = [name for name, row in rows.items() if memory and row.status == "measured"]
    peaks = {name: peak for name in timed if (peak := peak_memory(name, case))}
    for name, peak in peaks.items():
        rows[name].values["peak_memory"] = peak
        if "per-token" in rows[name].ratios and "per-token" in peaks:
            rows[name].values["memory_to_per-token"] = peak / peaks["per-token"]
    return list(rows.values())


def training_step(model: nn.Module, written: torch.Tensor, read: torch.Tensor) -> list[torch.Tensor]:
    """A context is written, then a text is read from that memory alone; the gradients of the memory's parameters."""
    memory = MemoryState.zeros(model, written.shape[0])
    model(written, memory=memory, use_cache=False, logits_to_keep=1)
    memory.frozen = True
    loss = model(read, memory=memory, labels=read, use_cache=False).loss
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def trainable(backbone: nn.Module, backend: str) -> nn.Module:
    """``backbone`` patched, and nothing but the memory trains."""
    model = patch_model(backbone, DeltaMemConfig(), backend=backend)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".delta_memory." in name)
    return model


def training_rows(tiny: bool, turns: int) -> list[Row]:
    """A whole model's training step, its memory computed by numba and by the reference."""
    config = backbones.configuration("Qwen3-48M", tiny)
    written, read = (32, 8) if tiny else (WRITTEN, READ)
    name = "tiny Qwen3-48M" if tiny else "Qwen3-48M"
    parameters = {"model": name, "batch": 1, "tokens": written + read, "written": written, "dtype": "float32"}
    if not installed("numba"):
        return [absent("training-step/numba", NO_NUMBA, parameters)]
    bare = backbones.build(config, torch.float32, "cpu")
    models = {"reference": loud(trainable(copy.deepcopy(bare), "reference")), "numba": trainable(bare, "numba")}
    models["numba"].load_state_dict(models["reference"].state_dict())

    def fresh(length: int) -> torch.Tensor:
        return random_ids(config.vocab_size, 1, length, "cpu")

    ids = fresh(26), fresh(10)
    flat = {n: torch.cat([g.flatten() for g in training_step(m, *ids)]) for n, m in models.items()}
    error = relative_error(flat["numba"], flat["reference"])
    if not error < MODEL_TOLERANCE:
        note = f"relative error {error:.1e} of the gradients, allowed under {MODEL_TOLERANCE:.0e}"
        return [refused("training-step/numba", parameters, note, error)]
    variants = {n: lambda _, m=m: training_step(m, fresh(written), fresh(read)) for n, m in models.items()}
    times = in_turns(variants, turns, "cpu", warm_up=1)
    rows = [measured(f"training-step/{n}", parameters, times[n], error if n == "numba" else None) for n in models]
    compare(rows[1], "reference", times["reference"], times["numba"])
    return rows


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    """All rows of the gradient benchmark."""
    rows = []
    for case in QUICK_CASES if quick else CASES:
        progress(f"gradient: T {case.tokens}, B {case.batch}")
        turns, calls = (3, 2) if quick else (max(5, min(15, 15_000 // case.tokens)), 9)
        # A short scan takes less than a process's own comings and goings.
        rows += measure(case, turns, calls, memory=case.tokens >= 2048 or case is QUICK_CASES[0])
    progress("gradient: a training step")
    return rows + training_rows(quick, 3 if quick else 7)
