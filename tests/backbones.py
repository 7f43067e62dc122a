"""The backbones that are tested: a tiny random model of each, how it runs, and why. docs/backbones.md has the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# One layer without RoPE, whose queries grow with their position; the others see eight tokens.
LLAMA4 = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 96,
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 1, 1, 0],
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
    "attn_temperature_tuning": True,
    "floor_scale": 4,
}
MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
SHARED = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16}
TOKENS = {"image_token_index": 100, "boi_token_index": 105, "eoi_token_index": 106}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXTRAL = VISION | {"image_size": 32, "patch_size": 16, "head_dim": 16}
PHI_VISION = VISION | {"image_size": 28, "crop_size": 28, "patch_size": 14}
PHI_AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "nemo_conv_channels": 32,
}


def found(name: str):
    """A class of transformers; the test is skipped if this version has none."""
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    return kind


def tiny(name: str, seed: int = 0, **changes):
    """A random model of the class ``name``, the same for a seed."""
    kind = found(name)
    torch.manual_seed(seed)
    return kind(kind.config_class(**(SMALL | changes))).eval()


def gemma3_with_images():
    kind = found("Gemma3ForConditionalGeneration")
    torch.manual_seed(0)
    return kind(kind.config_class(text_config=SMALL | WINDOWS, vision_config=VISION, **TOKENS)).eval()


def mistral3(text: str):
    kind = found("Mistral3ForConditionalGeneration")
    torch.manual_seed(0)
    images = transformers.PixtralVisionConfig(**PIXTRAL)
    return kind(kind.config_class(text_config=found(text)(**SMALL), vision_config=images, image_token_index=100)).eval()


@dataclass(frozen=True)
class Backbone:
    """A family of models.

    Attributes:
        name: as people know it.
        model: its class in transformers.
        make: builds a tiny one.
        path: ``fast``, ``generic`` or ``refused``.
        note: for people: why it is not on the fast path, or which of its layers have a memory.
        reason: what patch_model says, a regular expression; of what is refused alone.
    """

    name: str
    model: str
    make: Callable[[], torch.nn.Module]
    path: str
    note: str = ""
    reason: str = ""


def _plain(name: str, model: str, path: str, note: str = "", reason: str = "", **changes) -> Backbone:
    return Backbone(name, model, lambda: tiny(model, **changes), path, note, reason)


_OTHER_NORM = "its norms of q and k are no plain RMS norms over a head"
_DROPOUT = "dropout behind its output"
_OTHER_ROPE = "its RoPE turns neighbouring numbers"
BACKBONES = [
    _plain("Llama 3", "LlamaForCausalLM", "fast", rope_parameters=LLAMA3_ROPE),
    _plain("Qwen2", "Qwen2ForCausalLM", "fast"),
    _plain("Qwen3", "Qwen3ForCausalLM", "fast"),
    _plain("Qwen3-MoE", "Qwen3MoeForCausalLM", "fast", **QWEN_EXPERTS),
    _plain("SmolLM3", "SmolLM3ForCausalLM", "fast", no_rope_layers=[1, 0, 1, 1]),
    _plain("Mistral", "MistralForCausalLM", "fast"),
    Backbone("Mistral 3", "Mistral3ForConditionalGeneration", lambda: mistral3("MistralConfig"), "fast", "text"),
    _plain("Ministral", "MinistralForCausalLM", "fast", **WINDOWS),
    _plain("Mixtral", "MixtralForCausalLM", "fast", **EXPERTS),
    _plain("Phi 3, Phi 4, Phi 4 mini", "Phi3ForCausalLM", "fast", "one linear gives q, k and v",
           rope_parameters=HALF_ROPE),
    _plain("Phi 4 multimodal", "Phi4MultimodalForCausalLM", "fast", "text; one linear gives q, k and v",
           vision_config=PHI_VISION, audio_config=PHI_AUDIO),
    _plain("Granite", "GraniteForCausalLM", "fast", attention_multiplier=0.3, residual_multiplier=0.5),
    _plain("Granite MoE", "GraniteMoeForCausalLM", "fast", attention_multiplier=0.3, **EXPERTS),
    _plain("LFM2", "Lfm2ForCausalLM", "fast", "its attention layers; those of convolutions have no memory",
           **CONVOLUTIONS),
    _plain("LFM2 MoE", "Lfm2MoeForCausalLM", "fast", "its attention layers, as LFM2",
           num_dense_layers=1, **CONVOLUTIONS, **QWEN_EXPERTS),
    _plain("Granite MoE, shared experts", "GraniteMoeSharedForCausalLM", "fast", attention_multiplier=0.3, **EXPERTS),
    _plain("Qwen2-MoE", "Qwen2MoeForCausalLM", "fast", shared_expert_intermediate_size=32, **QWEN_EXPERTS),
    _plain("Phi 3.5 MoE", "PhimoeForCausalLM", "fast", **EXPERTS),
    _plain("Apertus", "ApertusForCausalLM", "fast"),
    _plain("Arcee", "ArceeForCausalLM", "fast"),
    _plain("CWM", "CwmForCausalLM", "fast", **WINDOWS),
    _plain("Gemma", "GemmaForCausalLM", "fast"),
    _plain("Gemma 2", "Gemma2ForCausalLM", "generic", "it caps its scores", **WINDOWS),
    _plain("Gemma 3", "Gemma3ForCausalLM", "generic", _OTHER_NORM, **WINDOWS),
    Backbone("Gemma 3 with images", "Gemma3ForConditionalGeneration", gemma3_with_images, "generic",
             f"text; {_OTHER_NORM}"),
    _plain("Phi 1 to 2", "PhiForCausalLM", "generic", "RoPE on a part of a head, cut by its forward"),
    _plain("OLMo", "OlmoForCausalLM", "generic", "it may clip q, k and v", clip_qkv=0.2),
    _plain("OLMo 2", "Olmo2ForCausalLM", "generic", _OTHER_NORM),
    _plain("OLMo 3", "Olmo3ForCausalLM", "generic", _OTHER_NORM, **WINDOWS),
    _plain("Llama 4", "Llama4ForCausalLM", "generic", "text; complex RoPE, no norm with a weight", **LLAMA4),
    Backbone("Ministral 3", "Mistral3ForConditionalGeneration", lambda: mistral3("Ministral3Config"), "generic",
             "text; its queries grow with their position"),
    _plain("GLM 4", "Glm4ForCausalLM", "generic", _OTHER_ROPE),
    _plain("Ernie 4.5", "Ernie4_5ForCausalLM", "generic", _OTHER_ROPE),
    _plain("EXAONE 4", "Exaone4ForCausalLM", "generic", "RoPE in layers with a window alone", **WINDOWS),
    _plain("Seed-OSS", "SeedOssForCausalLM", "generic", _DROPOUT),
    _plain("StarCoder2", "Starcoder2ForCausalLM", "generic", _DROPOUT),
    _plain("MiniMax-M2", "MiniMaxM2ForCausalLM", "generic", _OTHER_NORM, **EXPERTS),
    _plain("Qwen3.5", "Qwen3_5ForCausalLM", "generic",
           "its attention layers; q_proj gives a gate as well, and Δq corrects both"),
    _plain("Hunyuan MoE", "HunYuanMoEV1ForCausalLM", "generic", "its norms of q and k come after RoPE"),
    _plain("Hunyuan dense", "HunYuanDenseV1ForCausalLM", "generic", "its norms of q and k come after RoPE"),
    _plain("gpt-oss", "GptOssForCausalLM", "generic", "its attention has sinks", **WINDOWS, **EXPERTS),
    _plain("Cohere", "CohereForCausalLM", "generic", _OTHER_ROPE),
    _plain("Cohere 2", "Cohere2ForCausalLM", "generic", _OTHER_ROPE, **WINDOWS),
    _plain("Gemma 3n", "Gemma3nForCausalLM", "refused",
           "its last layers keep no keys and values of their own; `target_layers` may leave them out",
           "(keeps layer 2 in a DummyLayer|keeps no keys and values of layer 2 in its cache)",
           **WINDOWS, **SHARED, activation_sparsity_pattern=[0.0] * 4),
    _plain("MiniMax", "MiniMaxForCausalLM", "refused", "a cache of its own", "a cache of its own, MiniMaxCache",
           **EXPERTS),
    _plain("Falcon-H1", "FalconH1ForCausalLM", "refused",
           "each layer is an attention and a Mamba at once, and hands nothing on",
           "(keeps layer 0 in a LinearAttentionAndFullAttentionLayer|hands no keyword arguments on to its layers)",
           **MAMBA),
    _plain("Nemotron", "NemotronForCausalLM", "refused", "its layers hand no keyword arguments on",
           "NemotronDecoderLayer hands no keyword arguments on to its self_attn"),
    _plain("StableLM", "StableLmForCausalLM", "refused", "its layers hand no keyword arguments on",
           "StableLmDecoderLayer hands no keyword arguments on"),
]  # fmt: skip
BY_NAME = {backbone.name: backbone for backbone in BACKBONES}


def table() -> str:
    """The table of docs/backbones.md."""
    rows = [f"| {b.name} | `{b.model}` | {b.path} | {b.note} |" for b in BACKBONES]
    return "\n".join(["| backbone | class in transformers | path | |", "|---|---|---|---|", *rows])
