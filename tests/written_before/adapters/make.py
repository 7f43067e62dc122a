"""Wrote the adapters beside this file with the version of commit da92e0d (its packages on PYTHONPATH).

``tests/storage/test_files.py`` takes the model and the numbers from here and reads the files with today's version.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

HERE = Path(__file__).parent
FORMATS = {"ours": "safetensors", "released": "released"}


def model(dtype: torch.dtype = torch.bfloat16):
    """A Qwen3 of two layers and a hidden size of 32."""
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def config():
    """MSW of rank 4, on the second layer alone."""
    from deltamem_fast import DeltaMemConfig

    return DeltaMemConfig.msw(2, rank=4, couple_lambda=False, delta_o_rmsnorm=True, target_layers=(1,))


def fill(memory) -> None:
    """Give each parameter numbers of its own, the same everywhere."""
    with torch.no_grad():
        for place, (_, parameter) in enumerate(sorted(memory.named_parameters())):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.copy_((numbers * 37 + place * 11) % 256 / 128 - 1)


def main() -> None:
    from deltamem_fast import export_adapter, patch_model

    patched = patch_model(model(), config())
    fill(patched.model.layers[1].self_attn.delta_memory)
    for name, format in FORMATS.items():
        export_adapter(patched, HERE / name, format)


if __name__ == "__main__":
    main()
