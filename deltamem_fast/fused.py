"""The fused forward of Llama-shaped attention; what differs between the families is data (``paths.SHAPES``).

One matmul makes q, k, v and the memory's projections. One launch corrects, normalises and rotates the heads, and at
decode moves the state on as well. Δo is what o_proj's product is added to. No autograd runs through it.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn

from .advance import MemoryCall, advance
from .backends import head_operations
from .memory import DeltaMemory


def fused_forward(
    attention: nn.Module,
    memory: DeltaMemory,
    call: MemoryCall,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values=None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention's own forward with its memory; same arguments and results, within rounding.

    Args:
        attention: of a class in ``paths.SHAPES``, whose ``LayerWeights.applies`` is true.
        memory, call: the layer's adapter and this forward's memory.
        hidden_states: [B, T, d]; the rest as the class's own forward takes it.
    """
    weights = memory.weights
    shape = weights.shape
    packed = F.linear(hidden_states, weights.rows.tensor, None if weights.bias is None else weights.bias.tensor)
    rotates = not shape.rope or getattr(attention, shape.rope)
    cos, sin = position_embeddings if rotates else (None, None)
    reads, addend = _steer(attention, memory, call, packed, cos, sin)

    batch, length = hidden_states.shape[:2]
    heads = packed.narrow(-1, 0, weights.first_memory_row).view(batch, length, -1, attention.head_dim).transpose(1, 2)
    query, key, value = heads.split_with_sizes(weights.heads, 1)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    family = sys.modules[type(attention).__module__]
    interface = family.ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, family.eager_attention_forward
    )
    if shape.window:
        owner = attention if shape.window == "module" else attention.config
        kwargs["sliding_window"] = getattr(owner, "sliding_window", None)
    out, attention_weights = interface(
        attention, query, key, value, attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0, scaling=attention.scaling, **kwargs,
    )  # fmt: skip
    out = out.reshape(batch, length, -1)
    return _project_out(attention, memory, out, reads, addend), attention_weights


def _steer(
    attention: nn.Module, memory: DeltaMemory, call: MemoryCall, packed: torch.Tensor, cos, sin
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read, write and steer the packed rows in place → the reads, and at decode Δo (None: still to be added)."""
    weights = memory.weights
    layout = weights.layout(attention.head_dim, 0 if cos is None else cos.shape[-1])
    steering = weights.steering(attention, memory)
    heads = head_operations(memory.backend, packed.device)
    bias = weights.gate_bias.tensor
    reads_only = call.frozen and call.projections is None
    decodes = packed.shape[1] == 1 and (reads_only or call.steps(memory.layer_idx, packed))
    if decodes and call.cu_seqlens is None:
        initial, _ = call.start(memory.layer_idx)
        reads, addend = heads.decode_(
            packed.squeeze(1), bias, initial, memory.rule, layout, steering, cos, sin,
            mask=None if call.token_mask is None else call.token_mask.squeeze(1),
            skipped=call.state._skipped[memory.layer_idx], arrived=call.state._arrived.get(memory.layer_idx),
            frozen=call.frozen, check=False, prepared=weights.prepared,
        )  # fmt: skip
        return reads.unsqueeze(1), addend
    reads = advance(memory, packed[..., layout.width : layout.width + memory.rule.width], bias, call)
    heads.steer_heads_(packed, reads, layout, steering, cos, sin, check=False)
    return reads, None


def _project_out(
    attention: nn.Module, memory: DeltaMemory, out: torch.Tensor, reads: torch.Tensor, addend: torch.Tensor | None
) -> torch.Tensor:
    """o_proj of ``out`` plus Δo."""
    o_proj = attention._modules["o_proj"]
    weight, bias = o_proj._parameters["weight"], o_proj._parameters["bias"]
    if "o" not in memory.config.delta_heads:
        return F.linear(out, weight, bias)
    # The matmul adds to what lies there already; in decode and prefill alike, so that both round alike.
    if addend is None:
        addend = memory.output_delta(reads, out.dtype).flatten(0, 1)
    if bias is not None:
        addend += bias
    return addend.addmm_(out.flatten(0, 1), weight.t()).view(*out.shape[:-1], -1)
