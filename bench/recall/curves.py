"""Measure recall against facts, rank, distance, overwriting and retrieval, and the perplexity of other text.

Everything is drawn with fixed seeds; all variants of a point are asked the same questions.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from deltamem_fast import patch_model, unpatch_model
from deltamem_fast.config import CONFIG_NAME
from deltamem_fast.recall.weights import SHIPPED, load_backbone

from ..instrument import commands, results
from ..instrument.rows import Row, absent, counted
from . import conversations, figures, perplexity, variants
from .conversations import ASKED, Conversation
from .perplexity import Text
from .variants import Variant

DIRECTORY = results.DIRECTORY / "recall"
EPISODES = 64


@dataclass(frozen=True)
class Curve:
    """Recall along one size.

    Attributes:
        draw: a conversation from (random, tokenizer, **point).
        points: the sizes.
        variants: the lines.
        conversations: how many of a point for each of ``--episodes``; more where a conversation asks less.
    """

    draw: Callable[..., Conversation]
    points: tuple[dict[str, Any], ...]
    variants: tuple[Variant, ...]
    conversations: Callable[[dict[str, Any]], int]


def _more_if_few(point: dict[str, Any]) -> int:
    return max(1, ASKED // point["facts"])


_BASELINES = (variants.CONTEXT, variants.BM25_1, variants.BM25_4, variants.TOGETHER)
CURVES = {
    "facts": Curve(
        conversations.plain,
        tuple({"facts": count} for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)),
        (*variants.MEMORIES, *variants.OTHER_RANKS, variants.EMPTY, variants.FROZEN, *_BASELINES),
        _more_if_few,
    ),
    "distance": Curve(
        conversations.distant,
        tuple({"facts": 2, "distance": tokens} for tokens in (0, 32, 64, 128, 256, 512, 1024)),
        (*variants.MEMORIES, variants.CONTEXT, variants.BM25_1),
        lambda point: 1,
    ),
    "overwriting": Curve(
        conversations.revised,
        tuple({"facts": facts, "revisions": times} for facts in (4, 8) for times in (0, 1, 2, 3)),
        (*variants.MEMORIES, *_BASELINES),
        lambda point: 2,
    ),
    "hostile": Curve(
        conversations.hostile,
        (
            *({"facts": 4, "text": text, "tokens": 50} for text in conversations.HOSTILE[:3]),
            *({"facts": 4, "text": text, "tokens": 500} for text in conversations.HOSTILE[3:]),
            *({"facts": 2, "text": text, "tokens": 1024} for text in conversations.HOSTILE[4:]),
        ),
        (*variants.MEMORIES, variants.CONTEXT, variants.BM25_1),
        lambda point: 2,
    ),
    "half": Curve(
        conversations.halved,
        tuple({"facts": count} for count in (4, 8, 12, 16)),
        (*variants.MEMORIES, variants.FROZEN),
        _more_if_few,
    ),
}
PARTS = (*CURVES, perplexity.NAME)


def _drawn(tokenizer, name: str, episodes: int) -> Iterator[tuple[dict[str, Any], list[Conversation]]]:
    """The points of a curve, each with the conversations that all variants are asked about."""
    curve = CURVES[name]
    for point in curve.points:
        random, count = Random(f"{name} {point}"), episodes * curve.conversations(point)
        yield point, [curve.draw(random, tokenizer, **point) for _ in range(count)]


def measure(
    model: nn.Module,
    tokenizer,
    directory: Path,
    episodes: int = EPISODES,
    only: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """All rows, curve by curve, each variant's points in order.

    Args:
        model: the bare backbone; it is patched with one adapter after the other, and bare again afterwards.
        directory: of the adapters, by name. The rows of one that is not there say so.
        episodes: conversations of a point at least, and texts of each kind.
        only: one of ``PARTS`` instead of all.
    """
    wanted = [name for name in PARTS if only in (None, name)]
    drawn = {name: list(_drawn(tokenizer, name, episodes)) for name in wanted if name in CURVES}
    texts = perplexity.draw_texts(episodes) if perplexity.NAME in wanted else []
    frozen = perplexity.losses(model, tokenizer, texts, None)
    rows = [counted("chance", {"kind": kind}, share=chance) for kind, chance in figures.CHANCE.items()]
    for adapter in dict.fromkeys([None, *(line.adapter for curve in CURVES.values() for line in curve.variants)]):
        path = None if adapter is None else directory / adapter
        with _adapted(model, path) as there:
            for name in wanted:
                progress(f"{name}: {adapter or 'no memory'}")
                subject = model if there else None
                if name in CURVES:
                    rows += _curve(subject, tokenizer, name, drawn[name], adapter)
                else:
                    rows += _perplexity(subject, tokenizer, texts, frozen, adapter)
    _add_ratios(rows)
    order = [f"{name}/{variant.name}" for name, curve in CURVES.items() for variant in curve.variants]
    return sorted(rows, key=lambda row: order.index(row.name) if row.name in order else len(order))


@contextlib.contextmanager
def _adapted(model: nn.Module, path: Path | None) -> Iterator[bool]:
    """Inside, the model has the adapter at ``path`` (None = none); False if there is none at that place."""
    if path is None or not (path / CONFIG_NAME).is_file():
        yield path is None
        return
    patch_model(model, path)
    try:
        yield True
    finally:
        unpatch_model(model)


def _curve(model: nn.Module | None, tokenizer, name: str, drawn: Sequence[tuple], adapter: str | None) -> Iterator[Row]:
    for variant in (variant for variant in CURVES[name].variants if variant.adapter == adapter):
        for point, talks in drawn:
            if model is None:
                yield absent(f"{name}/{variant.name}", _missing(adapter), point)
                continue
            answers = variants.answers(model, tokenizer, variant, talks)
            yield counted(f"{name}/{variant.name}", point, **figures.point(talks, answers))


def _perplexity(
    model: nn.Module | None, tokenizer, texts: Sequence[Text], frozen: torch.Tensor, adapter: str | None
) -> Iterator[Row]:
    if adapter is None:
        yield from perplexity.rows("frozen", None, texts, frozen, frozen)
    elif adapter in variants.STRATEGIES:
        for memory in perplexity.MEMORIES:
            if model is None:
                parameters = {"text": perplexity.EVERYTHING, "memory": memory}
                yield absent(f"{perplexity.NAME}/{adapter}", _missing(adapter), parameters)
                continue
            losses = perplexity.losses(model, tokenizer, texts, memory)
            yield from perplexity.rows(adapter, memory, texts, losses, frozen)


def _missing(adapter: str) -> str:
    return f"no adapter {adapter} among the weights"


def _add_ratios(rows: Sequence[Row]) -> None:
    """Give the rows with the newer half in sight their ratio to the frozen backbone."""
    frozen = {row.parameters["facts"]: row.values for row in rows if row.name == f"half/{variants.FROZEN.name}"}
    for row in rows:
        if row.name.startswith("half/") and row.status == "measured" and row.name != f"half/{variants.FROZEN.name}":
            base = frozen[row.parameters["facts"]]
            found = figures.ratio(row.values["share"], base["share"], row.values["asked"], base["asked"])
            if found is not None:
                row.values["ratio"], row.values["ratio_error"] = (round(x, figures.DIGITS) for x in found)


def fingerprints(directory: Path) -> dict[str, str]:
    """The weights under ``directory``, each folder's by the first twelve digits of its SHA-256."""
    return {path.name: figures.weights_digest(path) for path in sorted(directory.iterdir()) if path.is_dir()}


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.recall curves``."""
    parser.add_argument("--episodes", type=int, default=EPISODES, help="conversations of a point (%(default)s)")
    parser.add_argument("--weights", type=Path, help="folder of backbone and adapters (the shipped ones)")
    parser.add_argument("--only", choices=PARTS, help="one curve instead of all")


def run(options: argparse.Namespace) -> int:
    """Measure and write; a run with fewer episodes, or with weights that differ from the shipped ones, is kept out of
    docs/results. Adapters that do not ship, such as those of other ranks, may lie beside copies of them."""
    if options.episodes < 1:
        raise ValueError(f"--episodes: got {options.episodes}, allowed 1 or more")
    progress = commands.progress()
    directory = options.weights or SHIPPED
    model, tokenizer = load_backbone(directory / "backbone")
    rows = measure(model, tokenizer, directory, options.episodes, options.only, progress)
    weights = fingerprints(directory)
    small = options.episodes < EPISODES or not fingerprints(SHIPPED).items() <= weights.items()
    arguments: dict[str, Any] = {"quick": small, "only": options.only, "episodes": options.episodes}
    count = sum(p.numel() for p in model.parameters())
    result = results.collect(rows, "cpu", arguments, weights=weights, parameters=count)
    progress(f"{len(rows)} rows")
    print(results.write(options.output, result))
    return 0
