"""The gradient of ``read``: with d = dL/dread_t and the frozen state S,

    dq_t = Sᵀ d_t        dS = Σ_t d_t q_tᵀ

Each program takes a block of tokens one after another: dq is a sum over the rows of a head, which are neighbouring
columns; dS is added up in registers, and the blocks' sums are added in a second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rule import DeltaRule
from . import launch as _launch
from .launch import bytes_and_slots, check_tokens, launch, state_strides, strides, whole_keys
from .primitives import across, columns, direction, direction_backward, group_sum, load_vector, owned, state_pointers
from .projection_gradient import token_tile
from .scan_backward import check_gradient, choose_spacing, scatter_rows
from .token_parts import find_flags


@triton.jit
def read_backward_kernel(
    x_ptr, s_ptr, slots_ptr, flags_ptr, d_reads_ptr, d_x_ptr, d_state_ptr,
    total_groups, states, length, blocks_per_row,
    stride_x_b, stride_x_t, stride_x_w, stride_d_b, stride_d_t, stride_d_c,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, DENSE_STATE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The q part of the projections' gradient, and d_state[row, block, h, i, :], the sum over the block's tokens.

    Equals autograd's gradients of ``reference.recurrence.read``.
    """
    group, i, m_column = columns(total_groups, R, COLUMNS)  # [COLUMNS] each
    m_column = m_column & (i < RANK)
    h = group % HEADS
    row = group // HEADS // blocks_per_row
    first = group // HEADS % blocks_per_row * BLOCK
    b = row.to(tl.int64)
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    live = m_column
    state_row = b
    if HAS_SLOTS:
        state_row = owned(tl.load(slots_ptr + row, mask=m_column, other=-1), states)
        live = m_column & (state_row >= 0)
    m_row = live[None, :] & (o_j < RANK)
    p_s = state_pointers(
        s_ptr + state_row * stride_s_n, h, i, stride_s_h, stride_s_i, stride_s_j, RANK, R, DENSE_STATE
    )  # fmt: skip
    s = tl.load(p_s, mask=m_row, other=0.0)  # [R, COLUMNS]
    p_x = x_ptr + b * stride_x_b + first.to(tl.int64) * stride_x_t
    p_d = d_reads_ptr + b * stride_d_b + first.to(tl.int64) * stride_d_t + (h * RANK + i).to(tl.int64) * stride_d_c
    token = b * length + first
    p_row = d_x_ptr + token * WIDTH + h * RANK + i
    mine = o_j == i[None, :]  # [R, COLUMNS]
    total = tl.zeros([R, COLUMNS], tl.float32)
    m = m_column & (first < length)
    q = load_vector(p_x, h * RANK, stride_x_w, m, RANK, R, WHOLE)  # [R, COLUMNS]
    d = tl.load(p_d, mask=m & live, other=0.0)  # [COLUMNS]
    flag = tl.load(flags_ptr + token, mask=m, other=0)  # [COLUMNS]
    for t in range(BLOCK):
        # The next token is on its way while this one is computed.
        m_next = m_column & (first + t + 1 < length) & (t + 1 < BLOCK)
        p_x += stride_x_t
        p_d += stride_d_t
        q_next = load_vector(p_x, h * RANK, stride_x_w, m_next, RANK, R, WHOLE)
        d_next = tl.load(p_d, mask=m_next & live, other=0.0)
        flag_next = tl.load(flags_ptr + token + t + 1, mask=m_next, other=0)

        valid = (flag == 1) & live
        d = d.to(tl.float32)
        z, c = direction(q, NORMALIZE)  # [R, COLUMNS], [COLUMNS]
        total = tl.where(valid[None, :], tl.fma(across(d * c, R), z, total), total)
        d_q = direction_backward(group_sum(s * d[None, :], R), z, c, NORMALIZE)  # [R, COLUMNS]
        d_q = tl.where(valid, tl.sum(tl.where(mine, d_q, 0.0), axis=0), 0.0)
        tl.store(p_row, d_q.to(d_x_ptr.dtype.element_ty), mask=m)
        p_row += WIDTH
        q, d, flag, m = q_next, d_next, flag_next, m_next
    o_total = (group.to(tl.int64) * RANK + i) * RANK
    tl.store(d_state_ptr + o_total[None, :] + o_j, total, mask=m_column[None, :] & (o_j < RANK))


def read_backward(
    d_reads: torch.Tensor,
    projections: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of ``read``, of which it takes the arguments.

    Args:
        d_reads: [B, T, H·r], the gradient of the reads, of any strides.

    Returns:
        The gradients of projections (0 outside of q, and for a masked token) and state, each in the dtype and shape
        of what it belongs to. The same bits on every run.

    Raises:
        ValueError, TypeError: see ``read``; d_reads of another shape than the reads.
    """
    check_tokens(projections, None, state, rule, mask=mask, slots=slots)
    batch, length, width = projections.shape
    check_gradient("d_reads", d_reads, (batch, length, rule.read_width), projections)
    mask, slots = bytes_and_slots(mask, slots)
    # k, v and the gates are read by nobody.
    d_x = torch.zeros(projections.shape, dtype=projections.dtype, device=projections.device)
    block, _ = choose_spacing(rule)
    blocks = triton.cdiv(length, block)
    sums = _launch.empty(
        (batch, blocks, rule.heads, rule.rank, rule.rank), dtype=torch.float32, device=projections.device
    )
    if projections.numel():
        flags = find_flags(projections, mask)
        cols, warps = token_tile(rule)
        rows = _launch.next_power_of_two(rule.rank)
        groups = batch * blocks * rule.heads
        launch(
            read_backward_kernel, triton.cdiv(groups * rows, cols), projections, num_warps=warps,
            x_ptr=projections, s_ptr=state, slots_ptr=slots, flags_ptr=flags, d_reads_ptr=d_reads,
            d_x_ptr=d_x, d_state_ptr=sums,
            total_groups=groups, states=state.shape[0], length=length, blocks_per_row=blocks,
            **strides("x", "btw", projections), **strides("d", "btc", d_reads), **state_strides(state),
            HEADS=rule.heads, RANK=rule.rank, R=rows, COLUMNS=cols, WIDTH=width,
            WHOLE=whole_keys(rule, projections), NORMALIZE=rule.normalize, HAS_SLOTS=slots is not None, BLOCK=block,
        )  # fmt: skip
    return d_x, scatter_rows(sums.sum(1), state, slots)
