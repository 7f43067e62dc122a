"""The packed row of the fast path in plain PyTorch: Δq, Δk, Δv, q/k norm and RoPE; the definition of correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..layout import HeadLayout, Steering, check_heads
from ..rule import DeltaRule
from .recurrence import read, step

_ORDER = "qkvo"


def factor(steering: Steering, head: str, dtype: torch.dtype) -> torch.Tensor | float:
    """scale · c of ``q``, ``k``, ``v`` or ``o``."""
    raw = steering.scale_raw
    if raw is None:
        return steering.scale
    raw = raw[_ORDER.index(head) if raw.numel() == 4 else 0]
    return steering.scale * torch.sigmoid(raw.to(dtype)) * steering.scale_max


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the leading numbers of heads [B, T, n, D]; cos and sin [B or 1, T, rotary] in the same dtype."""
    rotary = cos.shape[-1]
    turned, rest = heads[..., :rotary], heads[..., rotary:]
    low, high = turned.chunk(2, -1)
    turned = turned * cos.unsqueeze(2) + torch.cat([-high, low], -1) * sin.unsqueeze(2)
    return torch.cat([turned, rest], -1)


def steer_heads_(
    packed: torch.Tensor,
    reads: torch.Tensor,
    layout: HeadLayout,
    steering: Steering,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    check: bool = True,
) -> None:
    """Correct, normalise and rotate the heads of packed rows, in place. Not differentiable.

        x <- RoPE(rms_norm(x + scale · c · W reads))     q and k; v: the correction alone

    Args:
        packed: [B, T, N] of any floating dtype, last stride 1, N at least the layout's width; q, k and v are
            changed, what lies behind them is not.
        reads: float32 [B, T, H·r].
        layout: which heads lie where.
        steering: corrections and norms.
        cos, sin: [B or 1, T, rotary] of any floating dtype, or None without RoPE.
        check: False leaves the checks out, for a caller that knows the shapes.

    Everything is computed in float32 (float64 for float64 rows) and rounded once.

    Raises:
        ValueError, TypeError: see ``deltamem_kernels.layout.check_heads``.
    """
    if check:
        check_heads(packed, layout, steering, cos, sin, reads.shape[-1])
    wide = torch.float64 if packed.dtype == torch.float64 else torch.float32
    for head, norm in (("q", steering.q_norm), ("k", steering.k_norm), ("v", None)):
        weight = getattr(steering, head)
        turned = head != "v" and layout.rotary > 0
        if weight is None and norm is None and not turned:
            continue
        first, last = layout.span(head)
        rows = packed[..., first:last]
        value = rows.to(wide)
        if weight is not None:
            value = value + F.linear(reads.to(wide), weight.to(wide)) * factor(steering, head, wide)
        value = value.unflatten(-1, (-1, layout.dim))
        if norm is not None:
            value = F.rms_norm(value, (layout.dim,), norm.to(wide), steering.eps)
        if turned:
            value = rotate(value, cos.to(wide), sin.to(wide))
        rows.copy_(value.flatten(-2))


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
        reads: float32 [..., H·r].
        weight: [N, H·r], of any floating dtype.
        scale, norm_weight, eps: as in ``reference.recurrence.steer``.
        dtype: of the result.

    Returns:
        [..., N], computed in float32 (float64 for float64 reads) and rounded once.
    """
    found = F.linear(reads, weight.to(reads.dtype)) * scale
    if norm_weight is not None:
        found = F.rms_norm(found, (found.shape[-1],), norm_weight.to(reads.dtype), eps)
    return found.to(dtype)


def workspace(kept: dict, counter: torch.Tensor | None) -> object:
    """What ``decode_`` and ``prefill_`` of this backend want from call to call; of no use to another. Here, nothing.

    Args:
        kept: empty at first; goes with the tensors of one ``steering`` and ``gate_bias``, and may be shared by threads.
        counter: int32 [B] of zeros, on the state's device, or None; goes with one state.
    """
    return None


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
    workspace: object = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One decoded token per row: read, write, and the heads corrected, normalised and rotated. Not differentiable.

    ``step`` (``read`` if frozen) of the memory's projections, then ``steer_heads_`` with what was read.

    Args:
        packed: [B, N], last stride 1: q, k, v (changed in place), then the memory's W projections, raw.
        gate_bias, state, rule, mask, slots, skipped: as in ``step``; state and skipped are changed in place.
        layout, steering, cos, sin: as in ``steer_heads_``; cos and sin [B or 1, 1, rotary].
        frozen: read only; state and skipped stay as they are.
        check: as in ``steer_heads_``.
        workspace: what the backend's ``workspace`` has made, or None; only what it costs depends on it.

    Returns:
        reads, float32 [B, H·r], and Δo = scale · c · W_o reads in packed's dtype, [B, N_o], or None without ``o``.

    Raises:
        ValueError, TypeError: see ``deltamem_kernels.rule.check_arguments`` and ``layout.check_heads``.
    """
    if check:
        check_heads(packed, layout, steering, cos, sin, rule.read_width, rule)
    rows = packed[:, layout.width : layout.width + rule.width]
    if frozen:
        reads = read(rows.unsqueeze(1), state, rule, mask=None if mask is None else mask.unsqueeze(1), slots=slots)
        reads = reads.squeeze(1)
    else:
        reads = step(rows, gate_bias, state, rule, mask=mask, slots=slots, skipped=skipped)
    steer_heads_(packed.unsqueeze(1), reads.unsqueeze(1), layout, steering, cos, sin)
    if steering.o is None:
        return reads, None
    addend = F.linear(reads, steering.o.to(reads.dtype)) * factor(steering, "o", reads.dtype)
    return reads, addend.to(packed.dtype)
