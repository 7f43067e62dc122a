"""Prefill and decode of a whole model: patched against the same model without a patch."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

from deltamem_fast import DeltaMemConfig, memory_disabled, patch_model
from deltamem_fast.backends import resolve_backend

from .rows import Row, compare, measured, refused
from .scan import relative_error

TARGET = 0.95  # times the tokens per second of the model without a patch
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the logits, against the patch computed by the reference


@dataclass(frozen=True)
class Sizes:
    """A backbone's sizes and what is run through it."""

    hidden: int = 512
    intermediate: int = 2048
    layers: int = 8
    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 64
    vocabulary: int = 16_384
    prefill: int = 512
    decode: int = 32
    batches: tuple[int, ...] = (1, 4)
    turns: tuple[int, int] = (5, 15)
    budget: float = 60.0  # seconds for a batch size; past it only the least number of turns is completed


FULL = Sizes()  # 48 M parameters
QUICK = Sizes(
    hidden=64, intermediate=128, layers=2, heads=4, key_value_heads=2, head_dim=16, vocabulary=256,
    prefill=32, decode=4, batches=(1, 2), turns=(3, 3),
)  # fmt: skip


def build(sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    """A Qwen3 decoder with random weights."""
    config = Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=4 * (sizes.prefill + sizes.decode),
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def random_ids(sizes: Sizes, batch: int) -> torch.Tensor:
    """Fresh token ids [B, prefill + decode]."""
    return torch.randint(sizes.vocabulary, (batch, sizes.prefill + sizes.decode))


def logits_of(model: nn.Module, sizes: Sizes, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, vocabulary] of a prefill and two decoded tokens."""
    cache, at = DynamicCache(config=model.config), sizes.prefill
    parts = [ids[:, :at], ids[:, at : at + 1], ids[:, at + 1 : at + 2]]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@torch.no_grad()
def check(bare: nn.Module, patched: nn.Module, exact: nn.Module, sizes: Sizes, tolerance: float) -> tuple[str, float]:
    """What is wrong with the patched model, or "", and the relative error of its logits.

    Args:
        bare: the backbone.
        patched: the same one, patched.
        exact: the same one with the same adapter, computed by the reference.
        sizes, tolerance: of the backbone and of the logits' relative error.
    """
    ids = random_ids(sizes, 2)
    plain = logits_of(bare, sizes, ids)
    with memory_disabled(patched):
        if not torch.equal(logits_of(patched, sizes, ids), plain):
            return "logits differ from the backbone's with the memory disabled", float("nan")
    logits, wanted = logits_of(patched, sizes, ids), logits_of(exact, sizes, ids)
    error = relative_error(logits, wanted)
    if relative_error(wanted, plain) <= 10 * tolerance:
        return "the adapter changes too little to be checked", error
    if not error < tolerance:
        return f"relative error {error:.1e} of the logits, allowed under {tolerance:.0e}", error
    return "", error


def turn(model: nn.Module, sizes: Sizes, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of one prefill and of the decode after it, a token at a time."""
    cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    # As generate does: the logits of the last token only.
    model(ids[:, : sizes.prefill], past_key_values=cache, logits_to_keep=1)
    middle = time.perf_counter()
    for i in range(sizes.prefill, ids.shape[1]):
        model(ids[:, i : i + 1], past_key_values=cache, logits_to_keep=1)
    return {"prefill": middle - start, "decode": time.perf_counter() - middle}


@torch.no_grad()
def measure(models: dict[str, nn.Module], sizes: Sizes, batch: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by phase and model, one entry a turn: the models run in turns on the same tokens."""
    times = {phase: {name: [] for name in models} for phase in ("prefill", "decode")}
    for model in models.values():
        turn(model, sizes, random_ids(sizes, batch))  # warm-up
    least, most = sizes.turns
    start = time.perf_counter()
    for count in itertools.count():
        if count >= most or (count >= least and time.perf_counter() - start > sizes.budget):
            return times
        ids = random_ids(sizes, batch)
        # Who goes first changes from turn to turn, so that neither always follows the other.
        for name in list(models)[:: 1 if count % 2 == 0 else -1]:
            for phase, value in turn(models[name], sizes, ids).items():
                times[phase][name].append(value)


def run(quick: bool, progress: Callable[[str], None], dtype: str = "float32") -> list[Row]:
    """All rows of the model benchmark."""
    sizes = QUICK if quick else FULL
    bare = build(sizes, getattr(torch, dtype))
    count = sum(parameter.numel() for parameter in bare.parameters())
    progress(f"model: {count:,} parameters")
    patched = patch_model(copy.deepcopy(bare), DeltaMemConfig())
    exact = patch_model(copy.deepcopy(bare), DeltaMemConfig(), backend="reference")
    exact.load_state_dict(patched.state_dict())
    wrong, error = check(bare, patched, exact, sizes, TOLERANCE[dtype])
    del exact
    target = None if quick else TARGET  # a target is for a backbone of a real width
    common = {"parameters": count, "dtype": dtype}
    rows = []
    for batch in sizes.batches:
        progress(f"model: batch {batch}")
        phases = ("prefill", "decode")
        parameters = {phase: {"tokens": getattr(sizes, phase), "batch": batch} | common for phase in phases}
        backend = {"backend": resolve_backend("auto", "cpu")}
        models = {"unpatched": bare} if wrong else {"unpatched": bare, "patched": patched}
        times = measure(models, sizes, batch)
        for phase in phases:
            plain = times[phase]["unpatched"]
            rows.append(measured(f"{phase}/unpatched", parameters[phase], plain))
            name, details = f"{phase}/patched", parameters[phase] | backend
            if wrong:
                rows.append(refused(name, details, wrong, error, target))
                continue
            ours = times[phase]["patched"]
            row = measured(name, details, ours, error)
            rows.append(compare(row, [a / b for a, b in zip(plain, ours)], target))
    return rows
