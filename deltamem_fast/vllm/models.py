"""vLLM's models with a memory in their attention layers."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from ..adapter.files import AdapterSource
from ..adapter.layer import DeltaMemory
from ..errors import UnsupportedError
from .linears import give_memory, projected_sizes
from .requests import Requests
from .settings import adapter_of, fill, layers_of, rule_of
from .states import OPERATORS, States


class _WithMemory:
    """A model of vLLM's, its attention layers with a memory; before the model's class among the bases."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        source = adapter_of(vllm_config)
        # Before the attention layers: vLLM takes the manager of a cache group's first layer.
        states = _make_states(source, vllm_config, prefix)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _attach(self, source, states, vllm_config)


class DeltaMemQwen3ForCausalLM(_WithMemory, Qwen3ForCausalLM):
    """vLLM's own Qwen3, with a memory."""


class DeltaMemLlamaForCausalLM(_WithMemory, LlamaForCausalLM):
    """vLLM's own Llama, with a memory."""


class DeltaMemForCausalLM(_WithMemory, TransformersForCausalLM):
    """A model of transformers' on vLLM's Transformers backend, with a memory."""


def _make_states(source: AdapterSource, vllm_config: VllmConfig, prefix: str) -> dict[str, States]:
    """The states of each layer that the adapter is for, by the attention's name in the model."""
    config = source.config
    layers = layers_of(config, vllm_config.model_config.hf_text_config)
    if len(config.target_modules) != 1:
        raise UnsupportedError(f"target_modules: the adapter has {config.target_modules}, allowed in vLLM: one name")
    names = [f"model.layers.{layer}.{config.target_modules[0]}" for layer in layers]
    requests = Requests(rule_of(vllm_config, source))
    return {name: States(maybe_prefix(prefix, f"{name}.delta_memory"), requests, vllm_config) for name in names}


def _attach(model: nn.Module, source: AdapterSource, states: dict[str, States], vllm_config: VllmConfig) -> None:
    compilation = vllm_config.compilation_config
    for name, layer in compilation.static_forward_context.items():
        if isinstance(layer, Attention) and getattr(layer, "sliding_window", None) is not None:
            raise UnsupportedError(
                f"model: {name} has a sliding window of {layer.sliding_window} tokens, allowed with a delta-mem "
                "adapter: full attention; blocks outside of a window are freed with their states"
            )
    found = dict(model.named_modules())
    missing = sorted(states.keys() - found.keys())
    if missing:
        raise UnsupportedError(f"adapter: {source.name} is for {', '.join(missing[:3])}, which the model does not have")
    hidden = vllm_config.model_config.hf_text_config.hidden_size
    memories = {}
    for index, name in enumerate(states):
        sizes = projected_sizes(found[name], name)
        memories[name] = DeltaMemory(
            source.config, hidden, sizes, index, device="meta", dtype=vllm_config.model_config.dtype
        )
    fill(memories, source)
    for name, memory in memories.items():
        with torch.device("cpu"):
            give_memory(found[name], name, states[name], memory)
    if compilation.splitting_ops:  # they look at the step's plan, which no CUDA graph would
        operators = [f"vllm::{name}" for name in OPERATORS]
        compilation.splitting_ops += [name for name in operators if name not in compilation.splitting_ops]
