"""The gradient of ``steer``. With g the gradient of out = base + Δ, that of base is g itself; of Δ = scale · W reads

    d_reads = scale · Wᵀ g        d_W = scale · Σ_t g_t reads_tᵀ

and with the RMS norm, y = Δ / rms(Δ), g stands for (g · norm_weight − y · mean(g · norm_weight · y)) / rms(Δ), and
d_norm_weight = Σ_t g y.

Both products come from one pass over g, which is what there is to move: as two matrix products it would be read twice,
and in bfloat16 the reads would lose bits that their gradient has. The sum over tokens goes into at most SPLITS sums,
each added up by one program in one order, which are added in a second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch as _launch
from .launch import interpreted, launch, matrix_precision, next_power_of_two, strides
from .primitives import three_parts
from .steer import batch_time, check_sum

SPLITS = 256  # sums over tokens that are added at last: a fixed number, so the same bits on every device
ROWS = 64  # tokens of a tile


@triton.jit
def dot(big, small, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """total [M, N] + big [M, K] · small [K, N] in float32.

    A bfloat16 ``big`` stays what it is, and ``small`` becomes three of its kind: 8 + 8 + 8 bits, so that each product
    is exact. They are added up among themselves first: the matrix units cut off what they add to a large sum.
    """
    if big.dtype == tl.bfloat16:
        if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 numbers
            big = big.to(tl.float32)
        if small.dtype == tl.bfloat16:
            total = tl.dot(big, small.to(big.dtype), total)
        else:
            high, middle, low = three_parts(small.to(tl.float32))
            exact = tl.dot(big, low.to(big.dtype))
            exact = tl.dot(big, middle.to(big.dtype), exact)
            total += tl.dot(big, high.to(big.dtype), exact)
    else:
        total = tl.dot(big.to(tl.float32), small.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def delta_block(
    p_reads, weight_ptr, o_n, m_row, m_n, scale, stride_r_c, stride_w_n, stride_w_c,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, READ_WIDTH: tl.constexpr, READ_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale · reads Wᵀ, a tile [ROWS, BLOCK] in float32."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, READ_WIDTH, READ_BLOCK):
        o_c = start + tl.arange(0, READ_BLOCK)
        m_c = o_c < READ_WIDTH
        r = tl.load(p_reads[:, None] + o_c[None, :] * stride_r_c, mask=m_row[:, None] & m_c[None, :], other=0.0)
        p_w = weight_ptr + o_n.to(tl.int64)[None, :] * stride_w_n + o_c[:, None] * stride_w_c
        w = tl.load(p_w, mask=m_c[:, None] & m_n[None, :], other=0.0)
        total = tl.dot(r.to(tl.float32), w.to(tl.float32), total, input_precision=PRECISION)
    return total * scale


@triton.jit
def steer_backward_kernel(
    grad_ptr, reads_ptr, weight_ptr, norm_ptr, d_reads_ptr, d_weight_ptr, d_norm_ptr,
    total_rows, tiles_per_split, length, n, scale, eps,
    stride_g_b, stride_g_t, stride_g_n, stride_r_b, stride_r_t, stride_r_c, stride_w_n, stride_w_c, stride_norm,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, READ_WIDTH: tl.constexpr, READ_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, HAS_NORM: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """d_reads of the split's tokens; d_weight[split, :, :] and d_norm[split, :], the sums over them.

    One program per split and READ_BLOCK columns of the reads. Equals autograd's gradients of
    ``reference.recurrence.steer``.
    """
    READ_BLOCKS: tl.constexpr = (READ_WIDTH + READ_BLOCK - 1) // READ_BLOCK
    split = tl.program_id(0) // READ_BLOCKS
    o_c = tl.program_id(0) % READ_BLOCKS * READ_BLOCK + tl.arange(0, READ_BLOCK)  # [READ_BLOCK]
    m_c = o_c < READ_WIDTH
    d_weight_ptr += split.to(tl.int64) * n * READ_WIDTH
    if HAS_NORM:
        d_norm_ptr += split.to(tl.int64) * n
    for tile in range(tiles_per_split):
        row = (split * tiles_per_split + tile) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        m_row = row < total_rows
        b = (row // length).to(tl.int64)
        t = (row % length).to(tl.int64)
        p_grad = grad_ptr + b * stride_g_b + t * stride_g_t
        p_reads = reads_ptr + b * stride_r_b + t * stride_r_t
        m_reads = m_row[:, None] & m_c[None, :]
        reads = tl.load(p_reads[:, None] + o_c[None, :] * stride_r_c, mask=m_reads, other=0.0).to(tl.float32)
        if HAS_NORM:
            square = tl.zeros([ROWS], tl.float32)
            along = tl.zeros([ROWS], tl.float32)
            for start in range(0, n, BLOCK):
                o_n = start + tl.arange(0, BLOCK)
                m_n = o_n < n
                delta = delta_block(
                    p_reads, weight_ptr, o_n, m_row, m_n, scale, stride_r_c, stride_w_n, stride_w_c,
                    ROWS, BLOCK, READ_WIDTH, READ_BLOCK, PRECISION,
                )  # fmt: skip
                p_g = p_grad[:, None] + o_n.to(tl.int64)[None, :] * stride_g_n
                grad = tl.load(p_g, mask=m_row[:, None] & m_n[None, :], other=0.0).to(tl.float32)  # [ROWS, BLOCK]
                norm = tl.load(norm_ptr + o_n * stride_norm, mask=m_n, other=0.0).to(tl.float32)  # [BLOCK]
                square += tl.sum(delta * delta, axis=1)
                along += tl.sum(grad * norm[None, :] * delta, axis=1)
            inverse = tl.rsqrt(square / n + eps)
            along = along * inverse * inverse / n
        d_reads = tl.zeros([ROWS, READ_BLOCK], tl.float32)
        for start in tl.range(0, n, BLOCK, num_stages=STAGES):
            o_n = start + tl.arange(0, BLOCK)
            m_n = o_n < n
            p_g = p_grad[:, None] + o_n.to(tl.int64)[None, :] * stride_g_n
            grad = tl.load(p_g, mask=m_row[:, None] & m_n[None, :], other=0.0)
            if HAS_NORM:
                delta = delta_block(
                    p_reads, weight_ptr, o_n, m_row, m_n, scale, stride_r_c, stride_w_n, stride_w_c,
                    ROWS, BLOCK, READ_WIDTH, READ_BLOCK, PRECISION,
                )  # fmt: skip
                norm = tl.load(norm_ptr + o_n * stride_norm, mask=m_n, other=0.0).to(tl.float32)
                d_norm = tl.sum(grad.to(tl.float32) * delta * inverse[:, None], axis=0)
                m_before = m_n & (o_n * 0 + tile > 0)
                d_norm += tl.load(d_norm_ptr + o_n, mask=m_before, other=0.0)
                if tl.program_id(0) % READ_BLOCKS == 0:
                    tl.store(d_norm_ptr + o_n, d_norm, mask=m_n)
                grad = (grad.to(tl.float32) * norm[None, :] - delta * along[:, None]) * inverse[:, None]
            m_weight = m_n[:, None] & m_c[None, :]
            p_w = weight_ptr + o_n.to(tl.int64)[:, None] * stride_w_n + o_c[None, :] * stride_w_c
            w = tl.load(p_w, mask=m_weight, other=0.0)
            d_reads = dot(grad, w, d_reads, PRECISION, INTERPRETED)
            p_d = d_weight_ptr + o_n.to(tl.int64)[:, None] * READ_WIDTH + o_c[None, :]
            before = tl.load(p_d, mask=m_weight & (o_n * 0 + tile > 0)[:, None], other=0.0)
            d_weight = dot(tl.trans(grad), reads, before, PRECISION, INTERPRETED)
            tl.store(p_d, d_weight, mask=m_weight)
        p_d = d_reads_ptr + row.to(tl.int64)[:, None] * READ_WIDTH + o_c[None, :]
        tl.store(p_d, (d_reads * scale).to(d_reads_ptr.dtype.element_ty), mask=m_reads)
        # The next tile adds to what other threads of this program have stored.
        tl.debug_barrier()


def steer_backward(
    grad: torch.Tensor,
    reads: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient of ``steer`` in what it adds to base; that of base is ``grad``.

    Args:
        grad: bfloat16, float16 or float32 [..., N], the gradient of the result, of any strides.
        reads, weight, scale, norm_weight, eps: as in ``steer``.

    Returns:
        The gradients of reads, weight and norm_weight (None without one), each in the dtype and shape of what it
        belongs to, summed in float32. The same bits on every run.

    Raises:
        ValueError: shapes that do not fit; tensors that are not on a GPU.
        TypeError: a float64 tensor.
    """
    check_sum("steer_backward", "grad", grad, reads, weight, norm_weight)
    float32 = {"dtype": torch.float32, "device": grad.device}
    n, width = weight.shape
    d_reads = (_launch.empty if n else torch.zeros)(reads.shape, dtype=reads.dtype, device=reads.device)
    total = grad.numel() // n if n else 0
    # Together the sums weigh no more than half of a bfloat16 gradient.
    most = max(1, min(SPLITS, total // (4 * max(width, 1))))
    tiles = triton.cdiv(triton.cdiv(total, ROWS), most)
    splits = triton.cdiv(total, ROWS * tiles) if total else 0
    d_weight = _launch.empty((splits, n, width), **float32)
    d_norm = _launch.empty((splits, n), **float32) if norm_weight is not None else None
    if splits and width:
        p_grad, p_reads = batch_time(grad), batch_time(reads)
        narrow = grad.dtype == torch.bfloat16 and norm_weight is None
        read_block = min(32 if narrow and _launch.WARP == 32 else 16, max(16, next_power_of_two(width)))
        # As wide as registers allow on every target: a gradient that is not bfloat16 is split into three itself.
        block, stages = (64, 3) if narrow and read_block == 16 else (32, 2)
        warps = 4 if narrow and read_block == 16 else 8
        if grad.dtype != torch.bfloat16:
            block = 16
        launch(
            steer_backward_kernel, splits * triton.cdiv(width, read_block), grad, num_warps=warps,
            grad_ptr=p_grad, reads_ptr=p_reads, weight_ptr=weight, norm_ptr=norm_weight,
            d_reads_ptr=d_reads, d_weight_ptr=d_weight, d_norm_ptr=d_norm,
            total_rows=total, tiles_per_split=tiles, length=p_grad.shape[1], n=n, scale=float(scale), eps=float(eps),
            **strides("g", "btn", p_grad), **strides("r", "btc", p_reads), **strides("w", "nc", weight),
            stride_norm=norm_weight.stride(0) if norm_weight is not None else 0,
            ROWS=ROWS, BLOCK=block, READ_WIDTH=width, READ_BLOCK=read_block,
            PRECISION=matrix_precision(), HAS_NORM=norm_weight is not None, STAGES=stages,
            INTERPRETED=interpreted(),
        )  # fmt: skip
    d_weight = d_weight.sum(0).mul_(scale).to(weight.dtype)
    return d_reads, d_weight, None if d_norm is None else d_norm.sum(0).to(norm_weight.dtype)
