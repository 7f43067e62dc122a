"""What the compiler makes of every kernel: registers, shared memory, spills. Needs no GPU.

    python -m deltamem_kernels.report [--target sm_90]
    python -m deltamem_kernels.report --depth

Runs the launchers on tensors without memory, takes down what they would launch, and compiles that for each
target: what is reported is what a launch would run, specialised as Triton would (an alignment of 16 bytes, a
stride of 1). Not to be run with TRITON_INTERPRET=1. The last table (with --depth the only one) says how many steps
of a scan wait for one another, and what the transitions of its chunks weigh against the tokens. What the kernels
execute and ask of memory is counted on an emulator, which the repository has: make kernels-report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import constexpr

from .layout import HeadLayout, Steering
from .rule import DeltaRule
from .triton import launch as _launch
from .triton.decode import decode_
from .triton.heads import steer_heads_
from .triton.read import read
from .triton.read_backward import read_backward
from .triton.scan import choose_chunk, depth, scan
from .triton.scan_backward import depth as depth_backward
from .triton.scan_backward import scan_backward
from .triton.steer import steer
from .triton.steer_backward import steer_backward
from .triton.step import step

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target. Bytes, but for registers (per thread) and spills (registers)."""

    case: str
    kernel: str
    target: str
    registers: int
    shared: int
    stack: int
    spills: int
    instructions: int


@dataclass(frozen=True)
class Case:
    """One call of the launchers to report on."""

    dtype: torch.dtype = torch.bfloat16
    rank: int = 8
    heads: int = 1
    mask: bool = False
    length: int = 8192
    mode: str = "standard"
    row_gates: bool = True
    coupled: bool = True
    packed: bool = False
    checkpoints: bool = False
    strided: bool = False
    backward: bool = True
    guard: tuple[float, ...] = ()  # beta_max, keep_max, value_max; none
    parts: tuple[int | None, ...] = (None, 16, 1)  # programs per decoded row: a unit each, some units, all of it

    def __str__(self):
        words = [str(self.dtype).removeprefix("torch."), f"r{self.rank}", f"H{self.heads}", f"T{self.length}"]
        words += [name for name in ("mask", "packed", "checkpoints", "strided") if getattr(self, name)]
        words += ["guard"] * bool(self.guard)
        words += [self.mode] * (self.mode != "standard") + ["head-gates"] * (not self.row_gates)
        return " ".join(words + ["uncoupled"] * (not self.coupled))


# Pairs, not the full product: each dtype with both ranks, both numbers of heads, masked or not, chunked or not.
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case(BF16, 8, 1, False, parts=(None, 1)),
    Case(BF16, 8, 1, True, length=64, backward=False, parts=(16,)),
    Case(BF16, 16, 4, True, packed=True, checkpoints=True, parts=(1,)),
    Case(FP16, 8, 4, True, mode="lambda_outside", coupled=False, parts=(None,)),
    Case(FP16, 16, 1, False, length=64, checkpoints=True, backward=False, parts=(1,)),
    Case(FP32, 8, 4, False, length=64, row_gates=False, parts=(16,)),
    Case(FP32, 16, 1, True, mode="no_lambda", parts=(None,)),
    Case(BF16, 32, 1, False, strided=True, parts=(1,)),
    Case(BF16, 64, 1, True, parts=(None,)),
    Case(FP32, 64, 4, False, length=64, backward=False, parts=(1,)),
    Case(BF16, 8, 1, False, mode="lambda_outside", coupled=False, guard=(0.95, 0.99, 16.0), parts=(None, 1)),
]
# Every kernel, at the released adapters' rank and at two whose registers are scarce: --brief.
BRIEF = [CASES[0], CASES[2], CASES[8]]
LEAST = CASES[:1]  # every kernel, once: --least
# The full product of what the released adapters and their neighbours use: --full, and make soak.
PRODUCT = [
    Case(dtype, rank, heads, mask, length)
    for dtype in (BF16, FP16, FP32)
    for rank in (8, 16)
    for heads in (1, 4)
    for mask in (False, True)
    for length in (64, 8192)
]


@contextlib.contextmanager
def recording(warp: int):
    """Launches are taken down instead of made, on a device whose warps are so wide → their list."""
    saved = _launch.recorded, _launch.WARP
    _launch.recorded, _launch.WARP = [], warp
    try:
        yield _launch.recorded
    finally:
        _launch.recorded, _launch.WARP = saved


def launches(case: Case, warp: int) -> list:
    """The launches of every launcher for one case, with the given width of a warp."""
    rule = DeltaRule(case.rank, case.heads, case.mode, case.row_gates, case.coupled, True, *case.guard)
    meta = {"device": "meta"}
    rows = 2

    def tokens(*shape):
        width = rule.width + 3 * case.strided
        return torch.empty(*shape, width, dtype=case.dtype, **meta)[..., : rule.width]

    batch = 1 if case.packed else rows
    x, bias = tokens(batch, case.length), torch.empty(rule.bias_width, dtype=case.dtype, **meta)
    state = torch.empty(rows, rule.heads, rule.rank, rule.rank, **meta)
    mask = torch.empty(batch, case.length, dtype=torch.bool, **meta) if case.mask else None
    slots = torch.empty(rows, dtype=torch.int32, **meta) if case.packed else None
    cu_seqlens = torch.empty(rows + 1, dtype=torch.int32, **meta) if case.packed else None
    base = torch.empty(batch, case.length, 4096, dtype=case.dtype, **meta)
    weight = torch.empty(4096, rule.read_width, dtype=case.dtype, **meta)
    reads = torch.empty(batch, case.length, rule.read_width, **meta)
    every, norm_weight = 64 if case.checkpoints else 0, weight[:, 0] if case.mask else None
    with recording(warp) as found:
        # Scan, then what a decoded token and a whole prompt take.
        scan(x, bias, state, rule, mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=every)
        step_mask = torch.empty(rows, dtype=torch.bool, **meta) if case.mask else None
        step(tokens(rows), bias, state, rule, mask=step_mask, slots=slots)
        if not case.packed:
            read(x, state, rule, mask=mask)
        steer(base, reads, weight, 2.0, norm_weight=norm_weight)
        steer(base[:1, :1], reads[:1, :1], weight, 2.0, norm_weight=norm_weight)
        head_launches(case, rule)
        if case.backward:
            d_checkpoints = state.new_empty(case.length // every, *state.shape[1:]) if every else None
            scan_backward(
                reads, torch.empty_like(state), x, bias, state, rule, mask=mask, cu_seqlens=cu_seqlens, slots=slots,
                d_checkpoints=d_checkpoints, checkpoint_every=every,
            )  # fmt: skip
            if not case.packed:
                read_backward(reads, x, state, rule, mask=mask)
            # Weights of a float32 model on rows of another, where heads are several.
            steer_backward(base, reads, weight.float() if case.heads > 1 else weight, 2.0, norm_weight=norm_weight)
    return found


def head_launches(case: Case, rule: DeltaRule) -> None:
    """steer_heads_ and decode_ on the heads of Qwen3-4B; the masked cases are the unusual ones."""
    meta, few, outputs = {"device": "meta"}, 2, 2560
    layout = HeadLayout(32, 8, 8, 128, 64 if case.packed else 128)

    def half(*shape):
        return torch.empty(*shape, dtype=case.dtype, **meta)

    def count(rows):
        return torch.empty(rows, dtype=torch.int32, **meta)

    rows = {"q": layout.q * layout.dim, "o": outputs}
    if case.mask:
        rows |= {"k": layout.k * layout.dim, "v": layout.v * layout.dim}
    norm = None if case.checkpoints else half(layout.dim)
    steering = Steering(
        **{head: half(n, rule.read_width) for head, n in rows.items()},
        scale_raw=torch.empty(4, **meta) if case.mask else None, q_norm=norm, k_norm=norm,
    )  # fmt: skip
    turn = half(1, case.length, layout.rotary)
    width = layout.width + rule.width + 3 * case.strided
    reads = torch.empty(1, case.length, rule.read_width, **meta)
    steer_heads_(half(1, case.length, width), reads, layout, steering, turn, turn)
    turn, bias = turn[:, :1], torch.empty(rule.bias_width, **meta)
    given = {"slots": count(few)} if case.packed else {}
    if case.mask:
        given["mask"] = torch.empty(few, dtype=torch.bool, **meta)
    state = torch.empty(few, rule.heads, rule.rank, rule.rank, **meta)
    for parts in case.parts:
        decode_(
            half(few, width), bias, state, rule, layout, steering, turn, turn,
            workspace=count(few), skipped=count(few) if case.mask else None, parts=parts, **given,
        )  # fmt: skip
    if case.mask and None in case.parts:
        decode_(half(few, width), bias, state, rule, layout, steering, turn, turn, frozen=True, **given)


def source(kernel, arguments: dict) -> ASTSource:
    """A launch's arguments as Triton's run time would specialise them."""
    constants, attributes = {}, {}

    def kind(value, key: tuple[int, ...], is_constexpr: bool, fixed: bool):
        """The type of the argument at a place, or the types of a tuple's fields."""
        if isinstance(value, tuple):
            return type(value)(*(kind(v, (*key, n), isinstance(v, constexpr), fixed) for n, v in enumerate(value)))
        if is_constexpr or value is None or (isinstance(value, int) and value == 1 and fixed):
            constants[key] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[key] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and fixed:
            attributes[key] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {
        parameter.name: kind(
            arguments[parameter.name], (parameter.num,), parameter.is_constexpr, not parameter.do_not_specialize
        )
        for parameter in kernel.params
    }
    return ASTSource(kernel, signature, constants, attributes)


def _nvidia(binary: bytes) -> tuple[int, int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text, re.M)
    spills = sum(name.startswith(("LDL", "STL")) for name in instructions)
    return found["REG"], found["STACK"] + found["LOCAL"], spills, len(instructions)


def _amd(text: str) -> tuple[int, int, int, int]:
    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    body = re.findall(r"^\t(?:[sv]_|global_|ds_|buffer_|flat_|scratch_)\w+", text, re.M)
    spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    return value("vgpr_count"), value("private_segment_fixed_size"), spills, len(body)


def measure(target: str, case: Case, seen: set, most: int | None = None) -> list[Resources]:
    """Compile the launches of one case for one target, the first ``most`` of them, but for those ``seen`` before."""
    gpu, rows = TARGETS[target], []
    for kernel, arguments, options in launches(case, gpu.warp_size)[:most]:
        built = source(kernel, arguments)
        if built.hash() in seen:
            continue
        seen.add(built.hash())
        compiled = triton.compile(built, target=gpu, options=options)
        found = _nvidia(compiled.asm["cubin"]) if gpu.backend == "cuda" else _amd(compiled.asm["amdgcn"])
        registers, stack, spills, instructions = found
        rows.append(
            Resources(
                str(case), kernel.fn.__name__, target, registers, compiled.metadata.shared, stack, spills,
                instructions,
            )
        )  # fmt: skip
    return rows


def weights(rule: DeltaRule, length: int) -> tuple[int, int]:
    """Bytes of the transitions of a scan's chunks and of its tokens, one sequence in bfloat16, as a scan allocates."""
    with recording(_launch.WARP) as found:
        meta = {"dtype": torch.bfloat16, "device": "meta"}
        x = torch.empty(1, length, rule.width, **meta)
        scan(x, torch.empty(rule.bias_width, **meta), None, rule)
    maps = [a["transitions_ptr"] for _, a, _ in found if "transitions_ptr" in a]
    return sum({id(m): m.numel() * 4 for m in maps}.values()), x.numel() * 2


def print_depth() -> None:
    print(
        f"{'rank':>4}{'T':>9}{'chunk':>7}{'depth':>8}{'depth/√T':>10}{'backward':>10}{'map bytes':>13}"
        f"{'token bytes':>15}{'ratio':>7}"
    )
    for rank in (8, 16):
        rule = DeltaRule(rank)
        for power in range(0, 21, 2):
            length = 1 << power
            maps, tokens = weights(rule, length)
            steps = depth(rule, length)
            print(
                f"{rank:>4}{length:>9}{choose_chunk(rule, length):>7}{steps:>8}{steps / length**0.5:>10.2f}"
                f"{depth_backward(rule, length):>10}{maps:>13}{tokens:>14}{maps / tokens:>7.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--brief", action="store_true", help="every kernel, in few cases")
    sizes.add_argument("--least", action="store_true", help="every kernel, as the released adapters have it")
    sizes.add_argument("--full", action="store_true", help="the full product of dtypes, ranks, heads, masks, lengths")
    parser.add_argument("--depth", action="store_true", help="only how many steps of a scan wait for one another")
    options = parser.parse_args()
    if options.depth:
        return print_depth()
    targets = options.target or list(TARGETS)
    cases = BRIEF if options.brief else LEAST if options.least else PRODUCT if options.full else CASES
    print(f"Triton {triton.__version__}, torch {torch.__version__}; spills in registers, the rest in bytes")
    print(f"{'case':<50} {'kernel':<34}{'target':<7}{'regs':>5}{'shared':>7}{'stack':>6}{'spills':>7}{'instr':>6}")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TRITON_CACHE_DIR"] = directory
        for target in targets:
            seen: set = set()
            for case in cases:
                for row in measure(target, case, seen):
                    print(
                        f"{row.case:<50} {row.kernel:<34}{row.target:<7}{row.registers:>5}{row.shared:>7}"
                        f"{row.stack:>6}{row.spills:>7}{row.instructions:>6}",
                        flush=True,
                    )
    print()
    print_depth()


if __name__ == "__main__":
    main()
