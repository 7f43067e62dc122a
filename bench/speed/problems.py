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
# Of a call: the inputs that gradients are taken in, and the gradients of its results.
DIFFERENTIATED = {
    "scan": (("projections", "bias", "state"), ("d_reads", "d_state")),
    "read": (("projections", "state"), ("d_reads",)),
    "steer": (("reads", "o", "base"), ("d_out",)),
}


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

    @functools.cached_property
    def rule(self) -> DeltaRule:
        """The released recurrence at these sizes."""
        return DeltaRule(rank=self.rank, heads=self.heads)

    @property
    def parameters(self) -> dict:
        """A row's parameters."""
        return {name: getattr(self, name) for name in ("tokens", "batch", "rank", "heads", "dtype")}

    @property
    def way(self) -> tuple:
        """What one check is for: a short scan runs other kernels than a long one."""
        return self.kernel, self.rank, self.heads, self.tokens > 128

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
    q_weight, o_weight = (out * rule.read_width * w for out in (LAYOUT.q * LAYOUT.dim, OUT))
    turn = 2 * LAYOUT.rotary * w * case.tokens
    heads = 2 * q_and_k * w + read
    # Both passes read the inputs; the results' gradients come in, the inputs' go out (that of base is not moved).
    forward = least_bytes(replace(case, kernel=case.forward)) if case.kernel != case.forward else 0
    more = {
        "scan": tokens * (rule.width * w + read) + 2 * rows * state,
        "step": rows * (rule.width * w + read + 2 * state),
        "read": tokens * (rule.width * w + read) + rows * state,
        "steer": tokens * (2 * OUT * w + read) + o_weight,
        "steer_heads_": tokens * heads + q_weight + turn,
        "decode_": rows * (heads + rule.width * w + 2 * state + OUT * w) + q_weight + o_weight + turn,
        "scan_gradient": tokens * (2 * rule.width * w + read) + 4 * rows * state,
        "read_gradient": tokens * (2 * rule.width * w + read) + 2 * rows * state,
        "steer_gradient": tokens * (OUT * w + 2 * read) + 2 * o_weight,
    }
    return forward + more[case.kernel]


def resident_bytes(case: Case) -> int:
    """Bytes that one set of inputs and outputs takes, v and all."""
    whole = case.batch * case.tokens * (LAYOUT.width + case.rule.width) * getattr(torch, case.dtype).itemsize
    return max(least_bytes(case), whole if case.kernel in ("steer_heads_", "decode_") else 0)


def random_inputs(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Fresh random arguments by name; the kernel's own names, no zeros."""
    dtype = getattr(torch, case.dtype)
    rule, b, t = case.rule, case.batch, case.tokens
    width, lead = rule.read_width, (b,) if case.kernel in ("step", "decode_") else (b, t)

    def random(*shape, kind=torch.float32):
        return torch.randn(*shape, device=device, dtype=kind)

    inputs = {
        "bias": random(rule.bias_width),
        "state": random(b, case.heads, case.rank, case.rank),
        "skipped": torch.zeros(b, dtype=torch.int32, device=device),
    }
    if case.forward in ("scan", "read", "step"):
        inputs["projections"] = random(*lead, rule.width, kind=dtype)
    elif case.forward == "steer":
        inputs |= {"base": random(b, t, OUT, kind=dtype), "reads": random(b, t, width)}
        inputs["o"] = random(OUT, width, kind=dtype)
    else:
        angles = torch.rand(1, t, LAYOUT.rotary // 2, device=device).repeat(1, 1, 2) * 6.28
        inputs |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
        inputs |= {"q": random(LAYOUT.span("q")[1], width, kind=dtype), "o": random(OUT, width, kind=dtype)}
        inputs |= {name: 1 + random(LAYOUT.dim, kind=dtype) / 8 for name in ("q_norm", "k_norm")}
        inputs["packed"] = random(*lead, LAYOUT.width + rule.width, kind=dtype)
        inputs["reads"] = random(b, t, width)
        inputs["arrived"] = torch.zeros(b, dtype=torch.int32, device=device)
    if case.kernel != case.forward:
        inputs |= {"d_reads": random(b, t, width), "d_state": torch.randn_like(inputs["state"])}
        inputs |= {"d_out": random(b, t, OUT, kind=dtype)} if case.forward == "steer" else {}
    return inputs


def _gradient(case: Case, inputs: dict[str, torch.Tensor], ops: Operators) -> tuple[torch.Tensor, ...]:
    """The gradients of one forward call, in the order of its inputs, for what its results are given."""
    names, given = DIFFERENTIATED[case.forward]
    with torch.enable_grad():
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
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
        return ops.scan(i["projections"], i["bias"], i["state"], rule)[:2]
    if case.kernel == "step":
        return ops.step(i["projections"], i["bias"], i["state"], rule, skipped=i["skipped"]), i["state"]
    if case.kernel == "read":
        return (ops.read(i["projections"], i["state"], rule),)
    if case.kernel == "steer":
        return (ops.steer(i["base"], i["reads"], i["o"], 2.0),)
    turn, o = (i["cos"], i["sin"]), i["o"] if case.kernel == "decode_" else None
    steering = Steering(q=i["q"], o=o, scale=2.0, q_norm=i["q_norm"], k_norm=i["k_norm"])
    if case.kernel == "steer_heads_":
        ops.steer_heads_(i["packed"], i["reads"], LAYOUT, steering, *turn)
        return (i["packed"][..., : LAYOUT.width],)
    reads, addend = ops.decode_(
        i["packed"], i["bias"], i["state"], rule, LAYOUT, steering, *turn,
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


def wide(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of inputs on the CPU, numbers with a point in float64."""
    found = {name: tensor.cpu().clone() for name, tensor in inputs.items()}
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


# ``reference`` in float64, with the signatures of the kernels.
Exact = SimpleNamespace(**vars(reference) | {"scan": functools.partial(reference.scan, dtype=torch.float64)})


def check(case: Case, device: str) -> tuple[str, float]:
    """What is wrong with the kernel at these sizes (few tokens), or "", and the largest relative error."""
    small = few(case)
    inputs = random_inputs(small, device)
    exact = apply(small, wide(inputs), Exact)
    return fault(apply(small, inputs, operators(device)), exact)


def few(case: Case) -> Case:
    """A case with few rows and tokens, to be checked with."""
    return replace(case, batch=min(case.batch, 3), tokens=min(case.tokens, CHECK_TOKENS))


def fault(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> tuple[str, float]:
    """What is wrong with results, or "", and the largest relative error."""
    worst = 0.0
    for ours, wanted in zip(found, exact, strict=True):
        error = relative_error(ours.cpu(), wanted)
        allowed = TOLERANCES[str(ours.dtype).removeprefix("torch.")]
        if not error < allowed:
            return f"relative error {error:.1e} against float64, allowed under {allowed:.0e}", error
        worst = max(worst, error)
    return "", worst


def calls(case: Case, device: str, sets: int) -> list[Callable[[], object]]:
    """The kernel on each of ``sets`` fresh sets of inputs."""
    ops = operators(device)
    return [functools.partial(apply, case, random_inputs(case, device), ops) for _ in range(sets)]


def compiled_reference(case: Case, device: str) -> Callable[[], object]:
    """The plain PyTorch definition under torch.compile, on fresh inputs. One token a row: a scan is a loop."""
    return functools.partial(torch.compile(apply, dynamic=False), case, random_inputs(case, device), reference)
