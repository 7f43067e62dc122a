"""What an engine may be configured with: everything that was not tested is refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltamem_kernels.rule import DeltaRule

from ..adapter.files import AdapterSource, canonical_name, read_adapter, stage_weights
from ..adapter.guard import guarding
from ..adapter.layer import DeltaMemory
from ..config import DeltaMemConfig
from ..errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY, GUARD = "delta_mem_adapter", "delta_mem_guard"
_HERE = __name__.rpartition(".")[0]


def adapter_of(vllm_config: VllmConfig) -> AdapterSource:
    """The adapter that ``hf_overrides`` names.

    Raises:
        ValueError: it names none, or one of fresh weights or of SSW.
        FileNotFoundError: there is no such adapter.
    """
    given = getattr(vllm_config.model_config.hf_config, KEY, None)
    if not isinstance(given, str):
        raise ArgumentError(
            f"hf_overrides: got {KEY} {given!r}, allowed the directory or the hub id of an adapter, e.g. "
            f'{{"architectures": ["DeltaMemQwen3ForCausalLM"], "{KEY}": "path/to/adapter"}}'
        )
    source = read_adapter(given)
    granularity = source.config.memory_write_granularity
    if source.config.segmented:
        raise UnsupportedError(
            f"memory_write_granularity: the adapter {given} has {granularity!r}, allowed in vLLM: 'token'; its tokens "
            "would have to be read before any of their segment is written, whatever chunks they come in"
        )
    return source


def rule_of(vllm_config: VllmConfig, source: AdapterSource) -> DeltaRule:
    """The recurrence of an engine's layers: under the default ``Guard`` where ``hf_overrides`` ask for one.

    Raises:
        ValueError: it is neither true nor false, or the adapter cannot have one.
    """
    given = getattr(vllm_config.model_config.hf_config, GUARD, False)
    if not isinstance(given, bool):
        raise ArgumentError(f"hf_overrides: got {GUARD} {given!r:.80}, allowed true or false")
    return guarding(given, source.config.rule).rule or source.config.rule


def layers_of(config: DeltaMemConfig, text_config: Any) -> list[int]:
    """The layers that have a memory, in ascending order; ``text_config``: the backbone's."""
    return sorted(config.target_layers) or list(range(text_config.num_hidden_layers))


def fill(memories: Mapping[str, DeltaMemory], source: AdapterSource) -> None:
    """Give layers on the meta device, by their attention's name, the adapter's weights, on the CPU."""
    staged = stage_weights(memories, source)
    for name, memory in memories.items():
        weights = {key: staged[canonical_name(f"{name}.{key}")] for key, _ in memory.named_parameters()}
        memory.load_state_dict(weights, assign=True)


def check_config(vllm_config: VllmConfig) -> None:
    """Raise if an engine is configured with something that memories were not tested with.

    Raises:
        ValueError: naming the setting, what was given and what is allowed.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    _only("runner", vllm_config.model_config.runner_type, "generate")
    _only("kv_cache_dtype", cache.cache_dtype, "auto")
    _only("kv_sharing_fast_prefill", getattr(cache, "kv_sharing_fast_prefill", False), False)
    for name in (
        "pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size",
    ):  # fmt: skip
        _only(name, getattr(parallel, name, 1), 1)
    _only("enable_dbo", getattr(parallel, "enable_dbo", False), False)
    _only("quantization", vllm_config.model_config.quantization, None)
    # A request that has ended would run one token further, and write it.
    _only("async_scheduling", vllm_config.scheduler_config.async_scheduling or False, False)
    for name, why in (
        ("speculative_config", "a draft that is turned down would stay in the state"),
        ("kv_transfer_config", "a connector does not carry the states"),
        ("lora_config", "its layers take the place of those that a memory corrects"),
    ):
        if getattr(vllm_config, name, None) is not None:
            raise UnsupportedError(f"{name}: got one, allowed None with a delta-mem adapter: {why}")


def _only(name: str, given: Any, allowed: Any) -> None:
    if given != allowed:
        raise UnsupportedError(
            f"{name}: got {given!r}, allowed {allowed!r} with a delta-mem adapter; others are untested"
        )


def processor_name(shape: tuple[int, int, int, int], v2: bool) -> str:
    """The logits processor that follows requests with memories of a shape [L, H, r, r]; see ``requests``."""
    return "NoRows" if v2 else f"Rows_{'_'.join(map(str, shape))}"


class MemoryModelConfig:
    """vLLM's hook for a configuration of our architectures."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """Nothing: what is looked at here is the whole configuration's."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what was not tested, and make the adapter's configuration part of what compiled code is kept by."""
        check_config(vllm_config)
        config = adapter_of(vllm_config).config
        vllm_config.scheduler_config.async_scheduling = False
        if isinstance(vllm_config.additional_config, dict):
            vllm_config.additional_config["delta_mem"] = config.to_dict()
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        shape = len(layers_of(config, model.hf_text_config)), config.num_state_heads, config.rank, config.rank
        processor = f"{_HERE}.requests:{processor_name(shape, vllm_config.use_v2_model_runner)}"
        model.logits_processors = [*(model.logits_processors or []), processor]
        if not parallel.worker_extension_cls:
            parallel.worker_extension_cls = f"{_HERE}.worker.MemoryWorker"
