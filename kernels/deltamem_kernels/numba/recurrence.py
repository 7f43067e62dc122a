"""The CPU backend: ``scan``, ``step`` and ``read`` compiled by numba; signatures as in ``reference``."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch

from ..errors import ArgumentIndexError
from ..reference import recurrence as reference
from ..rule import STATE_UPDATE_MODES, DeltaRule, ScanOutput, check_arguments
from ..schemas import (
    ROWS,
    RULE,
    RULE_SIZE,
    SEQUENCES,
    TOKENS,
    fake_reads,
    flat_rule,
    like,
    needs_operator,
    operator,
    or_empty,
)
from .backward import backward_loops
from .loops import BLOCK, scan_loops

# The loops read and write float32, whatever PyTorch's default dtype and device are just now.
_FLOAT = {"dtype": torch.float32, "device": "cpu"}
_RULE = RULE.replace("update", "update_mode")
_UNWANTED = np.zeros((0, 0), np.uint8)  # nobody asks which tokens were written


def rule_flags(rule: DeltaRule) -> tuple:
    """A rule as the loops take it, rank and guard apart."""
    mode = STATE_UPDATE_MODES.index(rule.mode)
    return rule.heads, mode, rule.row_gates, rule.has_lambda, rule.normalize


@functools.cache
def guard(rule: DeltaRule) -> tuple:
    """A rule's beta_max, keep_max and value_max as the loops take them."""
    return tuple(np.float32(number) for number in (rule.beta_max, rule.keep_max, rule.value_max))


def _array(tensor: torch.Tensor):
    return tensor.detach().numpy()


def checked_slots(slots: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The slots as the loops take them, int64. Raises: IndexError if one is past the state."""
    if slots.numel() and int(slots.max()) >= state.shape[0]:
        raise ArgumentIndexError(f"slots: got {int(slots.max())}, allowed −1 to {state.shape[0] - 1}")
    return slots.long().contiguous()


def _floats(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _mask_of(projections: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    tokens = projections.shape[:-1]
    return torch.ones(tokens, dtype=torch.bool, device="cpu") if mask is None else mask.contiguous()


def _start(state, slots, sequences: int, rule: DeltaRule) -> torch.Tensor:
    """A fresh float32 copy of each sequence's first state."""
    given = None if state is None else state.detach()
    found = reference.first_states(given, slots, sequences, rule, torch.float32, "cpu")
    return found.clone(memory_format=torch.contiguous_format) if found is given else found.contiguous()


def _places(slots: torch.Tensor | None, sequences: int) -> torch.Tensor:
    """Where ``_start`` has each sequence's state, −1 for a sequence that has none."""
    places = torch.arange(sequences, device="cpu")
    return places if slots is None else torch.where(slots >= 0, places, -1)


def _pieces(cu_seqlens: torch.Tensor | None, length: int, every: int, places: torch.Tensor, saved: torch.Tensor):
    """What one run of the loops takes: all rows at once, or one packed sequence after another.

    Returns:
        (first token and the one behind the last, places, saved states [B, n, H, r, r]) of each.
    """
    if cu_seqlens is None:
        return [(0, length, places, saved)]
    bounds = cu_seqlens.tolist()
    reference.check_bounds(bounds, length)
    pieces, first = [], 0
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        count = (end - begin) // every if every else 0
        pieces.append((begin, end, places[i : i + 1], saved[None, first : first + count]))
        first += count
    return pieces


def _scan(projections, gate_bias, state, rule, mask, cu_seqlens, slots, every, says=False) -> tuple[torch.Tensor, ...]:
    """Reads, final states, skipped, saved states and, if it ``says`` so, which tokens were written, bool [B, T]."""
    batch, length = projections.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    final = _start(state, slots, sequences, rule)
    mask = _mask_of(projections, mask)
    reads = torch.empty(batch, length, rule.read_width, **_FLOAT)
    skipped = torch.zeros(sequences, dtype=torch.int32, device="cpu")
    written = torch.zeros(batch, length if says else 0, dtype=torch.uint8, device="cpu")
    inputs, bias = _floats(projections), _floats(gate_bias)
    shape = (length // every if every else 0, rule.heads, rule.rank, rule.rank)
    # Packed sequences may have fewer checkpoints.
    saved = torch.empty(batch, *shape, **_FLOAT) if cu_seqlens is None else torch.zeros(shape, **_FLOAT)
    run = scan_loops(rule.rank).scan_rows
    for begin, end, places, states in _pieces(cu_seqlens, length, every, _places(slots, sequences), saved):
        run(
            _array(inputs[:, begin:end]), _array(bias), _array(mask[:, begin:end]), _array(final), _array(places),
            *rule_flags(rule), *guard(rule), every, _array(reads[:, begin:end]), _array(states), _array(skipped),
            _array(written[:, begin:end]),
        )  # fmt: skip
    return reads, final, skipped, saved, written.view(torch.bool)


def _fake_scan(projections, gate_bias, state, mask, cu_seqlens, slots, rank, heads, *given):
    batch, length = projections.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    every, lead, states = given[-1], (batch,) if cu_seqlens is None else (), (heads, rank, rank)
    return (
        fake_reads(projections, rank, heads),
        projections.new_empty(sequences, *states, dtype=torch.float32),
        projections.new_empty(sequences, dtype=torch.int32),
        projections.new_empty(*lead, length // every if every else 0, *states, dtype=torch.float32),
        projections.new_empty(batch, length, dtype=torch.bool),
    )


@operator(
    "deltamem_fast::scan_numba", f"{TOKENS}, Tensor? state, {SEQUENCES}, {_RULE}, SymInt every",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_fake_scan,
)  # fmt: skip
def scan_op(projections, gate_bias, state, mask, cu_seqlens, slots, *given):
    *rule, every = given
    return _scan(projections, gate_bias, state, DeltaRule(*rule), mask, cu_seqlens, slots, every, says=True)


def _scan_backward(d_reads, d_state, d_saved, projections, gate_bias, state, rule, mask, cu_seqlens, slots, every):
    """The gradients of projections, gate_bias and the sequences' first states (float32 [N, H, r, r])."""
    length, sequences = projections.shape[1], d_state.shape[0]
    start = _start(state, slots, sequences, rule)
    grad = d_state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    inputs, bias, mask = _floats(projections), _floats(gate_bias), _mask_of(projections, mask)
    d_reads, d_saved = _floats(d_reads), _floats(d_saved)
    d_projections = torch.empty_like(inputs)
    d_bias = torch.zeros(rule.bias_width, dtype=torch.float64, device="cpu")
    pieces = _pieces(cu_seqlens, length, every, _places(slots, sequences), d_saved)
    longest = max((end - begin for begin, end, *_ in pieces), default=0)
    starts = torch.empty(-(-longest // BLOCK), rule.heads, rule.rank, rule.rank, **_FLOAT)
    run = backward_loops(rule.rank).scan_backward_rows
    for begin, end, places, saved in pieces:
        run(
            _array(inputs[:, begin:end]), _array(bias), _array(mask[:, begin:end]), _array(start), _array(places),
            *rule_flags(rule), *guard(rule), every, _array(d_reads[:, begin:end]), _array(saved), _array(starts),
            _array(grad), _array(d_projections[:, begin:end]), _array(d_bias),
        )  # fmt: skip
    return d_projections.to(projections.dtype), d_bias.to(gate_bias.dtype), grad


def _scatter_rows(grad: torch.Tensor, state: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """The gradient of the sequences' first states → that of the states that they were taken from."""
    if slots is None:
        return grad.to(state.dtype)
    live = slots >= 0
    pool = torch.zeros(state.shape, **_FLOAT).index_add_(0, slots[live].long(), grad[live])
    return pool.to(state.dtype)


@operator(
    "deltamem_fast::scan_backward_numba",
    f"Tensor d_reads, Tensor d_state, Tensor d_saved, {TOKENS}, Tensor? state, {SEQUENCES}, {_RULE}, SymInt every",
    "(Tensor, Tensor, Tensor)",
    fake=lambda d_reads, d_state, d_saved, projections, gate_bias, state, *_: (
        like(projections, d_state), like(gate_bias, d_state), like(state, d_state),
    ),
)  # fmt: skip
def scan_backward_op(d_reads, d_state, d_saved, projections, gate_bias, state, mask, cu_seqlens, slots, *given):
    *rule, every = given
    d_projections, d_bias, grad = _scan_backward(
        d_reads, d_state, d_saved, projections, gate_bias, state, DeltaRule(*rule), mask, cu_seqlens, slots, every
    )
    return d_projections, d_bias, or_empty(None if state is None else _scatter_rows(grad, state, slots), grad)


def _setup(ctx, inputs, output):
    projections, gate_bias, state, _mask, cu_seqlens, slots, *flags, every = inputs
    ctx.rule_flags, ctx.every = flags, every
    ctx.save_for_backward(projections, gate_bias, state, output[4], cu_seqlens, slots)
    ctx.mark_non_differentiable(output[2], output[4])


def _backward(ctx, d_reads, d_state, _skipped, d_saved, _written):
    projections, gate_bias, state, written, cu_seqlens, slots = ctx.saved_tensors
    d_projections, d_bias, d_initial = scan_backward_op(
        d_reads, d_state, d_saved, projections, gate_bias, state, written, cu_seqlens, slots, *ctx.rule_flags, ctx.every
    )
    return d_projections, d_bias, None if state is None else d_initial, *[None] * (RULE_SIZE + 4)


scan_op.register_autograd(_backward, setup_context=_setup)


@operator(
    "deltamem_fast::step_numba", f"{TOKENS}, Tensor(a2!) state, Tensor(a3!) skipped, {ROWS}, {_RULE}",
    fake=lambda projections, gate_bias, state, skipped, mask, slots, *rule: fake_reads(projections, *rule[:2]),
)  # fmt: skip
def step_op(projections, gate_bias, state, skipped, mask, slots, *rule):
    return _step(projections, gate_bias, state, DeltaRule(*rule), mask, slots, skipped)


def _step(projections, gate_bias, state, rule, mask, slots, skipped) -> torch.Tensor:
    batch = projections.shape[0]
    reads = torch.empty(batch, 1, rule.read_width, **_FLOAT)
    slots = torch.arange(batch, device="cpu") if slots is None else checked_slots(slots, state)
    work = state if state.dtype == torch.float32 and state.is_contiguous() else _floats(state)
    nothing = torch.empty(batch, 0, rule.heads, rule.rank, rule.rank, **_FLOAT)
    scan_loops(rule.rank).scan_rows(
        _array(_floats(projections[:, None])), _array(_floats(gate_bias)), _array(_mask_of(projections, mask)[:, None]),
        _array(work), _array(slots), *rule_flags(rule), *guard(rule), 0, _array(reads), _array(nothing),
        _array(skipped), _UNWANTED,
    )  # fmt: skip
    if work is not state:
        state.copy_(work)
    return reads[:, 0]


@operator(
    "deltamem_fast::read_numba", f"Tensor projections, Tensor state, {ROWS}, {_RULE}",
    fake=lambda projections, state, mask, slots, *rule: fake_reads(projections, *rule[:2]),
)  # fmt: skip
def read_op(projections, state, mask, slots, *rule):
    return _read(projections, state, DeltaRule(*rule), mask, slots)


def _read(projections, state, rule, mask, slots) -> torch.Tensor:
    batch, length = projections.shape[:2]
    reads = torch.empty(batch, length, rule.read_width, **_FLOAT)
    slots = torch.arange(batch, device="cpu") if slots is None else checked_slots(slots, state)
    scan_loops(rule.rank).read_rows(
        _array(_floats(projections)), _array(_mask_of(projections, mask)), _array(_floats(state)), _array(slots),
        rule.heads, rule.normalize, _array(reads),
    )  # fmt: skip
    return reads


def _read_backward(d_reads, projections, state, rule, mask, slots) -> tuple[torch.Tensor, torch.Tensor]:
    batch = projections.shape[0]
    inputs, d_rows = _floats(projections), torch.empty(batch, rule.heads, rule.rank, rule.rank, **_FLOAT)
    d_projections = torch.empty_like(inputs)
    places = torch.arange(batch, device="cpu") if slots is None else checked_slots(slots, state)
    backward_loops(rule.rank).read_backward_rows(
        _array(inputs), _array(_mask_of(projections, mask)), _array(_floats(state)), _array(places),
        rule.heads, rule.normalize, _array(_floats(d_reads)), _array(d_rows), _array(d_projections),
    )  # fmt: skip
    return d_projections.to(projections.dtype), _scatter_rows(d_rows, state, slots)


@operator(
    "deltamem_fast::read_backward_numba", f"Tensor d_reads, Tensor projections, Tensor state, {ROWS}, {_RULE}",
    "(Tensor, Tensor)", fake=lambda d_reads, projections, state, *_: (like(projections, state), like(state, state)),
)  # fmt: skip
def read_backward_op(d_reads, projections, state, mask, slots, *rule):
    return _read_backward(d_reads, projections, state, DeltaRule(*rule), mask, slots)


def _setup_read(ctx, inputs, output):
    projections, state, mask, slots, *ctx.rule_flags = inputs
    ctx.save_for_backward(projections, state, mask, slots)


def _backward_of_read(ctx, d_reads):
    grads = read_backward_op(d_reads, *ctx.saved_tensors, *ctx.rule_flags)
    return *grads, *[None] * (RULE_SIZE + 2)


read_op.register_autograd(_backward_of_read, setup_context=_setup_read)


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
) -> ScanOutput:
    """``reference.recurrence.scan`` in float32 on a CPU: same arguments, results and errors. Differentiable."""
    check_arguments(
        projections, gate_bias, state, rule,
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    if needs_operator(projections, gate_bias, state):
        out = scan_op(projections, gate_bias, state, mask, cu_seqlens, slots, *flat_rule(rule), checkpoint_every)
    else:
        out = _scan(projections, gate_bias, state, rule, mask, cu_seqlens, slots, checkpoint_every)
    reads, final, skipped, saved, _ = out
    return ScanOutput(reads, final, skipped, saved if checkpoint_every else None)


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
    """``reference.recurrence.step`` on a CPU: same arguments, results and errors."""
    check_arguments(projections, gate_bias, state, rule, mask=mask, slots=slots)
    if skipped is None:
        skipped = torch.zeros(state.shape[0], dtype=torch.int32, device="cpu")
    if torch.compiler.is_compiling():
        return step_op(projections, gate_bias, state, skipped, mask, slots, *flat_rule(rule))
    return _step(projections, gate_bias, state, rule, mask, slots, skipped)


def read(
    projections: torch.Tensor,
    state: torch.Tensor,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """``reference.recurrence.read`` in float32 on a CPU: same arguments, results and errors. Differentiable."""
    check_arguments(projections, None, state, rule, mask=mask, slots=slots)
    if needs_operator(projections, state):
        return read_op(projections, state, mask, slots, *flat_rule(rule))
    return _read(projections, state, rule, mask, slots)


@reference.full_precision
def steer(
    base: torch.Tensor,
    reads: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``reference.recurrence.steer``: same arguments, results and errors. Differentiable.

    A base in the sum's own dtype is the addend of one matmul: Δ is never written by itself, nor is its gradient.
    """
    if norm_weight is not None or base.dtype not in (torch.float32, torch.float64):
        return reference.steer(base, reads, weight, scale, norm_weight=norm_weight, eps=eps)
    reads, weight = reads.to(base.dtype), weight.to(base.dtype)
    flat, flat_reads = base.reshape(-1, base.shape[-1]), reads.reshape(-1, reads.shape[-1])
    return torch.addmm(flat, flat_reads, weight.transpose(0, 1), alpha=scale).view(base.shape)
