"""What every launcher does alike: allocate, check the device, launch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from ..rule import DeltaRule, check_arguments, check_dtype

Fields = TypeVar("Fields", bound=tuple)

# A warp on AMD's data-centre cards is 64 threads wide. A program of the recurrence gives one thread one column.
WARP = 64 if torch.version.hip else 32

MOST_REGISTERS = 255  # of a thread on NVIDIA

# Tests replace it, to fill the buffers with NaN first: an element that no kernel writes is then seen.
empty = torch.empty

# Set by ``report`` to a list, which then receives every launch instead of a device.
recorded = None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""
    return triton.knobs.runtime.interpret


def check_device(tensor: torch.Tensor) -> None:
    """Raises: ValueError if Triton cannot run on the tensor's device."""
    if not (tensor.is_cuda or recorded is not None or interpreted()):
        raise ArgumentError(f"tensors: on {tensor.device}; the Triton kernels need a GPU")


def check_reach(name: str, tensor: torch.Tensor, axes: int) -> None:
    """Rows, tokens and states have 64-bit offsets; inside a token, and inside a weight, they are 32-bit numbers.

    Raises: ValueError if the last ``axes`` axes of the tensor reach 2^31 elements or more.
    """
    first = tensor.ndim - axes
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape[first:], tensor.stride()[first:]) if n > 1)
    if reach >= 2**31:
        raise ValueError(
            f"{name}: got strides {list(tensor.stride())} at shape {list(tensor.shape)}, allowed a reach below 2^31 "
            f"elements along the last {axes} axes"
        )


def compiler_sees(tensors: tuple[torch.Tensor | None, ...]) -> tuple[bool, ...]:
    """What Triton compiles differently for from one tensor to the next, its dtype apart: whether it is aligned to 16
    bytes and, on AMD, whether all of its storage lies within 2 GiB."""
    seen = tuple([tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors])
    if torch.version.hip is None:
        return seen
    return seen + tuple([tensor is None or tensor.untyped_storage().nbytes() < 2**31 for tensor in tensors])


class Launched(NamedTuple):
    """A kernel that has been launched, for ``launch_again``: what Triton compiled, and how it was asked to.

    Attributes:
        kinds: the types of the arguments, in the kernel's order; named tuples reach the short way as plain ones.
    """

    kernel: Any
    compiled: Any
    kinds: tuple[type, ...]
    options: dict


def fixed(kind: type[Fields], **values) -> Fields:
    """A named tuple of a kernel's arguments, its fields in capitals wrapped, as Triton wants what it compiles in."""
    return kind(**{name: _constant(value) if name.isupper() else value for name, value in values.items()})


@functools.lru_cache(maxsize=None, typed=True)
def _constant(value) -> tl.constexpr:
    """``value`` wrapped, once for each type and value."""
    return tl.constexpr(value)


def launch(
    kernel, programs: int, tensor: torch.Tensor, *, num_warps: int, registers: int | None = None, **arguments
) -> Launched | None:
    """Launch ``kernel`` with a one-dimensional grid on the device of ``tensor`` → what ``launch_again`` takes, or None.

    registers: how many a thread may have; None leaves it to ptxas, which sometimes spills a few so that more warps fit
    beside each other.

    No FP fusion: of a·b + c·d the compiler would fuse one product here and the other there, from one copy of a
    function to the next, and what two kernels compute alike would differ in its last bits. The kernels say ``tl.fma``
    where they mean it. One stage: the loops fetch the next token themselves.

    From the second time on for what Triton compiles alike, it takes the short way (``launch_again``): Triton's own way
    to what it has compiled takes a hundred microseconds on the host for thirty arguments, which is longer than most of
    these kernels run.
    """
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}
    if registers is not None and WARP == 32:
        options["maxnreg"] = registers
    if recorded is not None:
        recorded.append((kernel, arguments, options))
        return None
    if interpreted():
        with _on_device_of(tensor):
            kernel[(programs,)](**arguments, **options)
        return None
    constant = _constant_parameters(kernel)
    values = [arguments[name] for name in constant]
    key = (
        id(kernel), tensor.device, num_warps, registers,
        *[value if fix else _compiled_for(value) for fix, value in zip(constant.values(), values)],
    )  # fmt: skip
    launched = _launched.get(key)
    if launched is not None:
        launch_again(launched, programs, tensor, values)
    else:
        with _on_device_of(tensor):
            compiled = kernel[(programs,)](**arguments, **options)
        if len(_launched) >= MOST_LAUNCHED:
            _launched.clear()
        launched = _launched[key] = Launched(kernel, compiled, tuple(map(type, values)), options)
    if notes.steps is not None:
        notes.steps.append((launched, programs, values))
    return launched


class _Notes(threading.local):
    """What ``replay`` notes: launches and allocations in order, while a thread's ``steps`` are a list."""

    steps: list[tuple] | None = None


notes = _Notes()
# By the kernel, the device and what Triton compiles differently for. An entry holds its kernel, whose id stays its own.
_launched: dict[tuple, Launched] = {}
MOST_LAUNCHED = 4096
_parameters: dict[int, tuple[Any, dict[str, bool]]] = {}


def _constant_parameters(kernel) -> dict[str, bool]:
    """The kernel's parameters, and whether each is compiled in."""
    found = _parameters.get(id(kernel))
    if found is None:
        found = _parameters[id(kernel)] = kernel, {p.name: p.is_constexpr for p in kernel.params}
    return found[1]


def _compiled_for(value):
    """What Triton compiles differently for in an argument, or more: dtype and alignment of a tensor (and reach, on
    AMD), whether an integer is 1, a multiple of 16 or past 32 bits, and a constant as it is."""
    if isinstance(value, torch.Tensor):
        seen = value.dtype, value.data_ptr() % 16 == 0
        return seen if torch.version.hip is None else (*seen, value.untyped_storage().nbytes() < 2**31)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        kind = "1" if value == 1 else "16" if value % 16 == 0 else "any"  # True would equal 1
        return kind, -(2**31) <= value < 2**31
    if isinstance(value, tuple):
        return tuple(map(_compiled_for, value))
    return value.value if isinstance(value, tl.constexpr) else type(value)


def launch_again(launched: Launched, programs: int, tensor: torch.Tensor, values: Sequence) -> None:
    """Launch what ``launch`` has launched, with other arguments, in the kernel's order; named tuples may be plain ones.

    For arguments of the same types, alignments and integers alone: nothing looks at them, which is what costs most of
    the time of a launch with many. Once a process, with and without tuples, Triton itself launches, and what
    it hands to its launcher is compared with what would be handed over here. If that is another thing, or if somebody
    has hooked onto launches, Triton launches, every time.
    """
    with _on_device_of(tensor):
        runtime = triton.knobs.runtime
        if _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook):
            _launch_plainly(launched, programs, values)
            return
        known = _launchers_known.get(_way(launched))
        if known is None:
            _launch_and_compare(launched, programs, values)
        elif known:
            compiled = launched.compiled
            active = triton.runtime.driver.active
            stream = active.get_current_stream(active.get_current_device())
            compiled.run(
                programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values
            )  # fmt: skip
        else:
            _launch_plainly(launched, programs, values)


# By Triton's version and whether there are tuples: whether its launcher is handed what ``launch_again`` hands to it.
_launchers_known: dict[tuple[str, bool], bool] = {}
_comparing = threading.Lock()


def _way(launched: Launched) -> tuple[str, bool]:
    return triton.__version__, any(hasattr(kind, "_fields") for kind in launched.kinds)


def _hooked(hook) -> bool:
    """Whether a hook of Triton's has anything to call: None and chains that nobody has joined have not."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _launch_plainly(launched: Launched, programs: int, values: Sequence) -> None:
    named = [kind(*value) if hasattr(kind, "_fields") else value for kind, value in zip(launched.kinds, values)]
    launched.kernel[(programs,)](*named, **launched.options)


def _launch_and_compare(launched: Launched, programs: int, values: Sequence) -> None:
    """Launch as Triton does, and note whether it hands to its launcher what ``launch_again`` would."""
    compiled, here, handed = launched.compiled, threading.get_ident(), []
    with _comparing:
        places = vars(compiled)
        run = places.get("_run")
        if run is None:  # it is not where Triton's launches up to 3.9 find it
            _launchers_known[_way(launched)] = False
            _launch_plainly(launched, programs, values)
            return

        def noting(*given):
            if threading.get_ident() == here:
                handed.append(given)
            return run(*given)

        places["_run"] = noting
        try:
            _launch_plainly(launched, programs, values)
        finally:
            places["_run"] = run
        active, runtime = triton.runtime.driver.active, triton.knobs.runtime
        stream = active.get_current_stream(active.get_current_device())
        ours = (programs, 1, 1, stream, compiled.function, compiled.packed_metadata)
        hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
        _launchers_known[_way(launched)] = (
            len(handed) == 1
            and _same(handed[0][:6], ours)
            and _same(handed[0][7:], (*hooks, *values))  # between them: what hooks are told
        )


def _same(one, other) -> bool:
    """Whether arguments are the same tensors, numbers and constants, in tuples alike."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and isinstance(one, int | float | str) and one == other)


def _on_device_of(tensor: torch.Tensor):
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def matrix_precision() -> str:
    """How the matrix units multiply float32: NVIDIA's take 11 bits, and three products come to 22; AMD's have 24."""
    return "ieee" if WARP == 64 else "tf32x3"


def narrow_reads(width: int, *weights: torch.Tensor | None) -> bool:
    """Whether reads of ``width`` numbers times these weights are two bfloat16 products; see ``times_reads``.

    The interpreter would multiply the bits of bfloat16 numbers.
    """
    bfloat16 = all(weight is None or weight.dtype == torch.bfloat16 for weight in weights)
    return bfloat16 and width <= 8 and not interpreted()


def half_or_single(name: str, tensor: torch.Tensor | None) -> None:
    """Raises: TypeError unless the tensor is bfloat16, float16 or float32, or None."""
    check_dtype(name, tensor, "bfloat16, float16 or float32", torch.bfloat16, torch.float16, torch.float32)


def check_tokens(
    projections: torch.Tensor, gate_bias: torch.Tensor | None, state: torch.Tensor | None, rule: DeltaRule, **given
) -> int:
    """``check_arguments``, and what the kernels of the recurrence cannot take besides → the number of sequences."""
    sequences = check_arguments(projections, gate_bias, state, rule, **given)
    check_device(projections)
    check_reach("projections", projections, 1)
    half_or_single("projections", projections)
    check_dtype("state", state, "float32", torch.float32)  # the reference alone takes float64
    if gate_bias is not None:
        check_reach("gate_bias", gate_bias, 1)
    return sequences


def check_counts(name: str, counts: torch.Tensor | None, length: int) -> None:
    """Raises: ValueError unless the counts are int32 [length], or None."""
    if counts is not None and (counts.dtype != torch.int32 or tuple(counts.shape) != (length,)):
        raise ArgumentError(f"{name}: got {counts.dtype} {list(counts.shape)}, allowed int32 [{length}]")


def bytes_and_slots(
    mask: torch.Tensor | None, slots: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mask and slots as the kernels take them: one byte a token, and no strides."""
    return None if mask is None else mask.view(torch.uint8), None if slots is None else slots.contiguous()


def tile(rule: DeltaRule) -> tuple[int, int]:
    """Rows and columns of a tile: at most 16 numbers for each thread of a warp."""
    rows = next_power_of_two(rule.rank)
    return rows, max(1, min(WARP, 16 * WARP // rows))


def whole_keys(rule: DeltaRule, projections: torch.Tensor) -> bool:
    """Whether one aligned access of at most 16 bytes fetches a head's whole q or k; see ``load_vector``.

    The compiler has to see it too, and all that Triton tells it of a stride is whether 16 divides it.
    """
    size = rule.rank * projections.element_size()
    return (
        rule.rank == next_power_of_two(rule.rank)
        and size <= 16
        and projections.stride(-1) == 1
        and all(stride % 16 == 0 for stride in projections.stride()[:-1])
        and projections.data_ptr() % 16 == 0
    )


def rule_flags(rule: DeltaRule, projections: torch.Tensor) -> dict:
    """What every kernel of the recurrence is compiled for. Without a guard (1, 1, inf) it has no instruction of one."""
    return {
        "HEADS": rule.heads,
        "RANK": rule.rank,
        "R": next_power_of_two(rule.rank),
        "MODE": rule.mode,
        "ROW_GATES": rule.row_gates,
        "HAS_LAMBDA": rule.has_lambda,
        "NORMALIZE": rule.normalize,
        "BETA_MAX": float(rule.beta_max),
        "KEEP_MAX": float(rule.keep_max),
        "VALUE_MAX": float(rule.value_max),
        "WHOLE": whole_keys(rule, projections),
    }


def strides(name: str, axes: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """``stride_{name}_{axis}`` for each of the axes; 0 without a tensor."""
    found = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"stride_{name}_{axis}": stride for axis, stride in zip(axes, found, strict=True)}


def state_strides(state: torch.Tensor | None) -> dict:
    """Strides, and whether the heads and rows of one state lie end to end, as the compiler then knows."""
    return strides("s", "nhij", state) | {"DENSE_STATE": state is not None and dense_state(state)}


def dense_state(state: torch.Tensor) -> bool:
    """Whether a state [N, H, r, r] has its heads and rows end to end."""
    heads, rank = state.shape[1], state.shape[-1]
    _, of_head, of_row, of_key = state.stride()
    return of_key == 1 and of_row == rank and (heads == 1 or of_head == rank * rank)
