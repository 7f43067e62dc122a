"""Helpers of the tests: golden cases, small models, comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LogitsProcessor

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ in float64; NaN never passes a comparison."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def golden_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """case.json and the tensors of a golden case."""
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "golden.safetensors")


def golden_model(case: dict, attention: str = "eager"):
    """The backbone of a golden case."""
    directory = GOLDEN / case["model"].removeprefix("../")
    dtype = getattr(torch, case.get("dtype", "float32"))
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention, dtype=dtype).eval()


def tiny_model(family: str = "qwen3", attention: str = "sdpa", dtype=torch.float32, seed: int = 0, **changes):
    """A random decoder of two or three layers, hidden 64, in the shape of ``family``; always the same for a seed."""
    from transformers import (
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
        SmolLM3Config,
    )

    common = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    configs = {
        "qwen3": (Qwen3Config, {"head_dim": 16}),
        "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2}),
        "llama": (LlamaConfig, {}),
        "mistral": (MistralConfig, {"sliding_window": 12, "head_dim": 16}),
        "qwen2": (Qwen2Config, {}),
    }
    kind, extra = configs[family]
    torch.manual_seed(seed)
    config = kind(**(common | extra | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()


def loud_adapter(model, seed: int = 1, scale: float = 1.0):
    """Random weights for every parameter of a patched model's adapter, so that no part is hidden by zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".delta_memory." in name and parameter.requires_grad:
                spread = {"beta_bias": 0.5, "lambda_bias": 0.5}.get(name.split(".")[-1], 0.2)
                noise = torch.randn(parameter.shape, generator=generator) * spread * scale
                parameter.copy_(noise + 1.0 if "rmsnorm" in name else noise)
    return model


class Says(LogitsProcessor):
    """Makes ``generate`` choose these tokens, one after another, then the end."""

    def __init__(self, tokenizer, text: str):
        self.ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        self.said = 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -float("inf"))
        forced[:, self.ids[min(self.said, len(self.ids) - 1)]] = 0.0
        self.said += 1
        return forced
