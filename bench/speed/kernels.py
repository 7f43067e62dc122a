"""Microbenchmarks: every kernel over tokens, rows, ranks and heads, against the roofline and peers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch

from ..instrument.rows import Row, absent, compare, measured, refused
from ..instrument.timing import capture, copy_bandwidth, in_turns, l2_bytes, peak_memory
from . import peers, problems
from .problems import Case

TOKENS = (1, 16, 128, 1024, 8192, 32768, 131_072)
BATCHES = (1, 16, 128, 512)
RANKS = (8, 16, 32, 4)
HEADS = (1, 4)
GRADIENTS = ("scan_gradient", "read_gradient", "steer_gradient")
BACK_TO_BACK = 8  # calls in the graph that shows what a call costs between others
SETS = 4


def full_sweep() -> list[Case]:
    """Every kernel at all its sizes: the recurrence over the full product, what moves rows at r = 8, H = 1."""
    shapes = list(itertools.product(TOKENS, BATCHES))
    ranks = list(itertools.product(RANKS, HEADS))
    cases = [Case("scan", t, b, r, h) for (r, h) in ranks for (t, b) in shapes]
    cases += [Case(kernel, 1, b, r, h) for kernel in ("step", "decode_") for (r, h) in ranks for b in BATCHES]
    for kernel in ("read", "steer", "steer_heads_"):
        cases += [Case(kernel, t, b) for (t, b) in shapes]
        cases += [Case(kernel, 8192, 1, r, h) for (r, h) in ranks if (r, h) != (8, 1)]
    for kernel in GRADIENTS:
        cases += [Case(kernel, t, b) for t in TOKENS[3:] for b in (1, 16)]
        cases += [Case(kernel, 8192, 1, r, h) for (r, h) in ranks if (r, h) != (8, 1)]
    return cases


def short_sweep() -> list[Case]:
    """What fits a few minutes: the released sizes, most telling first."""
    cases = [Case("decode_", 1, b) for b in (1, 16)] + [Case("step", 1, b) for b in (1, 16, 512)]
    cases += [Case("steer_heads_", t) for t in (1, 8192, 32768)] + [Case("steer", t) for t in (1, 8192, 32768)]
    cases += [Case("scan", t) for t in (1, 128, 2048, 8192, 32768, 131_072)]
    cases += [Case("read", 32768, 16), Case("scan", 2048, 16), Case("scan", 8192, rank=16), Case("scan", 8192, heads=4)]
    cases += [Case("scan_gradient", t) for t in (2048, 8192, 32768)]
    cases += [Case("steer_gradient", 32768), Case("read_gradient", 32768, 16)]
    return cases + [Case("decode_", 1, 512), Case("scan", 8192, rank=32), Case("scan_gradient", 8192, heads=4)]


def tiny_sweep() -> list[Case]:
    """One small case of each kernel."""
    kernels = ("scan", "read", "steer", "steer_heads_", *GRADIENTS)
    return [Case(kernel, 5) for kernel in kernels] + [Case("step"), Case("decode_")]


def room(device: str) -> int:
    """Bytes that inputs may take: half of what the GPU has free."""
    return torch.cuda.mem_get_info()[0] // 2 if device == "cuda" else 1 << 30


def row_of(case: Case, device: str, turns: int, check: Callable) -> Row:
    """Time one case: each call as a CUDA graph of its own, cold, on inputs that change from call to call."""
    name = f"kernel/{case.kernel}"
    one = 3 * problems.resident_bytes(case)  # a set, what is written, and what lies between two launches
    sets = next((count for count in (SETS, SETS // 2, 1) if count * one <= room(device)), 0)
    if not sets:
        return absent(name, f"does not fit the device: {one / 2**30:.0f} GiB", case.parameters)
    wrong, error = check(case)
    if wrong:
        return refused(name, case.parameters, wrong, error)
    calls = problems.calls(case, device, sets)
    replays = [capture(call, device) for call in calls]
    times = in_turns({name: lambda n: replays[n % sets]()}, turns, device)[name]
    row = measured(name, case.parameters, times, error)
    floor = problems.least_bytes(case)
    share = floor / row.p50 / copy_bandwidth(device)
    row.values |= {"bytes": floor, "bandwidth": floor / row.p50, "roofline": share}
    if case.memory_bound and floor > 2 * l2_bytes(device) > 0:
        row.values["streaming"] = share
    if floor < 64 << 20:
        many = capture(lambda: [calls[n % sets]() for n in range(BACK_TO_BACK)], device)
        spent = in_turns({name: lambda n: many()}, turns, device, cold=False)[name]
        row.values["back_to_back"] = sorted(spent)[len(spent) // 2] / BACK_TO_BACK
    return row


def rows(cases: Iterable[Case], device: str, turns: int) -> Iterator[Row]:
    """A row for each case; what does not fit the device says so. One case of each ``way`` is compared with float64."""
    found: dict[tuple, tuple[str, float]] = {}

    def check(case: Case) -> tuple[str, float]:
        if case.way not in found:
            found[case.way] = problems.check(case, device)
        return found[case.way]

    with torch.no_grad():
        for case in cases:
            try:
                yield row_of(case, device, turns, check)
            except torch.OutOfMemoryError:
                yield absent(f"kernel/{case.kernel}", "does not fit the device: out of memory", case.parameters)
            if device == "cuda":
                torch.cuda.empty_cache()


@torch.no_grad()
def _released_row(name: str, case: Case, device: str, turns: int, scan: Callable) -> Row:
    """Their scan and ours in turns on the same tokens, checked against each other."""
    rule, ops = case.rule, problems.operators(device)
    sets = []
    for _ in range(2):
        inputs = problems.random_inputs(case, device)
        inputs["state"].zero_()
        theirs = peers.released_inputs(inputs["projections"], inputs["bias"], rule)
        state = torch.zeros(case.batch, case.rank, case.rank, device=device, dtype=inputs["projections"].dtype)
        sets.append((inputs, (state, *theirs)))

    def ours(n):
        inputs, _ = sets[n % 2]
        return ops.scan(inputs["projections"], inputs["bias"], None, rule)

    def released(n):
        return scan(*sets[n % 2][1])

    error = problems.relative_error(released(0)[1], ours(0).reads)
    return _beside(name, case, device, turns, ours, released, error, "to the released scan")


def _beside(
    name: str, case: Case, device: str, turns: int, ours: Callable, released: Callable, error: float, what: str
) -> Row:
    """Both in turns, refused if they differ.

    Theirs is one launch (its gradient two) and takes long enough to hide it; ours is several short ones, timed as CUDA
    graphs and as Python launches them.
    """
    if not error < 5e-2:  # their inputs and states are rounded to bfloat16
        return refused(name, case.parameters, f"relative error {error:.1e} {what}", error)
    graphs = [capture(functools.partial(ours, n), device) for n in range(2)]
    variants = {"graph": lambda n: graphs[n % 2](), "eager": ours, "released": released}
    times = in_turns(variants, turns, device, warm_up=1)
    row = measured(name, case.parameters, times["graph"], error)
    compare(row, "released", times["released"], times["graph"])
    return compare(row, "released, ours launched from Python", times["released"], times["eager"])


def _gradient_row(name: str, case: Case, device: str, turns: int, scan: Callable) -> Row:
    """Forward and backward of both, in turns, and the memory that each takes beyond what it returns."""
    rule, ops = case.rule, problems.operators(device)
    inputs = problems.random_inputs(case, device)
    x, bias = inputs["projections"].requires_grad_(), inputs["bias"].requires_grad_()
    grad = torch.randn(case.batch, case.tokens, rule.read_width, device=device)
    theirs = [t.detach().requires_grad_() for t in peers.released_inputs(x.detach(), bias.detach(), rule)]
    state = torch.zeros(case.batch, case.rank, case.rank, device=device, dtype=x.dtype)
    rounded = grad.to(x.dtype)

    def ours(n=0):
        reads = ops.scan(x, bias, None, rule).reads
        return reads, *torch.autograd.grad(reads, (x, bias), grad)

    def released(n=0):
        reads = scan(state, *theirs)[1]
        return reads, *torch.autograd.grad(reads, theirs, rounded)

    # v is a plain slice of the projections, so its gradient is comparable.
    r = rule.rank
    error = problems.relative_error(released()[3], ours()[1][..., 2 * r : 3 * r])
    row = _beside(name, case, device, turns, ours, released, error, "to the released gradient of v")
    peaks = [peak_memory(call, device) for call in (ours, released) if row.status == "measured"]
    if any(peaks):
        # Both return reads and gradients, which nothing can save: what counts is what lies beside them at the peak.
        beside = [peak - sum(t.nbytes for t in call()) for peak, call in zip(peaks, (ours, released))]
        row.values |= {"peak_memory": peaks[0], "memory_beside_results": beside[0]}
        row.values["memory_to_released"] = beside[0] / beside[1]
    return row


def released_rows(lengths: Iterable[int], gradients: Iterable[int], device: str, turns: int) -> Iterator[Row]:
    """Scan over ``lengths`` and its gradient over ``gradients`` against the released package's, or rows that say why
    not."""
    scan = peers.released_scan(device)
    kind = "triton" if device == "cuda" else "auto"
    wanted = [(f"scan/{kind}", _released_row, length, turns) for length in lengths]
    wanted += [(f"scan-gradient/{kind}", _gradient_row, length, 3) for length in gradients]
    for name, row, length, times in wanted:
        case = Case("scan", length)
        if scan is None:
            yield absent(name, peers.MISSING["released"], case.parameters)
        else:
            yield row(name, case, device, times, scan)


def fla_rows(lengths: Iterable[int], device: str, turns: int) -> Iterator[Row]:
    """fla's chunked gated delta rule at its smallest head dimension: another function, for scale."""
    scan = peers.fla_scan(device)
    for length in lengths:
        parameters = {"tokens": length, "batch": 1, "rank": peers.FLA_DIM, "heads": 1, "dtype": "bfloat16"}
        if scan is None:
            yield absent("scan/fla", peers.MISSING["fla"], parameters)
            continue
        shape = (1, length, 1, peers.FLA_DIM)
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
        beta = torch.rand(shape[:3], device=device, dtype=torch.bfloat16)
        g = torch.nn.functional.logsigmoid(torch.randn(shape[:3], device=device))
        try:
            with torch.no_grad():
                times = in_turns({"fla": lambda n, t=(q, k, v, beta, g): scan(*t)}, turns, device)["fla"]
        except Exception as error:  # whatever a peer raises here leaves it out
            yield absent("scan/fla", f"failed: {type(error).__name__}", parameters)
            continue
        row = measured("scan/fla", parameters, times)
        row.note = "another function (one gate a token where this one has one a row), for scale"
        yield row


def compiled_rows(cases: Iterable[Case], device: str, turns: int) -> Iterator[Row]:
    """Kernels against torch.compile of the reference, in turns, where that is no loop over tokens."""
    for case in cases:
        name = f"compiled-reference/{case.kernel}"
        if case.kernel == "scan":
            yield absent(name, "a loop over the tokens: the compiler unrolls it", case.parameters)
            continue
        with torch.no_grad():
            try:
                replay = capture(problems.compiled_reference(case, device), device)
            except Exception as error:  # the compiler's or the capture's
                yield absent(name, f"not compiled: {type(error).__name__}", case.parameters)
                continue
            ours = capture(problems.calls(case, device, 1)[0], device)
            times = in_turns({"ours": lambda n, f=ours: f(), "compiled": lambda n, f=replay: f()}, turns, device)
        row = measured(name, case.parameters, times["compiled"])
        yield compare(row, "kernel", times["ours"], times["compiled"])
