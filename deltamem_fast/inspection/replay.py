"""The recurrence of a forward once more, token by token and over all layers at a time, from its raw projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltamem_kernels.reference.recurrence import (
    all_finite,
    delta_rule,
    full_precision,
    split_projections,
    valid_tokens,
)
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.segment_means import segment_means

BLOCK = 256  # tokens whose states are held at a time


@dataclass(frozen=True, eq=False)
class Replay:
    """What each of T tokens did in each of L layers and H heads; float32 (float64 for a float64 state).

    Attributes:
        writes: [T, L, H], ‖write_t ⊙ v_t − erase_t ⊙ (S_{t−1} k_t)‖ · ‖k_t‖, gate × error: the norm of the rank-1
            change that is put in beside the decay; 0 where nothing is written.
        reads: [T, L, H], ‖S_{t−1} q_t‖; 0 for a masked token.
        beta: [T, L, H], mean over the rows of the state of the write gate; 0 where nothing is written.
        norms: [T, L, H], ‖S_t‖, Frobenius.
        final: [L, H, r, r], the last state.
        states: [T, L, H, r, r], S_t, or None if they were not asked for.
    """

    writes: torch.Tensor
    reads: torch.Tensor
    beta: torch.Tensor
    norms: torch.Tensor
    final: torch.Tensor
    states: torch.Tensor | None


@torch.no_grad()
@full_precision
def replay(
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    initial: torch.Tensor,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    frozen: bool = False,
    keep_states: bool = False,
) -> Replay:
    """Read and write one conversation's tokens in every layer, as ``model.update.advance`` does.

    With segments (SSW) every token reads the initial state. A segment is written once, and that write is said of each
    of its tokens: they share its size and its β, and their state is the one after it. A token that is in no segment
    has the state of the written token before it.

    Args:
        projections: [L, T, W], raw, of any floating dtype.
        gate_bias: [L, bias_width].
        initial: float32 (or float64) [L, H, r, r], before the first token.
        rule: the recurrence, the same in all layers.
        mask: bool [T], True = a real token, or None. A masked token, and one that is not finite in a layer, reads 0
            there and writes nothing.
        segment_ids: int [T], −1 = not written, or None: every token is written.
        frozen: read-only: nothing is written.
        keep_states: return the state after every token, T·L·H·r² numbers.
    """
    dtype = initial.dtype
    projections, gate_bias = projections.to(dtype), gate_bias.to(dtype)
    layers, length = projections.shape[:2]
    mask = None if mask is None else mask.expand(layers, length)
    valid, _ = valid_tokens(projections, mask)
    if segment_ids is None and not frozen:
        return _scan(_factors(projections, valid, gate_bias, rule), valid, initial, keep_states)

    q = _factors(projections, valid, gate_bias, rule)[0]
    reads = torch.einsum("lhij,lthj->tlhi", initial, q).norm(dim=-1)
    if frozen:
        nothing = torch.zeros_like(reads)
        norms = initial.norm(dim=(-2, -1)).expand(length, -1, -1)
        states = initial.expand(length, -1, -1, -1, -1) if keep_states else None
        return Replay(nothing, reads, nothing, norms, initial, states)

    ids = segment_ids.expand(layers, length)
    means, present, _ = segment_means(projections, ids, mask)
    count = int(present.sum(1).max()) if length else 0
    means, present = means[:, :count], present[:, :count]
    written = _scan(_factors(means, present, gate_bias, rule), present, initial, keep_states)
    place = _places(ids, valid & (ids >= 0))
    own = place.where(valid & (ids >= 0), torch.full_like(place, -1))
    nothing = initial.new_zeros(1, *initial.shape[:2])
    return Replay(
        _pick(written.writes, own, nothing),
        reads,
        _pick(written.beta, own, nothing),
        _pick(written.norms, place, initial.norm(dim=(-2, -1))[None]),
        written.final,
        _pick(written.states, place, initial[None]) if keep_states else None,
    )


def _factors(projections, valid, gate_bias, rule: DeltaRule) -> list[torch.Tensor]:
    """q, k, v, keep, erase, write, each [L, T, H, r]; every layer has gate biases of its own."""
    clean = torch.where(valid.unsqueeze(-1), projections, 0.0)
    by_layer = [split_projections(rows, bias, rule) for rows, bias in zip(clean, gate_bias)]
    return [torch.stack(parts) for parts in zip(*by_layer)]


def _scan(factors: list[torch.Tensor], valid: torch.Tensor, state: torch.Tensor, keep_states: bool) -> Replay:
    blocks, kept = [], []
    for tokens in zip(*(x.split(BLOCK, 1) for x in (*factors, valid))):
        if not tokens[0].shape[1]:
            break
        *factors, counts = tokens
        (state, states, *block), _ = all_finite(_block, factors, state, counts)
        blocks.append(block)
        kept += [states] if keep_states else []
    nothing = state.new_zeros(0, *state.shape[:2])
    figures = [torch.cat(parts) for parts in zip(*blocks)] if blocks else [nothing] * 4
    states = torch.cat(kept) if kept else state.new_zeros(0, *state.shape)
    return Replay(*figures, state, states if keep_states else None)


def _block(q, k, v, keep, erase, write, state, valid):
    """The last state, all states, writes, reads, beta and norms of some tokens."""
    reads, states = delta_rule(q, k, v, keep, erase, write, state, valid)
    after = torch.stack(states)
    before = torch.cat([state[None], after[:-1]])
    k, v, erase, write = (x.transpose(0, 1) for x in (k, v, erase, write))
    error = write * v - erase * torch.einsum("tlhij,tlhj->tlhi", before, k)
    counts = valid.T[..., None]
    writes = torch.where(counts, error.norm(dim=-1) * k.norm(dim=-1), 0.0)
    beta = torch.where(counts, write.mean(-1), 0.0)
    return states[-1], after, writes, torch.stack(reads).norm(dim=-1), beta, after.norm(dim=(-2, -1))


def _places(ids: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """[L, T]: how many segments precede that of each token, or of the written token before it; −1 before the first."""
    length = ids.shape[1]
    rows = []
    for row, counts in zip(ids, used):
        place = torch.searchsorted(row[counts].unique(), row)
        last = torch.where(counts, torch.arange(length, device=row.device), -1).cummax(0).values
        rows.append(torch.where(last >= 0, place[last.clamp(min=0)], -1))
    return torch.stack(rows)


def _pick(values: torch.Tensor, place: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """[P, L, ...] → [T, L, ...]: the value at each layer's and token's place; ``before``, [1, L, ...], at −1."""
    layers = torch.arange(place.shape[0], device=place.device)
    return torch.cat([before, values])[place.T + 1, layers]
