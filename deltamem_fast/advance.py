"""One forward's memory, and what a layer does with it: read, and move its state on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .backends import operations
from .memory import DeltaMemory
from .segment_means import segment_means
from .state import MemoryState, writable


@dataclass
class MemoryCall:
    """What one forward of the model hands to its attention layers.

    Attributes:
        state: the memory that is read and written.
        token_mask: bool [B, T], True = a real token, or None = all are.
        segment_ids: int [B, T] (SSW) or None.
        cu_seqlens: int [N + 1] for packed sequences, or None.
        frozen: read-only.
        in_place: no autograd outside: states keep their address.
        initial: the state that each layer started this forward from. A recomputation (gradient checkpointing)
            finds it here, and does not write a second time.
    """

    state: MemoryState
    token_mask: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    frozen: bool = False
    in_place: bool = True
    initial: dict[int, torch.Tensor] = field(default_factory=dict)

    def start(self, layer: int) -> tuple[torch.Tensor, bool]:
        """The state that a layer starts from, and whether this is its first run in this forward."""
        first_run = layer not in self.initial
        if first_run:
            self.initial[layer] = self.state[layer]
        return self.initial[layer], first_run

    def steps(self, layer: int, projections: torch.Tensor) -> bool:
        """Whether this is decode: one token a row, written where the state lies."""
        return (
            projections.shape[1] == 1
            and self.in_place
            and self.cu_seqlens is None
            and self.segment_ids is None
            and writable(self.initial.get(layer, self.state[layer]))
            and writable(self.state._skipped[layer])
        )


def advance(memory: DeltaMemory, projections: torch.Tensor, gate_bias: torch.Tensor, call: MemoryCall) -> torch.Tensor:
    """One layer's reads for the tokens of a forward; its state moves on.

    Args:
        memory: the layer's adapter.
        projections: [B, T, W], raw.
        gate_bias: of the gates.
        call: this forward's memory.

    Returns:
        reads, float32 [B, T, H·r].
    """
    layer = memory.layer_idx
    ops = operations(memory.backend, projections.device)
    initial, first_run = call.start(layer)
    mask, rule = call.token_mask, memory.rule

    if call.frozen:
        if call.cu_seqlens is not None:
            return _read_packed(ops, projections, initial, rule, mask, call.cu_seqlens)
        return ops.read(projections, initial, rule, mask=mask)

    if call.segment_ids is not None:
        reads = ops.read(projections, initial, rule, mask=mask)
        means, present, skipped = segment_means(projections, call.segment_ids, mask)
        out = ops.scan(means, gate_bias, initial, rule, mask=present)
        _commit(call, layer, first_run, out.state, skipped)
        return reads

    if call.steps(layer, projections):
        reads = ops.step(
            projections.squeeze(1), gate_bias, initial, rule,
            mask=None if mask is None else mask.squeeze(1), skipped=call.state._skipped[layer],
        )  # fmt: skip
        return reads.unsqueeze(1)

    out = ops.scan(projections, gate_bias, initial, rule, mask=mask, cu_seqlens=call.cu_seqlens)
    _commit(call, layer, first_run, out.state, out.skipped)
    return out.reads


def _read_packed(ops, projections, state, rule, mask, cu_seqlens):
    """Reads of packed sequences from frozen states: every token is a row of its own that names its state."""
    tokens = torch.arange(projections.shape[1], device=projections.device)
    owner = torch.searchsorted(cu_seqlens[1:].to(tokens.dtype), tokens, right=True)
    mask = None if mask is None else mask.transpose(0, 1)
    return ops.read(projections.transpose(0, 1), state, rule, mask=mask, slots=owner).transpose(0, 1)


def _commit(call: MemoryCall, layer: int, first_run: bool, state: torch.Tensor, skipped: torch.Tensor) -> None:
    if first_run:
        call.state.put(layer, state, in_place=call.in_place)
        call.state._count(layer, skipped)
        if not call.in_place and not torch.is_grad_enabled():
            # Reentrant checkpointing runs the layer without a graph first: nothing differentiates through this state.
            call.state._broken = (
                "memory: its last write was under reentrant gradient checkpointing, so no gradient would run through "
                "it; use_reentrant=False keeps it, memory.detach() does without"
            )
