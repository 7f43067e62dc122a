"""One call of each kernel: fresh random inputs, the least bytes that it must move, and its check against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from deltamem_kernels.dispatch import Operators, operations
from deltamem_kernels.layout import HeadLayout, Steering
from deltamem_kernels.reference import ops as reference
from deltamem_kernels.rule import DeltaRule

LAYOUT = HeadLayout(q=32, k=8, v=8, dim=128, rotary=128)  # Qwen3-4B's and 8B's
OUT = 2560  # Qwen3-4B's hidden size, to which o_proj projects
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3}  # of an output in that dtype, by ‖out − exact‖ / ‖exact‖
CHECK_TOKENS = 300


@dataclass(frozen=True)
class Case:
    """Sizes of one call: B rows of T tokens, rank r, H state heads.

    Attributes:
        kernel: ``scan``, ``step``, ``read``, ``steer``, ``steer_heads_`` or ``decode_``; ``scan_gradient``,
            ``read_gradient`` and ``steer_gradient`` are the call and its gradient in every input.
        dtype: of projections, rows and weights; states, reads and biases are float32.
    """

    kernel: str
    tokens: int = 1
    batch: int = 1
    rank: int = 8
    heads: int = 1
    dtype: str = "bfloat16"

    @property
    def rule(self) -> DeltaRule:
        """The released recurrence at these sizes."""
        return DeltaRule(rank=self.rank, heads=self.heads)

    @property
    def parameters(self) -> dict:
        """A row's parameters."""
        names = ("tokens", "batch", "rank", "heads", "dtype")
        return {name: getattr(self, name) for name in names}

    @property
    def memory_bound(self) -> bool:
        """Whether a large one should stream at the memory's bandwidth: tokens do not wait for each other."""
        return self.kernel in ("read", "steer", "steer_heads_", "read_gradient", "steer_gradient")

    @property
    def forward(self) -> str:
        """The kernel whose gradient this is of, or the kernel itself."""
        return self.kernel.removesuffix("_gradient")


def least_bytes(case: Case) -> int:
    """Bytes that a call must move: each input read once, each output written once, what is updated twice."""
    w = getattr(torch, case.dtype).itemsize
    rule, rows, tokens = case.rule, case.batch, case.batch * case.tokens
    read, state = 4 * rule.read_width, 4 * case.heads * case.rank**2
    q_and_k = (LAYOUT.q + LAYOUT.k) * LAYOUT.dim
    q_weight = LAYOUT.q * LAYOUT.dim * rule.read_width * w
    turn = 2 * LAYOUT.rotary * w * case.tokens
    if case.kernel != case.forward:
        # Both passes read the inputs; the results' gradients come in, the inputs' go out (that of base is not moved).
        forward = least_bytes(replace(case, kernel=case.forward))
        weight = OUT * rule.read_width * w
        return (
            forward
            + {
                "scan": tokens * (2 * rule.width * w + read) + 4 * rows * state,
                "read": tokens * (2 * rule.width * w + read) + 2 * rows * state,
                "steer": tokens * (OUT * w + 2 * read) + 2 * weight,
            }[case.forward]
        )
    return {
        "scan": tokens * (rule.width * w + read) + 2 * rows * state,
        "step": rows * (rule.width * w + read + 2 * state),
        "read": tokens * (rule.width * w + read) + rows * state,
        "steer": tokens * (2 * OUT * w + read) + OUT * rule.read_width * w,
        "steer_heads_": tokens * (2 * q_and_k * w + read) + q_weight + turn,
        "decode_": rows * (2 * q_and_k * w + rule.width * w + read + 2 * state + OUT * w)
        + q_weight + OUT * rule.read_width * w + turn,
    }[case.kernel]  # fmt: skip


def resident_bytes(case: Case) -> int:
    """Bytes that one set of inputs and outputs takes, v and all."""
    whole = case.batch * case.tokens * (LAYOUT.width + case.rule.width) * getattr(torch, case.dtype).itemsize
    return max(least_bytes(case), whole if case.kernel in ("steer_heads_", "decode_") else 0)


def random_inputs(case: Case, device: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Fresh random arguments by name; the kernel's own names, no zeros."""
    dtype = dtype or getattr(torch, case.dtype)
    rule, b, t = case.rule, case.batch, case.tokens
    width = rule.read_width

    def random(*shape, kind=torch.float32):
        return torch.randn(*shape, device=device, dtype=kind)

    inputs = {
        "bias": random(rule.bias_width),
        "state": random(b, case.heads, case.rank, case.rank),
        "skipped": torch.zeros(b, dtype=torch.int32, device=device),
    }
    if case.forward in ("scan", "read"):
        inputs["projections"] = random(b, t, rule.width, kind=dtype)
    elif case.kernel == "step":
        inputs["projections"] = random(b, rule.width, kind=dtype)
    elif case.forward == "steer":
        inputs |= {"base": random(b, t, OUT, kind=dtype), "reads": random(b, t, width)}
        inputs["o"] = random(OUT, width, kind=dtype)
    else:
        angles = torch.rand(1, t, LAYOUT.rotary // 2, device=device).repeat(1, 1, 2) * 6.28
        inputs |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
        inputs |= {"q": random(LAYOUT.span("q")[1], width, kind=dtype), "o": random(OUT, width, kind=dtype)}
        inputs |= {name: 1 + random(LAYOUT.dim, kind=dtype) / 8 for name in ("q_norm", "k_norm")}
        lead = (b,) if case.kernel == "decode_" else (b, t)
        inputs["packed"] = random(*lead, LAYOUT.width + rule.width, kind=dtype)
        inputs["reads"] = random(b, t, width)
        inputs["arrived"] = torch.zeros(b, dtype=torch.int32, device=device)
    if case.kernel != case.forward:
        inputs |= {"d_reads": random(b, t, width), "d_state": torch.randn_like(inputs["state"])}
        inputs |= {"d_out": random(b, t, OUT, kind=dtype)} if case.forward == "steer" else {}
    return inputs


def _steering(inputs: dict, with_o: bool) -> Steering:
    norms = {name: inputs[name] for name in ("q_norm", "k_norm")}
    return Steering(q=inputs["q"], o=inputs["o"] if with_o else None, scale=2.0, **norms)


def _gradient(case: Case, inputs: dict[str, torch.Tensor], ops: Operators) -> tuple[torch.Tensor, ...]:
    """The gradients of one forward call, in the order of its inputs, for what its results are given."""
    names = {
        "scan": ("projections", "bias", "state"),
        "read": ("projections", "state"),
        "steer": ("reads", "o", "base"),
    }
    given = {"scan": ("d_reads", "d_state"), "read": ("d_reads",), "steer": ("d_out",)}[case.forward]
    with torch.enable_grad():
        leaves = {name: inputs[name].detach().requires_grad_() for name in names[case.forward]}
        found = apply(replace(case, kernel=case.forward), inputs | leaves, ops)
        return torch.autograd.grad(found, tuple(leaves.values()), [inputs[name] for name in given])


def apply(case: Case, inputs: dict[str, torch.Tensor], ops: Operators) -> tuple[torch.Tensor, ...]:
    """Call the kernel as ``ops`` has it.

    Returns:
        what it computed; what it changed in place among it.
    """
    i, rule = inputs, case.rule
    if case.kernel != case.forward:
        return _gradient(case, inputs, ops)
    if case.kernel == "scan":
        out = ops.scan(i["projections"], i["bias"], i["state"], rule)
        return out.reads, out.state
    if case.kernel == "step":
        return ops.step(i["projections"], i["bias"], i["state"], rule, skipped=i["skipped"]), i["state"]
    if case.kernel == "read":
        return (ops.read(i["projections"], i["state"], rule),)
    if case.kernel == "steer":
        return (ops.steer(i["base"], i["reads"], i["o"], 2.0),)
    turn = i["cos"], i["sin"]
    if case.kernel == "steer_heads_":
        ops.steer_heads_(i["packed"], i["reads"], LAYOUT, _steering(i, False), *turn)
        return (i["packed"][..., : LAYOUT.width],)
    reads, addend = ops.decode_(
        i["packed"], i["bias"], i["state"], rule, LAYOUT, _steering(i, True), *turn,
        skipped=i["skipped"], workspace=ops.workspace({}, i["arrived"]),
    )  # fmt: skip
    return reads, addend, i["packed"][..., : LAYOUT.width], i["state"]


def operators(device: str) -> Operators:
    """The implementation that ``backend="auto"`` takes on ``device``, for ``apply``."""
    return operations("auto", torch.device(device))


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖ in float64; NaN where anything is not finite."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return ((ours - exact).norm() / exact.norm()).item()


def _wide(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


# ``reference`` in float64, with the signatures of the kernels.
Exact = SimpleNamespace(**vars(reference) | {"scan": functools.partial(reference.scan, dtype=torch.float64)})


def check(case: Case, device: str) -> tuple[str, float]:
    """What is wrong with the kernel at these sizes (few tokens), or "", and the largest relative error."""
    small = replace(case, batch=min(case.batch, 3), tokens=min(case.tokens, CHECK_TOKENS))
    inputs = random_inputs(small, device)
    exact_inputs = {name: _wide(name, tensor.cpu().clone()) for name, tensor in inputs.items()}
    exact = apply(small, exact_inputs, Exact)
    worst = 0.0
    for ours, wanted in zip(apply(small, inputs, operators(device)), exact, strict=True):
        error = relative_error(ours.cpu(), wanted)
        allowed = TOLERANCES[str(ours.dtype).removeprefix("torch.")]
        if not error < allowed:
            return f"relative error {error:.1e} against float64, allowed under {allowed:.0e}", error
        worst = max(worst, error)
    return "", worst


def calls(case: Case, device: str, sets: int) -> list[Callable[[], object]]:
    """The kernel on each of ``sets`` fresh sets of inputs."""
    ops = operators(device)

    def on(inputs):
        return lambda: apply(case, inputs, ops)

    return [on(random_inputs(case, device)) for _ in range(sets)]


def compiled_reference(case: Case, device: str) -> Callable[[], object]:
    """The plain PyTorch definition under torch.compile, on fresh inputs. One token a row: a scan is a loop."""
    inputs = random_inputs(case, device)
    run = torch.compile(apply, dynamic=False)
    return lambda: run(case, inputs, reference)
