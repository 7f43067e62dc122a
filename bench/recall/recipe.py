"""One row a change of recipe: facts behind talk, eight facts, overwriting, perplexity, of adapters side by side.

python -m bench.recall recipe "before=old/tsw-r8" "long talk, its gates cost=build/lasting/tsw-r8"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

from torch import nn

from deltamem_fast import patch_model, unpatch_model
from deltamem_fast.config import CONFIG_NAME
from deltamem_fast.recall.weights import SHIPPED, load_backbone

from ..instrument import commands, results
from ..instrument.rows import Row, counted
from ..instrument.tables import plain_table
from . import conversations, figures, perplexity, variants
from .variants import Variant

DIRECTORY = results.DIRECTORY / "recall-recipe"
NAME = "recipe"
EPISODES = 64
# What is asked: the name that seeds the draw, the draw, its sizes, conversations for each of EPISODES, and which parts
# of the questions (``figures.point``) become which figures. A curve's name and sizes: that curve's questions.
POINTS = (
    ("distance", conversations.distant, {"facts": 2, "distance": 1024}, 1, {"share": "two_facts_1024"}),
    ("facts", conversations.plain, {"facts": 8}, 1, {"share": "eight_facts"}),
    ("hostile", conversations.hostile, {"facts": 2, "text": "new talk", "tokens": 1024}, 2,
     {"share": "two_facts_1024_new_talk"}),
    ("drawn", conversations.hostile, {"facts": 2, "text": "drawn talk", "tokens": 1024}, 2,
     {"share": "two_facts_1024_drawn_talk"}),
    ("overwriting", conversations.revised, {"facts": 8, "revisions": 1}, 2,
     {"newest": "overwritten_once", "kept": "others_once"}),
    ("overwriting", conversations.revised, {"facts": 8, "revisions": 2}, 2,
     {"newest": "overwritten_twice", "kept": "others_twice"}),
    ("in sight", conversations.in_sight, {"facts": 4, "sight": "newer"}, 2,
     {"newest": "newer_in_sight", "kept": "others_newer_in_sight"}),
    ("in sight", conversations.in_sight, {"facts": 4, "sight": "everything"}, 2,
     {"newest": "newest_all_in_sight", "kept": "others_all_in_sight"}),
)  # fmt: skip


def measure(model: nn.Module, tokenizer, adapters: Sequence[tuple[str, Path]], episodes: int, progress) -> list[Row]:
    """A row for each (change, adapter's directory), in order; the model is bare before and afterwards."""
    texts = perplexity.draw_texts(episodes)
    frozen = perplexity.losses(model, tokenizer, texts, None)
    rows = []
    for change, directory in adapters:
        progress(f"{directory.name}: {change}")
        patch_model(model, directory)
        values = {}
        for name, draw, sizes, times, titles in POINTS:
            random = Random(f"{name} {sizes}")
            talks = [draw(random, tokenizer, **sizes) for _ in range(episodes * times)]
            found = figures.point(talks, variants.answers(model, tokenizer, Variant(NAME, directory.name), talks))
            for part, title in titles.items():
                error = found["error" if part == "share" else f"{part}_error"]
                values |= {title: found[part], f"{title}_error": error}
        for memory in ("filled", "live"):
            found = perplexity.ratio(perplexity.losses(model, tokenizer, texts, memory), frozen)
            values |= dict(zip((f"perplexity_{memory}", f"perplexity_{memory}_error"), found))
        unpatch_model(model)
        numbers = {key: round(value, figures.DIGITS) for key, value in values.items()}
        parameters = {"change": change, "weights": figures.weights_digest(directory)}
        rows.append(counted(f"{NAME}/{directory.name}", parameters, **numbers))
    return rows


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.recall recipe``."""
    parser.add_argument("adapter", nargs="+", help='"change of the recipe=directory of the adapter that it made"')
    parser.add_argument("--episodes", type=int, default=EPISODES, help="conversations of a point (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Measure, write, and print the table."""
    pairs = []
    for given in options.adapter:
        change, _, directory = given.partition("=")
        if not change or not (Path(directory) / CONFIG_NAME).is_file():
            raise ValueError(f"adapter: got {given!r}, allowed CHANGE=DIRECTORY, with an adapter in the directory")
        pairs.append((change, Path(directory)))
    if options.episodes < 1:
        raise ValueError(f"--episodes: got {options.episodes}, allowed 1 or more")
    model, tokenizer = load_backbone(SHIPPED / "backbone", options.device)
    rows = measure(model, tokenizer, pairs, options.episodes, commands.progress())
    arguments = {"quick": options.episodes < EPISODES, "episodes": options.episodes}
    print(plain_table(rows))
    print(results.write(options.output, results.collect(rows, options.device, arguments)))
    return 0
