"""The patched attention: read, steer the projections, write."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

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


def advance(memory: DeltaMemory, hidden_states: torch.Tensor, call: MemoryCall) -> torch.Tensor:
    """One layer's reads for the tokens of a forward; its state moves on.

    Args:
        memory: the layer's adapter.
        hidden_states: [B, T, d], the attention's input.
        call: this forward's memory.

    Returns:
        reads, float32 [B, T, H·r].
    """
    layer = memory.layer_idx
    ops = operations(memory.backend, hidden_states.device)
    projections, bias = memory.project(hidden_states)
    first_run = layer not in call.initial
    if first_run:
        call.initial[layer] = call.state[layer]
    initial = call.initial[layer]
    mask, rule = call.token_mask, memory.rule

    if call.frozen:
        if call.cu_seqlens is not None:
            return _read_packed(ops, projections, initial, rule, mask, call.cu_seqlens)
        return ops.read(projections, initial, rule, mask=mask)

    if call.segment_ids is not None:
        reads = ops.read(projections, initial, rule, mask=mask)
        means, present, skipped = segment_means(projections, call.segment_ids, mask)
        out = ops.scan(means, bias, initial, rule, mask=present)
        _commit(call, layer, first_run, out.state, skipped)
        return reads

    counter = call.state._skipped[layer]
    if (
        call.in_place
        and hidden_states.shape[1] == 1
        and call.cu_seqlens is None
        and writable(initial)
        and writable(counter)
    ):
        reads = ops.step(
            projections.squeeze(1), bias, initial, rule,
            mask=None if mask is None else mask.squeeze(1), skipped=counter,
        )  # fmt: skip
        return reads.unsqueeze(1)

    out = ops.scan(projections, bias, initial, rule, mask=mask, cu_seqlens=call.cu_seqlens)
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


class SteeredAttention:
    """An attention module seen through its corrected projections.

    The class's own forward runs with this as ``self``: q_proj, k_proj, v_proj and o_proj add their correction,
    everything else is the module's. Nothing is stored on the module, so threads and recomputation do not meet.
    """

    def __init__(self, module: nn.Module, memory: DeltaMemory, reads: torch.Tensor):
        self._module = module
        self._memory = memory
        self._reads = reads

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        head = name[0] if name in ("q_proj", "k_proj", "v_proj", "o_proj") else None
        if head is None or head not in self._memory.config.delta_heads:
            return value
        memory, reads = self._memory, self._reads

        def corrected(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            return memory.correct(head, value(x, *args, **kwargs), reads)

        return corrected


def attention_forward(self, *args, memory: MemoryCall | None = None, **kwargs):
    """Instance-level forward of a patched attention; without a memory call it is the class's own."""
    if memory is None:
        return type(self).forward(self, *args, **kwargs)
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    adapter = self.delta_memory
    reads = advance(adapter, hidden_states, memory)
    return type(self).forward(SteeredAttention(self, adapter, reads), *args, **kwargs)
