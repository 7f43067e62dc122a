"""One forward's memory, and what a layer does with it: read, and move its state on."""

from __future__ import annotations

import torch

from deltamem_kernels.dispatch import operations
from deltamem_kernels.segment_means import segment_means
from deltamem_kernels.trust import trusted

from ..adapter.layer import DeltaMemory
from ..memory.state import written
from ..memory.watch import gate_sums
from .call import MemoryCall
from .checkpointing import join


def advance(layer: DeltaMemory, projections: torch.Tensor, gate_bias: torch.Tensor, call: MemoryCall) -> torch.Tensor:
    """One layer's reads for the tokens of a forward; its state moves on.

    Args:
        layer: the adapter layer.
        projections: [B, T, W], raw.
        gate_bias: of the gates.
        call: this forward's memory.

    Returns:
        reads, float32 [B, T, H·r].
    """
    batch, length = projections.shape[:2]
    index, rule = layer.layer_idx, call.rule_of(layer)
    initial, first_run = call.start(index)
    if first_run:
        call.keep(index, projections)
    mask, trust = call.token_mask, None if call.frozen else call.trust
    if call.cu_seqlens is not None and batch > 1:
        # Packed sequences are counted over the rows, one behind another.
        projections = projections.reshape(1, batch * length, -1)
        mask, trust = (None if t is None else t.reshape(1, batch * length) for t in (mask, trust))
    if trust is not None and call.segment_ids is None:
        projections = trusted(projections, gate_bias, rule, trust)
    ops = operations(layer.backend, projections.device)
    if call.frozen and call.cu_seqlens is not None:
        reads = _read_packed(ops, projections, initial, rule, mask, call.cu_seqlens)
    elif call.frozen:
        reads = ops.read(projections, initial, rule, mask=mask)
    elif projections.shape[1] == 1 and call.steps(index):
        call.count_gates(index, projections, gate_bias, rule)
        reads = ops.step(
            projections.squeeze(1), gate_bias, initial, rule,
            mask=None if mask is None else mask.squeeze(1), skipped=call.state.counter(index),
        )  # fmt: skip
        written(initial)
    else:
        reads = skipped = None
        if call.segment_ids is not None:  # they are read before, and their means written
            reads = ops.read(projections, initial, rule, mask=mask)
            if trust is not None:  # a segment's is the mean of its tokens'
                projections = torch.cat([projections.float(), trust.unsqueeze(-1)], -1)
            projections, mask, skipped = segment_means(projections, call.segment_ids, mask)
            if trust is not None:
                projections = trusted(projections[..., :-1], gate_bias, rule, projections[..., -1])
        gates = None if call.gates is None else gate_sums(projections, gate_bias, rule, mask)
        out = ops.scan(projections, gate_bias, initial, rule, mask=mask, cu_seqlens=call.cu_seqlens)
        reads = out.reads if reads is None else reads
        reads, state, beta = join(call, index, reads, out.state, None if gates is None else gates.beta)
        if first_run:
            call.state.put(index, state, in_place=call.in_place)
            call.state.count(index, out.skipped if skipped is None else skipped + out.skipped)
            if gates is not None:
                call.gates[index] = gates._replace(beta=beta)
    return reads.view(batch, length, -1)


def _read_packed(ops, projections, state, rule, mask, cu_seqlens):
    """Reads of packed sequences from frozen states: every token is a row of its own that names its state."""
    tokens = torch.arange(projections.shape[1], device=projections.device)
    owner = torch.searchsorted(cu_seqlens[1:].to(tokens.dtype), tokens, right=True)
    mask = None if mask is None else mask.transpose(0, 1)
    return ops.read(projections.transpose(0, 1), state, rule, mask=mask, slots=owner).transpose(0, 1)
