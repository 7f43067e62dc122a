"""The demo's figures as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..display import columns
from ..inspection.pictures import Snapshot, heat_map_lines
from . import demo
from .proof import REVISED_FACTS

ROWS = {
    "empty": "empty memory",
    "frozen": "bare backbone, sees nothing",
    "context": "bare backbone, sees all facts",
}


def format_demo(
    figures: dict[str, Any], snapshots: Sequence[Snapshot], *, style: str = "ascii", width: int = 80
) -> str:
    """The figures and the states as text; ``style`` and ``width`` as in ``heat_map_lines``."""
    lines = ["deltamem demo: what is told is answered from the memory alone", "", *_about_lines(figures)]
    for title, part in (
        ("Told, each in a context of its own, which is then thrown away:", figures["story"]["told"]),
        ("Asked, each in a fresh context (no cache, positions from 0):", _asked_lines(figures["story"]["asked"])),
        ("Told then: " + figures["story"]["revision"], _asked_lines(figures["story"]["asked_again"])),
        ("Answered right, in percent, by the number of facts told", _recall_lines(figures)),
        ("The older half told, the newer half in sight: answered right, in percent", _half_lines(figures)),
        (f"One of {REVISED_FACTS} facts revised: answers, in percent", _revise_lines(figures)),
        ("The state as it fills", [*heat_map_lines(snapshots, style, width - 2), *_picture_lines(figures)]),
        (
            "Checks",
            [f"{'ok  ' if holds else 'FAIL'}  {demo.CHECKS[name]}" for name, holds in figures["checks"].items()],
        ),
    ):
        lines += ["", title, *(f"  {line}".rstrip() for line in part)]
    return "\n".join([*lines, "", f"{figures['timings']['seconds']:.1f} s"])


def _about_lines(figures) -> list[str]:
    backbone, adapter = figures["backbone"], figures["adapter"]
    heads = f", {adapter['heads']} heads" if adapter["heads"] > 1 else ""
    return [
        f"backbone  {backbone['name']}, {backbone['layers']} layers, hidden {backbone['hidden']}, "
        f"{backbone['parameters'] / 1e6:.2f} M parameters, frozen, on {figures['device']}",
        f"adapter   {figures['strategy']}, rank {adapter['rank']}{heads}, on {' and '.join(adapter['corrects'])}, "
        f"{adapter['parameters'] / 1e3:.1f} k parameters, backend {figures['backend']}",
        f"memory    {figures['memory_bytes']:,} bytes a conversation, whatever its length",
        "names     none of those below was in the training of either",
    ]


def _asked_lines(asked: list[dict[str, str]]) -> list[str]:
    titles = {"truth": "truth", "memory": "memory", "empty": "empty memory", "unpatched": "not patched"}
    names = [name for name in titles if name in asked[0]]
    rows = [("", *(titles[name] for name in names))]
    return columns([*rows, *((row["question"], *(row[name] for name in names)) for row in asked)])


def _recall_lines(figures) -> list[str]:
    shares = {f"memory, {name}": values for name, values in figures["recall"].items()}
    shares |= {title: figures[name] for name, title in ROWS.items()}
    error = 50 / math.sqrt(figures["questions"])
    return [
        *_share_lines(shares),
        f"{figures['questions']} questions a number (standard error {error:.1f} at most); "
        f"chance is {100 * figures['chance']:.1f}; best at few facts: {figures['best']}",
    ]


def _half_lines(figures) -> list[str]:
    shares = {"bare backbone": figures["half_frozen"]} | {f"memory, {n}": s for n, s in figures["half"].items()}
    ratios = ["times as many", "", *(f"{ratio:.2f}" for ratio in figures["half_ratio"].values())]
    return [f"{line}  {ratio.rjust(13)}".rstrip() for line, ratio in zip(_share_lines(shares), ratios)]


def _revise_lines(figures) -> list[str]:
    titles = {"revised": "the new value", "stale": "the old value", "kept": "the other facts"}
    rows = [("", *titles.values())]
    for name, shares in figures["revise"].items():
        rows.append((f"memory, {name}", *(f"{100 * shares[column]:.1f}" for column in titles)))
    return columns(rows)


def _picture_lines(figures) -> list[str]:
    picture = figures["files"]["heat_map"]
    drawn = f"Drawn in {picture}" if picture else "No picture: matplotlib is not installed (extra: demo)"
    return ["", drawn, f"The memory is saved in {figures['files']['memory']}"]


def _share_lines(shares: dict[str, dict[str, float]]) -> list[str]:
    counts = list(next(iter(shares.values())))
    return columns([
        ("facts", *counts),
        *((name, *(f"{100 * values[count]:.1f}" for count in counts)) for name, values in shares.items()),
    ])  # fmt: skip
