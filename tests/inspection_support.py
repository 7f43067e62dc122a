"""Models with a memory, memories of random numbers, and traces, for the tests of the inspection."""

from __future__ import annotations

import torch
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model
from deltamem_fast.inspection.trace import Trace
from deltamem_fast.memory.figures import MemoryReport
from deltamem_fast.memory.file import MemoryContent

TOKENIZER = chatml_tokenizer()
CHAT = [
    {"role": "user", "content": "My dog is called Rex. My sister lives in Paris!"},
    {"role": "assistant", "content": "She took the train home; the market was shut."},
]
CONFIGS = {
    "tsw": DeltaMemConfig.tsw(),
    "msw": DeltaMemConfig.msw(3, rank=8),
    "ssw": DeltaMemConfig.ssw("sentence_mean"),
    "message": DeltaMemConfig.ssw("message_mean", rank=3),
    "uncoupled": DeltaMemConfig(couple_lambda=False, rankwise_gates=False),
    "outside": DeltaMemConfig(state_update_mode="lambda_outside", couple_lambda=False, rank=3),
    "no_lambda": DeltaMemConfig(state_update_mode="no_lambda"),
    "raw": DeltaMemConfig(normalize_qk=False, target_layers=(0, 2)),
}


def model_with(config: DeltaMemConfig, dtype=torch.float32):
    """Three layers for ``TOKENIZER``, patched, every parameter loud."""
    model = tiny_model(vocab_size=len(TOKENIZER), dtype=dtype)
    scale = 1.0 if config.normalize_qk else 0.2  # raw keys longer than 1 make a state grow without bound
    return loud_adapter(patch_model(model, config, backend="reference"), scale=scale)


def random_memory(layers=(0, 1), rows: int = 1, heads: int = 1, rank: int = 8, seed: int = 0) -> MemoryState:
    """Of random numbers; it belongs to no model."""
    generator = torch.Generator().manual_seed(seed)
    return MemoryState({i: torch.randn(rows, heads, rank, rank, generator=generator) for i in layers})


def memory_in(file: MemoryContent) -> MemoryState:
    """The memory in a file; it belongs to no model."""
    return MemoryState(file.layers, frozen=file.frozen, skipped=file.skipped)


def report(memory: MemoryState, row: int | None = None) -> MemoryReport:
    """Its figures."""
    return memory.report(row)


def filled(model, rows: int = 1, seed: int = 0) -> MemoryState:
    """A memory of that model, of random numbers."""
    memory = MemoryState.zeros(model, rows)
    generator = torch.Generator().manual_seed(seed)
    for _, state in memory.items():
        state.copy_(torch.randn(state.shape, generator=generator))
    return memory


def bits(memory: MemoryState) -> dict[int, tuple[bytes, list[int]]]:
    """States and counters, bit for bit."""
    return {i: (state.numpy().tobytes(), memory._skipped[i].tolist()) for i, state in memory.items()}


def random_trace(layers: int = 3, heads: int = 2, rank: int = 4, tokens: int = 12, states: bool = True, seed: int = 0):
    """A trace of random numbers from a random memory, and that memory; no model is needed."""
    generator = torch.Generator().manual_seed(seed)

    def sizes():
        return torch.rand(tokens, layers, heads, generator=generator)

    memory = random_memory(range(layers), 1, heads, rank, seed)
    initial = torch.cat([state for _, state in memory.items()])
    later = torch.randn(tokens if states else 1, layers, heads, rank, rank, generator=generator)
    after = MemoryState({i: later[-1, i : i + 1].clone() for i in range(layers)})
    words = [f" word{i}" for i in range(tokens)]
    found = Trace(
        tokens=tuple(words), token_ids=tuple(range(tokens)), segment_ids=None, layers=tuple(range(layers)),
        frozen=False, writes=sizes(), reads=sizes(), beta=sizes(), norms=sizes() * 5, initial=initial,
        final=later[-1], states=later if states else None, memory=after,
    )  # fmt: skip
    return found, memory
