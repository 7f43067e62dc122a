"""Tokens that write with a share of their strength."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .rule import DeltaRule


def trusted(projections: torch.Tensor, gate_bias: torch.Tensor, rule: DeltaRule, trust: torch.Tensor) -> torch.Tensor:
    """Raw projections whose gates are lowered: β ← τ β, and λ ← 1 − τ (1 − λ).

    So S_t is τ of what it would be, and 1 − τ of S_{t−1}: the rows obey s ← s + τ (κ s − ε (s · k) k + ω v k − s), in
    ``lambda_outside`` with τ ε of the lowered λ. At τ = 0 the state stays as it is, bit for bit; reads do not change.

    The gates are lowered in their logits, so that every operator takes them; differentiable, but for τ.

    Args:
        projections: [..., W], raw, of any floating dtype.
        gate_bias: [β's (and λ's) biases].
        rule: the recurrence.
        trust: τ [...], 0 to 1.

    Returns:
        [..., W] in float32 (float64 stays); where τ is 1 with the numbers of ``projections``.
    """
    wide = projections if projections.dtype == torch.float64 else projections.float()
    first = 3 * rule.read_width
    bias, share = gate_bias.to(wide.dtype), trust.to(wide.dtype).unsqueeze(-1)
    # λ's logit is lowered from above: 1 − λ = σ(−logit) is what gets the share.
    sign = torch.ones_like(bias)
    sign[rule.gate_width :] = -1.0
    raw = wide[..., first:]
    logit = sign * (raw + bias)
    lowered = share.log() + F.logsigmoid(logit) - (1 - share + share * torch.sigmoid(-logit)).log()
    # σ of it is 0 in every backend; −inf would make the token one that is not finite.
    lowered = torch.where(share > 0, sign * lowered - bias, -1e30 * sign)
    lowered = torch.where(torch.isfinite(raw), lowered, raw)  # such a token stays one that is left out and counted
    return torch.cat([wide[..., :first], torch.where(share == 1, raw, lowered)], -1)
