"""Gradients of scan, read and steer: explicit adjoints in plain PyTorch, for any backend and device.

With G = dL/dS_t, the gradient of the state after token t, and d = dL/dread_t (rows i, columns j):

    p = S_{t-1} k,   u = write v − erase p,   S_t = diag(keep) S_{t-1} + u kᵀ
    du     = G k             dv   = du write     dwrite = du v     derase = −du p     dp = −erase du
    dk     = Gᵀ u + S_{t-1}ᵀ dp                  dq     = S_{t-1}ᵀ d
    dkeep  = Σ_j G S_{t-1}                       dS_{t-1} = diag(keep) G + dp kᵀ + d qᵀ

Tokens run backwards. Only the states at the starts of √T blocks are kept; those inside a block are computed once
more when its turn comes. A masked token, and one that is not finite, passes G on unchanged and gets 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .rule import DeltaRule

EPS = 1e-6


def _wide(*tensors: torch.Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _unit_tanh(raw: torch.Tensor, rule: DeltaRule):
    """unit(tanh(raw)), and what its gradient needs."""
    if not rule.normalize:
        return raw, None
    z = torch.tanh(raw)
    norm = torch.sqrt((z * z).sum(-1, keepdim=True)).clamp(min=EPS)
    return z / norm, (z, norm)


def _unit_tanh_backward(grad: torch.Tensor, unit: torch.Tensor, saved) -> torch.Tensor:
    if saved is None:
        return grad
    z, norm = saved
    # At the floor of the norm unit() is a plain division.
    along = torch.where(norm > EPS, (grad * unit).sum(-1, keepdim=True), 0.0)
    return (grad - unit * along) / norm * (1 - z * z)


def _split(projections: torch.Tensor, rule: DeltaRule) -> list[torch.Tensor]:
    sizes = [rule.read_width] * 3 + [rule.gate_width] * (2 if rule.has_lambda else 1)
    return list(projections.split(sizes, -1))


def _heads(x: torch.Tensor, rule: DeltaRule) -> torch.Tensor:
    """[..., H·r] or [..., H] → [..., H, r] or [..., H, 1]."""
    return x.unflatten(-1, (rule.heads, x.shape[-1] // rule.heads))


def _forward_parts(projections: torch.Tensor, bias: torch.Tensor, rule: DeltaRule) -> dict:
    """Clean projections [..., W] → every factor of the recurrence, [..., H, r] (gates of a head: [..., H, 1])."""
    raw = _split(projections, rule)
    q, q_saved = _unit_tanh(_heads(raw[0], rule), rule)
    k, k_saved = _unit_tanh(_heads(raw[1], rule), rule)
    beta = torch.sigmoid(_heads(raw[3] + bias[: rule.gate_width], rule))
    own = None
    if rule.mode == "no_lambda":
        keep = torch.ones_like(beta)
    elif rule.coupled:
        keep = 1 - beta
    else:
        keep = own = torch.sigmoid(_heads(raw[4] + bias[rule.gate_width :], rule))
    erase = keep * beta if rule.mode == "lambda_outside" else beta
    return {
        "q": q, "k": k, "v": _heads(raw[2], rule), "keep": keep, "erase": erase, "write": beta,
        "own": own, "q_saved": q_saved, "k_saved": k_saved,
    }  # fmt: skip


def _parts_backward(grads: dict, parts: dict, rule: DeltaRule) -> torch.Tensor:
    """Gradients of the factors, each [..., H, r] → the gradient of the projections [..., W]."""

    def gate(name: str) -> torch.Tensor:
        return grads[name] if rule.row_gates else grads[name].sum(-1, keepdim=True)

    keep, beta, erase = gate("keep"), gate("write"), gate("erase")
    if rule.mode == "lambda_outside":
        beta = beta + erase * parts["keep"]
        keep = keep + erase * parts["write"]
    else:
        beta = beta + erase
    if rule.mode != "no_lambda" and rule.coupled:
        beta = beta - keep
    value = parts["write"]
    columns = [
        _unit_tanh_backward(grads["q"], parts["q"], parts["q_saved"]),
        _unit_tanh_backward(grads["k"], parts["k"], parts["k_saved"]),
        grads["v"],
        beta * value * (1 - value),
    ]
    if rule.has_lambda:
        columns.append(keep * parts["own"] * (1 - parts["own"]))
    return torch.cat([column.flatten(-2) for column in columns], -1)


def _next_state(state: torch.Tensor, token: dict, valid: torch.Tensor) -> torch.Tensor:
    predicted = torch.einsum("bhij,bhj->bhi", state, token["k"])
    u = token["write"] * token["v"] - token["erase"] * predicted
    updated = token["keep"].unsqueeze(-1) * state + u.unsqueeze(-1) * token["k"].unsqueeze(-2)
    return torch.where(valid[:, None, None, None], updated, state)


def _rows_backward(d_reads, d_state, d_checkpoints, every, projections, bias, initial, valid, rule):
    """Rows of equal length: gradients of projections [B, T, W], bias and initial state."""
    batch, length = valid.shape
    clean = torch.where(valid.unsqueeze(-1), projections, 0.0)
    parts = _forward_parts(clean, bias, rule)
    names = ("q", "k", "v", "keep", "erase", "write")

    def token(t: int) -> dict:
        return {name: parts[name][:, t] for name in names}

    block = max(1, math.isqrt(length))
    starts, state = [], initial
    for t in range(length):
        if t % block == 0:
            starts.append(state)
        state = _next_state(state, token(t), valid[:, t])
    out = {name: clean.new_zeros(batch, length, rule.heads, rule.rank) for name in names}
    d_reads = _heads(torch.where(valid.unsqueeze(-1), d_reads, 0.0), rule)
    grad = d_state
    for first in range((length - 1) // block * block, -1, -block) if length else ():
        last = min(first + block, length)
        states = [starts[first // block]]
        for t in range(first, last - 1):
            states.append(_next_state(states[-1], token(t), valid[:, t]))
        for t in range(last - 1, first - 1, -1):
            if d_checkpoints is not None and (t + 1) % every == 0:
                grad = grad + d_checkpoints[:, (t + 1) // every - 1]
            now, before, d_read = token(t), states[t - first], d_reads[:, t]
            live = valid[:, t, None, None]
            predicted = torch.einsum("bhij,bhj->bhi", before, now["k"])
            u = now["write"] * now["v"] - now["erase"] * predicted
            d_u = torch.einsum("bhij,bhj->bhi", grad, now["k"])
            d_predicted = -now["erase"] * d_u
            here = {
                "q": torch.einsum("bhij,bhi->bhj", before, d_read),
                "k": torch.einsum("bhij,bhi->bhj", grad, u) + torch.einsum("bhij,bhi->bhj", before, d_predicted),
                "v": d_u * now["write"],
                "keep": (grad * before).sum(-1),
                "erase": -d_u * predicted,
                "write": d_u * now["v"],
            }
            for name in names:
                out[name][:, t] = torch.where(live, here[name], 0.0)
            back = now["keep"].unsqueeze(-1) * grad
            back = back + d_predicted.unsqueeze(-1) * now["k"].unsqueeze(-2)
            back = back + d_read.unsqueeze(-1) * now["q"].unsqueeze(-2)
            grad = torch.where(live.unsqueeze(-1), back, grad)
    d_projections = _parts_backward(out, parts, rule)
    d_projections = torch.where(valid.unsqueeze(-1), d_projections, 0.0)
    d_bias = d_projections[..., 3 * rule.read_width :].sum((0, 1))
    return d_projections, d_bias, grad


def _gather_rows(state, slots, count: int, rule: DeltaRule, wide: torch.dtype, device) -> torch.Tensor:
    if state is None:
        return torch.zeros(count, rule.heads, rule.rank, rule.rank, dtype=wide, device=device)
    if slots is None:
        return state.to(wide)
    live = (slots >= 0)[:, None, None, None]
    return torch.where(live, state[slots.clamp(min=0).long()].to(wide), 0.0)


def _scatter_rows(grad: torch.Tensor, state: torch.Tensor, slots) -> torch.Tensor:
    """The gradient of the rows → that of the state they were taken from."""
    if slots is None:
        return grad.to(state.dtype)
    grad = torch.where((slots >= 0)[:, None, None, None], grad, 0.0)
    pool = torch.zeros(state.shape, dtype=grad.dtype, device=grad.device)
    return pool.index_add(0, slots.clamp(min=0).long(), grad).to(state.dtype)


def scan_backward(
    d_reads: torch.Tensor,
    d_state: torch.Tensor,
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    d_checkpoints: torch.Tensor | None = None,
    checkpoint_every: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient of ``scan``, of which it takes the arguments.

    Args:
        d_reads: [B, T, H·r], the gradient of ``reads``.
        d_state: [N, H, r, r], of the final ``state``.
        d_checkpoints: of ``checkpoints``, in their layout, or None.

    Returns:
        The gradients of projections, gate_bias and state (None without a state), each in the dtype and shape of
        what it belongs to, computed in float32 (float64 if an input is). A masked token and one that is not
        finite get 0, and so does a sequence whose slot is −1. With ``cu_seqlens`` the host waits for them.
    """
    wide = _wide(projections, state)
    device = projections.device
    finite = torch.isfinite(projections).all(-1)
    valid = finite if mask is None else finite & mask
    x, bias, d_reads, d_state = (t.to(wide) for t in (projections, gate_bias, d_reads, d_state))
    d_checkpoints = d_checkpoints.to(wide) if d_checkpoints is not None else None
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    initial = _gather_rows(state, slots, count, rule, wide, device)
    index = None
    if cu_seqlens is not None:
        # One padded row per sequence; what pads is masked.
        begin, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        longest = int(lengths.max()) if count else 0
        steps = torch.arange(longest, device=device)
        inside = steps < lengths[:, None]
        index = torch.where(inside, begin[:, None] + steps, 0)
        x, valid, d_reads = x[0, index], valid[0, index] & inside, d_reads[0, index]
        if d_checkpoints is not None:
            taken = lengths // checkpoint_every
            steps = torch.arange(longest // checkpoint_every, device=device)
            rows = torch.where(steps < taken[:, None], (taken.cumsum(0) - taken)[:, None] + steps, 0)
            here = (steps < taken[:, None])[..., None, None, None]
            d_checkpoints = torch.where(here, d_checkpoints[rows], 0.0)
    if slots is not None:
        valid = valid & (slots >= 0)[:, None]
    d_x, d_bias, d_initial = _rows_backward(
        d_reads, d_state, d_checkpoints, checkpoint_every, x, bias, initial, valid, rule
    )
    if index is not None:
        packed = torch.zeros(projections.shape[1:], dtype=wide, device=device)
        packed.index_add_(0, index.flatten(), torch.where(inside.unsqueeze(-1), d_x, 0.0).flatten(0, 1))
        d_x = packed.unsqueeze(0)
    d_initial = _scatter_rows(d_initial, state, slots) if state is not None else None
    return d_x.to(projections.dtype), d_bias.to(gate_bias.dtype), d_initial


def read_backward(
    d_reads: torch.Tensor,
    projections: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of ``read``: of projections (0 outside of q) and state."""
    wide = _wide(projections, state)
    finite = torch.isfinite(projections).all(-1)
    valid = finite if mask is None else finite & mask
    if slots is not None:
        valid = valid & (slots >= 0)[:, None]
    rows = _gather_rows(state, slots, projections.shape[0], rule, wide, projections.device)
    raw = torch.where(valid.unsqueeze(-1), projections[..., : rule.read_width].to(wide), 0.0)
    q, saved = _unit_tanh(_heads(raw, rule), rule)
    d_reads = _heads(torch.where(valid.unsqueeze(-1), d_reads.to(wide), 0.0), rule)
    d_q = torch.einsum("bhij,bthi->bthj", rows, d_reads)
    d_raw = torch.where(valid.unsqueeze(-1), _unit_tanh_backward(d_q, q, saved).flatten(-2), 0.0)
    d_projections = F.pad(d_raw, (0, rule.width - rule.read_width)).to(projections.dtype)
    d_rows = torch.einsum("bthi,bthj->bhij", d_reads, q)
    return d_projections, _scatter_rows(d_rows, state, slots)


def steer_backward(
    grad: torch.Tensor,
    reads: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient of ``steer``: of base, reads, weight and norm_weight (None without one)."""
    wide = _wide(grad, reads, weight)
    d_delta, wide_reads, wide_weight = grad.to(wide), reads.to(wide), weight.to(wide)
    d_norm = None
    if norm_weight is not None:
        delta = F.linear(wide_reads, wide_weight) * scale
        inverse = torch.rsqrt((delta * delta).mean(-1, keepdim=True) + eps)
        normed = delta * inverse
        d_norm = (d_delta * normed).flatten(0, -2).sum(0).to(norm_weight.dtype)
        d_normed = d_delta * norm_weight.to(wide)
        d_delta = inverse * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    d_delta = d_delta * scale
    d_weight = d_delta.flatten(0, -2).transpose(0, 1) @ wide_reads.flatten(0, -2)
    # A gradient is a tensor of its own, never the one that came in.
    return grad.clone(), (d_delta @ wide_weight).to(reads.dtype), d_weight.to(weight.dtype), d_norm
