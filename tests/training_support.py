"""A model, a tokenizer and data that train in a second."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from support import tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import DeltaMemConfig
from deltamem_fast.adapter.files import SAFETENSORS_NAME
from deltamem_fast.training import TrainingOptions, read_log, train


def chat(*contents: str, system: str = "") -> list[dict]:
    """Messages of user and assistant in turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + messages


def write_lines(path, values) -> str:
    """A JSONL file; returns its name."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def recall_lines(count: int = 12) -> list[dict]:
    """Each tells a letter, and asks for it in another turn; the answers differ in length."""
    letters = [chr(ord("a") + i) * (1 + i % 3) for i in range(count)]
    return [{"messages": chat(f"it is {letter}.", "ok", "what?", letter)} for letter in letters]


def small_model(tokenizer=None, dtype=torch.float32):
    """Two layers, hidden 32, for that tokenizer."""
    size = len(tokenizer if tokenizer is not None else chatml_tokenizer())
    return tiny_model(vocab_size=size, hidden_size=32, num_hidden_layers=2, dtype=dtype)


def run(data, output, *, adapter=None, evaluate=(), model=None, **changes):
    """A short run of ``train`` on the reference; returns its result."""
    tokenizer = chatml_tokenizer()
    options = TrainingOptions(
        **{"output": output, "steps": 4, "batch_size": 2, "accumulate": 1, "lr": 1e-2, "progress": False} | changes
    )
    model = small_model(tokenizer) if model is None else model
    adapter = DeltaMemConfig(rank=4) if adapter is None else adapter
    return train(model, tokenizer, [data], options, adapter, evaluate=evaluate, backend="reference")


def weights_in(directory) -> dict[str, torch.Tensor]:
    """The adapter's weights in a directory."""
    return load_file(directory / SAFETENSORS_NAME)


def steps_in(directory) -> list[dict]:
    """The training steps in a run's log."""
    return [entry for entry in read_log(directory / "log.jsonl") if "loss" in entry]


def without_time(entries: list[dict]) -> list[dict]:
    """Log entries without how long they took."""
    return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in entries]
