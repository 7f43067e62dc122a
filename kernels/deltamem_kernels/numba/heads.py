"""The packed row of the fast path on a CPU: ``steer_heads_`` and ``decode_`` with loops compiled by numba.

float32 rows; 16-bit ones, which numba cannot read, take the reference. Signatures as in ``reference.heads``.
"""

from __future__ import annotations

import re

import numpy as np
import torch

from ..layout import HeadLayout, Steering, check_heads
from ..reference import heads as reference_heads
from ..rule import DeltaRule, check_arguments
from ..schemas import (
    LAYOUT,
    ROPE,
    ROWS,
    RULE,
    RULE_SIZE,
    STEERING,
    fake_decode,
    flat_layout,
    flat_rule,
    operator,
    or_empty,
)
from .recurrence import checked_slots, guard, rule_flags
from .rows import BLOCK, row_loop, turn_loop
from .threads import on_threads, threads_for

# Rows whose Δo may lie there through the attention; those of a longer prompt are made behind it, at a higher price, for
# there they might be what its peak memory consists of.
MOST_DELTAS = 8192
# As compiled programs name them.
_LAYOUT, _STEERING = re.sub(r"heads_(.)", r"\1_heads", LAYOUT), STEERING.replace("w_", "")
_EMPTY = np.zeros(0, np.float32)


def _array(tensor: torch.Tensor | None, empty: np.ndarray) -> np.ndarray:
    """A float32 tensor's memory, or ``empty`` for None; another dtype or layout is copied."""
    if tensor is None:
        return empty
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        tensor = tensor.float().contiguous()
    return tensor.numpy()


class _Layer:
    """What ``steer_rows`` takes of one layer from token to token, and the tensors that it is made of.

    Never changed once made: threads share it. The tensors are held, so an address that has not changed is the same
    memory.
    """

    __slots__ = ("addresses", "arrays", "factors", "layout", "o_rows", "read_width", "rule", "run", "table", "tensors")

    def __init__(self, rule: DeltaRule, layout: HeadLayout, steering: Steering, gate_bias: torch.Tensor):
        found = (gate_bias, *steering[:4], steering.q_norm, steering.k_norm)
        self.rule, self.layout = rule, layout
        self.tensors = [tensor for tensor in found if tensor is not None]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        arrays = [_array(tensor, _EMPTY) for tensor in found]
        factors = _factors(steering, rule)
        self.read_width, self.o_rows = rule.read_width, 0 if steering.o is None else steering.o.shape[0]
        numbers = [*rule_flags(rule), *flat_layout(layout), self.o_rows]
        numbers += [array.ctypes.data if array.size else 0 for array in arrays]
        table = np.array(numbers, np.int64)
        self.arrays = (*arrays, factors, table)
        self.table = table.ctypes.data
        self.factors = factors.ctypes.data if steering.scale_raw is None else None
        self.run = row_loop(rule.rank)

    def are_the_tensors(self) -> bool:
        """Whether every array is its tensor's own memory, so that writes are seen."""
        return all(t.dtype == torch.float32 and t.is_contiguous() for t in self.tensors)

    def holds_for(self, rule: DeltaRule, layout: HeadLayout, gate_bias: torch.Tensor) -> bool:
        """Whether it was made of these, and no tensor has moved since."""
        if self.rule is not rule or self.layout is not layout or self.tensors[0] is not gate_bias:
            return False
        return [tensor.data_ptr() for tensor in self.tensors] == self.addresses


def _layer(rule, layout, steering: Steering, gate_bias: torch.Tensor, workspace: dict | None) -> _Layer:
    found = None if workspace is None else workspace.get("numba")
    if found is None or not found.holds_for(rule, layout, gate_bias):
        found = _Layer(rule, layout, steering, gate_bias)
        if workspace is not None and found.are_the_tensors():
            workspace["numba"] = found
    return found


def _plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of ``dtype``: itself, or a copy."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def _factors(steering: Steering, rule: DeltaRule | None = None) -> np.ndarray:
    """scale · c of q, k, v and o, the norms' eps, and of a ``rule`` its guard."""
    scales = [steering.scale] * 4
    if steering.scale_raw is not None:
        scales = [reference_heads.factor(steering, head, torch.float32).item() for head in "qkvo"]
    return np.array([*scales, steering.eps, *(() if rule is None else guard(rule))], np.float32)


def _loops_take(packed: torch.Tensor, state: torch.Tensor | None = None, skipped: torch.Tensor | None = None) -> bool:
    """Whether the loops can take these tensors as they lie."""
    # Tensors without storage (FakeTensorMode) are of another type: their address is 0.
    if type(packed) is not torch.Tensor or packed.dtype != torch.float32 or not packed.is_contiguous():
        return False
    if state is not None and (state.dtype != torch.float32 or not state.is_contiguous()):
        return False
    return skipped is None or (skipped.dtype == torch.int32 and skipped.is_contiguous())


def _steer_heads(packed, reads, layout: HeadLayout, steering: Steering, cos, sin) -> None:
    if packed.numel() == 0:
        return
    factors = _factors(steering)
    for n, head in enumerate("qkv"):
        weight = getattr(steering, head)
        if weight is not None:
            first, last = layout.span(head)
            rows = packed.view(-1, packed.shape[-1])[:, first:last]
            rows.addmm_(reads.flatten(0, 1), weight.detach().float().t(), alpha=float(factors[n]))
    if steering.q_norm is None and steering.k_norm is None and cos is None:
        return
    norms = [_array(norm, _EMPTY) for norm in (steering.q_norm, steering.k_norm)]
    norms_at = [norm.ctypes.data if norm.size else 0 for norm in norms]
    batch, length, width = packed.shape
    _held, (cos_at, sin_at, step) = _tables(cos, sin, length, layout.rotary)
    _run(
        turn_loop(), _blocks(batch, length), batch, packed.data_ptr(), width, batch, length, layout.q, layout.k,
        layout.dim, *norms_at, factors.ctypes.data, cos_at, sin_at, layout.rotary, step,
    )  # fmt: skip


def _blocks(batch: int, length: int) -> int:
    """The blocks of B sequences of T rows; 1, that is all at once, for few rows or a token of each."""
    return batch * -(-length // BLOCK) if length > 1 and batch * length > BLOCK else 1


def _run(function, parts: int, batch: int, *arguments: int) -> None:
    """Call a loop over B sequences that has ``parts`` parts, on PyTorch's threads if it has several.

    Its last argument is what the threads share.
    """
    threads = threads_for(parts)
    if threads == 1:
        function(*arguments, 0)
        return
    work = np.zeros(2 + batch, np.int64)
    on_threads(function, (*arguments, work.ctypes.data), threads)
    if work[1] != parts:  # an exception in there is printed, not raised
        raise MemoryError(f"{parts - work[1]} of {parts} parts of a prompt were not computed")


def _tables(cos: torch.Tensor | None, sin: torch.Tensor | None, length: int, rotary: int) -> tuple[tuple, tuple]:
    """cos and sin [1 or B, T, rotary] as the loops take them: what is to be held, and addresses and ``step``."""
    if cos is None:
        return (), (0, 0, 0)
    cos, sin = _plain(cos, torch.float32), _plain(sin, torch.float32)
    return (cos, sin), (cos.data_ptr(), sin.data_ptr(), length * rotary if cos.shape[0] > 1 else 0)


def _steer_rows(
    packed, length, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen, workspace
):  # fmt: skip
    """``steer_rows`` of packed rows [B · T, N] → the reads [B · T, H·r], and Δo [B · T, N_o].

    Δo is None without o's weight and for more than ``MOST_DELTAS`` rows.
    """
    layer = _layer(rule, layout, steering, gate_bias, workspace)
    count = packed.shape[0]
    reads, delta = packed.new_empty(count, layer.read_width), None
    slots_at = mask_at = delta_at = scratch_at = 0
    _held, (cos_at, sin_at, step) = _tables(cos, sin, length, layout.rotary)
    if layer.o_rows and count <= MOST_DELTAS:
        delta = packed.new_empty(count, layer.o_rows)
        delta_at = delta.data_ptr()
    if length > 1:
        scratch = packed.new_empty(count, rule.width)
        scratch_at = scratch.data_ptr()
    if slots is not None:
        slots = checked_slots(slots, state)
        slots_at = slots.data_ptr()
    if mask is not None:
        mask = _plain(mask, torch.bool)
        mask_at = mask.data_ptr()
    if skipped is None:
        skipped = state.new_zeros(state.shape[0], dtype=torch.int32)
    factors = layer.factors
    if factors is None:
        current = _factors(steering, rule)
        factors = current.ctypes.data
    # A name here holds every tensor until the call is over.
    batch = count // length
    blocks = _blocks(batch, length)
    parts = batch + blocks if blocks > 1 else 1  # each sequence's recurrence is one
    _run(
        layer.run, parts, batch, layer.table, factors, packed.data_ptr(), packed.shape[1], batch, length,
        state.data_ptr(), slots_at, mask_at, skipped.data_ptr(), cos_at, sin_at, step, int(frozen), reads.data_ptr(),
        delta_at, scratch_at,
    )  # fmt: skip
    return reads, delta


@operator(
    "deltamem_fast::steer_heads_numba",
    f"Tensor(a0!) packed, Tensor reads, {_LAYOUT}, {_STEERING.replace('Tensor? o, ', '')}, {ROPE}", "()",
    fake=lambda *_: None,
)  # fmt: skip
def _steer_heads_op(packed, reads, *given):
    *flat, cos, sin = given
    run = _steer_heads if _loops_take(packed) else reference_heads.steer_heads_
    run(packed, reads, HeadLayout(*flat[:5]), Steering(*flat[5:8], None, *flat[8:]), cos, sin)


@operator(
    "deltamem_fast::decode_numba",
    "Tensor(a0!) packed, Tensor gate_bias, Tensor(a2!) state, Tensor(a3!) skipped, "
    f"{RULE}, {_LAYOUT}, {_STEERING}, {ROPE}, {ROWS}, bool frozen",
    "(Tensor, Tensor)",
    fake=lambda packed, gate_bias, state, skipped, *given: fake_decode(packed, *given[:2], given[RULE_SIZE + 8]),
)
def _decode_op(packed, gate_bias, state, skipped, *given):
    *flat, cos, sin, mask, slots, frozen = given
    heads, rest = flat[RULE_SIZE : RULE_SIZE + 5], flat[RULE_SIZE + 5 :]
    reads, delta = _run_decode(
        packed, gate_bias, state, DeltaRule(*flat[:RULE_SIZE]), HeadLayout(*heads), Steering(*rest), cos, sin,
        mask, slots, skipped, frozen,
    )  # fmt: skip
    return reads, or_empty(delta, packed)


def _run_decode(
    packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen, workspace=None
):  # fmt: skip
    if _loops_take(packed, state, skipped):
        return _steer_rows(
            packed, 1, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen, workspace
        )  # fmt: skip
    return reference_heads.decode_(
        packed, gate_bias, state, rule, layout, steering, cos, sin,
        mask=mask, slots=slots, skipped=skipped, frozen=frozen,
    )  # fmt: skip


def steer_heads_(
    packed: torch.Tensor,
    reads: torch.Tensor,
    layout: HeadLayout,
    steering: Steering,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    check: bool = True,
) -> None:
    """``reference.heads.steer_heads_`` on a CPU: same arguments, results and errors."""
    if check:
        check_heads(packed, layout, steering, cos, sin, reads.shape[-1])
    if torch.compiler.is_compiling():
        _steer_heads_op(packed, reads, *flat_layout(layout), *steering[:3], *steering[4:], cos, sin)
    elif _loops_take(packed):
        _steer_heads(packed, reads, layout, steering, cos, sin)
    else:
        reference_heads.steer_heads_(packed, reads, layout, steering, cos, sin)


def workspace(kept: dict, counter: torch.Tensor | None) -> dict:
    """``reference.heads.workspace``: where what is made of a layer's weights is kept, for the next token."""
    return kept


def decode_(
    packed: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    layout: HeadLayout,
    steering: Steering,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    skipped: torch.Tensor | None = None,
    frozen: bool = False,
    check: bool = True,
    workspace: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``reference.heads.decode_`` on a CPU: same arguments, results and errors."""
    if check:
        check_heads(packed, layout, steering, cos, sin, rule.read_width, rule)
        projections = packed[:, layout.width : layout.width + rule.width]
        check_arguments(projections, gate_bias, state, rule, mask=mask, slots=slots)
    if not torch.compiler.is_compiling():
        return _run_decode(
            packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen, workspace
        )  # fmt: skip
    if skipped is None:
        skipped = state.new_zeros(state.shape[0], dtype=torch.int32)
    given = *flat_rule(rule), *flat_layout(layout), *steering, cos, sin, mask, slots, frozen
    reads, delta = _decode_op(packed, gate_bias, state, skipped, *given)
    return reads, None if steering.o is None else delta


def prefill_(
    packed: torch.Tensor,
    length: int,
    gate_bias: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    layout: HeadLayout,
    steering: Steering,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    mask: torch.Tensor | None,
    skipped: torch.Tensor,
    frozen: bool,
    workspace: dict | None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """A prompt in one call: ``decode_`` for T tokens a row → its reads [B · T, H·r] and Δo, see ``_steer_rows``.

    Args:
        packed: [B · T, N], contiguous.
        length: T, 1 or more.
        cos, sin: [1 or B, T, rotary]; mask: bool [B, T]. The rest as in ``decode_``; nothing is checked.

    Returns:
        None, and nothing is done, where the loops cannot take the tensors as they lie.
    """
    if torch.compiler.is_compiling() or not _loops_take(packed, state, skipped):
        return None
    return _steer_rows(
        packed, length, gate_bias, state, rule, layout, steering, cos, sin, mask, None, skipped, frozen, workspace
    )  # fmt: skip


def delta(
    reads: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``reference.heads.delta``; float32 without a norm in one operation."""
    if norm_weight is not None or not reads.dtype == weight.dtype == dtype == torch.float32 or reads.ndim != 2:
        return reference_heads.delta(reads, weight, scale, dtype, norm_weight=norm_weight, eps=eps)
    return reads.new_empty(reads.shape[0], weight.shape[0]).addmm_(reads, weight.t(), beta=0, alpha=scale)
