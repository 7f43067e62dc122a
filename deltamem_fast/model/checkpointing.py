"""Gradients of a memory past layers whose graph autograd does not see, or must not enter from the side.

Under reentrant checkpointing a layer runs without a graph, and once more, with one, when its backward comes. What it
writes in the first run would be on no graph. Functions that compute nothing carry the gradients across::

    hidden states ── enter ── layers ── leave ── hidden states
    initial states ────┘                  └───── states, gate sums

``leave``'s backward runs before any layer's and keeps the gradients of states and gate sums; ``join``, in the
recomputed layer, hands them to what that layer writes anew; what they make of the state that the layer started from is
kept in turn, and ``enter``'s backward, which runs after all the layers', returns it.

FSDP gathers a layer's weights when the gradient of its output arrives, so that no gradient may reach the layer through
its state before: ``leave`` and ``join`` see to that order, too.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .call import Bridge, MemoryCall, with_hidden

NO_GRAPH = (
    "memory: it was written under reentrant checkpointing, and nothing that went into the layers required a gradient, "
    "so no gradient would run through it; allowed: enable_input_require_grads() of the model, use_reentrant=False, or "
    "memory.detach()"
)


# What these functions return shares its storage with what they got: detached, because an input that is returned as it
# is, or a view of it, could not be changed in place any more.


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bridge: Bridge, layers: list[int], hidden_states: torch.Tensor, *initial: torch.Tensor):
        ctx.bridge, ctx.layers = bridge, layers
        return hidden_states.detach()

    @staticmethod
    def backward(ctx, d_hidden):
        return None, None, d_hidden, *(ctx.bridge.start_gradient(layer) for layer in ctx.layers)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bridge: Bridge, layers: list[int], hidden_states: torch.Tensor, *written: torch.Tensor | None):
        ctx.bridge, ctx.layers = bridge, layers
        return hidden_states.detach(), *(None if tensor is None else tensor.detach() for tensor in written)

    @staticmethod
    def backward(ctx, d_hidden, *d_written):
        # A gradient that nobody gave comes as zeros: the layers are gone through even for a state's sake alone.
        for layer, *gradients in zip(ctx.layers, d_written[::2], d_written[1::2]):
            ctx.bridge.keep(layer, tuple(gradients))
        return None, None, d_hidden, *d_written


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reads: torch.Tensor, state: torch.Tensor, beta: torch.Tensor | None):
        ctx.set_materialize_grads(False)
        return reads.detach(), state.detach(), None if beta is None else beta.detach()

    @staticmethod
    def backward(ctx, d_reads, d_state, d_beta):
        return d_reads, d_state, d_beta


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, bridge: Bridge, layer: int, reads: torch.Tensor, state: torch.Tensor, beta: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.bridge, ctx.layer = bridge, layer
        return reads.detach()

    @staticmethod
    def backward(ctx, d_reads):
        return None, None, d_reads, *ctx.bridge.take(ctx.layer)


def enter(decoder: nn.Module, call: MemoryCall, arguments: dict[str, Any]) -> None:
    """Before the layers of a differentiable forward; changes the decoder's arguments where they checkpoint reentrantly.

    Args:
        decoder: the patched decoder.
        call: this forward's memory.
        arguments: the decoder's own, by name; may get ``inputs_embeds`` for ``input_ids``.
    """
    if torch.compiler.is_compiling() or not _checkpoints_reentrantly(decoder):
        return
    hidden_states = arguments.get("inputs_embeds")
    if hidden_states is None:
        hidden_states = decoder.get_input_embeddings()(arguments["input_ids"])
        arguments["input_ids"] = None
    layers = [layer for layer, state in call.state.items() if state.requires_grad]
    if layers:
        hidden_states = _Enter.apply(call.bridge, layers, hidden_states, *(call.state[layer] for layer in layers))
    elif not hidden_states.requires_grad:
        # Without such an input a checkpoint would give no gradient to the parameters inside it.
        hidden_states = hidden_states.detach().requires_grad_()
    arguments["inputs_embeds"] = hidden_states
    call.bridge.entered = True


def leave(call: MemoryCall, output):
    """After the layers of a differentiable forward: states and gate sums get their place on the graph.

    Args:
        call: this forward's memory.
        output: the decoder's, its last hidden state first.

    Returns:
        ``output``, its last hidden state changed.
    """
    bridge = call.bridge
    if call.frozen or not (bridge.unseen or bridge.ordered):
        return output
    hidden_states = output[0]
    if not hidden_states.requires_grad:
        call.state.break_off(NO_GRAPH)
        return output
    layers = sorted(call.initial)
    gates = {} if call.gates is None else call.gates
    written = [tensor for i in layers for tensor in (call.state[i], gates[i].beta if i in gates else None)]
    hidden_states, *written = _Leave.apply(bridge, layers, hidden_states, *written)
    for layer, state, beta in zip(layers, written[::2], written[1::2]):
        call.state.put(layer, state, in_place=False)
        if layer in gates:
            gates[layer] = gates[layer]._replace(beta=beta)
    return with_hidden(output, hidden_states)


def join(
    call: MemoryCall, layer: int, reads: torch.Tensor, state: torch.Tensor, beta: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """In a layer that writes: (reads, state, beta), whose gradients go back together, after the layer's output's.

    Args:
        call, layer: this forward's memory, and which layer.
        reads: of the layer's tokens.
        state: what the layer has written.
        beta: Σ β of its gates, or None.
    """
    bridge = call.bridge
    if bridge is None or not torch.is_grad_enabled():
        return reads, state, beta
    if layer in bridge.unseen:
        return _Receive.apply(bridge, layer, reads, state, beta), state, beta
    return _Join.apply(reads, state, beta) if bridge.ordered else (reads, state, beta)


def _checkpoints_reentrantly(decoder: nn.Module) -> bool:
    if not (decoder.training and getattr(decoder, "gradient_checkpointing", False)):
        return False
    if getattr(getattr(decoder, "config", None), "hidden_size_per_layer_input", 0):
        return False  # its layers take embeddings of their own from input_ids, which ``enter`` replaces
    function = getattr(decoder, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant", True) is not False


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP (``fully_shard``) gathers the weights of a part of ``module``."""
    if torch.compiler.is_compiling():
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody who has not imported it has sharded anything
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and any(isinstance(part, kind) for part in module.modules())
