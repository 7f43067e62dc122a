"""Decode: one token per row, the state updated where it lies.

    read = S q,   S <- diag(keep) S − diag(erase) (S k) kᵀ + diag(write) v kᵀ

One launch. Every row of every state is a column of its own (see ``primitives``): it is read once, changed in
registers and written once, by the same thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rule import DeltaRule, check_together
from . import launch as _launch
from .launch import (
    bytes_and_slots,
    check_counts,
    check_tokens,
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
    gates,
    group_sum,
    held_value,
    load_bias,
    load_flag,
    load_vector,
    load_write,
    owned,
    state_pointers,
    zero_or_nan,
)


@triton.jit
def stepped(
    row, place, m_column, x_ptr, bias_ptr, s_ptr, slots_ptr, mask_ptr, states,
    stride_x_b, stride_x_w, stride_bias, stride_mask_b, stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    DENSE_STATE: tl.constexpr, MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Columns ``place`` of the tokens ``row``, both [COLUMNS], and the states after their tokens.

    Returns:
        where the states lie, which of these numbers there are, the states, each [R, COLUMNS]; the reads, the tokens'
        flags, the rows of the state, each [COLUMNS].
    """
    h = place // RANK
    i = place % RANK
    b = row.to(tl.int64)
    p_x = x_ptr + b * stride_x_b
    p_mask = mask_ptr
    if HAS_MASK:
        p_mask += b * stride_mask_b
    live = m_column
    state_row = b
    if HAS_SLOTS:
        state_row = owned(tl.load(slots_ptr + row, mask=m_column, other=-1), states)
        live = m_column & (state_row >= 0)
    p_s = state_pointers(
        s_ptr + state_row * stride_s_n, h, i, stride_s_h, stride_s_i, stride_s_j, RANK, R, DENSE_STATE
    )  # fmt: skip
    m_tile = live[None, :] & (tl.arange(0, R) < RANK)[:, None]  # [R, COLUMNS]
    s = tl.load(p_s, mask=m_tile, other=0.0)  # [R, COLUMNS]

    q = load_vector(p_x, h * RANK, stride_x_w, live, RANK, R, WHOLE)  # [R, COLUMNS]
    k = load_vector(p_x, (HEADS + h) * RANK, stride_x_w, live, RANK, R, WHOLE)  # [R, COLUMNS]
    v, beta, lam = load_write(p_x, h, i, stride_x_w, live, HEADS, RANK, ROW_GATES, HAS_LAMBDA)  # [COLUMNS] each
    beta_bias, lambda_bias = load_bias(bias_ptr, stride_bias, h, i, m_column, HEADS, RANK, ROW_GATES, HAS_LAMBDA)
    flag = load_flag(p_x, None, p_mask, stride_x_w, live, WIDTH, WHOLE, False, HAS_MASK)  # [COLUMNS]
    flag = tl.where(live, flag, 0)

    z, c = direction(q, NORMALIZE)  # [R, COLUMNS], [COLUMNS]
    read = dot(s, z) * c  # [COLUMNS]
    z, c = direction(k, NORMALIZE)
    keep, erase, write = gates(
        beta.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA, BETA_MAX, KEEP_MAX
    )
    s = delta_update(s, z, c, keep, erase, write * held_value(v.to(tl.float32), VALUE_MAX))
    return p_s, m_tile, s, read, flag, state_row


@triton.jit
def step_kernel(
    x_ptr, bias_ptr, s_ptr, slots_ptr, mask_ptr, reads_ptr, skipped_ptr,
    rows, states, stride_x_b, stride_x_w, stride_bias, stride_mask_b, stride_skipped,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, DENSE_STATE: tl.constexpr,
    MODE: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SKIPPED: tl.constexpr,
):  # fmt: skip
    """A token is GROUP columns, H·r rounded up to a power of two, all in one program: whether the state after it is
    finite is a question to all of them. Where a program has too few, it goes through them twice.

    Equals ``reference.recurrence.step``.
    """
    o_column = tl.arange(0, COLUMNS)
    if GROUP <= COLUMNS:
        row = tl.program_id(0) * (COLUMNS // GROUP) + o_column // GROUP
        place = o_column % GROUP
        m_column = (row < rows) & (place < HEADS * RANK)
        p_s, m_tile, s, read, flag, state_row = stepped(
            row, place, m_column, x_ptr, bias_ptr, s_ptr, slots_ptr, mask_ptr, states,
            stride_x_b, stride_x_w, stride_bias, stride_mask_b, stride_s_n, stride_s_h, stride_s_i, stride_s_j,
            HEADS, RANK, R, WIDTH, WHOLE, DENSE_STATE, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE,
            BETA_MAX, KEEP_MAX, VALUE_MAX, HAS_SLOTS, HAS_MASK,
        )  # fmt: skip
        nothing = zero_or_nan(s)
        if GROUP > 1:
            nothing = tl.reshape(group_sum(nothing[None, :], GROUP), [COLUMNS])
        flag = tl.where((flag == 1) & (nothing != 0.0), 2, flag)
        tl.store(reads_ptr + row.to(tl.int64) * (HEADS * RANK) + place, tl.where(flag == 1, read, 0.0), mask=m_column)
        tl.store(p_s, s, mask=m_tile & (flag == 1)[None, :])
        if HAS_SKIPPED:
            # No state is given to two rows, so nobody else touches this count.
            m_skipped = (flag == 2) & (place == 0)
            p_skipped = skipped_ptr + state_row * stride_skipped
            tl.store(p_skipped, tl.load(p_skipped, mask=m_skipped, other=0) + 1, mask=m_skipped)
    else:
        row = o_column * 0 + tl.program_id(0)
        nothing = tl.zeros([COLUMNS], tl.float32)
        for first in tl.range(0, HEADS * RANK, COLUMNS):
            place = first + o_column
            _, _, s, _, _, _ = stepped(
                row, place, place < HEADS * RANK, x_ptr, bias_ptr, s_ptr, slots_ptr, mask_ptr, states,
                stride_x_b, stride_x_w, stride_bias, stride_mask_b, stride_s_n, stride_s_h, stride_s_i, stride_s_j,
                HEADS, RANK, R, WIDTH, WHOLE, DENSE_STATE, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE,
                BETA_MAX, KEEP_MAX, VALUE_MAX, HAS_SLOTS, HAS_MASK,
            )  # fmt: skip
            nothing += zero_or_nan(s)
        finite = tl.sum(nothing, axis=0) == 0.0
        for first in tl.range(0, HEADS * RANK, COLUMNS):
            place = first + o_column
            m_column = place < HEADS * RANK
            p_s, m_tile, s, read, flag, state_row = stepped(
                row, place, m_column, x_ptr, bias_ptr, s_ptr, slots_ptr, mask_ptr, states,
                stride_x_b, stride_x_w, stride_bias, stride_mask_b, stride_s_n, stride_s_h, stride_s_i, stride_s_j,
                HEADS, RANK, R, WIDTH, WHOLE, DENSE_STATE, MODE, ROW_GATES, HAS_LAMBDA, NORMALIZE,
                BETA_MAX, KEEP_MAX, VALUE_MAX, HAS_SLOTS, HAS_MASK,
            )  # fmt: skip
            flag = tl.where((flag == 1) & (finite == 0), 2, flag)
            p_read = reads_ptr + row.to(tl.int64) * (HEADS * RANK) + place
            tl.store(p_read, tl.where(flag == 1, read, 0.0), mask=m_column)
            tl.store(p_s, s, mask=m_tile & (flag == 1)[None, :])
            if HAS_SKIPPED:
                m_skipped = (flag == 2) & (place == 0)
                p_skipped = skipped_ptr + state_row * stride_skipped
                tl.store(p_skipped, tl.load(p_skipped, mask=m_skipped, other=0) + 1, mask=m_skipped)


def step(
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    skipped: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token per row, the state updated in place (decode). Not differentiable.

        read = S q,   S <- diag(keep) S − diag(erase) (S k) kᵀ + diag(write) v kᵀ

    Args:
        projections: bfloat16, float16 or float32 [B, W], raw, of any strides.
        gate_bias: [β's (and λ's) biases], of any floating dtype.
        state: float32 [B, H, r, r], of any strides, or [S, H, r, r] with ``slots``; changed in place.
        rule: the recurrence.
        mask: bool [B], True = a real token. A masked token reads 0 and leaves the state bit-equal; so does a
            token with a value that is not finite, and one that would leave NaN or Inf in the state of any head.
        slots: int [B], which row of ``state`` each token belongs to, no row twice; −1 = reads 0, writes nothing.
        skipped: int32 with a row per row of ``state``, or None; incremented where an unmasked token was not written
            because it, or the state after it, is not finite.

    Returns:
        reads, float32 [B, H·r].

    Raises:
        ValueError, TypeError: see ``check_arguments``; a float64 input; tensors that are not on a GPU.
    """
    check_tokens(projections, gate_bias, state, rule, mask=mask, slots=slots)
    batch, width = projections.shape
    check_counts("skipped", skipped, state.shape[0])
    check_together("projections", projections, skipped=skipped)
    reads = _launch.empty((batch, rule.read_width), dtype=torch.float32, device=projections.device)
    if batch == 0:
        return reads
    mask, slots = bytes_and_slots(mask, slots)
    _, cols = tile(rule)
    group = next_power_of_two(rule.read_width)
    warps = min(8, max(1, group // cols))
    cols *= warps
    programs = triton.cdiv(batch, cols // group) if group <= cols else batch
    launch(
        step_kernel, programs, projections, num_warps=warps,
        x_ptr=projections, bias_ptr=gate_bias, s_ptr=state, slots_ptr=slots, mask_ptr=mask,
        reads_ptr=reads, skipped_ptr=skipped, rows=batch, states=state.shape[0],
        **strides("x", "bw", projections), stride_bias=gate_bias.stride(0), **strides("mask", "b", mask),
        stride_skipped=skipped.stride(0) if skipped is not None else 0, **state_strides(state),
        GROUP=group, COLUMNS=cols, WIDTH=width, **rule_flags(rule, projections),
        HAS_SLOTS=slots is not None, HAS_MASK=mask is not None, HAS_SKIPPED=skipped is not None,
    )  # fmt: skip
    return reads
