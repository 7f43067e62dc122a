"""What a session costs beside generate on a cache kept by hand: turns, windows built anew, files.

The turns of one conversation are timed side by side: each variant says and answers the same number of tokens.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from deltamem_fast import DeltaMemConfig, MemorySession, MemoryState, patch_model
from deltamem_fast.recall.weights import find_weights, load_backbone

from ..instrument import backbones, commands, results
from ..instrument.rows import Row, compare, counted, measured
from ..instrument.timing import in_turns, wall
from ..speed.model import loud

DIRECTORY = results.DIRECTORY / "sessions"
SAID, ANSWERED, TURNS, WINDOW = 64, 64, 8, 4
TEXT = "The rain came all day."  # with its space six tokens of the recall tokenizer


def by_hand(model: nn.Module, tokenizer, text: str, limits: dict) -> Callable[[int], object]:
    """A turn as one writes it without a session: generate on a cache and a memory that are kept."""
    cache, memory = DynamicCache(), MemoryState.zeros(model)
    ids: list[int] = []

    def turn(_) -> None:
        chat = [{"role": "user", "content": text}]
        ids.extend(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False))
        mask = torch.ones(1, len(ids), dtype=torch.long)
        given = {"attention_mask": mask, "memory": memory, "past_key_values": cache}
        ids[:] = model.generate(torch.tensor([ids]), **given, **limits)[0].tolist()

    return turn


def said_and_answered(sizes: dict) -> tuple[str, dict]:
    """What is said in a turn, and the options with which exactly so many tokens are answered."""
    count = sizes["answered"]
    limits = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
    return " ".join([TEXT] * max(1, sizes["said"] // 6)), limits


def turn_rows(model: nn.Module, tokenizer, sizes: dict) -> list[Row]:
    """Seconds of a turn; ratios turn by turn, so that the contexts compared are of one length."""
    text, limits = said_and_answered(sizes)
    sessions = [MemorySession(model, tokenizer, **kept) for kept in ({}, {"context_turns": sizes["window"]})]
    variants = {
        "by hand": by_hand(model, tokenizer, text, limits),
        "session": lambda _: sessions[0].answer(text, **limits),
        "session, window": lambda _: sessions[1].answer(text, **limits),
    }
    times = in_turns(variants, sizes["turns"], "cpu", warm_up=1)
    rows = []
    for name, seconds in times.items():
        parameters = sizes | ({} if name == "session, window" else {"window": None})
        row = measured(f"turn/{name}", parameters, seconds)
        rows.append(row if name == "by hand" else compare(row, "by hand", times["by hand"], seconds))
    return rows


def file_rows(model: nn.Module, tokenizer, sizes: dict, repeats: int) -> list[Row]:
    """Seconds of save and load, and bytes on the disk, with the cache and without it."""
    session = MemorySession(model, tokenizer, context_turns=sizes["window"])
    text, limits = said_and_answered(sizes)
    for _ in range(sizes["window"] + 2):
        session.answer(text, **limits)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for with_cache in (True, False):
            parameters = {"cache": with_cache, "context_tokens": session.context_tokens, "window": sizes["window"]}
            save = functools.partial(session.save, folder, cache=with_cache)
            load = functools.partial(MemorySession.load, folder, model, tokenizer)
            saving, loading = zip(*((wall(save, "cpu"), wall(load, "cpu")) for _ in range(repeats)))
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            rows += [measured("session/save", parameters, saving), measured("session/load", parameters, loading)]
            rows.append(counted("session/files", parameters, bytes=size))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.memory sessions``."""
    parser.add_argument("--quick", action="store_true", help="a tiny model, few turns; stays out of docs/results")


def run(options: argparse.Namespace) -> int:
    """Measure, print, write."""
    _, tokenizer = load_backbone(find_weights().backbone)
    tiny = {"vocab_size": len(tokenizer)} if options.quick else {}
    config = backbones.configuration("Qwen3-48M", options.quick, **tiny)
    model = loud(patch_model(backbones.build(config, torch.float32, "cpu"), DeltaMemConfig()))
    model.requires_grad_(False)
    name = "tiny Qwen3-48M" if options.quick else "Qwen3-48M"
    sizes = {"model": name, "said": SAID, "answered": ANSWERED, "turns": TURNS, "window": WINDOW}
    if options.quick:
        sizes |= {"said": 12, "answered": 4, "turns": 3, "window": 2}
    rows = [*turn_rows(model, tokenizer, sizes), *file_rows(model, tokenizer, sizes, 3 if options.quick else 15)]
    return commands.finish(rows, {"quick": options.quick}, options.output)
