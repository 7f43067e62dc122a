"""The packed row of the fast path on a CPU: ``steer_heads_`` and ``decode_`` with loops compiled by numba.

float32 rows; 16-bit ones, which numba cannot read, take the reference. Signatures as in ``reference_heads``.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import torch
from numba import njit

from deltamem_kernels.layout import HeadLayout, Steering, check_heads
from deltamem_kernels.rule import STATE_UPDATE_MODES, DeltaRule, check_arguments

from . import reference_heads
from .numba_loops import loops

delta = reference_heads.delta

# Every head takes the same instructions in the same order, wherever it lies, so sums may be reordered for the
# vector unit without a token's bits depending on its place. NaN and Inf keep their meaning.
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}
_ONE = np.float32(1.0)
_EMPTY = np.zeros(0, np.float32)
_EMPTY_WEIGHT = np.zeros((0, 0), np.float32)
_EMPTY_TABLE = np.zeros((1, 1, 0), np.float32)


@njit(**_OPTIONS)
def _add_delta(row, reads, weight, factor):
    """row += factor · weight reads for one token: row [n], reads [c], weight [n, c]."""
    for n in range(row.size):
        total = np.float32(0.0)
        for c in range(reads.size):
            total += weight[n, c] * reads[c]
        row[n] += factor * total


@njit(**_OPTIONS)
def _turn_heads(row, heads, dim, norm, eps, cos, sin):
    """RMS norm (norm [dim] or empty) and RoPE (cos, sin [rotary] or empty) of the heads in row [heads · dim]."""
    rotary = cos.size
    half = rotary // 2
    for h in range(heads):
        head = row[h * dim : (h + 1) * dim]
        if norm.size:
            square = np.float32(0.0)
            for j in range(dim):
                square += head[j] * head[j]
            inverse = _ONE / np.float32(np.sqrt(square / np.float32(dim) + eps))
            for j in range(dim):
                head[j] = head[j] * inverse * norm[j]
        for j in range(half):
            low, high = head[j], head[j + half]
            head[j] = low * cos[j] - high * sin[j]
            head[j + half] = high * cos[j + half] + low * sin[j + half]


@njit(**_OPTIONS)
def _turn_tokens(packed, q, k, dim, q_norm, k_norm, eps, cos, sin):
    """``_turn_heads`` for packed [B, T, N]; cos and sin [1 or B, T, rotary]."""
    for b in range(packed.shape[0]):
        c = b if cos.shape[0] > 1 else 0
        for t in range(packed.shape[1]):
            _turn_heads(packed[b, t, : q * dim], q, dim, q_norm, eps, cos[c, t], sin[c, t])
            _turn_heads(packed[b, t, q * dim : (q + k) * dim], k, dim, k_norm, eps, cos[c, t], sin[c, t])


@njit(**_OPTIONS)
def _steer_rows(packed, reads, q, k, v, dim, q_weight, k_weight, v_weight, o_weight, factors, q_norm, k_norm, eps,
                cos, sin, delta):  # fmt: skip
    """One token a row: corrections, norms and RoPE in packed [B, N], and Δo in delta [B, N_o]."""
    k_first, v_first, end = q * dim, (q + k) * dim, (q + k + v) * dim
    for b in range(packed.shape[0]):
        row, read = packed[b], reads[b]
        if q_weight.size:
            _add_delta(row[:k_first], read, q_weight, factors[0])
        if k_weight.size:
            _add_delta(row[k_first:v_first], read, k_weight, factors[1])
        if v_weight.size:
            _add_delta(row[v_first:end], read, v_weight, factors[2])
        c = b if cos.shape[0] > 1 else 0
        _turn_heads(row[:k_first], q, dim, q_norm, eps, cos[c, 0], sin[c, 0])
        _turn_heads(row[k_first:v_first], k, dim, k_norm, eps, cos[c, 0], sin[c, 0])
        if delta.size:
            delta[b] = np.float32(0.0)
            _add_delta(delta[b], read, o_weight, factors[3])


def _array(tensor: torch.Tensor | None, empty: np.ndarray) -> np.ndarray:
    """A float32 tensor's memory, or ``empty`` for None; another dtype or layout is copied."""
    if tensor is None:
        return empty
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        tensor = tensor.float().contiguous()
    return tensor.numpy()


@functools.lru_cache(maxsize=64)
def _all_rows(batch: int, heads: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nothing masked [B, 1], row b's state in slot b, no state to be kept on the way."""
    return (
        np.ones((batch, 1), np.bool_),
        np.arange(batch, dtype=np.int64),
        np.empty((batch, 0, heads, rank, rank), np.float32),
    )


class _Arrays:
    """What the loops take of one layer's weights as arrays, and the tensors that they are.

    An array keeps its memory alive, so an address that has not changed is the same memory. Never changed once made:
    threads share it.
    """

    __slots__ = ("addresses", "factors", "gate_bias", "matrices", "norms", "tensors")

    def __init__(self, steering: Steering, gate_bias: torch.Tensor):
        found = (steering.q, steering.k, steering.v, steering.o, steering.q_norm, steering.k_norm, gate_bias)
        self.tensors = [tensor for tensor in found if tensor is not None]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.matrices = tuple(_array(weight, _EMPTY_WEIGHT) for weight in found[:4])
        self.norms = tuple(_array(norm, _EMPTY) for norm in found[4:6])
        self.gate_bias = _array(gate_bias, _EMPTY)
        self.factors = _factors(steering) if steering.scale_raw is None else None

    def are_the_tensors(self) -> bool:
        """Whether every array is its tensor's own memory, so that writes are seen."""
        return all(t.dtype == torch.float32 and t.is_contiguous() for t in self.tensors)

    def hold_for(self, gate_bias: torch.Tensor) -> bool:
        """Whether no tensor has moved since."""
        return self.tensors[-1] is gate_bias and [tensor.data_ptr() for tensor in self.tensors] == self.addresses


def _arrays(steering: Steering, gate_bias: torch.Tensor, prepared: dict | None) -> _Arrays:
    if prepared is None:
        return _Arrays(steering, gate_bias)
    found = prepared.get("numba")
    if found is None or not found.hold_for(gate_bias):
        found = _Arrays(steering, gate_bias)
        if found.are_the_tensors():
            prepared["numba"] = found
    return found


_last = threading.local()


def _tables(cos: torch.Tensor | None, sin: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of cosines and sines; every layer of a forward gets the same, so this thread's last are kept."""
    if cos is None:
        return _EMPTY_TABLE, _EMPTY_TABLE
    known, also, arrays = getattr(_last, "tables", (None, None, None))
    if cos is not known or sin is not also:
        arrays = _array(cos, _EMPTY_TABLE), _array(sin, _EMPTY_TABLE)
        if all(table.dtype == torch.float32 and table.is_contiguous() for table in (cos, sin)):
            _last.tables = cos, sin, arrays  # not copies: what is written to the tensors is seen
    return arrays


def _factors(steering: Steering) -> np.ndarray:
    """scale · c of q, k, v and o."""
    if steering.scale_raw is None:
        return np.full(4, steering.scale, np.float32)
    found = [reference_heads.factor(steering, head, torch.float32).item() for head in "qkvo"]
    return np.array(found, np.float32)


def _loops_take(packed: torch.Tensor, state: torch.Tensor | None = None) -> bool:
    """Whether the loops can take these tensors as they lie."""
    if packed.dtype != torch.float32 or not packed.is_contiguous():
        return False
    return state is None or (state.dtype == torch.float32 and state.is_contiguous())


def _steer_heads(packed, reads, layout: HeadLayout, steering: Steering, cos, sin) -> None:
    if packed.numel() == 0:
        return
    for n, head in enumerate("qkv"):
        weight = getattr(steering, head)
        if weight is not None:
            first, last = layout.span(head)
            rows = packed.view(-1, packed.shape[-1])[:, first:last]
            factor = float(_factors(steering)[n])
            rows.addmm_(reads.flatten(0, 1), weight.detach().float().t(), alpha=factor)
    if steering.q_norm is None and steering.k_norm is None and cos is None:
        return
    arrays = [_array(steering.q_norm, _EMPTY), _array(steering.k_norm, _EMPTY), np.float32(steering.eps)]
    tables = [_array(cos, _EMPTY_TABLE), _array(sin, _EMPTY_TABLE)]
    if cos is None:
        tables = [np.broadcast_to(_EMPTY_TABLE, (1, packed.shape[1], 0)).copy()] * 2
    # One thread: it is a thousandth of the matmuls' work, and others would wait for PyTorch's, which spin.
    _turn_tokens(packed.numpy(), layout.q, layout.k, layout.dim, *arrays, *tables)


def _decode(packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen, prepared=None):
    batch, first = packed.shape[0], layout.width
    rows = packed.numpy()
    projections = np.ascontiguousarray(rows[:, first : first + rule.width])[:, None]
    everything, places, nothing = _all_rows(batch, rule.heads, rule.rank)
    if slots is not None:
        places = slots.long().contiguous().numpy()
        if batch and int(places.max()) >= state.shape[0]:
            raise IndexError(f"slots: got {int(places.max())}, allowed −1 to {state.shape[0] - 1}")
    if mask is not None:
        everything = np.ascontiguousarray(mask.numpy())[:, None]
    arrays = _arrays(steering, gate_bias, prepared)
    reads = np.empty((batch, 1, rule.read_width), np.float32)
    run = loops(rule.rank)
    if frozen:
        states = _array(state, _EMPTY)
        run.read_rows(projections, everything, states, places, rule.heads, rule.normalize, reads)
    else:
        if skipped is None:
            skipped = torch.zeros(state.shape[0], dtype=torch.int32)
        run.scan_rows(
            projections, arrays.gate_bias, everything, state.numpy(), places, rule.heads,
            STATE_UPDATE_MODES.index(rule.mode), rule.row_gates, rule.has_lambda, rule.normalize, 0, reads, nothing,
            skipped.numpy(),
        )  # fmt: skip
    reads = reads[:, 0]
    addend = _EMPTY_WEIGHT if steering.o is None else np.empty((batch, steering.o.shape[0]), np.float32)
    factors = _factors(steering) if arrays.factors is None else arrays.factors
    _steer_rows(
        rows, reads, layout.q, layout.k, layout.v, layout.dim, *arrays.matrices, factors, *arrays.norms,
        np.float32(steering.eps), *_tables(cos, sin), addend,
    )  # fmt: skip
    return torch.from_numpy(reads), None if steering.o is None else torch.from_numpy(addend)


def _flat(rule: DeltaRule, layout: HeadLayout) -> tuple:
    rules = (rule.rank, rule.heads, rule.mode, rule.row_gates, rule.coupled, rule.normalize)
    return (*rules, layout.q, layout.k, layout.v, layout.dim, layout.rotary)


def _rule_and_layout(rank, heads, update, row_gates, coupled, normalize, q, k, v, dim, rotary):
    return DeltaRule(rank, heads, update, row_gates, coupled, normalize), HeadLayout(q, k, v, dim, rotary)


@torch.library.custom_op("deltamem_fast::steer_heads_numba", mutates_args=("packed",))
def _steer_heads_op(
    packed: torch.Tensor, reads: torch.Tensor, q_heads: int, k_heads: int, v_heads: int, dim: int, rotary: int,
    q: torch.Tensor | None, k: torch.Tensor | None, v: torch.Tensor | None, scale: float,
    scale_raw: torch.Tensor | None, scale_max: float, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
    eps: float, cos: torch.Tensor | None, sin: torch.Tensor | None,
) -> None:  # fmt: skip
    layout = HeadLayout(q_heads, k_heads, v_heads, dim, rotary)
    steering = Steering(q, k, v, None, scale, scale_raw, scale_max, q_norm, k_norm, eps)
    run = _steer_heads if _loops_take(packed) else reference_heads.steer_heads_
    run(packed, reads, layout, steering, cos, sin)


@_steer_heads_op.register_fake
def _(packed, reads, q_heads, k_heads, v_heads, dim, rotary, q, k, v, scale, scale_raw, scale_max, q_norm, k_norm,
      eps, cos, sin):  # fmt: skip
    return None


@torch.library.custom_op("deltamem_fast::decode_numba", mutates_args=("packed", "state", "skipped"))
def _decode_op(
    packed: torch.Tensor, gate_bias: torch.Tensor, state: torch.Tensor, skipped: torch.Tensor,
    rank: int, heads: int, update: str, row_gates: bool, coupled: bool, normalize: bool,
    q_heads: int, k_heads: int, v_heads: int, dim: int, rotary: int,
    q: torch.Tensor | None, k: torch.Tensor | None, v: torch.Tensor | None, o: torch.Tensor | None, scale: float,
    scale_raw: torch.Tensor | None, scale_max: float, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
    eps: float, cos: torch.Tensor | None, sin: torch.Tensor | None, mask: torch.Tensor | None,
    slots: torch.Tensor | None, frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rule, layout = _rule_and_layout(
        rank, heads, update, row_gates, coupled, normalize, q_heads, k_heads, v_heads, dim, rotary
    )
    steering = Steering(q, k, v, o, scale, scale_raw, scale_max, q_norm, k_norm, eps)
    reads, delta = _run_decode(
        packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen
    )  # fmt: skip
    return reads, packed.new_empty(0) if delta is None else delta


@_decode_op.register_fake
def _(packed, gate_bias, state, skipped, rank, heads, update, row_gates, coupled, normalize, q_heads, k_heads, v_heads,
      dim, rotary, q, k, v, o, scale, scale_raw, scale_max, q_norm, k_norm, eps, cos, sin, mask, slots,
      frozen):  # fmt: skip
    delta = packed.new_empty(0) if o is None else packed.new_empty(packed.shape[0], o.shape[0])
    return packed.new_empty(packed.shape[0], heads * rank, dtype=torch.float32), delta


def _run_decode(
    packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen, prepared=None
):  # fmt: skip
    if _loops_take(packed, state):
        return _decode(
            packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen, prepared
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
    """``reference_heads.steer_heads_`` on a CPU: same arguments, results and errors."""
    if check:
        check_heads(packed, layout, steering, cos, sin, reads.shape[-1])
    if torch.compiler.is_compiling():
        _steer_heads_op(
            packed, reads, layout.q, layout.k, layout.v, layout.dim, layout.rotary, *steering[:3], *steering[4:],
            cos, sin,
        )  # fmt: skip
    elif _loops_take(packed):
        _steer_heads(packed, reads, layout, steering, cos, sin)
    else:
        reference_heads.steer_heads_(packed, reads, layout, steering, cos, sin)


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
    arrived: torch.Tensor | None = None,
    frozen: bool = False,
    check: bool = True,
    prepared: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``reference_heads.decode_`` on a CPU: same arguments, results and errors."""
    if check:
        check_heads(packed, layout, steering, cos, sin, rule.read_width, rule)
        projections = packed[:, layout.width : layout.width + rule.width]
        check_arguments(projections, gate_bias, state, rule, mask=mask, slots=slots)
    if not torch.compiler.is_compiling():
        return _run_decode(
            packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, frozen, prepared
        )  # fmt: skip
    if skipped is None:
        skipped = torch.zeros(state.shape[0], dtype=torch.int32)
    reads, delta = _decode_op(
        packed, gate_bias, state, skipped, *_flat(rule, layout), *steering, cos, sin, mask, slots, frozen
    )
    return reads, None if steering.o is None else delta
