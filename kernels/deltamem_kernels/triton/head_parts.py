"""What the two launches that steer heads share; the heads lie in packed rows [q heads | k heads | v heads | ...].

    x <- RoPE(rms_norm(x + scale · c · W reads))     q and k; v: the correction alone

RoPE turns pairs of numbers, so a head is two tiles of D / 2 numbers, ``lo`` and ``hi``; pair j < rotary / 2 is (j,
j + rotary / 2), and the pairs behind them, which are not turned, are (j + rotary / 2, j + D / 2): every number of
the head once, in pieces that lie together, and no number has to change threads.

A kernel's arguments travel in named tuples, tensors first, then what differs from call to call, then, in capitals,
what is compiled in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layout import HeadLayout, Steering
from ..rule import check_together
from .launch import check_device, check_reach, fixed, half_or_single, next_power_of_two, strides
from .primitives import sigmoid


class Kind(NamedTuple):
    """Heads of one kind (q, k or v), and what is done to them.

    FIRST, COUNT: which heads of the row they are. PLACE: of their raw scale. UNITS: how many units (heads that a
    program takes at a time) they make, 0 if nothing is done to them. ROTARY: numbers of a head that are turned.
    """

    w_ptr: torch.Tensor | None
    norm_ptr: torch.Tensor | None
    stride_w_n: int
    stride_w_c: int
    stride_norm: int
    FIRST: tl.constexpr
    COUNT: tl.constexpr
    PLACE: tl.constexpr
    UNITS: tl.constexpr
    ROTARY: tl.constexpr
    HAS_DELTA: tl.constexpr
    HAS_NORM: tl.constexpr


class Turn(NamedTuple):
    """RoPE's tables [B or 1, T, rotary]."""

    cos_ptr: torch.Tensor | None
    sin_ptr: torch.Tensor | None
    stride_cos_b: int
    stride_cos_t: int
    stride_cos_w: int
    stride_sin_b: int
    stride_sin_t: int
    stride_sin_w: int


class Factor(NamedTuple):
    """scale · c of each kind: c = sigmoid(raw) · scale_max, or 1."""

    raw_ptr: torch.Tensor | None
    stride_raw: int
    scale: float
    scale_max: float
    HAS_RAW: tl.constexpr


class Heads(NamedTuple):
    """What holds for heads of every kind.

    DIM: D. PAIRS: D / 2, rounded up to a power of two. UNIT: heads that a program takes at a time. READ_WIDTH: H·r.
    CHUNK: numbers of a read that are multiplied at once. DENSE: the rows of all weights lie end to end, and have a
    length that the compiler knows, hence the alignment of each.
    """

    eps: float
    DIM: tl.constexpr
    PAIRS: tl.constexpr
    UNIT: tl.constexpr
    READ_WIDTH: tl.constexpr
    CHUNK: tl.constexpr
    DENSE: tl.constexpr


@triton.jit
def pairs(o_j, DIM: tl.constexpr, ROTARY: tl.constexpr):
    """The two places of pair j in its head; both of o_j's shape."""
    if ROTARY == 0 or ROTARY == DIM:
        o_lo = o_j
        o_hi = o_j + DIM // 2
    else:
        TURN: tl.constexpr = ROTARY // 2
        HALF: tl.constexpr = DIM // 2
        # The compiler does not see through the choice: pieces of so many numbers lie together.
        PIECE: tl.constexpr = (TURN | HALF) & -(TURN | HALF)
        o_lo = tl.max_contiguous(tl.multiple_of(o_j + tl.where(o_j < TURN, 0, TURN), PIECE), PIECE)
        o_hi = tl.max_contiguous(tl.multiple_of(o_j + tl.where(o_j < TURN, TURN, HALF), PIECE), PIECE)
    return o_lo, o_hi


@triton.jit
def load_raw(factor, PLACE: tl.constexpr):
    """The raw scale of one kind, or 0 without one; see ``scale_of``."""
    raw = 0.0
    if factor.HAS_RAW:
        raw = tl.load(factor.raw_ptr + PLACE * factor.stride_raw)
    return raw


@triton.jit
def scale_of(factor, raw):
    """scale · c, the definition's ``reference.heads.factor``."""
    by = factor.scale
    if factor.HAS_RAW:
        by = factor.scale * sigmoid(raw.to(tl.float32)) * factor.scale_max
    return by


@triton.jit
def turned(lo, hi, cos_lo, sin_lo, cos_hi, sin_hi):
    """The definition's ``reference.heads.rotate`` of pairs; all of one shape, lo and hi float32."""
    out_lo = tl.fma(lo, cos_lo.to(tl.float32), -hi * sin_lo.to(tl.float32))
    out_hi = tl.fma(hi, cos_hi.to(tl.float32), lo * sin_hi.to(tl.float32))
    return out_lo, out_hi


@triton.jit
def load_turn(p_cos, p_sin, o_lo, o_hi, turn, m):
    """cos and sin of both numbers of a pair, raw, in the shape of ``m``; 1 and 0 where m is False."""
    cos_lo = tl.load(p_cos + o_lo * turn.stride_cos_w, mask=m, other=1.0)
    sin_lo = tl.load(p_sin + o_lo * turn.stride_sin_w, mask=m, other=0.0)
    cos_hi = tl.load(p_cos + o_hi * turn.stride_cos_w, mask=m, other=1.0)
    sin_hi = tl.load(p_sin + o_hi * turn.stride_sin_w, mask=m, other=0.0)
    return cos_lo, sin_lo, cos_hi, sin_hi


def check_tensors(packed: torch.Tensor, steering: Steering, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    """Raises: see ``steer_heads_``."""
    check_device(packed)
    check_reach("packed", packed, 1)
    half_or_single("packed", packed)
    named = {"cos": cos, "sin": sin, "q": steering.q, "k": steering.k, "v": steering.v, "o": steering.o}
    named |= {"q_norm": steering.q_norm, "k_norm": steering.k_norm, "scale_raw": steering.scale_raw}
    for name, tensor in named.items():
        if tensor is not None:
            half_or_single(name, tensor)
            # Rows and tokens of the tables have 64-bit offsets.
            check_reach(name, tensor, 1 if name in ("cos", "sin") else tensor.ndim)
    check_together("packed", packed, **named)


def steered_heads(layout: HeadLayout, steering: Steering) -> tuple[int, int, int]:
    """How many q, k and v heads have something done to them."""
    q = layout.rotary or steering.q is not None or steering.q_norm is not None
    k = layout.rotary or steering.k is not None or steering.k_norm is not None
    return layout.q if q else 0, layout.k if k else 0, layout.v if steering.v is not None else 0


def arguments(
    layout: HeadLayout,
    steering: Steering,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    unit: int,
    read_width: int,
    chunk: int,
) -> dict[str, NamedTuple]:
    """What both kernels take alike: ``q``, ``k``, ``v``, ``turn``, ``factor`` and ``heads``."""
    found, first = {}, 0
    norms = {"q": steering.q_norm, "k": steering.k_norm, "v": None}
    for place, (name, steered) in enumerate(zip("qkv", steered_heads(layout, steering))):
        weight, norm, count = getattr(steering, name), norms[name], getattr(layout, name)
        found[name] = fixed(
            Kind, w_ptr=weight, norm_ptr=norm, **strides("w", "nc", weight),
            stride_norm=norm.stride(0) if norm is not None else 0, FIRST=first, COUNT=count, PLACE=place,
            UNITS=triton.cdiv(steered, unit), ROTARY=0 if name == "v" else layout.rotary,
            HAS_DELTA=weight is not None, HAS_NORM=norm is not None,
        )  # fmt: skip
        first += count
    tables = strides("cos", "btw", cos) | strides("sin", "btw", sin)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and table.shape[0] == 1:
            tables[f"stride_{name}_b"] = 0
    raw, weights = steering.scale_raw, [getattr(steering, head) for head in "qkvo"]
    return found | {
        "turn": fixed(Turn, cos_ptr=cos, sin_ptr=sin, **tables),
        # One raw for all heads is one raw each, a stride of 0 apart.
        "factor": fixed(
            Factor, raw_ptr=raw, stride_raw=raw.stride(0) if raw is not None and raw.numel() == 4 else 0,
            scale=float(steering.scale), scale_max=float(steering.scale_max), HAS_RAW=raw is not None,
        ),
        "heads": fixed(
            Heads, eps=float(steering.eps), DIM=layout.dim, PAIRS=next_power_of_two(layout.dim // 2), UNIT=unit,
            READ_WIDTH=read_width, CHUNK=chunk, DENSE=all(w is None or w.is_contiguous() for w in weights),
        ),
    }  # fmt: skip
