"""What is refused when an engine starts: it names the setting, what was given and what is allowed."""

import pytest

from deltamem_fast import DeltaMemConfig
from tests.vllm.engines import checkpoint, engine

CASES = {
    "speculative_config: got one, allowed None": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    },
    "kv_transfer_config: got one, allowed None": {
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": "nowhere"},
        }
    },
    "lora_config: got one, allowed None": {"enable_lora": True},
    "kv_cache_dtype: got 'fp8', allowed 'auto'": {"kv_cache_dtype": "fp8"},
    "pipeline_parallel_size: got 2, allowed 1": {"pipeline_parallel_size": 2},
    "async_scheduling: got True, allowed False": {"async_scheduling": True},
    "delta_mem_adapter None, allowed the directory or the hub id": {
        "hf_overrides": {"architectures": ["DeltaMemQwen3ForCausalLM"]}
    },
    "'nowhere', which is neither a directory nor a hub id": {
        "hf_overrides": {"architectures": ["DeltaMemQwen3ForCausalLM"], "delta_mem_adapter": "nowhere"}
    },
}


def test_a_guard_is_on_or_off(qwen3):
    given = {"delta_mem_adapter": str(qwen3 / "adapter"), "delta_mem_guard": "yes"}
    given["architectures"] = ["DeltaMemQwen3ForCausalLM"]
    with pytest.raises(Exception, match="delta_mem_guard 'yes', allowed true or false"):
        with engine(qwen3, hf_overrides=given):
            pass


@pytest.mark.parametrize("words", CASES)
def test_settings(qwen3, words):
    with pytest.raises(Exception, match=words), engine(qwen3, **CASES[words]):
        pass


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (DeltaMemConfig.ssw(), "memory_write_granularity: the adapter .* has 'message_mean', allowed in vLLM: 'token'"),
        (DeltaMemConfig(target_layers=(0, 1)), "does not fit the model|has unexpected"),
    ],
)
def test_adapters(qwen3, tmp_path, adapter, words):
    """An adapter of segments; and one whose layers another configuration names."""
    import json

    directory = checkpoint(tmp_path, config=adapter)
    if not adapter.segmented:
        file = directory / "adapter" / "delta_mem_config.json"
        values = json.loads(file.read_text())
        values["target_layers"] = [0, 2]
        file.write_text(json.dumps(values))
        words = "was written with another configuration|does not fit"
    with pytest.raises(Exception, match=words), engine(directory):
        pass


def test_sliding_windows(tmp_path):
    directory = checkpoint(tmp_path, "mistral", sliding_window=64)
    words = "has a sliding window of .* tokens, allowed with a delta-mem"
    with pytest.raises(Exception, match=words), engine(directory, "DeltaMemLlamaForCausalLM"):
        pass


def test_a_block_that_kernels_split():
    """The one place where vLLM would break a state apart: seen when its metadata's builder is made."""
    from types import SimpleNamespace

    import torch

    from deltamem_fast.errors import UnsupportedError
    from deltamem_fast.vllm.cache import StateSpec
    from deltamem_fast.vllm.states import StatesBuilder

    spec = StateSpec(
        block_size=32, num_kv_heads=1, head_size=64, head_size_v=0, dtype=torch.float32, state_content_bytes=256,
        tokens_per_state=32,
    )  # fmt: skip
    assert spec.page_size_bytes == 256
    split = spec.copy_with_new_block_size(16)
    with pytest.raises(UnsupportedError, match="block_size: .* blocks of 32 tokens into blocks of 16"):
        StatesBuilder(split, ["layer"], SimpleNamespace(), torch.device("cpu"))


def test_model_runner_v2_takes_no_memories():
    """Its requests cannot be followed as here: they are refused, not ignored."""
    pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor.interface")
    from types import SimpleNamespace

    from deltamem_fast.errors import UnsupportedError
    from deltamem_fast.vllm import requests, settings
    from deltamem_fast.vllm.given import arguments_of

    assert settings.processor_name((3, 1, 8, 8), True) == "NoRows"
    processor = requests.NoRows
    processor.validate_params(SimpleNamespace(extra_args={"other": 1}))
    with pytest.raises(UnsupportedError, match="extra_args: got a delta-mem memory under Model Runner V2"):
        processor.validate_params(SimpleNamespace(extra_args=arguments_of(None, "none")))
    rows = getattr(requests, settings.processor_name((3, 1, 8, 8), False))
    assert rows.shape == (3, 1, 8, 8)


def test_compiled_code_is_kept_by_the_adapters_configuration(tmp_path):
    """Another adapter in the same folder: α / r is a number in the compiled code."""
    from vllm.engine.arg_utils import EngineArgs

    hashes = []
    for alpha in (16.0, 16.0, 8.0):
        directory = checkpoint(tmp_path, config=DeltaMemConfig(alpha=alpha))
        overrides = {"architectures": ["DeltaMemQwen3ForCausalLM"], "delta_mem_adapter": str(directory / "adapter")}
        arguments = EngineArgs(str(directory), hf_overrides=overrides, skip_tokenizer_init=True, max_model_len=128)
        hashes.append(arguments.create_engine_config().compute_hash())
    assert hashes[0] == hashes[1] != hashes[2]
