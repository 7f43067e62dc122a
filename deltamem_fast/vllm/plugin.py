"""What vLLM calls in each of its processes (entry point group ``vllm.general_plugins``): names, no weights."""

from __future__ import annotations

# Our architecture → where its class is, by name: vLLM imports it when it is asked for.
ARCHITECTURES = {
    "DeltaMemQwen3ForCausalLM": "deltamem_fast.vllm.models:DeltaMemQwen3ForCausalLM",
    "DeltaMemLlamaForCausalLM": "deltamem_fast.vllm.models:DeltaMemLlamaForCausalLM",
    "DeltaMemForCausalLM": "deltamem_fast.vllm.models:DeltaMemForCausalLM",
}


def register() -> None:
    """Tell vLLM our architectures, what they ask of a configuration, and how their states are cached."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .cache import register_spec
    from .settings import MemoryModelConfig

    for name, place in ARCHITECTURES.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, place)
        MODELS_CONFIG_MAP[name] = MemoryModelConfig
    register_spec()
