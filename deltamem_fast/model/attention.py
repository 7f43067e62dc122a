"""The patched attention: read, steer the projections, write."""

from __future__ import annotations

import torch
from torch import nn

from ..adapter.layer import DeltaMemory
from .call import MemoryCall
from .fused import fused_forward
from .update import advance


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
    adapter = self._modules["delta_memory"]
    weights = adapter.weights
    # A checkpoint's first run is to round as its recomputation does.
    packed = memory.in_place and weights.usable(self, adapter, memory)
    if packed and weights.applies(hidden_states):
        return fused_forward(self, adapter, memory, *args, **kwargs)
    reads = advance(adapter, *adapter.project(hidden_states, packed), memory)
    return type(self).forward(SteeredAttention(self, adapter, reads), *args, **kwargs)
