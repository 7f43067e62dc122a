"""Other families, and tensor parallelism: each in vLLM generates what transformers does, token for token."""

import pytest

from deltamem_fast import DeltaMemConfig
from tests.vllm.engines import Expected, checkpoint, prompts, rounds
from tests.vllm.run_engine import generated

CASES = {
    "qwen3 on the Transformers backend": ("qwen3", "DeltaMemForCausalLM", {}, {}),
    "smollm3 on the Transformers backend": ("smollm3", "DeltaMemForCausalLM", {}, {}),
    "native llama": ("llama", "DeltaMemLlamaForCausalLM", {}, {}),
    "all heads, four states, own gates": (
        "qwen3",
        "DeltaMemQwen3ForCausalLM",
        {
            "num_state_heads": 4, "rank": 4, "delta_heads": ("q", "k", "v", "o"), "couple_lambda": False,
            "delta_o_rmsnorm": True, "trainable_delta_scale": True, "delta_scale_granularity": "head",
        },
        {},
    ),
    "some layers": ("qwen3", "DeltaMemQwen3ForCausalLM", {"target_layers": (0, 2)}, {}),
    "two ranks": (
        "qwen3",
        "DeltaMemQwen3ForCausalLM",
        {"delta_heads": ("q", "k", "v", "o")},
        {"tensor_parallel_size": 2},
    ),
    "two ranks, one head of keys": (
        "qwen3",
        "DeltaMemForCausalLM",
        {"delta_heads": ("q", "k", "v", "o")},
        {"tensor_parallel_size": 2, "changes": {"num_key_value_heads": 1}},
    ),
    "smollm3, compiled": ("smollm3", "DeltaMemForCausalLM", {}, {"enforce_eager": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_family(tmp_path, case, monkeypatch):
    family, architecture, adapter, settings = CASES[case]
    settings = dict(settings)
    directory = checkpoint(tmp_path, family, DeltaMemConfig(**adapter), **settings.pop("changes", {}))
    expected = Expected(directory)
    batches = [*rounds(seed=70), prompts(5, seed=80, shortest=1, longest=3)]
    if "tensor_parallel_size" in settings:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    found = generated(directory, architecture, batches, 40, max_num_batched_tokens=100, **settings)
    assert found == [[expected(ids, 40) for ids in batch] for batch in batches]
