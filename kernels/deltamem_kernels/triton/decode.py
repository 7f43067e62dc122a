"""``decode_``: one decoded token a row. Its memory is read and written, its heads are steered, and Δo is made.

    read = S q,   S <- diag(keep) S − diag(erase) (S k) kᵀ + diag(write) v kᵀ
    x <- RoPE(rms_norm(x + scale · c · W read)),   Δo = scale · c · W_o read

One launch; computes in float32 and rounds once. ``heads`` does it to many tokens whose reads are known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from ..layout import HeadLayout, Steering, check_heads
from ..rule import DeltaRule, check_together
from .head_parts import (
    arguments,
    check_tensors,
    load_raw,
    load_turn,
    pairs,
    scale_of,
    steered_heads,
    turned,
)
from .launch import (
    MOST_REGISTERS,
    bytes_and_slots,
    check_counts,
    check_tokens,
    fixed,
    half_or_single,
    launch,
    next_power_of_two,
    rule_flags,
    state_strides,
    strides,
    tile,
)
from .primitives import (
    delta_update,
    direction,
    dot,
    dot_rows,
    gates,
    held_value,
    load_bias,
    load_vector,
    load_write,
    owned,
    state_pointers,
    zero_or_nan,
)
from .replay import allocate, replayed

ALONE = 512  # rows from which a program has a row to itself
PROGRAMS = 4096  # of one warp each: what an H200 holds at once (132 × 32)


class Rows(NamedTuple):
    """The packed rows [B, N], the reads [B, H·r], and who has arrived, int32 [B]; see ``decode_kernel``."""

    x_ptr: torch.Tensor
    reads_ptr: torch.Tensor
    arrived_ptr: torch.Tensor | None
    batch: int
    stride_x_b: int


class Memory(NamedTuple):
    """The memory's projections in the rows (from ``m_ptr``), its gates' biases, and states [S, H, r, r].

    states: S if rows have slots.
    """

    m_ptr: torch.Tensor
    bias_ptr: torch.Tensor
    s_ptr: torch.Tensor
    slots_ptr: torch.Tensor | None
    mask_ptr: torch.Tensor | None
    skipped_ptr: torch.Tensor | None
    states: int
    stride_bias: int
    stride_mask_b: int
    stride_skipped: int
    stride_s_n: int
    stride_s_h: int
    stride_s_i: int
    stride_s_j: int
    HAS_SLOTS: tl.constexpr
    HAS_MASK: tl.constexpr
    HAS_SKIPPED: tl.constexpr
    FROZEN: tl.constexpr
    DENSE_STATE: tl.constexpr


class Rule(NamedTuple):
    """The recurrence, and the tile [R, COLUMNS] in which a program has (a piece of) a row's state."""

    HEADS: tl.constexpr
    RANK: tl.constexpr
    R: tl.constexpr
    COLUMNS: tl.constexpr
    WIDTH: tl.constexpr
    WIDTH_PAD: tl.constexpr
    MODE: tl.constexpr
    ROW_GATES: tl.constexpr
    HAS_LAMBDA: tl.constexpr
    NORMALIZE: tl.constexpr
    BETA_MAX: tl.constexpr
    KEEP_MAX: tl.constexpr
    VALUE_MAX: tl.constexpr
    WHOLE: tl.constexpr


class Output(NamedTuple):
    """Δo [B, n], in UNITS units of UNIT · PAIRS numbers."""

    w_ptr: torch.Tensor | None
    delta_ptr: torch.Tensor | None
    n: int
    stride_w_n: int
    stride_w_c: int
    UNITS: tl.constexpr


class Shares(NamedTuple):
    """How the UNITS units of a row are shared.

    PARTS: programs a row. IN_REGISTERS: a program has the whole state in one tile. LATE: a program has one unit; it
    asks for its heads and weights first and computes the reads while they are on their way.
    """

    PARTS: tl.constexpr
    UNITS: tl.constexpr
    IN_REGISTERS: tl.constexpr
    LATE: tl.constexpr


class Row(NamedTuple):
    """Where things of a program's row lie. p_m: its projections. live: 0 if it has no state, else 1."""

    p_x: tl.tensor
    p_cos: tl.tensor
    p_sin: tl.tensor
    p_delta: tl.tensor
    p_scratch: tl.tensor
    p_m: tl.tensor
    p_mask: tl.tensor
    p_state: tl.tensor
    live: tl.tensor


class Known(NamedTuple):
    """What ``recall`` finds: reads [COLUMNS], the state after the token [R, COLUMNS], and the token's flag."""

    reads: tl.tensor
    s: tl.tensor
    flag: tl.tensor


@triton.jit
def token_flag(row, memory, rule):
    """1: the token counts. 2: it is unmasked, but not finite. 0: it is masked, or has no state."""
    o_w = tl.arange(0, rule.WIDTH_PAD)  # [WIDTH_PAD]
    x = tl.load(row.p_m + o_w, mask=o_w < rule.WIDTH, other=0.0).to(tl.float32)
    flag = tl.where(tl.sum(x * 0.0, axis=0) == 0.0, 1, 2)
    if memory.HAS_MASK:
        flag = tl.where(tl.load(row.p_mask) != 0, flag, 0)
    return tl.where(row.live > 0, flag, 0)


@triton.jit
def state_tile(row, memory, rule, first):
    """Places of the state's rows ``first`` to ``first`` + COLUMNS − 1, and which there are."""
    column = first + tl.arange(0, rule.COLUMNS)  # [COLUMNS]
    m_live = (column < rule.HEADS * rule.RANK) & (column * 0 + row.live > 0)
    p_s = state_pointers(
        row.p_state + column * 0, column // rule.RANK, column % rule.RANK,
        memory.stride_s_h, memory.stride_s_i, memory.stride_s_j, rule.RANK, rule.R, memory.DENSE_STATE,
    )  # fmt: skip
    m_tile = m_live[None, :] & (tl.arange(0, rule.R) < rule.RANK)[:, None]  # [R, COLUMNS], as p_s
    return p_s, m_tile, m_live


@triton.jit
def recall(row, memory, rule, first):
    """``reference.recurrence.step`` (``read`` if frozen) of columns ``first`` to ``first`` + COLUMNS − 1 → ``Known``.

    The flag is 2 for a token that would leave NaN or Inf in these columns, too; then the reads are 0, here alone.
    The same operations in the same order as in ``step_kernel``, hence the same bits.
    """
    HEADS: tl.constexpr = rule.HEADS
    RANK: tl.constexpr = rule.RANK
    column = first + tl.arange(0, rule.COLUMNS)  # [COLUMNS]
    h = column // RANK
    i = column % RANK
    m_column = column < HEADS * RANK
    p_s, m_tile, m_live = state_tile(row, memory=memory, rule=rule, first=first)
    s = tl.load(p_s, mask=m_tile, other=0.0)  # [R, COLUMNS]
    p_token = row.p_m + column * 0
    q = load_vector(p_token, h * RANK, 1, m_live, RANK, rule.R, rule.WHOLE)  # [R, COLUMNS]
    if not memory.FROZEN:
        k = load_vector(p_token, (h + HEADS) * RANK, 1, m_live, RANK, rule.R, rule.WHOLE)  # [R, COLUMNS]
        v, beta, lam = load_write(p_token, h, i, 1, m_live, HEADS, RANK, rule.ROW_GATES, rule.HAS_LAMBDA)  # [COLUMNS]
        beta_bias, lambda_bias = load_bias(
            memory.bias_ptr, memory.stride_bias, h, i, m_column, HEADS, RANK, rule.ROW_GATES, rule.HAS_LAMBDA
        )  # fmt: skip
    flag = token_flag(row, memory=memory, rule=rule)
    z, c = direction(q, rule.NORMALIZE)  # [R, COLUMNS], [COLUMNS]
    read = dot(s, z) * c  # [COLUMNS]
    if not memory.FROZEN:
        z, c = direction(k, rule.NORMALIZE)
        keep, erase, write = gates(
            beta.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias,
            rule.MODE, rule.HAS_LAMBDA, rule.BETA_MAX, rule.KEEP_MAX,
        )  # fmt: skip
        s = delta_update(s, z, c, keep, erase, write * held_value(v.to(tl.float32), rule.VALUE_MAX))
        flag = tl.where((flag == 1) & (tl.sum(zero_or_nan(s), axis=0) != 0.0), 2, flag)
    valid = column * 0 + flag == 1
    return Known(reads=tl.where(valid & m_live, read, 0.0), s=s, flag=flag)


@triton.jit
def remember(row, memory, rule, first, s, flag):
    """Store columns [R, COLUMNS] of the state, if the token counts."""
    p_s, m_tile, _ = state_tile(row, memory=memory, rule=rule, first=first)
    column = first + tl.arange(0, rule.COLUMNS)  # [COLUMNS]
    tl.store(p_s, s, mask=m_tile & (column * 0 + flag == 1)[None, :])


@triton.jit
def reads_block(reads, row, heads, block, IN_REGISTERS: tl.constexpr):
    """Reads ``block`` · CHUNK and following of this row, [CHUNK]; reads: [COLUMNS] in registers."""
    CHUNK: tl.constexpr = heads.CHUNK
    if IN_REGISTERS:
        # All but one of the numbers added are 0: exact.
        pieces = tl.reshape(reads, [reads.shape[0] // CHUNK, CHUNK])
        o_piece = tl.arange(0, reads.shape[0] // CHUNK)[:, None]
        return tl.sum(tl.where(o_piece == block, pieces, 0.0), axis=0)
    else:
        o_c = block * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
        return tl.load(row.p_scratch + o_c, mask=o_c < heads.READ_WIDTH, other=0.0)


@triton.jit
def load_weights(p_w, o_n, m_n, block, stride_w_n, stride_w_c, heads):
    """Weights of one block of reads, raw, [numbers, CHUNK]."""
    o_c = block * heads.CHUNK + tl.arange(0, heads.CHUNK)  # [CHUNK]
    p = p_w + o_n[:, None] * stride_w_n + o_c[None, :] * stride_w_c
    return tl.load(p, mask=m_n[:, None] & (o_c < heads.READ_WIDTH)[None, :], other=0.0)


@triton.jit
def steer_unit(kind, unit, row, known, turn, factor, heads, memory, rule, shares):
    """UNIT heads of one kind and one token, all pairs in one row of numbers; ``reference.heads.steer_heads_``."""
    DIM: tl.constexpr = heads.DIM
    PAIRS: tl.constexpr = heads.PAIRS
    READ_WIDTH: tl.constexpr = heads.READ_WIDTH
    stride_w_n = kind.stride_w_n
    stride_w_c = kind.stride_w_c
    if heads.DENSE:
        stride_w_n = READ_WIDTH
        stride_w_c = 1
    first = unit * heads.UNIT
    o = tl.arange(0, heads.UNIT * PAIRS)  # [UNIT · PAIRS], as all that follows
    o_j = o % PAIRS
    head = first + o // PAIRS
    m = (o_j < DIM // 2) & (head < kind.COUNT)
    o_lo, o_hi = pairs(o_j, DIM=DIM, ROTARY=kind.ROTARY)
    p_x = row.p_x + kind.FIRST * DIM
    p_lo, p_hi = p_x + head * DIM + o_lo, p_x + head * DIM + o_hi
    x_lo = tl.load(p_lo, mask=m, other=0.0)
    x_hi = tl.load(p_hi, mask=m, other=0.0)
    if kind.HAS_DELTA:
        p_w = kind.w_ptr + first.to(tl.int64) * DIM * stride_w_n
        o_w = o // PAIRS * DIM
        w_lo = load_weights(p_w, o_w + o_lo, m, 0, stride_w_n, stride_w_c, heads=heads)  # [UNIT · PAIRS, CHUNK]
        w_hi = load_weights(p_w, o_w + o_hi, m, 0, stride_w_n, stride_w_c, heads=heads)
        raw = load_raw(factor, PLACE=kind.PLACE)
    if kind.ROTARY > 0:
        cos_lo, sin_lo, cos_hi, sin_hi = load_turn(
            p_cos=row.p_cos, p_sin=row.p_sin, o_lo=o_lo, o_hi=o_hi, turn=turn, m=m & (o_j < kind.ROTARY // 2)
        )  # fmt: skip
    if kind.HAS_NORM:
        norm_lo = tl.load(kind.norm_ptr + o_lo * kind.stride_norm, mask=m, other=0.0)
        norm_hi = tl.load(kind.norm_ptr + o_hi * kind.stride_norm, mask=m, other=0.0)
    if shares.LATE:
        known = recall(row, memory=memory, rule=rule, first=0)
    lo, hi = x_lo.to(tl.float32), x_hi.to(tl.float32)
    if kind.HAS_DELTA:
        reads = reads_block(known.reads, row=row, heads=heads, block=0, IN_REGISTERS=shares.IN_REGISTERS)  # [CHUNK]
        d_lo = dot_rows(w_lo.to(tl.float32), reads[None, :])
        d_hi = dot_rows(w_hi.to(tl.float32), reads[None, :])
        for block in range(1, (READ_WIDTH + heads.CHUNK - 1) // heads.CHUNK):
            reads = reads_block(known.reads, row=row, heads=heads, block=block, IN_REGISTERS=shares.IN_REGISTERS)
            w_lo = load_weights(p_w, o_w + o_lo, m, block, stride_w_n, stride_w_c, heads=heads)
            w_hi = load_weights(p_w, o_w + o_hi, m, block, stride_w_n, stride_w_c, heads=heads)
            d_lo += dot_rows(w_lo.to(tl.float32), reads[None, :])
            d_hi += dot_rows(w_hi.to(tl.float32), reads[None, :])
        by = scale_of(factor, raw=raw)
        lo = tl.fma(d_lo, tl.zeros_like(d_lo) + by, lo)
        hi = tl.fma(d_hi, tl.zeros_like(d_hi) + by, hi)
    if kind.HAS_NORM:
        square = tl.sum(tl.reshape(tl.fma(lo, lo, hi * hi), [heads.UNIT, PAIRS]), axis=1, keep_dims=True)  # [UNIT, 1]
        inverse = tl.broadcast_to(tl.rsqrt(square / DIM + heads.eps), [heads.UNIT, PAIRS])  # [UNIT, PAIRS]
        inverse = tl.reshape(inverse, [heads.UNIT * PAIRS])
        lo = lo * inverse * norm_lo.to(tl.float32)
        hi = hi * inverse * norm_hi.to(tl.float32)
    if kind.ROTARY > 0:
        lo, hi = turned(lo, hi, cos_lo, sin_lo, cos_hi, sin_hi)
    tl.store(p_lo, lo.to(x_lo.dtype), mask=m)
    tl.store(p_hi, hi.to(x_hi.dtype), mask=m)
    return known


@triton.jit
def output_unit(o, unit, row, known, factor, heads, memory, rule, shares):
    """UNIT · PAIRS numbers of Δo = scale · c · W_o reads, as ``reference.heads.decode_`` gives it."""
    BLOCK: tl.constexpr = heads.UNIT * heads.PAIRS
    stride_w_n = o.stride_w_n
    stride_w_c = o.stride_w_c
    if heads.DENSE:
        stride_w_n = heads.READ_WIDTH
        stride_w_c = 1
    first = unit * BLOCK
    o_n = tl.arange(0, BLOCK)  # [BLOCK]
    m_n = first + o_n < o.n
    p_w = o.w_ptr + first.to(tl.int64) * stride_w_n
    w = load_weights(p_w, o_n, m_n, 0, stride_w_n, stride_w_c, heads=heads)  # [BLOCK, CHUNK]
    raw = load_raw(factor, PLACE=3)
    if shares.LATE:
        known = recall(row, memory=memory, rule=rule, first=0)
    reads = reads_block(known.reads, row=row, heads=heads, block=0, IN_REGISTERS=shares.IN_REGISTERS)  # [CHUNK]
    delta = dot_rows(w.to(tl.float32), reads[None, :])  # [BLOCK]
    for block in range(1, (heads.READ_WIDTH + heads.CHUNK - 1) // heads.CHUNK):
        reads = reads_block(known.reads, row=row, heads=heads, block=block, IN_REGISTERS=shares.IN_REGISTERS)
        w = load_weights(p_w, o_n, m_n, block, stride_w_n, stride_w_c, heads=heads)
        delta += dot_rows(w.to(tl.float32), reads[None, :])
    scale = scale_of(factor, raw=raw)
    tl.store(row.p_delta + first + o_n, (scale * delta).to(row.p_delta.dtype.element_ty), mask=m_n)
    return known


@triton.jit
def decode_kernel(rows, memory, rule, q, k, v, o, turn, factor, heads, shares):
    """``reference.heads.decode_``: PARTS programs a row. Each computes the row's reads for itself, from the old state,
    and does its share of the units: UNIT heads, or as many numbers of Δo.

    rows: ``Rows``. memory: ``Memory``. rule: ``Rule``. q, k, v: ``Kind``. o: ``Output``. shares: ``Shares``. turn,
    factor, heads: see ``head_parts``.

    With one program, it also writes the state, which it alone reads. With several, all read the old state and one
    must replace it, and none may wait for another (nothing says that they run at the same time). So each announces
    that it is done with the old state by adding 1 to the row's count, and the one that finds PARTS − 1 there, the
    last, writes. Why no program can see the new state instead of the old one:

    - In a program, every thread's loads of the state come before ``debug_barrier``, and the barrier comes before the
      one thread's addition.
    - The addition is a release and an acquire at the scope of the GPU, on one location, and additions extend each
      other's release sequence: the last one to arrive synchronises with all the others.
    - Its result reaches the other threads of its program through shared memory and a barrier, and their stores to
      the state come after. So each load of the old state happens before each store of the new one.

    Whoever is last writes the same bits, from the same inputs: the result does not depend on the order of arrival.
    The last one also sets the count back to 0, for the next launch, which starts after this one has ended.
    """
    READ_WIDTH: tl.constexpr = heads.READ_WIDTH
    COLUMNS: tl.constexpr = rule.COLUMNS
    PARTS: tl.constexpr = shares.PARTS
    FROZEN: tl.constexpr = memory.FROZEN
    IN_REGISTERS: tl.constexpr = shares.IN_REGISTERS
    LATE: tl.constexpr = shares.LATE
    number = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    b = number.to(tl.int64)
    state_row = b
    if memory.HAS_SLOTS:
        state_row = owned(tl.load(memory.slots_ptr + number), memory.states)
    live = tl.where(state_row >= 0, 1, 0)
    p_x = rows.x_ptr + b * rows.stride_x_b
    # What is not there is not used; None would do, but a tuple does not take it.
    p_mask, p_cos, p_sin, p_delta = p_x, p_x, p_x, p_x
    if memory.HAS_MASK:
        p_mask = memory.mask_ptr + b * memory.stride_mask_b
    if q.ROTARY > 0:
        p_cos = turn.cos_ptr + b * turn.stride_cos_b
        p_sin = turn.sin_ptr + b * turn.stride_sin_b
    if o.UNITS > 0:
        p_delta = o.delta_ptr + b * o.n
    # Reads that registers do not hold: each program reads those that it has written itself.
    p_scratch = rows.reads_ptr + b * READ_WIDTH
    if not IN_REGISTERS:
        p_scratch += part.to(tl.int64) * rows.batch * READ_WIDTH
    row = Row(
        p_x=p_x, p_cos=p_cos, p_sin=p_sin, p_delta=p_delta, p_scratch=p_scratch,
        p_m=memory.m_ptr + b * rows.stride_x_b, p_mask=p_mask, p_state=memory.s_ptr + state_row * memory.stride_s_n,
        live=live,
    )  # fmt: skip

    # Alone with its row, a program writes the state as soon as it has read it, if it is in its registers as a whole.
    AT_ONCE: tl.constexpr = PARTS == 1 and not LATE and not FROZEN and IN_REGISTERS
    known = Known(reads=tl.zeros([COLUMNS], tl.float32), s=tl.zeros([rule.R, COLUMNS], tl.float32), flag=live)
    if not LATE:
        flag = live * 0
        for first in tl.range(0, READ_WIDTH, COLUMNS, disable_licm=True):
            known = recall(row, memory=memory, rule=rule, first=first)
            if not IN_REGISTERS:
                o_c = first + tl.arange(0, COLUMNS)  # [COLUMNS]
                tl.store(p_scratch + o_c, known.reads, mask=o_c < READ_WIDTH)
            if AT_ONCE:
                remember(row, memory=memory, rule=rule, first=first, s=known.s, flag=known.flag)
            flag = tl.maximum(flag, known.flag)
        known = Known(reads=known.reads, s=known.s, flag=flag)
        if not IN_REGISTERS:
            if flag == 2:
                # What some of the columns have read is taken back.
                tl.debug_barrier()
                for first in tl.range(0, READ_WIDTH, COLUMNS, disable_licm=True):
                    o_c = first + tl.arange(0, COLUMNS)
                    tl.store(p_scratch + o_c, tl.zeros([COLUMNS], tl.float32), mask=o_c < READ_WIDTH)
            tl.debug_barrier()

    # Nothing is hoisted out of these loops: addresses of all four kinds of units would fill the registers.
    turns = 1 if LATE else (shares.UNITS - 1 - part) // PARTS + 1
    for nth in tl.range(0, turns, disable_licm=True):
        unit = part + nth * PARTS
        if q.UNITS > 0 and unit < q.UNITS:
            known = steer_unit(
                kind=q, unit=unit, row=row, known=known, turn=turn, factor=factor, heads=heads, memory=memory,
                rule=rule, shares=shares,
            )  # fmt: skip
        elif k.UNITS > 0 and unit < q.UNITS + k.UNITS:
            known = steer_unit(
                kind=k, unit=unit - q.UNITS, row=row, known=known, turn=turn, factor=factor, heads=heads,
                memory=memory, rule=rule, shares=shares,
            )  # fmt: skip
        elif v.UNITS > 0 and unit < q.UNITS + k.UNITS + v.UNITS:
            known = steer_unit(
                kind=v, unit=unit - q.UNITS - k.UNITS, row=row, known=known, turn=turn, factor=factor, heads=heads,
                memory=memory, rule=rule, shares=shares,
            )  # fmt: skip
        elif o.UNITS > 0:
            known = output_unit(
                o=o, unit=unit - q.UNITS - k.UNITS - v.UNITS, row=row, known=known, factor=factor, heads=heads,
                memory=memory, rule=rule, shares=shares,
            )  # fmt: skip

    if IN_REGISTERS:
        if part == 0:
            o_c = tl.arange(0, COLUMNS)  # [COLUMNS]
            tl.store(p_scratch + o_c, known.reads, mask=o_c < READ_WIDTH)
    if not FROZEN:
        last = part == 0
        if PARTS > 1:
            tl.debug_barrier()
            last = tl.atomic_add(rows.arrived_ptr + number, 1, sem="acq_rel", scope="gpu") == PARTS - 1
        if last:
            if IN_REGISTERS and not AT_ONCE:
                remember(row, memory=memory, rule=rule, first=0, s=known.s, flag=known.flag)
            elif not AT_ONCE:
                for first in tl.range(0, READ_WIDTH, COLUMNS, disable_licm=True):
                    again = recall(row, memory=memory, rule=rule, first=first)
                    remember(row, memory=memory, rule=rule, first=first, s=again.s, flag=known.flag)
            if memory.HAS_SKIPPED:
                # No state is given to two rows, so nobody else touches this count.
                p_skipped = memory.skipped_ptr + state_row * memory.stride_skipped
                if known.flag == 2:
                    tl.store(p_skipped, tl.load(p_skipped) + 1)
            if PARTS > 1:
                tl.store(rows.arrived_ptr + number, 0)


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
    workspace: torch.Tensor | None = None,
    parts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One decoded token per row: read, write, and the heads corrected, normalised and rotated. Not differentiable.

        read = S q,   S <- diag(keep) S − diag(erase) (S k) kᵀ + diag(write) v kᵀ
        x <- RoPE(rms_norm(x + scale · c · W read))

    Args:
        packed: bfloat16, float16 or float32 [B, N], last stride 1: q, k, v (changed in place), then the memory's W
            projections, raw. Heads to which nothing is done are neither read nor written.
        gate_bias: [β's (and λ's) biases], of any floating dtype up to float32; not used if frozen.
        state: float32 [B, H, r, r], of any strides, or [S, H, r, r] with ``slots``; changed in place.
        rule: the recurrence.
        layout: which heads lie where.
        steering: corrections and norms.
        cos, sin: [B or 1, 1, rotary], of any floating dtype up to float32, or None without RoPE.
        mask: bool [B], True = a real token. A masked token reads 0 and leaves the state bit-equal; so does a
            token one of whose projections is not finite, and one that would leave NaN or Inf in the state of any
            memory head. Its heads are steered all the same, with reads of 0.
        slots: int [B], which row of ``state`` each token belongs to, no row twice; −1 = reads 0, writes nothing.
        skipped: int32 with a row per row of ``state``, or None; incremented where an unmasked token was not written
            because it, or the state after it, is not finite.
        frozen: read only; state, skipped and workspace stay as they are.
        check: as in ``steer_heads_``.
        workspace: int32 [B], contiguous zeros, or None; zero again afterwards. With it, a few rows are spread over
            many programs (see ``decode_kernel``); no other launch may use it at the same time. See ``workspace``.
        parts: programs per row, None to choose (tests set it).

    Returns:
        reads, float32 [B, H·r], the bits that ``step`` (``read`` if frozen) gives, and Δo = scale · c · W_o reads in
        packed's dtype, [B, N_o], or None without ``o``.

    Raises:
        ValueError, TypeError: see ``check_arguments`` and ``layout.check_heads``; a float64 tensor; tensors that
            are not on a GPU.
    """
    if check:
        _check_decode(packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, workspace)
    mask, slots = bytes_and_slots(mask, slots)
    rows = packed.narrow(1, layout.width, rule.width)
    q, k, v, o, scale, raw, scale_max, q_norm, k_norm, eps = steering
    inputs = (
        packed, rows, gate_bias, state, mask, slots, None if frozen else skipped, workspace, cos, sin,
        q, k, v, o, raw, q_norm, k_norm,
    )  # fmt: skip
    reads, delta = replayed(_decode, inputs, rule, layout, scale, scale_max, eps, frozen, parts)
    return reads[0], delta


def workspace(kept: dict, counter: torch.Tensor | None) -> torch.Tensor | None:
    """What ``decode_`` wants from token to token; see ``reference.heads.workspace``. Here, the counter."""
    return counter


def _check_decode(packed, gate_bias, state, rule, layout, steering, cos, sin, mask, slots, skipped, workspace) -> None:
    check_heads(packed, layout, steering, cos, sin, rule.read_width, rule)
    check_tensors(packed, steering, cos, sin)
    rows = packed[:, layout.width : layout.width + rule.width]
    check_tokens(rows, gate_bias, state, rule, mask=mask, slots=slots)
    half_or_single("gate_bias", gate_bias)
    check_together("packed", packed, skipped=skipped, workspace=workspace)
    check_counts("skipped", skipped, state.shape[0])
    check_counts("workspace", workspace, packed.shape[0])
    if workspace is not None and not workspace.is_contiguous():
        raise ArgumentError(f"workspace: got a stride of {workspace.stride(0)}, allowed 1")


def _decode(
    packed, rows, gate_bias, state, mask, slots, skipped, workspace, cos, sin, q, k, v, o, raw, q_norm, k_norm,
    rule: DeltaRule, layout: HeadLayout, scale: float, scale_max: float, eps: float, frozen: bool, parts: int | None,
):  # fmt: skip
    """The launch → reads [.., B, H·r], the first of which are returned, and Δo.

    Programs whose reads do not fit into registers keep them in ``reads``, each its own.
    """
    steering = Steering(q, k, v, o, scale, raw, scale_max, q_norm, k_norm, eps)
    batch, outputs = packed.shape[0], 0 if o is None else o.shape[0]
    count, pairs = steered_heads(layout, steering), next_power_of_two(layout.dim // 2)
    if parts is None:
        # One head a program while they all fit on the device at once.
        units = sum(count) + triton.cdiv(outputs, pairs)
        parts = min(units, PROGRAMS // max(batch, 1)) if batch < ALONE else 1
    if workspace is None and not frozen:
        parts = 1
    parts = max(1, parts)
    # A program that has a row to itself has as many threads for it as eight (or four) of the others.
    warps = 1 if parts > 1 else 8 if rule.rank <= 16 else 4
    units = sum(triton.cdiv(n, warps) for n in (*count, triton.cdiv(outputs, pairs)))
    columns = tile(rule)[1] * warps
    in_registers = rule.read_width <= columns
    reads = allocate((1 if in_registers else parts, batch, rule.read_width), torch.float32, packed.device)
    delta = None if o is None else allocate((batch, outputs), packed.dtype, packed.device)
    if batch == 0:
        return reads, delta
    given = arguments(
        layout, steering, cos, sin, unit=warps, read_width=rule.read_width,
        chunk=min(8, next_power_of_two(rule.read_width)),
    )  # fmt: skip
    launch(
        decode_kernel, batch * parts, packed, num_warps=warps,
        registers=None if rule.read_width <= 16 else MOST_REGISTERS,
        rows=fixed(
            Rows, x_ptr=packed, reads_ptr=reads, arrived_ptr=workspace if parts > 1 else None, batch=batch,
            stride_x_b=packed.stride(0),
        ),
        memory=fixed(
            Memory, m_ptr=rows, bias_ptr=gate_bias, s_ptr=state, slots_ptr=slots, mask_ptr=mask, skipped_ptr=skipped,
            states=state.shape[0] if slots is not None else 0, stride_bias=gate_bias.stride(0),
            **strides("mask", "b", mask), stride_skipped=skipped.stride(0) if skipped is not None else 0,
            HAS_SLOTS=slots is not None, HAS_MASK=mask is not None, HAS_SKIPPED=skipped is not None,
            FROZEN=frozen, **state_strides(state),
        ),
        rule=fixed(
            Rule, COLUMNS=columns, WIDTH=rule.width, WIDTH_PAD=next_power_of_two(rule.width), **rule_flags(rule, rows)
        ),
        o=fixed(
            Output, w_ptr=o, delta_ptr=delta, n=outputs, **strides("w", "nc", o if outputs else None),
            UNITS=triton.cdiv(outputs, warps * pairs),
        ),
        shares=fixed(Shares, PARTS=parts, UNITS=units, IN_REGISTERS=in_registers, LATE=in_registers and parts == units),
        **given,
    )  # fmt: skip
    return reads, delta
