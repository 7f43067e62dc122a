"""How long a run on a GPU should take, part by part, from what it launches and compiles: ``bench.gpu --plan``.

Launches are counted by calling the launchers with tensors that have shapes and no memory. The rates fit two runs on an
H100, whose hosts differed by a factor of 1.6; each is used with half as much again as a limit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch

from ..instrument import backbones
from ..instrument.devices import SLOWEST
from . import kernels, problems
from .model import Sizes

START = 12.0  # s: a process imports torch and transformers, and makes a CUDA context
COMPILE = 0.8  # s a kernel: Triton 3.6 for sm_90 on one core of a server's processor takes 0.5 to 4
LAUNCH = 28e-6  # s: a call from Python, of PyTorch's operators or of a kernel
REPLAY = 12e-6  # s: a CUDA graph of one call
CAPTURE = 0.02  # s: three runs before it, and the capture
FLUSH = 0.1e-3  # s: the L2 cache overwritten
CHECK = 0.5  # s: a forward kernel's outputs in float64 by the reference, on a CPU; a gradient takes four times that
BUILD = 3.0  # s: a model is made, copied, patched and checked, and 2 s more for each 4e9 parameters
STEP_OPERATIONS = {"unpatched": 56, "patched": 56, "released": 107}  # per decoded token and layer, at most
TOKEN = 2e-6  # s: the released scan, which takes one token after another
PROFILED = 1.0  # s: a launch under Nsight Compute
COMPILE_LAYER = 1.0  # s: torch.compile of a decoder's layer
COMPILE_FUNCTION = 20.0  # s: torch.compile of one function, Inductor started
TEST_KERNELS, TEST_PROCESSES = 900, 16  # distinct kernels of the tests that are not soak, by the launch recorder
TEST_WORK = 2400.0  # s: all those tests one after another, on a core of an H100's host
MARGIN = 1.5


@dataclass
class Estimate:
    """What a part does.

    Attributes:
        launches: of this project's kernels, all runs together.
        compiled: distinct kernels.
        seconds: all in all.
    """

    launches: int = 0
    compiled: int = 0
    seconds: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def limit(self) -> float:
        """Seconds that the part gets."""
        return math.ceil(self.seconds * MARGIN / 5) * 5


def launched(case: problems.Case) -> list[tuple]:
    """The launches of one call of a kernel at real sizes: name and what makes it a kernel of its own.

    Specialisation on alignment and on arguments that are 1 is left out: few calls differ in that alone.
    """
    from deltamem_kernels.triton import launch, ops

    inputs = problems.random_inputs(case, "meta")
    with mock.patch.object(launch, "recorded", []), torch.no_grad():
        problems.apply(case, inputs, ops)
        return [_distinct(*entry[:3]) for entry in launch.recorded]


def _distinct(kernel, arguments: dict, options: dict) -> tuple:
    fixed = {p.name for p in getattr(kernel, "params", ()) if p.is_constexpr}  # none in the interpreter

    def kept_of(name: str, value):
        if isinstance(value, tuple):
            return tuple(kept_of(field, part) for field, part in value._asdict().items())
        if isinstance(value, torch.Tensor):
            return value.dtype
        wrapped = getattr(value, "value", None)  # of a tuple, what is compiled in
        return value if name in fixed or value is None else wrapped

    kept = [(name, kept_of(name, value)) for name, value in arguments.items()]
    name = getattr(kernel, "fn", kernel).__name__
    return name, options.get("num_warps"), tuple(sorted(kept, key=lambda pair: pair[0]))


def of_kernels(cases: Iterable[problems.Case], turns: int) -> Estimate:
    """The microbenchmarks of ``kernels.rows``: checks, captures, timed replays."""
    total, seen, checked = Estimate(), set(), set()
    for case in cases:
        found = launched(case)
        small = problems.few(case)
        compiled = {*found, *launched(small)} - seen
        seen |= compiled
        passes = 0 if case.way in checked else 1 if case.kernel == case.forward else 4
        seconds = CHECK * passes * max(1, small.tokens) / 300
        checked.add(case.way)
        moved = problems.least_bytes(case)
        once = max(REPLAY, 2 * moved / SLOWEST.copy)
        runs = 4 * kernels.SETS + 3 + turns
        seconds += kernels.SETS * CAPTURE + runs * once + turns * FLUSH
        seconds += 4 * 2 * kernels.SETS * problems.resident_bytes(case) / SLOWEST.copy  # random numbers are made
        if moved < 64 << 20:
            runs += kernels.BACK_TO_BACK * (7 + turns)
            seconds += CAPTURE + kernels.BACK_TO_BACK * (7 + turns) * once
        total += Estimate(len(found) * runs, len(compiled), seconds + COMPILE * len(compiled))
    return total


def _model(name: str) -> tuple[int, int]:
    config = backbones.configuration(name)
    model = backbones.build(config, torch.bfloat16, "meta")
    return sum(p.numel() for p in model.parameters()), config.num_hidden_layers


def of_model(name: str) -> Estimate:
    """Making the variants and checking them: tokens of a prompt and two decoded ones, the reference among them."""
    count, layers = _model(name)
    reference = 26 * layers * 60 * LAUNCH * 2
    return Estimate(8 * layers, 8, BUILD + 2 * count / 4e9 + reference + 8 * COMPILE)


def of_eager(name: str, sizes: Sizes, variants: Sequence[str]) -> Estimate:
    """Turns of a prompt and the tokens decoded after it, each operator launched from Python."""
    count, layers = _model(name)
    turns, tokens = sizes.turns[1] + 1, sizes.decode
    step = sum(STEP_OPERATIONS[v] for v in variants) * layers * LAUNCH
    prompt = prefill_seconds(count, layers, sizes.prefill) + step / tokens
    released = "released" in variants
    seconds = turns * (tokens * step + len(variants) * prompt + released * layers * sizes.prefill * TOKEN)
    launches = turns * layers * (tokens + 4)
    return Estimate(launches, 4, min(seconds, max(sizes.budget * 2, seconds * sizes.turns[0] / turns)) + 4 * COMPILE)


def of_graph(name: str, context: int, tokens: int, turns: int) -> Estimate:
    """Decode by a captured graph: what is launched before the capture, then replays at the memory's speed."""
    count, layers = _model(name)
    warm = 2 * 4 * layers * 60 * LAUNCH * 2
    replay = 2 * count / SLOWEST.copy + layers * 56 * 2e-6
    return Estimate(layers * (4 + tokens * (turns + 1)), 2, warm + 2 * tokens * (turns + 1) * replay + 2 * COMPILE)


def prefill_seconds(count: int, layers: int, length: int, dim: int = 4096) -> float:
    """A forward of a prompt at half the matrix units' speed, attention at a third."""
    return 2 * count * length / (SLOWEST.flops / 2) + 2 * layers * length**2 * dim / (SLOWEST.flops / 3) + 0.02


def of_prefill(name: str, length: int, turns: int, variants: Sequence[str]) -> Estimate:
    """A warm-up, a run whose memory is counted, and the turns."""
    count, layers = _model(name)
    once = prefill_seconds(count, layers, length)
    released = ("released" in variants) * layers * length * TOKEN
    return Estimate((turns + 2) * layers * 6, 5, (turns + 2) * (len(variants) * once + released) + 5 * COMPILE)


def of_scan_peers(lengths: Iterable[int], gradients: Iterable[int], turns: int) -> Estimate:
    """Scans beside the released one, which takes one token after another, forward and (twice as long) backward."""
    total = Estimate()
    for kernel, sizes, runs, passes in (("scan", lengths, turns + 2, 1), ("scan_gradient", gradients, 3 + 4, 3)):
        for length in sizes:
            found = launched(problems.Case(kernel, length))
            seconds = runs * (passes * length * TOKEN + 2 * len(found) * LAUNCH + 1e-3) + 2 * CAPTURE
            compiled = len(set(found)) + passes
            total += Estimate(2 * runs * len(found), compiled, seconds + COMPILE * compiled)
    return total


def of_counters(cases: Iterable[problems.Case]) -> Estimate:
    """A process under Nsight Compute, which runs each launch a few times and takes its time over each."""
    found = [launch for case in cases for launch in launched(case)]
    return Estimate(2 * len(found), len(set(found)), START + PROFILED * len(found) + COMPILE * len(set(found)))


def of_compiled(name: str, compilations: int, static: dict[str, int]) -> Estimate:
    """Whole models under the compiler, patched and unpatched, and their tokens."""
    _, layers = _model(name)
    both = 2 * layers * COMPILE_LAYER
    decoded = of_graph(name, **static)
    return of_model(name) + Estimate(decoded.launches, 4, compilations * (both + decoded.seconds))


def of_compiled_kernels(count: int) -> Estimate:
    """Single functions under the compiler."""
    return Estimate(count, count, count * (COMPILE_FUNCTION + COMPILE))


def of_tests() -> Estimate:
    """The tests marked ``gpu`` and not ``soak``: half of it is compiling, a kernel at a time in each process."""
    return Estimate(0, TEST_KERNELS, 2 * START + TEST_WORK / TEST_PROCESSES)
