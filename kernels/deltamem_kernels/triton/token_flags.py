"""Which tokens count, found out beforehand: one byte a token.

Where tokens are narrow, ``token_parts_kernel`` and a read look for themselves, as a step and a decoded token always do
(``primitives.load_flag``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch, next_power_of_two
from .primitives import zero_or_nan_rows
from .replay import allocate

LOOK_WIDTH = 40  # widest token that each thread of another kernel checks for itself, registers permitting


@triton.jit
def token_flags_kernel(
    x_ptr, mask_ptr, flags_ptr,
    tokens, length, stride_x_b, stride_x_t, stride_x_w, stride_mask_b, stride_mask_t,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, TOKENS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """flags[b, t] = 1 if the token counts, 2 if it is unmasked but not finite, 0 if masked.

    Equals ``reference.recurrence.valid_tokens``.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    m_token = token < tokens
    b = (token // length).to(tl.int64)
    t = (token % length).to(tl.int64)
    o_w = tl.arange(0, WIDTH_PAD)
    p_x = x_ptr + (b * stride_x_b + t * stride_x_t)[:, None] + o_w[None, :] * stride_x_w
    x = tl.load(p_x, mask=m_token[:, None] & (o_w < WIDTH)[None, :], other=0.0).to(tl.float32)  # [TOKENS, WIDTH_PAD]
    flag = tl.where(zero_or_nan_rows(x) == 0.0, 1, 2)  # [TOKENS]
    if HAS_MASK:
        present = tl.load(mask_ptr + b * stride_mask_b + t * stride_mask_t, mask=m_token, other=0)
        flag = tl.where(present != 0, flag, 0)
    tl.store(flags_ptr + token, flag.to(tl.uint8), mask=m_token)


def find_flags(projections: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """uint8 [B, T]: 1 where the token counts, 2 where it is unmasked but not finite, 0 where it is masked.

    A token that would leave a state that is not finite is 1 here, and 2 where a scan has gone over them.
    """
    batch, length, width = projections.shape
    flags = allocate((batch, length), torch.uint8, projections.device)
    width_pad = next_power_of_two(width)
    tokens = max(1, 2048 // width_pad)
    launch(
        token_flags_kernel, triton.cdiv(batch * length, tokens), projections, num_warps=4,
        x_ptr=projections, mask_ptr=mask, flags_ptr=flags, tokens=batch * length, length=length,
        stride_x_b=projections.stride(0), stride_x_t=projections.stride(1), stride_x_w=projections.stride(2),
        stride_mask_b=mask.stride(0) if mask is not None else 0,
        stride_mask_t=mask.stride(1) if mask is not None else 0,
        WIDTH=width, WIDTH_PAD=width_pad, TOKENS=tokens, HAS_MASK=mask is not None,
    )  # fmt: skip
    return flags
