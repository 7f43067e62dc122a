"""Thousands of tokens: prefill, chunked prefill and decode agree.

By default on text made here. ``DELTAMEM_LOCOMO=path/to/locomo10.json`` takes the first conversation of the LoCoMo
data set instead (non-commercial licence, not part of this repository).
"""

import json
import os
import random

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model
from transformers import DynamicCache

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model


def made_up_dialogue(turns: int) -> str:
    """Small talk from a seed."""
    words = random.Random(0)
    names, things = ("Ada", "Ben"), ("the boat", "my sister", "work", "the garden", "Lisbon", "a new piano", "exams")
    said = (
        "I keep thinking about {}.",
        "How is {} going?",
        "Last week {} surprised me!",
        "Tell me more of {}, please.",
    )
    return "\n".join(f"{names[n % 2]}: {words.choice(said).format(words.choice(things))}" for n in range(turns))


def locomo(path: str) -> str:
    """The turns of the first conversation, session after session."""
    with open(path, encoding="utf-8") as file:
        conversation = json.load(file)[0]["conversation"]
    sessions = sorted(
        (k for k in conversation if k.startswith("session_") and k[8:].isdigit()), key=lambda k: int(k[8:])
    )
    return "\n".join(f"{turn['speaker']}: {turn['text']}" for session in sessions for turn in conversation[session])


def tokens_of(text: str, limit: int) -> torch.Tensor:
    """Pairs of characters as tokens of a vocabulary of 1024: no tokenizer is needed to have real repetition."""
    data = text.encode()
    ids = [3 + hash_pair(data[i], data[i + 1]) for i in range(0, len(data) - 1, 2)]
    return torch.tensor([ids[:limit]])


def hash_pair(first: int, second: int) -> int:
    return (first * 31 + second) % 1020


def check(ids: torch.Tensor, chunk: int):
    config = DeltaMemConfig.msw(heads=2)
    model = tiny_model(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=1024,
        max_position_embeddings=32768,
    )  # fmt: skip
    loud_adapter(patch_model(model, config), scale=0.7)
    length, memories, last = ids.shape[1], [], []
    for widths in (
        [length],
        [chunk] * (length // chunk) + [length % chunk],
        [length // 2] + [1] * (length - length // 2),
    ):
        memory, cache = MemoryState.zeros(model, 1), DynamicCache(config=model.config)
        with torch.no_grad():
            for part in ids.split([w for w in widths if w], 1):
                out = model(part, memory=memory, past_key_values=cache, logits_to_keep=1).logits
        memories.append(memory)
        last.append(out)
    for memory, logits in zip(memories[1:], last[1:]):
        assert all(relative_error(memory[i], memories[0][i]) < 1e-5 for i in memory)
        assert relative_error(logits, last[0]) < 1e-4
    assert all(torch.isfinite(state).all() and state.norm() > 0.1 for _, state in memories[0].items())


def dialogue(turns: int, limit: int) -> torch.Tensor:
    path = os.environ.get("DELTAMEM_LOCOMO")
    return tokens_of(locomo(path) if path else made_up_dialogue(turns), limit)


def test_two_thousand_tokens():
    ids = dialogue(200, 2000)
    assert ids.shape[1] == 2000
    check(ids, 300)


@pytest.mark.soak
def test_a_whole_conversation():
    ids = dialogue(1400, 16_384)
    assert ids.shape[1] > 15_000
    check(ids, 2048)
