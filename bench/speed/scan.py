"""On a CPU: the scan and its gradient, the compiled loop against the per-token PyTorch loop, and a training step."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import re
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model
from deltamem_kernels.dispatch import installed
from deltamem_kernels.reference import recurrence as reference

from ..instrument import backbones
from ..instrument.rows import Row, absent, compare, measured, refused, spread
from ..instrument.timing import in_turns, wall
from . import peers, problems
from .model import loud, random_ids
from .problems import Case, relative_error

NO_NUMBA = "numba is not installed"
on_cpu = functools.partial(Case, dtype="float32")  # what a CPU runs
CASES = (
    *(on_cpu("scan", length) for length in (512, 2048, 8192)),
    on_cpu("scan", 2048, rank=16),
    on_cpu("scan", 2048, heads=4),
)
QUICK_CASES = (on_cpu("scan", 64), on_cpu("scan", 96, heads=2))  # one rank: each is compiled
MODEL_TOLERANCE = 1e-4  # of all gradients of a model in float32, against the reference's
GRADIENT_CASES = (
    *(on_cpu("scan_gradient", length) for length in (512, 2048, 8192)),
    on_cpu("scan_gradient", 200, batch=32),
)
QUICK_GRADIENT_CASES = (on_cpu("scan_gradient", 64), on_cpu("scan_gradient", 96, batch=2))
WRITTEN, READ = 512, 64  # tokens of a training step's two passes


def implementations() -> dict[str, Callable]:
    """What is measured, by name; ``reference`` is the baseline."""
    found = {"reference": reference.scan}
    if installed("numba"):
        from deltamem_kernels.numba import ops as numba_backend

        found["numba"] = numba_backend.scan
    return found


def call_of(scan: Callable, case: Case, inputs: dict[str, torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One call of an implementation, or its gradient, as the case says."""
    return functools.partial(problems.apply, case, inputs, SimpleNamespace(scan=scan))


def seconds(scan: Callable, case: Case) -> float:
    """How long one call on fresh inputs takes."""
    return wall(call_of(scan, case, problems.random_inputs(case, "cpu")), "cpu")


@torch.no_grad()
def compared(case: Case, scans: Mapping[str, Callable], baseline: str, turns: int, calls: int) -> dict[str, Row]:
    """Check every implementation against float64, then time in turns those that passed; rows by name.

    Args:
        case: a scan, or its gradient.
        scans: implementations by name.
        baseline: whose time the ratios are to.
        turns: of each turn what is not compiled runs once.
        calls: how often the compiled scan, which takes a fraction of that, runs in a turn. A turn's ratio is the
            baseline's time to the median of them.
    """
    prefix, inputs = case.kernel.replace("_", "-"), problems.random_inputs(case, "cpu")
    exact = problems.apply(case, problems.wide(inputs), problems.Exact)
    rows, errors = {}, {}
    for name, scan in scans.items():
        wrong, error = problems.fault(call_of(scan, case, inputs)(), exact)
        if wrong:
            rows[name] = refused(f"{prefix}/{name}", case.parameters, wrong, error)
        else:
            errors[name] = error
    times, ratios = ({name: [] for name in errors} for _ in range(2))
    for _ in range(turns):
        turn = {n: [seconds(scans[n], case) for _ in range(calls if n == "numba" else 1)] for n in errors}
        for name, found in turn.items():
            times[name] += found
            if name != baseline and baseline in turn:
                ratios[name].append(turn[baseline][0] / statistics.median(found))
    for name, error in errors.items():
        rows[name] = measured(f"{prefix}/{name}", case.parameters, times[name], error)
        if ratios[name]:
            rows[name].ratios[baseline] = list(spread(ratios[name]))
    if "numba" not in scans:
        rows["numba"] = absent(f"{prefix}/numba", NO_NUMBA, case.parameters)
    return rows


def released_row(case: Case, turns: int) -> Row:
    """The released package's loop over the tokens, in turns with this package's reference; or why it has no number."""
    scan = peers.released_scan("cpu")
    if scan is None:
        return absent("scan/released", peers.MISSING["released"], case.parameters)
    inputs = problems.random_inputs(case, "cpu")
    inputs["state"].zero_()
    theirs = inputs["state"][:, 0], *peers.released_inputs(inputs["projections"], inputs["bias"], case.rule)
    exact = problems.apply(case, problems.wide(inputs), problems.Exact)
    wrong, error = problems.fault(scan(*theirs)[1:], exact[:1])
    if wrong:
        return refused("scan/released", case.parameters, wrong, error)
    variants = {"released": lambda n: scan(*theirs), "reference": lambda n: seconds(reference.scan, case)}
    with torch.no_grad():
        times = in_turns(variants, turns, "cpu", warm_up=1)
    row = measured("scan/released", case.parameters, times["released"], error)
    return compare(row, "reference", times["reference"], times["released"])


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    """All rows of the scan benchmark."""
    rows = []
    for case in QUICK_CASES if quick else CASES:
        progress(f"scan: T {case.tokens}, r {case.rank}, H {case.heads}")
        turns, calls = (3, 2) if quick else (max(5, min(15, 30_000 // case.tokens)), 9)
        rows += compared(case, implementations(), "reference", turns, calls).values()
    progress("scan: peers")
    rows.append(released_row(QUICK_CASES[0] if quick else CASES[2], 3 if quick else 5))
    return [*rows, absent("scan/fla", "flash-linear-attention: needs a GPU")]


# --- gradients


def per_token(projections, gate_bias, state, rule) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain PyTorch loop, of which autograd keeps everything: reads and the last state."""
    factors = reference.split_projections(projections, gate_bias, rule)
    reads, states = reference.delta_rule(*factors, state)
    return torch.stack(reads, 1).flatten(2), states[-1]


def gradient_implementations() -> dict[str, Callable]:
    """What is measured, by name; ``per-token`` is the baseline. Each returns reads and the last state first."""
    return {"per-token": per_token, **implementations()}


def _status(name: str) -> int:
    """A size of this process in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) << 10


def peak_here(name: str, case: Case) -> int | None:
    """Bytes that this process grows by at the peak of a forward and backward; None where nobody counts them."""
    torch.set_num_threads(1)
    first, call = (
        call_of(gradient_implementations()[name], one, problems.random_inputs(one, "cpu"))
        for one in (replace(case, tokens=80, batch=1), case)
    )
    first()  # what is loaded once is loaded now
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak_memory(name: str, case: Case) -> int | None:
    """``peak_here`` in a fresh process, where no memory is left over to be used again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_here, name, case).result()


def gradient_rows(case: Case, turns: int, calls: int, memory: bool = True) -> list[Row]:
    """Check every implementation against the float64 reference, and time it (see ``compared``).

    Args:
        memory: measure peak memory too.
    """
    rows = compared(case, gradient_implementations(), "per-token", turns, calls)
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


def run_gradients(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    """All rows of the gradient benchmark."""
    rows = []
    for case in QUICK_GRADIENT_CASES if quick else GRADIENT_CASES:
        progress(f"gradient: T {case.tokens}, B {case.batch}")
        turns, calls = (3, 2) if quick else (max(5, min(15, 15_000 // case.tokens)), 9)
        # A short scan takes less than a process's own comings and goings.
        rows += gradient_rows(case, turns, calls, memory=case.tokens >= 2048 or case is QUICK_GRADIENT_CASES[0])
    progress("gradient: a training step")
    return rows + training_rows(quick, 3 if quick else 7)
