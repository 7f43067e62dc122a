"""The patched attention, both ways: its own forward with corrected projections, or the fused one.

The fused forward is for Llama-shaped attention; what differs between the families is data (``families.SHAPES``).

One matmul makes q, k, v and the memory's projections. One launch corrects, normalises and rotates the heads, and at
decode moves the state on as well. Δo is what o_proj's product is added to. No autograd runs through it.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_kernels.dispatch import operations
from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule

from ..adapter.layer import DeltaMemory
from ..memory.state import written
from .call import MemoryCall
from .paged import paged_update
from .projections import sizes_in
from .update import advance


class SteeredAttention:
    """An attention module seen through its corrected projections.

    The class's own forward runs with this as ``self``: its linears (``projections.Projections``) add their heads'
    corrections, everything else is the module's. Nothing is stored on the module, so threads and recomputation do not
    meet.
    """

    def __init__(self, module: nn.Module, layer: DeltaMemory, reads: torch.Tensor):
        self._module = module
        self._layer = layer
        self._reads = reads

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        layer, reads = self._layer, self._reads
        heads = layer.weights.corrected.get(name, "")
        if not any(head in layer.config.delta_heads for head in heads):
            return value

        def corrected(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            out = value(x, *args, **kwargs)
            if len(heads) == 1:
                return _corrected(layer, heads, out, reads)
            parts = zip(heads, out.split(sizes_in(self._module, value, heads), -1))
            return torch.cat([layer.correct(h, p, reads) if h in layer.config.delta_heads else p for h, p in parts], -1)

        return corrected


def _corrected(layer: DeltaMemory, head: str, output: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    """A head's output [..., n] plus its correction; n may be what this process has of it (tensor parallelism)."""
    shard = layer.weights.shards.get(head)
    # Of a head that this process has a part of, all may have been gathered, by FSDP or by the linear itself.
    gathered = shard is None or output.shape[-1] == getattr(layer, f"delta_{head}_proj").shape[0]
    return layer.correct(head, output, reads, None if gathered else shard.part)


def attention_forward(self, *args, memory: MemoryCall | None = None, **kwargs):
    """Instance-level forward of a patched attention; without a memory call it is the class's own."""
    call = memory  # under the name that a caller's memory has, which decoders hand down
    if call is None:
        return type(self).forward(self, *args, **kwargs)
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    layer = self._modules["delta_memory"]
    weights = layer.weights
    # A checkpoint's first run is to round as its recomputation does.
    packed = call.in_place and weights.usable(self, layer, call)
    if packed and weights.applies(hidden_states):
        return fused_forward(self, layer, call, *args, **kwargs)
    reads = advance(layer, *layer.project(hidden_states, packed), call)
    return type(self).forward(SteeredAttention(self, layer, reads), *args, **kwargs)


def fused_forward(
    attention: nn.Module,
    layer: DeltaMemory,
    call: MemoryCall,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values=None,
    cache=None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention's own forward with its memory; same arguments and results, within rounding.

    Args:
        attention: of a class in ``families.SHAPES``, whose ``LayerWeights.applies`` is true.
        layer, call: the adapter layer and this forward's memory.
        hidden_states: [B, T, d]; the rest as the class's own forward takes it.
    """
    weights = layer.weights
    shape = weights.shape
    batch, length = hidden_states.shape[:2]
    bias = None if weights.bias is None else weights.bias.tensor
    packed = F.linear(hidden_states.flatten(0, 1), weights.rows.tensor, bias)
    cos, sin = position_embeddings if not shape.rope or getattr(attention, shape.rope) else (None, None)
    if cos is not None and cos.shape[1] != length:  # one position for all tokens
        cos, sin = (table.expand(-1, length, -1).contiguous() for table in (cos, sin))
    reads, addend = _steer(attention, layer, call, packed, length, cos, sin)

    query, key, value = _heads(packed, batch, length, weights.heads, attention.head_dim)
    cache = past_key_values if cache is None else cache  # its name since transformers 5.24
    if cache is not None:
        if call.cu_seqlens is None:
            key, value = cache.update(key, value, attention.layer_idx)
        else:  # continuous batching's: packed sequences have no other
            key, value = paged_update(attention, cache, key, value, kwargs)
    family = sys.modules[type(attention).__module__]
    interface = family.ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, family.eager_attention_forward
    )
    if shape.window:
        owner = attention if shape.window == "module" else attention.config
        kwargs["sliding_window"] = getattr(owner, "sliding_window", None)
    out, attention_weights = interface(
        attention, query, key, value, attention_mask,
        dropout=getattr(attention, "attention_dropout", 0.0) if attention.training else 0.0,  # LFM2 has none
        scaling=attention.scaling, **kwargs,
    )  # fmt: skip
    out = _project_out(attention, layer, out.reshape(batch * length, -1), reads, addend)
    return out.view(batch, length, -1), attention_weights


def _heads(packed: torch.Tensor, batch: int, length: int, counts: tuple[int, ...], dim: int) -> list[torch.Tensor]:
    """q, k and v [B, heads, T, D], views of the packed rows [B · T, N]."""
    width = packed.shape[1]
    if torch.compiler.is_compiling():
        rows = packed.narrow(1, 0, sum(counts) * dim).view(batch, length, -1, dim)
        return list(rows.transpose(1, 2).split_with_sizes(counts, 1))
    found, first = [], 0
    for count in counts:
        found.append(packed.as_strided((batch, count, length, dim), (length * width, dim, width, 1), first))
        first += count * dim
    return found


def _steer(
    attention: nn.Module, layer: DeltaMemory, call: MemoryCall, packed: torch.Tensor, length: int, cos, sin
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read, write and steer the packed rows [B · T, N] in place → the reads [B · T, H·r] and Δo.

    Δo is None where it is still to be computed.
    """
    weights = layer.weights
    layout = weights.layout(attention.head_dim, 0 if cos is None else cos.shape[-1])
    steering = weights.steering(attention, layer)
    heads = operations(layer.backend, packed.device)
    bias = weights.gate_bias.tensor
    if call.may_read if call.frozen else call.trust is None and call.steps(layer.layer_idx):
        found = _in_place(heads, layer, call, packed, length, layout, steering, cos, sin)
        if found is not None:
            if not call.frozen:
                written(call.initial[layer.layer_idx])
            if call.records:
                projections = _projections(packed, length, layout, layer.rule)
                call.keep(layer.layer_idx, projections)
                call.count_gates(layer.layer_idx, projections, bias, call.rule_of(layer))
            return found
    rows = packed.view(-1, length, packed.shape[1])
    reads = advance(layer, _projections(packed, length, layout, layer.rule), bias, call)
    heads.steer_heads_(rows, reads, layout, steering, cos, sin, check=False)
    return reads.flatten(0, 1), None


def _projections(packed: torch.Tensor, length: int, layout: HeadLayout, rule: DeltaRule) -> torch.Tensor:
    """The memory's raw projections [B, T, W], a view of the packed rows [B · T, N]."""
    return packed.view(-1, length, packed.shape[1]).narrow(2, layout.width, rule.width)


def _in_place(
    heads, layer: DeltaMemory, call: MemoryCall, packed: torch.Tensor, length: int, layout, steering, cos, sin
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """``_steer`` in one call, the state read and written where it lies; None, and nothing is done, if there is none."""
    weights, index, mask = layer.weights, layer.layer_idx, call.token_mask
    skipped, bias = call.state.counter(index), weights.gate_bias.tensor
    workspace = heads.workspace(weights.kept, call.state.arrivals(index))
    if length == 1:
        initial, _ = call.start(index)
        return heads.decode_(
            packed, bias, initial, call.rule_of(layer), layout, steering, cos, sin,
            mask=None if mask is None else mask.squeeze(1), skipped=skipped, frozen=call.frozen, check=False,
            workspace=workspace,
        )  # fmt: skip
    prefill = getattr(heads, "prefill_", None)
    if prefill is None or index in call.initial:
        return None
    found = prefill(
        packed, length, bias, call.state[index], call.rule_of(layer), layout, steering, cos, sin, mask=mask,
        skipped=skipped, frozen=call.frozen, workspace=workspace,
    )  # fmt: skip
    if found is not None:
        call.start(index)
    return found


def _project_out(
    attention: nn.Module, layer: DeltaMemory, out: torch.Tensor, reads: torch.Tensor, addend: torch.Tensor | None
) -> torch.Tensor:
    """The last linear of ``out`` [B · T, …] plus Δo."""
    parameters = attention._modules[layer.weights.output]._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    if "o" not in layer.config.delta_heads:
        return F.linear(out, weight, bias)
    # The matmul adds to what lies there already; in decode and prefill alike, so that both round alike.
    if addend is None:
        addend = layer.output_delta(reads, out.dtype)
    if bias is not None:
        addend += bias
    return addend.addmm_(out, weight.t())
