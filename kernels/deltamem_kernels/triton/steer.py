"""What the memory adds to the output of a projection.

    out = base + Δ,   Δ = scale · W reads,   or rms_norm(scale · W reads) · norm_weight

``delta`` gives Δ alone, for a matmul to be added to.

H·r is small, so a row of Δ is made in registers while ``base`` goes by: ``base`` is read once, ``out`` is
written once. With the norm a first pass over the row's weights finds its mean square and touches no ``base``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from ..rule import check_shape, check_together
from . import launch as _launch
from .launch import (
    check_device,
    check_reach,
    half_or_single,
    launch,
    matrix_precision,
    narrow_reads,
    next_power_of_two,
    strides,
)
from .primitives import dot_rows, load_weights, read_parts, times_reads
from .replay import replayed


@triton.jit
def delta_tile(
    reads_ptr, weight_ptr, row, o_n, m_row, m_n, stride_r_b, stride_r_t, stride_r_c, stride_w_n, stride_w_c,
    length, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr, READ_WIDTH: tl.constexpr, READ_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """scale · reads Wᵀ, a tile [ROWS, BLOCK] in float32.

    One row is a sum in each thread, of weights that it loads 16 bytes at a time. Several are a matrix product: as
    outer products every thread would fetch the weights of its places one by one.
    """
    if DENSE:
        stride_w_n = READ_WIDTH
        stride_w_c = 1
    b = (row // length).to(tl.int64)
    t = (row % length).to(tl.int64)
    p_r = (reads_ptr + b * stride_r_b + t * stride_r_t)[:, None]
    p_w = weight_ptr + o_n.to(tl.int64) * stride_w_n
    if NARROW:
        most, rest = read_parts(reads_ptr + b * stride_r_b + t * stride_r_t, m_row, stride=stride_r_c, WIDTH=READ_WIDTH)
        w = load_weights(p_w, stride=stride_w_c, m_n=m_n, WIDTH=READ_WIDTH)
        total = times_reads(most, rest, w)
    else:
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, READ_WIDTH, READ_BLOCK):
            o_c = start + tl.arange(0, READ_BLOCK)
            m_c = o_c < READ_WIDTH
            m_r = m_row[:, None] & m_c[None, :]
            r = tl.load(p_r + o_c[None, :] * stride_r_c, mask=m_r, other=0.0).to(tl.float32)
            if ROWS == 1:
                w = tl.load(p_w[:, None] + o_c[None, :] * stride_w_c, mask=m_n[:, None] & m_c[None, :], other=0.0)
                total += dot_rows(w.to(tl.float32), r)[None, :]
            else:
                w = tl.load(p_w[None, :] + o_c[:, None] * stride_w_c, mask=m_c[:, None] & m_n[None, :], other=0.0)
                total = tl.dot(r, w.to(tl.float32), total, input_precision=PRECISION)
    return total * scale


@triton.jit
def steer_kernel(
    base_ptr, reads_ptr, weight_ptr, norm_ptr, out_ptr,
    total_rows, length, n, scale, eps,
    stride_b_b, stride_b_t, stride_b_n, stride_r_b, stride_r_t, stride_r_c, stride_w_n, stride_w_c, stride_norm,
    stride_o_b, stride_o_t, stride_o_n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, READ_WIDTH: tl.constexpr, READ_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr, DENSE: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Equals ``reference.recurrence.steer``; without a base ``reference.heads.delta``. All tiles are [ROWS, BLOCK]."""
    blocks = 1 if HAS_NORM else tl.cdiv(n, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)  # [ROWS]
    first = tl.program_id(0) % blocks * BLOCK
    m_row = row < total_rows
    b = (row // length).to(tl.int64)
    t = (row % length).to(tl.int64)
    p_base = base_ptr
    if HAS_BASE:
        p_base += b * stride_b_b + t * stride_b_t
    p_out = out_ptr + b * stride_o_b + t * stride_o_t
    end = first + BLOCK
    if HAS_NORM:
        square = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            o_n = start + tl.arange(0, BLOCK)
            delta = delta_tile(
                reads_ptr, weight_ptr, row, o_n, m_row, o_n < n, stride_r_b, stride_r_t, stride_r_c,
                stride_w_n, stride_w_c, length, scale, ROWS, BLOCK, READ_WIDTH, READ_BLOCK, PRECISION, NARROW,
                DENSE,
            )  # fmt: skip
            square = tl.fma(delta, delta, square)
        inverse = tl.rsqrt(tl.sum(square, axis=1) / n + eps)
        end = n
    for start in range(first, end, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < n
        delta = delta_tile(
            reads_ptr, weight_ptr, row, o_n, m_row, m_n, stride_r_b, stride_r_t, stride_r_c,
            stride_w_n, stride_w_c, length, scale, ROWS, BLOCK, READ_WIDTH, READ_BLOCK, PRECISION, NARROW,
            DENSE,
        )  # fmt: skip
        if HAS_NORM:
            weight = tl.load(norm_ptr + o_n * stride_norm, mask=m_n, other=0.0).to(tl.float32)
            delta = delta * inverse[:, None] * weight[None, :]
        m = m_row[:, None] & m_n[None, :]
        o_wide = o_n.to(tl.int64)[None, :]
        if HAS_BASE:
            delta += tl.load(p_base[:, None] + o_wide * stride_b_n, mask=m, other=0.0).to(tl.float32)
        tl.store(p_out[:, None] + o_wide * stride_o_n, delta.to(out_ptr.dtype.element_ty), mask=m)


def batch_time(tensor: torch.Tensor) -> torch.Tensor:
    """[..., N] → [B, T, N]; a view up to three dimensions, which is all that a model has."""
    if tensor.ndim == 3:
        return tensor
    if tensor.ndim < 3:
        return tensor[(None,) * (3 - tensor.ndim)]
    return tensor.reshape(1, -1, tensor.shape[-1])


def check_delta(name: str, wide, reads, weight, norm_weight) -> None:
    """What Δ is made of, beside the tensor called ``name``. Raises: see ``steer``."""
    check_shape("norm_weight", norm_weight, weight.shape[:1])
    check_device(wide)
    check_together(name, wide, reads=reads, weight=weight, norm_weight=norm_weight)
    half_or_single(name, wide)
    for other, tensor in (("reads", reads), ("weight", weight), ("norm_weight", norm_weight)):
        half_or_single(other, tensor)
        if tensor is not None:
            check_reach(other, tensor, 2 if other == "weight" else 1)


def check_sum(function: str, name: str, wide, reads, weight, norm_weight) -> None:
    """The arguments of a function of Δ and a tensor of its shape, which is called ``name``. Raises: see ``steer``."""
    if wide.shape[:-1] != reads.shape[:-1] or weight.shape != (wide.shape[-1], reads.shape[-1]):
        raise ArgumentError(
            f"{function}: got {name} {list(wide.shape)}, reads {list(reads.shape)}, weight {list(weight.shape)}, "
            "allowed [..., N], [..., H·r] and [N, H·r]"
        )
    check_delta(name, wide, reads, weight, norm_weight)


def steer(
    base: torch.Tensor,
    reads: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """base + Δ with Δ = scale · W reads, or rms_norm(scale · W reads) · norm_weight.

    Args:
        base: bfloat16, float16 or float32 [..., N], the output of a projection, of any strides.
        reads: [..., H·r], float32 (another floating dtype is widened). A masked token's reads are 0, which
            adds 0.
        weight: [N, H·r], of any floating dtype up to float32.
        scale: α / r.
        norm_weight: [N] or None.
        eps: of the RMS norm.
        out: None for a new tensor, or ``base`` itself to write in place.

    Returns:
        [..., N] in ``base``'s dtype, summed in float32 and rounded once.

    Raises:
        ValueError: shapes that do not fit; an ``out`` other than ``base``; tensors that are not on a GPU.
        TypeError: a float64 tensor.
    """
    check_sum("steer", "base", base, reads, weight, norm_weight)
    if out is not None and out is not base:
        raise ArgumentError("out: allowed None or the tensor given as base")
    if out is None:
        out = _launch.empty(base.shape, dtype=base.dtype, device=base.device)
    elif base.ndim > 3 and not base.is_contiguous():
        raise ArgumentError("base: more than three dimensions, not contiguous, cannot be written in place")
    _steer(base, reads, weight, scale, norm_weight, eps, out)
    return out


def delta(
    reads: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Δ = scale · W reads, or rms_norm(scale · W reads) · norm_weight, alone. Not differentiable.

    Args:
        reads: [..., H·r], float32 (another floating dtype is widened).
        weight: [N, H·r], of any floating dtype up to float32.
        scale, norm_weight, eps: as in ``steer``.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        [..., N], contiguous, computed in float32 and rounded once.

    Raises:
        ValueError: shapes that do not fit; tensors that are not on a GPU.
        TypeError: a float64 tensor.
    """
    if weight.ndim != 2 or weight.shape[1] != reads.shape[-1]:
        raise ArgumentError(
            f"delta: got reads {list(reads.shape)}, weight {list(weight.shape)}, allowed [..., H·r] and [N, H·r]"
        )
    check_delta("reads", reads, reads, weight, norm_weight)
    out = _launch.empty((*reads.shape[:-1], weight.shape[0]), dtype=dtype, device=reads.device)
    half_or_single("dtype", out)
    _steer(None, reads, weight, scale, norm_weight, eps, out)
    return out


def _steer(base, reads, weight, scale, norm_weight, eps, out) -> None:
    if out.numel() == 0:
        return
    base = None if base is None else batch_time(base)
    replayed(_launch_steer, (batch_time(out), base, batch_time(reads), weight, norm_weight), float(scale), float(eps))


def _launch_steer(p_out, p_base, p_reads, weight, norm_weight, scale: float, eps: float) -> tuple:
    """The launch, of tensors [B, T, …]."""
    total, n = p_out.shape[0] * p_out.shape[1], p_out.shape[-1]
    # One row (decode): a thin tile, many programs. More: the weights of a tile serve 16 rows, which fill a matrix
    # instruction.
    rows = 1 if total == 1 else 16
    block = min(1024 if rows == 1 else 128, next_power_of_two(n))
    if norm_weight is None and rows == 1:
        block = min(256, block)
    if rows > 1:
        block = max(16, block)
    blocks = 1 if norm_weight is not None else triton.cdiv(n, block)
    launch(
        steer_kernel, triton.cdiv(total, rows) * blocks, p_out, num_warps=4,
        base_ptr=p_base, reads_ptr=p_reads, weight_ptr=weight, norm_ptr=norm_weight, out_ptr=p_out,
        total_rows=total, length=p_out.shape[1], n=n, scale=scale, eps=eps,
        **strides("b", "btn", p_base), **strides("r", "btc", p_reads), **strides("w", "nc", weight),
        stride_norm=norm_weight.stride(0) if norm_weight is not None else 0, **strides("o", "btn", p_out),
        ROWS=rows, BLOCK=block, READ_WIDTH=p_reads.shape[-1],
        READ_BLOCK=min(8, next_power_of_two(p_reads.shape[-1])) if rows == 1 else 16,
        PRECISION=matrix_precision(), NARROW=rows > 1 and narrow_reads(p_reads.shape[-1], weight),
        DENSE=weight.is_contiguous(), HAS_BASE=p_base is not None,
        HAS_NORM=norm_weight is not None,
    )  # fmt: skip
    return ()
