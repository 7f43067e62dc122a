"""A user's turns once more, one after another and alone: what the memory must be."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from deltamem_fast import MemoryState
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.serving.prompts import Prompt, rendered
from deltamem_fast.serving.rows import Row, answer_rows_from
from deltamem_fast.session.turns import feed, new_cache
from deltamem_fast.text.answering import answer_options

from .clients import Turn


def prompt_of(model: nn.Module, tokenizer, turn: Turn) -> Prompt:
    """A turn's messages, rendered."""
    return rendered(tokenizer, identity_of(model).config.memory_write_granularity, turn.messages, {})


def replayed(model: nn.Module, tokenizer, turns: list[Turn], answer: int) -> MemoryState:
    """The memory after turns, each written by itself, block by block, beside nobody.

    Args:
        answer: tokens of an answer at most, where it is not known what was answered.
    """
    memory, known = MemoryState.zeros(model), False
    for turn in turns:
        prompt = prompt_of(model, tokenizer, turn)
        if turn.reply is None:
            options = answer_options(model, tokenizer, {"do_sample": False})
            memory = answer_rows_from(model, [Row(prompt, answer)], memory, known, options, write=True)
        else:
            seen, new = ((prompt.preamble, *prompt.earlier), prompt.new) if known else ((), prompt.all_blocks)
            cache = new_cache(model)
            memory.frozen = True
            for block in seen:
                feed(model, cache, memory, block)
            memory.frozen = False
            for block in (*new, prompt.answer(turn.reply)):
                feed(model, cache, memory, block)
        known = True
    return memory


def loaded(model: nn.Module, file: bytes) -> MemoryState:
    """A memory that a server has exported."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        path.write_bytes(file)
        return MemoryState.load(path, model)


def distance(found: MemoryState, wanted: MemoryState) -> float:
    """‖found − wanted‖ / ‖wanted‖ of all layers together, in float64."""
    both = [(found[i].double().flatten(), wanted[i].double().flatten()) for i in wanted]
    ours, theirs = (torch.cat(parts) for parts in zip(*both))
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
