"""Train the weights of the recall proof from nothing: backbone, then adapters. Goes on where it was stopped.

On two CPU cores it takes under an hour. What `deltamem demo` loads is `--output deltamem_fast/data/recall`.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from deltamem_fast.recall import measure

from . import card
from .train_adapter import STRATEGIES, AdapterOptions, train_adapter
from .train_backbone import BackboneOptions, train_backbone

# What is shipped: the three strategies at rank 8, and TSW at four ranks, a fifth as long, for the curve over ranks.
ADAPTERS = {f"{strategy}-r8": AdapterOptions(strategy) for strategy in STRATEGIES} | {
    f"tsw-r{rank}-short": AdapterOptions("tsw", rank, steps=400, settle_steps=0) for rank in (4, 8, 16, 32)
}
CHECKED = (1, 2, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--output", type=Path, default=Path("build/recall"), help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of each, instead of the recipe's; for a try")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone: a third faster")
    parser.add_argument("--only", nargs="+", choices=["backbone", *ADAPTERS], help="default: all of them")


def run(options: argparse.Namespace) -> int:
    """Train what is not there yet, then write the model card."""
    changes = {"seed": options.seed} | ({"steps": options.steps} if options.steps else {})
    backbone = options.output / "backbone"
    wanted = options.only or ["backbone", *ADAPTERS]
    if "backbone" in wanted and not _done(backbone):
        train_backbone(BackboneOptions(**changes), backbone, options.device, options.compile)
    if not _done(backbone):
        raise FileNotFoundError(f"output: {backbone} holds no trained backbone; train it first (--only backbone)")
    left = [name for name in ADAPTERS if name in wanted and not _done(options.output / name)]
    adapters = [replace(ADAPTERS[name], **changes) for name in left]
    train = functools.partial(_train_one, backbone=backbone, output=options.output, device=options.device)
    if options.device == "cpu":
        # Such small matrices do not fill two cores; two runs do.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=spawn) as pool:
            list(pool.map(train, left, adapters))
    else:
        list(map(train, left, adapters))
    print(card.write(options.output))
    return 0


def _done(directory: Path) -> bool:
    return (directory / "training.json").is_file()


def _train_one(name: str, adapter: AdapterOptions, backbone: Path, output: Path, device: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    train_adapter(adapter, backbone, output / name, device, check)


def check(model, tokenizer) -> dict:
    """Recall of a trained adapter on a few episodes, facts → condition → share, as its training.json holds it."""
    found = {}
    for count in CHECKED:
        episodes = [measure.draw_episode(Random(seed), count) for seed in range(64)]
        conditions = ("memory", "empty", "context", "half_frozen", "half_memory")
        found[count] = {c: round(measure.recall(model, tokenizer, episodes, c), 4) for c in conditions}
    return {"recall": found}
