"""What a scan wants of every token, found out beforehand, all tokens at once.

A scan walks from token to token in few threads, so what a step computes, the next one waits for. What does not depend
on the state (tanh, norms, gates: four fifths of a step) is taken out of it and written down in float32, the same bits
as a step computes for itself. Which tokens count is one byte each. Where tokens are narrow, ``token_parts_kernel`` and
a read look for themselves, as a step and a decoded token always do (``primitives.load_flag``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..rule import DeltaRule
from .launch import launch, next_power_of_two, rule_flags, strides, tile
from .primitives import direction, gates, held_value, load_flag, load_vector, load_write, zero_or_nan_rows
from .replay import allocate

LOOK_WIDTH = 40  # widest token that each thread of another kernel checks for itself, registers permitting
WARPS = 4
MOST_BYTES = 256 << 20  # of parts


class Token(NamedTuple):
    """q = c_q z_q and k, z [R, COLUMNS] and c [COLUMNS]; keep, erase, added = write · v and the flag, [COLUMNS]."""

    q: tl.tensor
    c_q: tl.tensor
    k: tl.tensor
    c_k: tl.tensor
    keep: tl.tensor
    erase: tl.tensor
    added: tl.tensor
    flag: tl.tensor


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


@triton.jit
def token_parts_kernel(
    x_ptr, bias_ptr, mask_ptr, flags_ptr, parts_ptr,
    total_groups, length, stride_x_b, stride_x_t, stride_x_w, stride_bias, stride_mask_b, stride_mask_t,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, MODE: tl.constexpr, ROW_GATES: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    HAS_FLAGS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """parts[token, head, :] as ``load_token`` takes them, and without HAS_FLAGS flags[token]; see ``find_flags``.

    A column is a head of a token. Equals ``reference.recurrence.split_projections``, unit vectors as z and c = 1 / ‖z‖.
    """
    group = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    m_group = group < total_groups
    token = group // HEADS
    h = group % HEADS
    b = (token // length).to(tl.int64)
    t = (token % length).to(tl.int64)
    p_x = x_ptr + b * stride_x_b + t * stride_x_t
    o_j = tl.arange(0, R)[:, None]  # [R, 1]
    q, c_q = direction(load_vector(p_x, h * RANK, stride_x_w, m_group, RANK, R, WHOLE), NORMALIZE)
    k, c_k = direction(load_vector(p_x, (HEADS + h) * RANK, stride_x_w, m_group, RANK, R, WHOLE), NORMALIZE)
    v = load_vector(p_x, (2 * HEADS + h) * RANK, stride_x_w, m_group, RANK, R, WHOLE).to(tl.float32)  # [R, COLUMNS]
    if ROW_GATES:
        beta = load_vector(p_x, (3 * HEADS + h) * RANK, stride_x_w, m_group, RANK, R, WHOLE)
        lam = beta
        if HAS_LAMBDA:
            lam = load_vector(p_x, (4 * HEADS + h) * RANK, stride_x_w, m_group, RANK, R, WHOLE)
        p_bias = bias_ptr + (h[None, :] * RANK + o_j) * stride_bias
        m_bias = m_group[None, :] & (o_j < RANK)
    else:
        p_gate = p_x + (3 * HEADS * RANK + h) * stride_x_w
        beta = tl.load(p_gate, mask=m_group, other=0.0)[None, :]
        lam = beta
        if HAS_LAMBDA:
            lam = tl.load(p_gate + HEADS * stride_x_w, mask=m_group, other=0.0)[None, :]
        p_bias = bias_ptr + h[None, :] * stride_bias
        m_bias = m_group[None, :]
    beta_bias = tl.load(p_bias, mask=m_bias, other=0.0).to(tl.float32)
    lambda_bias = beta_bias
    if HAS_LAMBDA:
        o_lambda = HEADS * RANK if ROW_GATES else HEADS
        lambda_bias = tl.load(p_bias + o_lambda * stride_bias, mask=m_bias, other=0.0).to(tl.float32)
    keep, erase, write = gates(
        beta.to(tl.float32) + beta_bias, lam.to(tl.float32) + lambda_bias, MODE, HAS_LAMBDA, BETA_MAX, KEEP_MAX
    )

    p_parts = parts_ptr + group.to(tl.int64)[None, :] * (5 * R + 4) + o_j  # [R, COLUMNS]
    m_parts = m_group[None, :] & (o_j < R)
    tl.store(p_parts, q, mask=m_parts)
    tl.store(p_parts + R, k, mask=m_parts)
    tl.store(p_parts + 2 * R, tl.broadcast_to(keep, v.shape), mask=m_parts)
    tl.store(p_parts + 3 * R, tl.broadcast_to(erase, v.shape), mask=m_parts)
    tl.store(p_parts + 4 * R, write * held_value(v, VALUE_MAX), mask=m_parts)
    p_c = parts_ptr + group.to(tl.int64) * (5 * R + 4) + 5 * R  # of two numbers; two more are not used
    tl.store(p_c, c_q, mask=m_group)
    tl.store(p_c + 1, c_k, mask=m_group)
    if not HAS_FLAGS:
        p_mask = mask_ptr
        if HAS_MASK:
            p_mask += b * stride_mask_b + t * stride_mask_t
        flag = load_flag(p_x, flags_ptr, p_mask, stride_x_w, m_group, WIDTH, WHOLE, False, HAS_MASK)
        tl.store(flags_ptr + token, flag.to(tl.uint8), mask=m_group & (h == 0))


@triton.jit
def load_direction(p_parts, m, PLACE: tl.constexpr, R: tl.constexpr):
    """q (PLACE 0) or k (1) of each column's token and head → (z [R, COLUMNS], c [COLUMNS]); see ``direction``.

    16 bytes at a time, up to 8 numbers; else see ``load_vector`` for the hint.
    """
    p_c = p_parts + 5 * R + PLACE
    if R == 4 or R == 8:
        p = (p_parts + PLACE * R)[None, :] + tl.arange(0, 4)[:, None]  # [4, COLUMNS]
        z = tl.load(p, mask=m[None, :], other=0.0)
        if R == 8:
            z = tl.join(z, tl.load(p + 4, mask=m[None, :], other=0.0))  # [4, COLUMNS, 2]
            z = tl.reshape(tl.permute(z, (2, 0, 1)), [8, m.shape[0]])
    else:
        p = p_parts[None, :] + tl.arange(0, R)[:, None] + PLACE * R
        p = tl.multiple_of(tl.max_contiguous(p, [1, 2]), [1, 1])
        z = tl.load(p, mask=m[None, :], other=0.0)
    return z, tl.load(p_c, mask=m, other=0.0)


@triton.jit
def first_token(
    x_ptr, h, row, begin, length, stride_x_b, stride_x_t, HEADS: tl.constexpr, R: tl.constexpr, PREPARED: tl.constexpr
):  # fmt: skip
    """Where ``load_token`` finds token ``begin`` of each column's row and head, and how far on the next one lies."""
    if PREPARED:
        first = row.to(tl.int64) * length + begin
        return x_ptr + (first * HEADS + h) * (5 * R + 4), HEADS * (5 * R + 4)
    else:
        return x_ptr + row.to(tl.int64) * stride_x_b + begin.to(tl.int64) * stride_x_t, stride_x_t


@triton.jit
def load_token(
    p, p_flag, h, i, m, stride_x_w,
    HEADS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, ROW_GATES: tl.constexpr, HAS_LAMBDA: tl.constexpr,
    WHOLE: tl.constexpr, READS: tl.constexpr, PREPARED: tl.constexpr,
):  # fmt: skip
    """A token of each column's head h and row i → ``Token``, without READS k for q.

    p: of its parts, or, if it is not PREPARED, of its raw projections: then see ``prepared``.
    """
    flag = tl.load(p_flag, mask=m, other=0)
    if PREPARED:
        k, c_k = load_direction(p, m, 1, R)
        q, c_q = k, c_k
        if READS:
            q, c_q = load_direction(p, m, 0, R)
        keep = tl.load(p + i + 2 * R, mask=m, other=0.0)
        erase = tl.load(p + i + 3 * R, mask=m, other=0.0)
        added = tl.load(p + i + 4 * R, mask=m, other=0.0)
        return Token(q=q, c_q=c_q, k=k, c_k=c_k, keep=keep, erase=erase, added=added, flag=flag)
    else:
        k = load_vector(p, (HEADS + h) * RANK, stride_x_w, m, RANK, R, WHOLE)  # [R, COLUMNS]
        q = k
        if READS:
            q = load_vector(p, h * RANK, stride_x_w, m, RANK, R, WHOLE)
        v, b, lam = load_write(p, h, i, stride_x_w, m, HEADS, RANK, ROW_GATES, HAS_LAMBDA)  # [COLUMNS] each
        return Token(q=q, c_q=b, k=k, c_k=b, keep=b, erase=lam, added=v, flag=flag)


@triton.jit
def prepared(
    token, beta_bias, lambda_bias,
    MODE: tl.constexpr, HAS_LAMBDA: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_MAX: tl.constexpr, KEEP_MAX: tl.constexpr, VALUE_MAX: tl.constexpr,
    READS: tl.constexpr, PREPARED: tl.constexpr,
):  # fmt: skip
    """What ``load_token`` has loaded, as ``Token`` says; raw projections become what ``token_parts_kernel`` writes."""
    if PREPARED:
        return token
    else:
        k, c_k = direction(token.k, NORMALIZE)
        q, c_q = k, c_k
        if READS:
            q, c_q = direction(token.q, NORMALIZE)
        keep, erase, write = gates(
            token.keep.to(tl.float32) + beta_bias, token.erase.to(tl.float32) + lambda_bias,
            MODE, HAS_LAMBDA, BETA_MAX, KEEP_MAX,
        )  # fmt: skip
        added = write * held_value(token.added.to(tl.float32), VALUE_MAX)
        return Token(q=q, c_q=c_q, k=k, c_k=c_k, keep=keep, erase=erase, added=added, flag=token.flag)


def worth_preparing(rule: DeltaRule, tokens: int) -> bool:
    """Whether a scan of so many tokens prepares them. Many more fill the device anyway, and would fill its memory."""
    return 4 * tokens * rule.heads * (5 * tile(rule)[0] + 4) <= MOST_BYTES


def find_flags(projections: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """uint8 [B, T]: 1 where the token counts, 2 where it is unmasked but not finite, 0 where it is masked.

    A token that would leave a state that is not finite is 1 here, and 2 where a scan has gone over them.
    """
    batch, length, width = projections.shape
    flags = allocate((batch, length), torch.uint8, projections.device)
    if flags.numel() == 0:
        return flags
    width_pad = next_power_of_two(width)
    tokens = max(1, 2048 // width_pad)
    launch(
        token_flags_kernel, triton.cdiv(batch * length, tokens), projections, num_warps=4,
        x_ptr=projections, mask_ptr=mask, flags_ptr=flags, tokens=batch * length, length=length,
        **strides("x", "btw", projections), **strides("mask", "bt", mask),
        WIDTH=width, WIDTH_PAD=width_pad, TOKENS=tokens, HAS_MASK=mask is not None,
    )  # fmt: skip
    return flags


def find_parts(
    projections: torch.Tensor, gate_bias: torch.Tensor, mask: torch.Tensor | None, rule: DeltaRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a scan of projections [B, T, W] takes: parts, float32 [B · T · H, 5 R + 4], R the rank rounded up to a
    power of two, and flags, uint8 [B, T], as ``find_flags`` has them."""
    batch, length, width = projections.shape
    rows, cols = tile(rule)
    cols *= WARPS
    groups = batch * length * rule.heads
    parts = allocate((groups, 5 * rows + 4), torch.float32, projections.device)
    looked = width > LOOK_WIDTH
    flags = find_flags(projections, mask) if looked else allocate((batch, length), torch.uint8, projections.device)
    masked = None if looked else mask
    launch(
        token_parts_kernel, triton.cdiv(groups, cols), projections, num_warps=WARPS,
        x_ptr=projections, bias_ptr=gate_bias, mask_ptr=masked, flags_ptr=flags, parts_ptr=parts,
        total_groups=groups, length=length, **strides("x", "btw", projections), stride_bias=gate_bias.stride(0),
        **strides("mask", "bt", masked),
        WIDTH=width, COLUMNS=cols, HAS_FLAGS=looked, HAS_MASK=masked is not None, **rule_flags(rule, projections),
    )  # fmt: skip
    return parts, flags
