"""Train the weights of the recall proof from nothing: backbone, episodes, adapters. Goes on where it was stopped.

python -m examples.recall [--help]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from deltamem_fast.training import TrainingOptions

from .adapters import Stage, adapter_config, is_trained, train_adapter
from .backbone import BackboneOptions, train_backbone
from .episodes import write_episodes
from .lasting import LastingOptions
from .settle import SettlingOptions

EPISODES, BATCH = 20_000, 64
# A fifth of the steps has few facts: with many from the start, most steps would pass before anything is learnt.
MOST_FACTS, FIRST = {"few": 2, "many": 8}, 5
# Long talk first; then more facts behind little talk, since the first stage costs some of eight facts' recall.
LASTING = (
    LastingOptions(steps=1000, rows=3),
    LastingOptions(steps=300, rows=3, lr=1e-3, most_facts=10, long=False, seed=1),
)
# Then more facts that are overwritten, for what has learnt to keep the first value it is told.
REVISED = LastingOptions(steps=250, rows=3, lr=1e-3, most_facts=10, seed=2, revisions=0.3, about_revised=0.15)
KEEPS_THE_FIRST = ("tsw", "ssw")
# Name → strategy, rank, steps, whether settled and made to last: the three strategies, and four ranks, a fifth as long.
ADAPTERS = {f"{strategy}-r8": (strategy, 8, 2000, True) for strategy in ("tsw", "ssw", "msw")} | {
    f"tsw-r{rank}-short": ("tsw", rank, 400, False) for rank in (4, 8, 16, 32)
}


def main(arguments: list[str] | None = None) -> int:
    """Train what is not there yet; returns the exit status."""
    parser = argparse.ArgumentParser("python -m examples.recall", description="Train the recall proof from nothing.")
    parser.add_argument("--output", type=Path, default=Path("build/recall"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of each, instead of the recipe's; for a try")
    parser.add_argument("--only", nargs="+", choices=["backbone", *ADAPTERS], help="default: all of them")
    options = parser.parse_args(arguments)
    try:
        _train(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def _train(options: argparse.Namespace) -> None:
    wanted = options.only or ["backbone", *ADAPTERS]
    backbone = options.output / "backbone"
    trained = (backbone / "training.json").is_file()
    if "backbone" in wanted and not trained:
        changes = {"terse_steps": options.steps, "steps": options.steps, "least_right": 0.0} if options.steps else {}
        train_backbone(BackboneOptions(seed=options.seed, **changes), backbone)
    elif not trained:
        raise FileNotFoundError(f"--output: {backbone} holds no trained backbone; train it first (--only backbone)")
    left = [name for name in ADAPTERS if name in wanted and not is_trained(options.output / name)]
    if not left:
        return
    for name, most_facts in MOST_FACTS.items():
        count = options.steps * BATCH if options.steps else EPISODES
        write_episodes(options.output / f"{name}.jsonl", count, options.seed, most_facts)
    train_one = partial(_train_one, output=options.output, seed=options.seed, steps=options.steps)
    if torch.cuda.is_available():
        list(map(train_one, left))
    else:
        # Such small matrices do not fill two cores; two runs do.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(train_one, left))


def _train_one(name: str, output: Path, seed: int, steps: int | None) -> None:
    strategy, rank, recipe_steps, settled = ADAPTERS[name]
    few = (steps or recipe_steps) // FIRST
    stages = [Stage(data, count, output / f"{data}.jsonl")
              for data, count in zip(MOST_FACTS, (few, (steps or recipe_steps) - few)) if count]  # fmt: skip
    options = TrainingOptions(
        str(output / name), batch_size=BATCH, accumulate=1, lr=3e-3, warmup=0.025, state_only_probability=0.0,
        seed=seed, save_every=200, keep=1,
    )  # fmt: skip
    settling = SettlingOptions(steps=steps or SettlingOptions.steps, seed=seed) if settled else None
    config = adapter_config(strategy, rank)
    stages_to_last = (*LASTING, REVISED) if strategy in KEEPS_THE_FIRST else LASTING
    lasting = [replace(each, steps=steps or each.steps, seed=seed + each.seed) for each in stages_to_last if settled]
    figures = train_adapter(config, options, stages, settling, output / "backbone", lasting)
    print(f"{name}: recall of {figures['recall']}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
