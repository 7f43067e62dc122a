"""From inference to training and back: which parameters train, in what dtype, in whose storage."""

from __future__ import annotations

import torch
from torch import nn

from ..adapter.layer import DeltaMemory
from ..adapter.record import PatchRecord, record_of
from ..adapter.wrappers import unwrap
from ..errors import ArgumentError
from ..model.patch import computing_dtype
from ..model.projections import query_linear


def prepare_for_training(model: nn.Module) -> nn.Module:
    """Make a patched model ready for an optimizer, and for DDP or FSDP around it. Returns the same model.

    - Everything is frozen but the adapter's parameters that its configuration uses.
    - The adapter's parameters become float32 (float64 stays), whatever the backbone's dtype: the masters that the
      optimizer changes. The forward rounds them to the hidden states' dtype; gradients arrive in float32.
    - Every parameter has storage of its own, until ``prepare_for_inference``: packed storage cannot be sharded. All
      layers take the generic path meanwhile.
    - The model is in train mode.

    Call it before the optimizer is made and before the model is wrapped.

    Raises:
        ValueError: the model is not patched, or sharded already.
    """
    record = record_of(unwrap(model))
    _refuse_sharded(record)
    model.requires_grad_(False)
    with torch.no_grad(), torch.inference_mode(False):
        for attention in record.attentions.values():
            memory = attention.delta_memory
            memory.weights.unpack()
            _cast(memory, torch.float32)
            for name in memory.used_names:
                memory.get_parameter(name).requires_grad_(True)
    return model.train()


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Undo ``prepare_for_training``: parameters in the backbone's dtype, weights packed, eval mode. Same model.

    The adapter is rounded to the backbone's dtype; save it first. Parameters stay as trainable as they are.

    Raises:
        ValueError: the model is not patched, or sharded.
    """
    inner = unwrap(model)
    record = record_of(inner)
    _refuse_sharded(record)
    with torch.no_grad(), torch.inference_mode(False):
        for attention in record.attentions.values():
            _cast(attention.delta_memory, computing_dtype(inner, query_linear(attention).weight))
            attention.delta_memory.weights.plain = False
    record.pack()
    return model.eval()


def _cast(memory: DeltaMemory, dtype: torch.dtype) -> None:
    for parameter in memory.parameters():
        if parameter.dtype != torch.float64:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None if parameter.grad is None else parameter.grad.to(dtype)


def _refuse_sharded(record: PatchRecord) -> None:
    for name, attention in record.attentions.items():
        for key, parameter in attention.delta_memory.named_parameters():
            if type(parameter) is not nn.Parameter or parameter.device.type == "meta":
                raise ArgumentError(
                    f"model: {name}.delta_memory.{key} is sharded or offloaded already; prepare the model before it "
                    "is wrapped"
                )
