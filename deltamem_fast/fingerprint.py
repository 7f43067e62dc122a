"""Fingerprints that tie a saved memory to the adapter and backbone it was made with."""

from __future__ import annotations

import hashlib
import json

import torch

from .config import DeltaMemConfig
from .memory import DeltaMemory

# What may differ between two loads of one backbone.
_VOLATILE = {
    "_name_or_path",
    "_attn_implementation",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "quantization_config",
    "_experts_implementation",
}


def adapter_fingerprint(config: DeltaMemConfig, memories: dict[int, DeltaMemory]) -> str:
    """sha256 of the configuration and of every weight, rounded to bfloat16.

    The rounding makes it the same for one adapter under a float32 and a bfloat16 backbone.
    """
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for layer_idx, memory in sorted(memories.items()):
        for name, weight in sorted(memory.state_dict().items()):
            digest.update(f"{layer_idx}.{name}{list(weight.shape)}".encode())
            values = weight.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def backbone_fingerprint(config) -> str:
    """sha256 of the backbone's configuration, without what may differ between two loads of it."""
    values = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def backbone_name(config) -> str:
    """A readable name: where the backbone came from, or its architecture and size."""
    path = getattr(config, "_name_or_path", "") or config.model_type
    return f"{path} ({config.model_type}, {config.num_hidden_layers} layers, hidden {config.hidden_size})"
