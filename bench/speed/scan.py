"""The scan on a CPU: the compiled loop against the per-token PyTorch loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from deltamem_kernels.dispatch import installed
from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule

from ..instrument.rows import Row, absent, compare, measured, refused, spread
from ..instrument.timing import in_turns, wall
from . import peers
from .problems import relative_error

TOLERANCE = 1e-5  # of what a scan returns, and of each of its gradients, against float64
NO_NUMBA = "numba is not installed"


@dataclass(frozen=True)
class Case:
    """Sizes of one scan: T tokens, rank r, H state heads, B rows."""

    tokens: int
    rank: int = 8
    heads: int = 1
    batch: int = 1

    @property
    def rule(self) -> DeltaRule:
        """The released recurrence at these sizes."""
        return DeltaRule(rank=self.rank, heads=self.heads)


CASES = (Case(512), Case(2048), Case(8192), Case(2048, rank=16), Case(2048, heads=4))
QUICK_CASES = (Case(64), Case(96, heads=2))  # one rank: each is compiled


def random_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fresh float32 projections [B, T, W], gate biases and a first state [B, H, r, r]."""
    rule = case.rule
    projections = torch.randn(case.batch, case.tokens, rule.width)
    return projections, torch.randn(rule.bias_width), torch.randn(case.batch, case.heads, case.rank, case.rank)


def error_of(scan: Callable, case: Case, inputs, expected) -> float:
    """The larger relative error of reads and final state against the oracle's; NaN if an output is not finite."""
    out = scan(*inputs, case.rule)
    errors = [relative_error(out.reads, expected.reads), relative_error(out.state, expected.state)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def seconds(scan: Callable, case: Case) -> float:
    """How long one scan of fresh inputs takes."""
    inputs, rule = random_inputs(case), case.rule
    return wall(lambda: scan(*inputs, rule), "cpu")


def implementations() -> dict[str, Callable]:
    """What is measured, by name; ``reference`` is the baseline."""
    found = {"reference": reference.scan}
    if installed("numba"):
        from deltamem_kernels.numba import ops as numba_backend

        found["numba"] = numba_backend.scan
    return found


def compared(
    prefix: str, scans: Mapping[str, Callable], parameters: dict, baseline: str, error_of: Callable, seconds: Callable,
    turns: int, calls: int,
) -> dict[str, Row]:  # fmt: skip
    """Check every implementation, then time in turns those that passed; rows by name.

    Args:
        prefix: of the rows' names.
        scans: implementations by name.
        baseline: whose time the ratios are to.
        error_of, seconds: the relative error of an implementation, and how long a call of it takes.
        turns: of each turn what is not compiled runs once.
        calls: how often the compiled scan, which takes a fraction of that, runs in a turn. A turn's ratio is the
            baseline's time to the median of them.
    """
    rows, errors = {}, {}
    for name, scan in scans.items():
        error = error_of(scan)
        if error < TOLERANCE:
            errors[name] = error
        else:
            note = f"relative error {error:.1e}, allowed under {TOLERANCE:.0e}"
            rows[name] = refused(f"{prefix}/{name}", parameters, note, error)
    times, ratios = ({name: [] for name in errors} for _ in range(2))
    for _ in range(turns):
        turn = {name: [seconds(scans[name]) for _ in range(calls if name == "numba" else 1)] for name in errors}
        for name, found in turn.items():
            times[name] += found
            if name != baseline and baseline in turn:
                ratios[name].append(turn[baseline][0] / statistics.median(found))
    for name, error in errors.items():
        rows[name] = measured(f"{prefix}/{name}", parameters, times[name], error)
        if ratios[name]:
            rows[name].ratios[baseline] = list(spread(ratios[name]))
    if "numba" not in scans:
        rows["numba"] = absent(f"{prefix}/numba", NO_NUMBA, parameters)
    return rows


@torch.no_grad()
def measure(case: Case, turns: int, calls: int) -> list[Row]:
    """Check every implementation against the float64 reference, and time it; see ``compared``."""
    parameters, inputs = asdict(case) | {"dtype": "float32"}, random_inputs(case)
    expected = reference.scan(*inputs, case.rule, dtype=torch.float64)
    rows = compared(
        "scan", implementations(), parameters, "reference", lambda scan: error_of(scan, case, inputs, expected),
        lambda scan: seconds(scan, case), turns, calls,
    )  # fmt: skip
    return list(rows.values())


def released_row(case: Case, turns: int) -> Row:
    """The released package's loop over the tokens, in turns with this package's reference; or why it has no number."""
    scan, parameters = peers.released_scan("cpu"), asdict(case) | {"dtype": "float32"}
    if scan is None:
        return absent("scan/released", peers.MISSING["released"], parameters)
    projections, bias, _ = random_inputs(case)
    inputs = torch.zeros(case.batch, case.rank, case.rank), *peers.released_inputs(projections, bias, case.rule)
    expected = reference.scan(projections, bias, None, case.rule, dtype=torch.float64).reads
    error = relative_error(scan(*inputs)[1], expected)
    if not error < TOLERANCE:
        return refused("scan/released", parameters, f"relative error {error:.1e}, allowed under {TOLERANCE:.0e}", error)
    variants = {"released": lambda n: scan(*inputs), "reference": lambda n: seconds(reference.scan, case)}
    with torch.no_grad():
        times = in_turns(variants, turns, "cpu", warm_up=1)
    row = measured("scan/released", parameters, times["released"], error)
    return compare(row, "reference", times["reference"], times["released"])


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    """All rows of the scan benchmark."""
    rows = []
    for case in QUICK_CASES if quick else CASES:
        progress(f"scan: T {case.tokens}, r {case.rank}, H {case.heads}")
        turns, calls = (3, 2) if quick else (max(5, min(15, 30_000 // case.tokens)), 9)
        rows += measure(case, turns, calls)
    progress("scan: peers")
    rows.append(released_row(QUICK_CASES[0] if quick else Case(8192), 3 if quick else 5))
    return [*rows, absent("scan/fla", "flash-linear-attention: needs a GPU")]
