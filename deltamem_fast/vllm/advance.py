"""One layer's step over a paged cache of states: (projections, plan, states at block ends) → reads."""

from __future__ import annotations

import torch

from deltamem_kernels.dispatch import Operators
from deltamem_kernels.rule import DeltaRule

from .plan import Plan, Spans, Steps


def step_blocks(
    step, projections: torch.Tensor, gate_bias: torch.Tensor, plan: Plan, rows: torch.Tensor, delta: torch.Tensor
) -> tuple[bool, torch.Tensor | None]:
    """``advance_blocks``, and what was read corrects rows, by one call: where one token of each sequence comes.

    This is what every decoded token of every layer pays, so it is kept short.

    Args:
        step: the layer's, a numba ``BlockStep``, or None.
        rows: [T, q | k | v], corrected.
        delta: [T, out], contiguous; written: Δo.

    Returns:
        whether it was done (if not, nothing was), and the reads if these rows have still to be corrected.
    """
    places = plan.all_resume
    if step is None or places is None or places[0] != projections.shape[0]:
        return False, None
    return True, step(projections, gate_bias, places, rows, delta)


def advance_blocks(
    operators: Operators,
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    cache: torch.Tensor,
    rule: DeltaRule,
    plan: Plan,
    table: torch.Tensor | None = None,
    reads: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read, then write, every token of a batch; the states move on in the cache.

    Args:
        operators: of a backend that runs where the tensors are (``deltamem_kernels.dispatch.operations``).
        projections: [T, W], raw; tokens of no sequence, behind the others', read 0.
        gate_bias: of the gates.
        cache: float32 [blocks, H, r, r], of any strides; written.
        rule: of the recurrence.
        plan: of this step.
        table: float32 [slots, H, r, r], the states that the plan's sequences start from or read; None: of none.
        reads: float32 [T, H·r], written and returned; None: a new one.

    Returns:
        reads, float32 [T, H·r].
    """
    if reads is None:
        reads = torch.empty(len(projections), rule.read_width, dtype=torch.float32, device=projections.device)
    steps, spans, frozen = plan.steps, plan.spans, plan.frozen
    if (
        spans is None
        and frozen is None
        and steps is not None
        and steps.tokens is None
        and len(steps.targets) == len(projections)
    ):
        return reads.copy_(_step(operators, projections, gate_bias, cache, rule, steps, table))
    reads.zero_()
    if steps is not None:
        places = slice(0, len(steps.targets)) if steps.tokens is None else steps.tokens
        reads[places] = _step(operators, projections[places], gate_bias, cache, rule, steps, table)
    if spans is not None:
        found = _scan(operators, projections[spans.tokens], gate_bias, cache, rule, spans, table, plan.block)
        if spans.kept is None:
            reads[spans.tokens] = found
        else:
            reads[spans.tokens[spans.kept]] = found[spans.kept]
    if frozen is not None and table is not None:
        rows = projections[frozen.tokens]
        reads[frozen.tokens] = operators.read(rows[:, None], table, rule, slots=frozen.slots)[:, 0]
    return reads


def _initial(cache: torch.Tensor, rows: Steps | Spans, table: torch.Tensor | None) -> torch.Tensor:
    """The states [N, H, r, r] that sequences start or resume from, a copy."""
    state = cache.index_select(0, rows.sources)
    if rows.fresh is not None:
        state.masked_fill_(rows.fresh, 0.0)  # not times 0: a block that nobody has written may hold anything
    if rows.begun is not None:
        state.index_copy_(0, rows.begun.places, table.index_select(0, rows.begun.slots))
    return state


def _step(operators, projections, gate_bias, cache, rule: DeltaRule, steps: Steps, table) -> torch.Tensor:
    state = _initial(cache, steps, table)
    reads = operators.step(projections, gate_bias, state, rule)
    cache.index_copy_(0, steps.targets, state)
    return reads


def _scan(operators, projections, gate_bias, cache, rule: DeltaRule, spans: Spans, table, block: int) -> torch.Tensor:
    state = _initial(cache, spans, table)
    out = operators.scan(
        projections[None], gate_bias, state, rule,
        mask=spans.mask, cu_seqlens=spans.cu_seqlens, checkpoint_every=block,
    )  # fmt: skip
    found = torch.cat([out.checkpoints[: spans.saved], out.state])  # behind those are rows of zeros
    cache.index_copy_(0, spans.targets, found.index_select(0, spans.picked))
    return out.reads[0]
