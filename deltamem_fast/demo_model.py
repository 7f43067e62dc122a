"""The demo's model, tokenizer and adapter: small, seeded, trained on nothing."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from .config import DeltaMemConfig
from .patch import patch_model

HIDDEN = 256
LAYERS = 4
NOISE = 0.1  # on every parameter of the adapter, so that it visibly corrects
# Gates that are nearly shut forget slowly: without training to open them where it pays, the default would have
# forgotten a turn before the next one ends.
BETA_BIAS = -5.0

PAD, TURN, END = "<|pad|>", "<|turn|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def _byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where it can be printed."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def build_tokenizer():
    """A byte-level tokenizer with a chat template: ids 0 to 255 are the bytes, then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[TURN],
        chat_template=TEMPLATE,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_backbone(tokenizer, seed: int) -> nn.Module:
    """A random Qwen3 of a few layers, float32 on the CPU, always the same for a seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=HIDDEN**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with _seeded(seed, torch.device("cpu")):
        return Qwen3ForCausalLM(config).float().eval().requires_grad_(False)


def patch_with_random_adapter(model: nn.Module, seed: int, backend: str) -> nn.Module:
    """Patch with the released recipe (gates apart), and add noise to every parameter that is in use."""
    with _seeded(seed, next(model.parameters()).device):
        patch_model(model, DeltaMemConfig(beta_bias_init=BETA_BIAS), backend=backend)
        for name, parameter in model.named_parameters():
            if ".delta_memory." in name and parameter.requires_grad:
                noise = torch.randn(parameter.shape) * NOISE
                parameter.add_(noise.to(parameter.device))
    return model


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device):
    # The caller's random numbers go on as if nothing had been drawn.
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            torch.cuda.manual_seed(seed)
        yield
