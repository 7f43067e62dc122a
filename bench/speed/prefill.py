"""Prefill of a long prompt: time and peak memory, patched against the same model without a patch."""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers import DynamicCache

from ..instrument import backbones
from ..instrument.rows import Row
from ..instrument.timing import in_turns, peak_memory
from . import peers
from .model import Models, random_ids


def prefill(model: nn.Module, ids: torch.Tensor) -> None:
    """One forward of a whole prompt, logits of the last token only."""
    peers.forget(model)
    model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)


@torch.no_grad()
def rows(models: Models, length: int, turns: int) -> list[Row]:
    """Rows of one length at one row: seconds, ``peak_memory`` and, where patched, ``extra_memory``.

    ``peak_memory`` is a model's own weights and what a prefill takes at its peak beyond them, in bytes;
    ``extra_memory`` is patched ÷ unpatched − 1.
    """
    fresh = functools.partial(random_ids, models.config.vocab_size, 1, length, models.device)
    peaks = {}
    for name, model in models.variants.items():
        prefill(model, fresh())  # kernels compile here
        taken = peak_memory(functools.partial(prefill, model, fresh()), models.device)
        if taken is not None:
            peaks[name] = backbones.weight_bytes(model) + taken
    prompts = [fresh() for _ in range(turns)]
    calls = {name: lambda n, model=model: prefill(model, prompts[n]) for name, model in models.variants.items()}
    times = in_turns(calls, turns, models.device, warm_up=0, events=False)
    made = models.rows("prefill", models.parameters(batch=1, tokens=length), times)
    for row in made:
        variant = row.name.split("/")[1]
        if row.status == "measured" and variant in peaks:
            row.values["peak_memory"] = peaks[variant]
            if variant != "unpatched":
                row.values["extra_memory"] = peaks[variant] / peaks["unpatched"] - 1
    return made
