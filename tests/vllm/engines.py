"""Tiny checkpoints with loud adapters on disk, and what vLLM and transformers generate from them."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model, save_adapter
from tests.support import loud_adapter, tiny_model

# vLLM's attention for a CPU knows few head sizes, and blocks of multiples of 32 tokens.
SHAPE = {"vocab_size": 256, "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BLOCK = 32


def checkpoint(directory: Path, family: str = "qwen3", config: DeltaMemConfig | None = None, **changes) -> Path:
    """A random model of ``family`` in ``directory``, and an adapter for it in ``directory``/adapter."""
    extra = {} if family == "smollm3" else {"head_dim": 32}
    if family == "smollm3":
        extra = {"hidden_size": 128, "no_rope_layers": [1, 0, 1]}
    model = tiny_model(family, **(SHAPE | extra | changes))
    with torch.no_grad():  # sharp enough that no rounding decides which token is the most likely
        model.lm_head.weight.mul_(4.0)
    model.save_pretrained(directory)
    loud_adapter(patch_model(model, config or DeltaMemConfig()), scale=1.5)
    save_adapter(model, directory / "adapter")
    return directory


def prompts(count: int, seed: int = 0, shortest: int = 3, longest: int = 90, shared: int = 0) -> list[list[int]]:
    """Random prompts; the first ``shared`` tokens are the same in all."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(3, 256, (shared,), generator=generator).tolist()
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [first + torch.randint(3, 256, (length,), generator=generator).tolist() for length in lengths]


def rounds(seed: int) -> list[list[list[int]]]:
    """Batches of prompts, one after another: new ones, ones that share their beginning, old ones, old ones longer."""
    first = prompts(3, seed=seed)
    shared = prompts(4, seed=seed + 1, shared=2 * BLOCK + 5)
    longer = [ids + more for ids, more in zip(shared, prompts(2, seed=seed + 2))]
    return [first, shared, [*longer, *first[:2], *prompts(2, seed=seed + 3)], shared[::-1]]


class Expected:
    """What transformers generates greedily from a patched checkpoint, one prompt after another."""

    def __init__(self, directory: Path, adapter: Path | None = None, bare: bool = False, guard="auto"):
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        if not bare:
            patch_model(self.model, str(adapter or directory / "adapter"), guard=guard)
        self.bare = bare

    def __call__(self, prompt: list[int], tokens: int, memory: MemoryState | None = None) -> list[int]:
        ids = torch.tensor([prompt])
        given = {}
        if not self.bare:
            given["memory"] = MemoryState.zeros(self.model) if memory is None else memory
        out = self.model.generate(
            ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids), **given
        )
        return out[0, len(prompt) :].tolist()


@contextlib.contextmanager
def engine(directory: Path, architecture: str = "DeltaMemQwen3ForCausalLM", adapter: Path | None = None, **settings):
    """An engine of vLLM over a checkpoint, shut down at the end; architecture "" is the bare model's own."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    overrides = {"architectures": [architecture], "delta_mem_adapter": str(adapter or directory / "adapter")}
    # vLLM 0.32 looks for kernels in all modules when it starts on a CPU, and trips over one of llvmlite's.
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    llm = LLM(
        str(directory),
        **{
            "hf_overrides": overrides if architecture else {},
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "block_size": BLOCK,
            "max_num_seqs": 8,
            "disable_log_stats": False,
        }
        | settings,
    )
    if hidden is not None:
        sys.modules[hidden.__name__] = hidden
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm, batch: list[list[int]], tokens: int, **sampling) -> list[list[int]]:
    """What an engine generates greedily from prompts of token ids."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling)
    out = llm.generate([{"prompt_token_ids": ids} for ids in batch], params, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in out]


def counted(llm, name: str) -> int:
    """A counter of an engine's, by its name after ``vllm:``."""
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
