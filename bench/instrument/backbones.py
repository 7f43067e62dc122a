"""The backbones: real models' shapes with random weights, and tiny ones of the same kind for dry runs."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, SmolLM3Config

KINDS = {
    "Qwen3-4B": (Qwen3Config, {
        "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "Qwen3-8B": (Qwen3Config, {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }),
    "SmolLM3-3B": (SmolLM3Config, {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
    }),
    "Qwen3-0.6B": (Qwen3Config, {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "Qwen3-48M": (Qwen3Config, {
        "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
    }),
    "SmolLM2-135M": (LlamaConfig, {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }),
}  # fmt: skip
TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def configuration(name: str, tiny: bool = False, **changes) -> PretrainedConfig:
    """The configuration of a backbone; ``tiny`` keeps its kind and makes it small."""
    kind, sizes = KINDS[name]
    if tiny:
        sizes = sizes | TINY | ({"head_dim": 16} if "head_dim" in sizes else {})
    return kind(**({"max_position_embeddings": 65_536} | sizes | changes))


def build(config: PretrainedConfig, dtype: torch.dtype, device: str) -> nn.Module:
    """A decoder with random weights, made on ``device``, with SDPA attention."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the storages that parameters and buffers lie in, each counted once."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
