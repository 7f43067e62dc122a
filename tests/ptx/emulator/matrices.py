"""Tensor cores: which lane holds which numbers of a matrix. Sums in float64, rounded once."""

from __future__ import annotations

import numpy as np

from .arithmetic import F32, LANES, U16, U32, bf16_to_f32


def tf32(u):
    """The numbers that a tensor core takes from 32-bit registers: the low 13 bits are cut off."""
    return (u & U32(0xFFFFE000)).view(F32)


def halves(u, kind):
    """Both 16-bit numbers of 32-bit registers, as float32."""
    lo, hi = (u & U32(0xFFFF)).astype(U16), (u >> U32(16)).astype(U16)
    if kind == "bf16":
        return bf16_to_f32(lo), bf16_to_f32(hi)
    return lo.view(np.float16).astype(F32), hi.view(np.float16).astype(F32)


def h_mma_k8_tf32(a, b, c):
    """mma.m16n8k8 on tf32 → 4 registers. a: 4, b: 2, c: 4 registers of float32."""
    g, t = LANES >> 2, LANES & 3
    A, B, C = np.zeros((16, 8)), np.zeros((8, 8)), np.zeros((16, 8))
    A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4] = (tf32(x.view(U32)) for x in a)
    B[t, g], B[t + 4, g] = (tf32(x.view(U32)) for x in b)
    C[g, 2 * t], C[g, 2 * t + 1], C[g + 8, 2 * t], C[g + 8, 2 * t + 1] = c
    D = (A @ B + C).astype(F32)
    return D[g, 2 * t], D[g, 2 * t + 1], D[g + 8, 2 * t], D[g + 8, 2 * t + 1]


def h_mma_k16(a, b, c, kind):
    """mma.m16n8k16 on ``bf16`` or ``f16`` → 4 registers. a: 4, b: 2 registers of two numbers each, c: 4 of float32."""
    g, t = LANES >> 2, LANES & 3
    A, B, C = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for n, (rows, cols) in enumerate(((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))):
        A[rows, cols], A[rows, cols + 1] = halves(a[n], kind)
    for n, rows in enumerate((2 * t, 2 * t + 8)):
        B[rows, g], B[rows + 1, g] = halves(b[n], kind)
    C[g, 2 * t], C[g, 2 * t + 1], C[g + 8, 2 * t], C[g + 8, 2 * t + 1] = c
    D = (A @ B + C).astype(F32)
    return D[g, 2 * t], D[g, 2 * t + 1], D[g + 8, 2 * t], D[g + 8, 2 * t + 1]


def wgmma_addresses(desc, rows, k, size, transposed):
    """Where in shared memory the numbers of a wgmma's operand lie, by its descriptor: bytes [rows, k].

    Args:
        size: bytes of a number.
        transposed: whether numbers of one column, not of one row, follow each other.
    """
    start = (desc & 0x3FFF) << 4
    lead = ((desc >> 16) & 0x3FFF) << 4
    stride = ((desc >> 32) & 0x3FFF) << 4
    swizzle = (desc >> 62) & 3
    r, c = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    span = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle] // size  # numbers of a row of the swizzle's pattern
    if not transposed:  # K is contiguous: 8 rows of ``span`` numbers are a pattern
        inside = (r % 8) * (span * size) + (c % span) * size
        at = start + inside + (r // 8) * stride + (c // span) * lead
    else:  # rows are contiguous: 8 values of k of ``span`` rows are a pattern
        inside = (c % 8) * (span * size) + (r % span) * size
        at = start + inside + (c // 8) * stride + (r // span) * lead
    if swizzle:
        bits = {1: 7, 2: 3, 3: 1}[swizzle]
        at = at ^ (((at >> 7) & bits) << 4)
    return at
