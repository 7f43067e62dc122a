"""The transformers model inside the wrappers of others, its decoder, and where it takes its tokens."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..arguments import shown
from ..errors import ArgumentTypeError

RECORD = "_delta_memory_patch"


_AROUND = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper, torch.compile's, and those that spread it over devices.

    Raises:
        TypeError: no such model; the message says what was given.
    """
    inner = model
    while isinstance(inner, nn.Module) and RECORD not in vars(inner):
        if "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        elif type(inner).__name__ in _AROUND and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            break
    if not isinstance(inner, nn.Module):
        raise ArgumentTypeError(f"model: got {_described(model)}")
    return inner


def spread_by(model: nn.Module) -> str:
    """The name of the wrapper of torch's or DeepSpeed's that spreads a model over devices, or "" without one."""
    while "_orig_mod" in model._modules:
        model = model._orig_mod
    return type(model).__name__ if type(model).__name__ in _AROUND else ""


def _described(model: Any) -> str:
    """What was given in a model's place, and what is allowed."""
    if isinstance(model, type):
        return f"the class {model.__name__}, allowed a model, as {model.__name__}.from_pretrained makes one"
    if isinstance(model, str | os.PathLike):
        return (
            f"the name {shown(os.fspath(model))}, allowed a model: AutoModelForCausalLM.from_pretrained of it makes one"
        )
    held = getattr(model, "model", None)
    if isinstance(held, nn.Module):
        return f"a {type(model).__name__}, allowed the model in it: its .model, a {type(held).__name__}"
    return f"{'None' if model is None else 'a ' + type(model).__name__}, allowed a model of transformers"


def decoder_of(model: nn.Module) -> nn.Module:
    """The module of a model that runs its layers; the model itself, if that does."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder = decoder if isinstance(decoder, nn.Module) else getattr(model, "base_model", model)
    inner = getattr(model, "model", None)
    # Llama 4's text model with a head has its decoder there, and names another place, which it has not.
    return inner if decoder is model and isinstance(inner, nn.Module) and hasattr(inner, "layers") else decoder


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids."""
    return computing_device(unwrap(model).get_input_embeddings())


def computing_device(module: nn.Module) -> torch.device:
    """Where a module computes: its weight's device, or what accelerate's offloading moves it to."""
    device = module.weight.device
    target = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(target) if device.type == "meta" and target is not None else device
