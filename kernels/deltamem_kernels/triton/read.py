"""Reads of a frozen state: every token reads the same S, nothing is written.

    read_t = S q_t

Every (token, head, row) is a column of its own, so all tokens are read at once; see ``primitives``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rule import DeltaRule
from . import launch as _launch
from .launch import bytes_and_slots, check_tokens, launch, state_strides, strides, tile, whole_keys
from .primitives import columns, direction, dot, load_flag, load_vector, owned, state_pointers
from .token_parts import LOOK_WIDTH, find_flags


@triton.jit
def read_kernel(
    x_ptr, s_ptr, slots_ptr, flags_ptr, mask_ptr, reads_ptr,
    total_groups, states, length, stride_x_b, stride_x_t, stride_x_w, stride_mask_b, stride_mask_t,
    stride_s_n, stride_s_h, stride_s_i, stride_s_j,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, DENSE_STATE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Equals ``reference.recurrence.read``; a column is one row of one head for one token."""
    group, i, m_column = columns(total_groups, RANK, COLUMNS)  # [COLUMNS] each
    token = group // HEADS
    h = group % HEADS
    row = token // length
    b = row.to(tl.int64)
    t = (token % length).to(tl.int64)
    p_x = x_ptr + b * stride_x_b + t * stride_x_t
    p_flag = flags_ptr
    p_mask = mask_ptr
    if HAS_FLAGS:
        p_flag += token
    if HAS_MASK:
        p_mask += b * stride_mask_b + t * stride_mask_t
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
    flag = load_flag(p_x, p_flag, p_mask, stride_x_w, live, WIDTH, WHOLE, HAS_FLAGS, HAS_MASK)  # [COLUMNS]
    z, c = direction(q, NORMALIZE)  # [R, COLUMNS], [COLUMNS]
    read = tl.where(flag == 1, dot(s, z) * c, 0.0)  # [COLUMNS]
    tl.store(reads_ptr + group.to(tl.int64) * RANK + i, read, mask=m_column)


def read(
    projections: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read a frozen state: read_t = S q_t for every token, nothing is written.

    Args:
        projections: bfloat16, float16 or float32 [B, T, W], raw, of any strides; only the q part is used to
            read, but a token with any value that is not finite reads 0.
        state: float32 [B, H, r, r], of any strides, or [S, H, r, r] with ``slots``.
        rule: the recurrence.
        mask: bool [B, T], True = a real token. A masked token reads 0.
        slots: int [B], which row of ``state`` each row reads; −1 = reads 0.

    Returns:
        reads, float32 [B, T, H·r].

    Raises:
        ValueError, TypeError: see ``check_arguments``; a float64 input; tensors that are not on a GPU.
    """
    check_tokens(projections, None, state, rule, mask=mask, slots=slots)
    batch, length, width = projections.shape
    reads = _launch.empty((batch, length, rule.read_width), dtype=torch.float32, device=projections.device)
    if reads.numel() == 0:
        return reads
    mask, slots = bytes_and_slots(mask, slots)
    flags = None
    if width > LOOK_WIDTH:
        flags, mask = find_flags(projections, mask), None
    rows, cols = tile(rule)
    launch(
        read_kernel, triton.cdiv(batch * length * rule.read_width, cols), projections, num_warps=1,
        x_ptr=projections, s_ptr=state, slots_ptr=slots, flags_ptr=flags, mask_ptr=mask, reads_ptr=reads,
        total_groups=batch * length * rule.heads, states=state.shape[0], length=length,
        **strides("x", "btw", projections), **strides("mask", "bt", mask), **state_strides(state),
        HEADS=rule.heads, RANK=rule.rank, R=rows, COLUMNS=cols,
        WIDTH=width, WHOLE=whole_keys(rule, projections), NORMALIZE=rule.normalize,
        HAS_SLOTS=slots is not None, HAS_FLAGS=flags is not None, HAS_MASK=mask is not None,
    )  # fmt: skip
    return reads
