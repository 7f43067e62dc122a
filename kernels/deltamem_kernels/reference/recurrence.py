"""The definition of correct: the delta-rule memory in plain PyTorch, one token at a time.

Same signatures and layout as the kernels, so that a test compares like with like. Differentiable with
respect to every floating-point input. Everything is computed in ``dtype`` (float32, or float64 as an oracle).
Source of the equations: arXiv 2605.12357. Where each stands:

    project          q, k, v and the gates from x     ``split_projections``
    read             read_t = S_{t-1} q_t             ``delta_rule``; of a frozen state ``read``
    write            S_t from S_{t-1}                 ``delta_rule``; one token in place ``step``
    what counts      masked, not finite               ``valid_tokens``, ``all_finite``
    steer            base + Δ, Δ = scale · W reads    ``steer``; inside packed heads ``heads``
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F

from ..errors import ArgumentError
from ..rule import DeltaRule, ScanOutput, check_arguments

EPS = 1e-6
UNDIVIDED = 64  # tokens of a row whose graph is kept whole


def _unit(z: torch.Tensor) -> torch.Tensor:
    """unit(z) = z / max(‖z‖₂, 1e-6) over the last axis, [..., r]."""
    # sqrt has no gradient at 0; an all-zero vector stays zero and gets the gradient of z / EPS.
    square = (z * z).sum(-1, keepdim=True)
    small = square <= EPS * EPS
    norm = torch.where(small, square.new_full((), EPS), torch.sqrt(torch.where(small, 1.0, square)))
    return z / norm


def _held(gate: torch.Tensor, most: float) -> torch.Tensor:
    """A gate at ``most`` or below; NaN stays NaN."""
    return gate if most == 1.0 else gate.clamp(max=most)


def split_projections(projections: torch.Tensor, gate_bias: torch.Tensor, rule: DeltaRule):
    """Project: raw projections → q, k, v, keep, erase, write.

        q = unit(tanh(W_q x)), k = unit(tanh(W_k x)) per head, both raw without ``normalize``;  v = W_v x
        β = σ(W_β x + b_β);  λ = 1 − β if coupled, else σ(W_λ x + b_λ);  λ = 1 in mode no_lambda
        keep = λ,  erase = β (lambda_outside: λ β),  write = β

    With a guard β, keep and |v| are held at ``beta_max``, ``keep_max`` and ``value_max`` at most; what is held there
    has no gradient.

    Args:
        projections: [..., W], x times the stacked weights of q, k, v, β (and λ), no bias.
        gate_bias: [β's (and λ's) biases].

    Returns:
        q, k, v, keep, erase, write, each [..., H, r].
    """
    heads, rank, gates = rule.heads, rule.rank, rule.gate_width
    sizes = [heads * rank] * 3 + [gates] * (2 if rule.has_lambda else 1)
    parts = projections.split(sizes, dim=-1)
    lead = projections.shape[:-1]
    q, k, v = (part.reshape(*lead, heads, rank) for part in parts[:3])
    if rule.normalize:
        q, k = _unit(torch.tanh(q)), _unit(torch.tanh(k))

    def gate(raw: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        raw = raw + bias
        # A bias may be NaN. Then so is the gate; but a gradient of 0 stays one, which sigmoid would make NaN.
        unknown = torch.isnan(raw)
        value = torch.where(unknown, torch.nan, torch.sigmoid(torch.where(unknown, 0.0, raw)))
        return value.reshape(*lead, heads, gates // heads).expand(*lead, heads, rank)

    beta = _held(gate(parts[3], gate_bias[:gates]), rule.beta_max)
    if rule.mode == "no_lambda":
        keep = torch.ones_like(beta)
    elif rule.coupled:
        keep = 1.0 - beta
    else:
        keep = gate(parts[4], gate_bias[gates:])
    keep = _held(keep, rule.keep_max)
    if rule.value_max != math.inf:
        v = v.clamp(-rule.value_max, rule.value_max)
    erase = keep * beta if rule.mode == "lambda_outside" else beta
    return q, k, v, keep, erase, beta


def valid_tokens(projections: torch.Tensor, mask: torch.Tensor | None):
    """Which tokens are unmasked and have finite projections: [..., W] → (valid, skipped), both bool [...].

    A valid one is not written either if it would leave a state that is not finite: ``all_finite``.
    """
    finite = torch.isfinite(projections).all(-1)
    present = torch.ones_like(finite) if mask is None else mask
    return present & finite, present & ~finite


def delta_rule(q, k, v, keep, erase, write, state, valid=None):
    """Read, then write, one token after another.

        read_t = S_{t-1} q_t
        S_t    = diag(keep_t) S_{t-1} − diag(erase_t) (S_{t-1} k_t) k_tᵀ + diag(write_t) v_t k_tᵀ

    Args:
        q, k, v, keep, erase, write: [B, T, H, r].
        state: [B, H, r, r], rows over values, columns over keys.
        valid: bool [B, T] or None. An invalid token reads 0 and leaves the state bit-equal.

    Returns:
        reads [B, T, H, r] and the list of the T states, each [B, H, r, r], after every token.
    """
    reads, states = [], []
    # Not q[:, t], whose gradient is as long as q for every token.
    tokens = zip(*(x.unbind(1) for x in (q, k, v, keep, erase, write)), strict=True)
    for t, (q_t, k_t, v_t, keep_t, erase_t, write_t) in enumerate(tokens):
        read = torch.einsum("bhij,bhj->bhi", state, q_t)
        updated = _updated(k_t, v_t, keep_t, erase_t, write_t, state)
        if valid is not None:
            read = torch.where(valid[:, t, None, None], read, 0.0)
            updated = torch.where(valid[:, t, None, None, None], updated, state)
        state = updated
        reads.append(read)
        states.append(state)
    return reads, states


def _updated(k, v, keep, erase, write, state):
    """S_t of ``delta_rule``: the state [B, H, r, r] after one token, its factors [B, H, r]."""
    predicted = torch.einsum("bhij,bhj->bhi", state, k)
    column = write * v - erase * predicted
    return keep.unsqueeze(-1) * state + column.unsqueeze(-1) * k.unsqueeze(-2)


def all_finite(run, factors, state: torch.Tensor, valid: torch.Tensor) -> tuple[tuple, torch.Tensor]:
    """Run a recurrence such that no token leaves a state that is not finite.

    A valid token after which the state of any of its H heads would hold NaN or Inf is written in none of them: it
    reads 0 and leaves the state bit-equal, as a masked token.

    Args:
        run: (q, k, v, keep, erase, write, state, valid) → (the last state, ...), by ``delta_rule``.
        factors, state, valid: what it takes, see ``delta_rule``.

    Returns:
        What ``run`` returns, and which tokens are written, bool [B, T].
    """
    if state.device.type == "meta":
        return run(*factors, state, valid), valid
    if _may_ask():
        found = run(*factors, state, valid)
        # What is not finite stays so: Inf times a number, plus a number, is Inf or NaN. The last state tells of all.
        if torch.isfinite(found[0]).all():
            return found, valid
    written = _written_tokens(factors, state, valid)
    # Not the projections: with the same gates, one of which may be NaN, a gradient of 0 would become NaN.
    clean = [torch.where(written[..., None, None], factor, 0.0) for factor in factors]
    return run(*clean, state, written), written


@torch.no_grad()
def _written_tokens(factors, state: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Which tokens ``all_finite`` writes, bool [B, T]: a look at the state after each."""
    written = []
    for _, *token, valid_t in zip(*(x.unbind(1) for x in (*factors, valid)), strict=True):
        updated = _updated(*token, state)
        written.append(valid_t & torch.isfinite(updated).flatten(1).all(1))
        state = torch.where(written[-1][:, None, None, None], updated, state)
    return torch.stack(written, 1)


def _may_ask() -> bool:
    """Whether a tensor's value may be asked for: not where a compiler or torch.func traces."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def first_states(state, slots, sequences: int, rule: DeltaRule, dtype, device) -> torch.Tensor:
    """S_0 of each sequence, [N, H, r, r]: the given states, the slots' rows of them, or zeros."""
    if state is None:
        return torch.zeros(sequences, rule.heads, rule.rank, rule.rank, dtype=dtype, device=device)
    state = state.to(dtype)
    if slots is None:
        return state
    rows = state[slots.clamp(min=0).long()]
    return torch.where((slots >= 0)[:, None, None, None], rows, 0.0)


def check_bounds(bounds: list[int], length: int) -> None:
    """Raise ValueError unless ``bounds`` cut T = ``length`` tokens into sequences."""
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ArgumentError(f"cu_seqlens: got {bounds}, allowed a non-decreasing list from 0 to T = {length}")


def full_precision(function):
    """Run ``function`` outside of autocast, which would round parts of the recurrence."""

    @functools.wraps(function)
    def wrapper(projections, *args, **kwargs):
        kind = projections.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(projections, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(projections, *args, **kwargs)

    return wrapper


def _scan_block(q, k, v, keep, erase, write, state, valid, first, every):
    """Tokens from the row's ``first`` on: the last state, reads [B, n, H, r] and, if any, the states to return."""
    reads, states = delta_rule(q, k, v, keep, erase, write, state, valid)
    kept = states[(-first - 1) % every :: every] if every else []
    return states[-1], torch.stack(reads, 1), *([torch.stack(kept, 1)] if kept else [])


class _Recomputed(torch.autograd.Function):
    """``_scan_block``, of which autograd keeps the arguments alone; the way back computes the rest once more.

    torch.utils.checkpoint does the same, with a hook on each of some thirty tensors a token: twice as slow.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.first, ctx.every = arguments
        ctx.save_for_backward(*tensors)
        return _scan_block(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[:-2]
        differentiable = torch.is_grad_enabled()  # create_graph: the gradient is differentiated in its turn
        if not differentiable:
            tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = _scan_block(*tensors, ctx.first, ctx.every)
        inputs = [t for t, n in zip(tensors, needed, strict=True) if n]
        found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=differentiable, allow_unused=True))
        return *(next(found) if n else None for n in needed), None, None


def _keeps_a_graph(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is done with them and can be told what not to keep."""
    # A compiler decides for itself what it keeps, and torch.func transforms no such function.
    return _may_ask() and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _scan_rows(projections, valid, gate_bias, state, rule, every):
    """A batch of equally long rows → reads, final state, list of stacked checkpoints, which tokens were written.

    Under autograd a long row is taken in blocks of √T tokens: of each the first state is kept, and what lies inside
    is computed once more on the way back. So a gradient takes O(√T · r²) beside the O(T · r) of the factors. Its bits
    are the same, but for the order of one sum where a returned checkpoint is a block's last state.
    """
    clean = torch.where(valid.unsqueeze(-1), projections, 0.0)
    factors = split_projections(clean, gate_bias, rule)
    batch, length = valid.shape
    if length == 0:
        return state.new_zeros(batch, 0, rule.read_width), state.clone(), [], valid
    if length <= UNDIVIDED or not _keeps_a_graph(*factors, state):
        run = functools.partial(_scan_block, first=0, every=every)
        (state, reads, *checkpoints), written = all_finite(run, factors, state, valid)
        return reads.flatten(2), state, checkpoints, written
    block = math.isqrt(length)
    reads, checkpoints, written = [], [], []
    for n, (*tokens, counts) in enumerate(zip(*(x.split(block, 1) for x in (*factors, valid)), strict=True)):

        def run(*arguments, first=n * block):
            return _Recomputed.apply(*arguments, first, every)

        (state, read, *kept), counts = all_finite(run, tokens, state, counts)
        reads.append(read)
        checkpoints += kept
        written.append(counts)
    return torch.cat(reads, 1).flatten(2), state, checkpoints, torch.cat(written, 1)


@full_precision
def scan(
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    dtype: torch.dtype = torch.float32,
) -> ScanOutput:
    """Read and write a sequence of tokens: ``split_projections``, then ``delta_rule``.

    Args:
        projections: [B, T, W] of any floating dtype, raw; or [1, T, W] packed, with ``cu_seqlens``.
        gate_bias: [β's (and λ's) biases].
        state: [N, H, r, r] before the first token, or None for zeros. With ``slots``: [S, H, r, r].
        rule: the recurrence.
        mask: bool [B, T], True = a real token. A masked token reads 0 and leaves the state bit-equal; so does one
            with a projection that is NaN or Inf, and one that would leave NaN or Inf in the state of any head.
        cu_seqlens: int [N + 1], where each packed sequence starts, then the total.
        slots: int [N], which row of ``state`` each sequence starts from; −1 = neither read nor written.
        checkpoint_every: n > 0 also returns the state after every n-th token of each sequence.
        dtype: what to compute in and return.

    Returns:
        ScanOutput. A sequence whose slot is −1 has reads and state 0. The given state is not changed.

    Raises:
        ValueError, TypeError: see ``deltamem_kernels.rule.check_arguments``.
    """
    sequences = check_arguments(
        projections, gate_bias, state, rule,
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    batch, length = projections.shape[:2]
    projections, gate_bias = projections.to(dtype), gate_bias.to(dtype)
    initial = first_states(state, slots, sequences, rule, dtype, projections.device)
    valid, not_finite = valid_tokens(projections, mask)
    present = valid | not_finite
    every = checkpoint_every

    if cu_seqlens is None:
        if slots is not None:
            valid, present = valid & (slots >= 0)[:, None], present & (slots >= 0)[:, None]
        reads, final, states, written = _scan_rows(projections, valid, gate_bias, initial, rule, every)
        checkpoints = None
        if every:
            empty = initial.new_zeros(batch, 0, *initial.shape[1:])
            checkpoints = torch.cat(states, 1) if states else empty
        return ScanOutput(reads, final, (present & ~written).sum(1, dtype=torch.int32), checkpoints)

    bounds = cu_seqlens.tolist()
    check_bounds(bounds, length)
    reads, finals, states, counts = [], [], [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        live = slots is None or bool(slots[i] >= 0)
        row_valid = valid[:, start:end] & live
        row_reads, final, row_states, written = _scan_rows(
            projections[:, start:end], row_valid, gate_bias, initial[i : i + 1], rule, every
        )
        reads.append(row_reads)
        finals.append(final)
        states.extend(row[0] for row in row_states)
        counts.append((present[:, start:end] & ~written).sum(1, dtype=torch.int32) * live)
    checkpoints = None
    if every:
        taken = sum(rows.shape[0] for rows in states)
        rest = initial.new_zeros(length // every - taken, *initial.shape[1:])
        checkpoints = torch.cat([*states, rest])
    no_reads = initial.new_zeros(1, 0, rule.read_width)
    return ScanOutput(
        torch.cat(reads, 1) if reads else no_reads,
        torch.cat(finals) if finals else initial,
        torch.cat(counts) if counts else valid.new_zeros(0, dtype=torch.int32),
        checkpoints,
    )


def step(
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    skipped: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token per row, the state updated in place (decode). Not differentiable.

    Args:
        projections: [B, W], raw.
        gate_bias: [β's (and λ's) biases].
        state: float32 [B, H, r, r], or [S, H, r, r] with ``slots``; changed in place.
        rule: the recurrence.
        mask: bool [B], True = a real token; see ``scan``.
        slots: int [B], which row of ``state`` each token belongs to, no row twice; −1 = reads 0, writes nothing.
        skipped: int32 with a row per row of ``state``, or None; incremented where an unmasked token was not written
            because it, or the state after it, is not finite.

    Returns:
        reads, float32 [B, H·r].
    """
    with torch.no_grad():
        out = scan(
            projections.unsqueeze(1), gate_bias, state, rule,
            mask=None if mask is None else mask.unsqueeze(1), slots=slots, dtype=state.dtype,
        )  # fmt: skip
        if slots is None:
            state.copy_(out.state)
            if skipped is not None:
                skipped.add_(out.skipped)
        else:
            live = slots >= 0
            rows = slots[live].long()
            state[rows] = out.state[live]
            if skipped is not None:
                skipped[rows] += out.skipped[live]
    return out.reads.squeeze(1)


@full_precision
def read(
    projections: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Read a frozen state: read_t = S q_t, every token the same S, nothing is written.

    Args:
        projections: [B, T, W], raw; only the q part is used to read, a token that is not finite reads 0.
        state: [B, H, r, r], or [S, H, r, r] with ``slots``.
        rule, mask, slots, dtype: as in ``scan``.

    Returns:
        reads [B, T, H·r].
    """
    sequences = check_arguments(projections, None, state, rule, mask=mask, slots=slots)
    projections = projections.to(dtype)
    valid, _ = valid_tokens(projections, mask)
    if slots is not None:
        valid = valid & (slots >= 0)[:, None]
    initial = first_states(state, slots, sequences, rule, dtype, projections.device)
    clean = torch.where(valid.unsqueeze(-1), projections, 0.0)
    q = split_projections(clean, clean.new_zeros(rule.bias_width), rule)[0]
    reads = torch.einsum("bhij,bthj->bthi", initial, q).flatten(2)
    return torch.where(valid.unsqueeze(-1), reads, 0.0)


@full_precision
def steer(
    base: torch.Tensor,
    reads: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """base + Δ with Δ = scale · W reads, or rms_norm(scale · W reads) · norm_weight.

    Args:
        base: [..., N], the output of a projection.
        reads: float32 [..., H·r].
        weight: [N, H·r], of any floating dtype.
        scale: α / r.
        norm_weight: [N] or None.
        eps: of the RMS norm.

    Returns:
        [..., N] in ``base``'s dtype, summed in float32 (float64 for a float64 base) and rounded once.
    """
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    delta = F.linear(reads.to(wide), weight.to(wide)) * scale
    if norm_weight is not None:
        delta = F.rms_norm(delta, (delta.shape[-1],), norm_weight.to(wide), eps)
    return (base.to(wide) + delta).to(base.dtype)
