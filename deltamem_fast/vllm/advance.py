"""One layer's step over a paged cache of states: (projections, plan, states at block ends) → reads."""

from __future__ import annotations

import torch

from deltamem_kernels.dispatch import Operators
from deltamem_kernels.rule import DeltaRule

from .plan import Plan, Spans, Steps


def advance_blocks(
    operators: Operators,
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    cache: torch.Tensor,
    rule: DeltaRule,
    plan: Plan,
) -> torch.Tensor:
    """Read, then write, every token of a batch; the states move on in the cache.

    Args:
        operators: of a backend that runs where the tensors are (``deltamem_kernels.dispatch.operations``).
        projections: [T, W], raw; tokens of no sequence, behind the others', read 0.
        gate_bias: of the gates.
        cache: float32 [blocks, H, r, r], of any strides; written.
        rule: of the recurrence.
        plan: of this step.

    Returns:
        reads, float32 [T, H·r].
    """
    steps, spans = plan.steps, plan.spans
    if spans is None and steps is not None and steps.tokens is None and len(steps.targets) == len(projections):
        return _step(operators, projections, gate_bias, cache, rule, steps)
    reads = torch.zeros(len(projections), rule.read_width, dtype=torch.float32, device=projections.device)
    if steps is not None:
        places = slice(0, len(steps.targets)) if steps.tokens is None else steps.tokens
        reads[places] = _step(operators, projections[places], gate_bias, cache, rule, steps)
    if spans is not None:
        found = _scan(operators, projections[spans.tokens], gate_bias, cache, rule, spans, plan.block)
        if spans.kept is None:
            reads[spans.tokens] = found
        else:
            reads[spans.tokens[spans.kept]] = found[spans.kept]
    return reads


def _initial(cache: torch.Tensor, sources: torch.Tensor, fresh: torch.Tensor | None) -> torch.Tensor:
    """The states [N, H, r, r] that sequences resume from, a copy."""
    state = cache.index_select(0, sources)
    # Not times 0: a block that nobody has written may hold anything.
    return state if fresh is None else state.masked_fill_(fresh, 0.0)


def _step(operators, projections, gate_bias, cache, rule: DeltaRule, steps: Steps) -> torch.Tensor:
    state = _initial(cache, steps.sources, steps.fresh)
    reads = operators.step(projections, gate_bias, state, rule)
    cache.index_copy_(0, steps.targets, state)
    return reads


def _scan(operators, projections, gate_bias, cache, rule: DeltaRule, spans: Spans, block: int) -> torch.Tensor:
    state = _initial(cache, spans.sources, spans.fresh)
    out = operators.scan(
        projections[None], gate_bias, state, rule,
        mask=spans.mask, cu_seqlens=spans.cu_seqlens, checkpoint_every=block,
    )  # fmt: skip
    found = torch.cat([out.checkpoints[: spans.saved], out.state])  # behind those are rows of zeros
    cache.index_copy_(0, spans.targets, found.index_select(0, spans.picked))
    return out.reads[0]
