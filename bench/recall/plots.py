"""Draw the curves of the newest result: recall against facts, rank, distance and revisions, and the half context.

Shaded: one standard error to both sides. The same JSON gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import plots, results
from ..results import Result
from ..rows import Row
from . import curves, variants
from .targets import HALF

DIRECTORY = plots.DIRECTORY
_BACKBONE = {
    variants.FROZEN.name: "tab:gray",
    variants.EMPTY.name: "silver",
    variants.CONTEXT.name: "black",
    variants.BM25_1.name: "tab:olive",
    variants.BM25_4.name: "tab:brown",
    variants.TOGETHER.name: "tab:pink",
}
COLOURS = dict(zip(variants.STRATEGIES, ("tab:blue", "tab:orange", "tab:green"))) | _BACKBONE


def newest(directory: Path = curves.DIRECTORY) -> Result | None:
    """The newest whole result of all devices, or None.

    Raises:
        ValueError, OSError: a file there cannot be read.
    """
    return max(results.newest(directory), key=lambda result: result.head["time"], default=None)


def _lines(rows: Sequence[Row], curve: str, names: Sequence[str], value: str) -> Iterator[tuple[str, list[Row]]]:
    for name in names:
        found = [row for row in rows if row.name == f"{curve}/{name}" and value in row.values]
        if found:
            yield name, found


def _line(axes, x: Sequence[float], rows: Sequence[Row], value: str, error: str, label: str, **style) -> None:
    y, errors = [row.values[value] for row in rows], [row.values[error] for row in rows]
    (line,) = axes.plot(x, y, marker="o", markersize=3, label=label, **style)
    low, high = ([a + sign * b for a, b in zip(y, errors)] for sign in (-1, 1))
    axes.fill_between(x, low, high, alpha=0.2, color=line.get_color())


def _share_axes(axes, x: str, ticks: Sequence[int]) -> None:
    axes.set(xlabel=x, ylabel="share of the answers", ylim=(-0.02, 1.02))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def draw_facts(rows: Sequence[Row], axes) -> bool:
    """Recall against the number of facts: strategies, backbone, retrieval."""
    names = [variant.name for variant in curves.CURVES["facts"].variants if variant.name in COLOURS]
    lines = list(_lines(rows, "facts", names, "share"))
    for name, found in lines:
        x = [row.parameters["facts"] for row in found]
        _line(axes, x, found, "share", "error", name, color=COLOURS[name])
    axes.set_xscale("log", base=2)
    _share_axes(axes, "facts told", (1, 2, 4, 8, 16, 32))
    return bool(lines)


def draw_ranks(rows: Sequence[Row], axes) -> bool:
    """Recall against rank, a line for each number of facts."""
    lines: dict[int, list[tuple[int, Row]]] = {}
    for rank, name in variants.RANKS.items():
        for _, found in _lines(rows, "facts", [name], "share"):
            for row in found:
                lines.setdefault(row.parameters["facts"], []).append((rank, row))
    for index, (facts, found) in enumerate(lines.items()):
        ranks, measured = zip(*found)
        _line(axes, ranks, measured, "share", "error", f"{facts} facts", color=f"C{index}")
    axes.set_xscale("log", base=2)
    _share_axes(axes, "rank r; TSW, adapters trained a fifth as long", tuple(variants.RANKS))
    return any(len(found) > 1 for found in lines.values())


def draw_distance(rows: Sequence[Row], axes) -> bool:
    """Recall of two facts against the tokens told after them."""
    lines = list(_lines(rows, "distance", [variant.name for variant in curves.CURVES["distance"].variants], "share"))
    for name, found in lines:
        x = [row.parameters["distance"] for row in found]
        _line(axes, x, found, "share", "error", name, color=COLOURS[name])
    axes.set_xscale("symlog", base=2, linthresh=32)
    ticks = [point["distance"] for point in curves.CURVES["distance"].points]
    _share_axes(axes, "tokens of small talk after two facts", ticks)
    return bool(lines)


def draw_overwriting(rows: Sequence[Row], axes) -> bool:
    """Answers with the newest value, with an earlier one (dashed), and right ones on the other facts (dotted)."""
    rows = [row for row in rows if row.parameters.get("facts") == 8]
    names = [*variants.STRATEGIES, variants.CONTEXT.name]
    for value, style in (("newest", "-"), ("stale", "--"), ("kept", ":")):
        for name, found in _lines(rows, "overwriting", names, value):
            x, label = [row.parameters["revisions"] for row in found], f"{name}: {value}"
            _line(axes, x, found, value, f"{value}_error", label, color=COLOURS[name], linestyle=style)
    _share_axes(axes, "times that one of eight facts was overwritten", range(4))
    return bool(axes.lines)


def draw_half(rows: Sequence[Row], axes) -> bool:
    """With the newer half in sight: recall of all facts ÷ the frozen backbone's; dashed: the target."""
    lines = list(_lines(rows, "half", variants.STRATEGIES, "ratio"))
    for name, found in lines:
        x = [row.parameters["facts"] for row in found]
        _line(axes, x, found, "ratio", "ratio_error", name, color=COLOURS[name])
    axes.axhline(HALF, linestyle="--", linewidth=0.8, color="black")
    axes.set(xlabel="facts, the newer half in the context", ylabel="recall ÷ frozen backbone", ylim=(0.9, None))
    return bool(lines)


DRAWINGS: dict[str, Callable[[Sequence[Row], object], bool]] = {
    "facts": draw_facts,
    "ranks": draw_ranks,
    "distance": draw_distance,
    "overwriting": draw_overwriting,
    "half": draw_half,
}


def names(directory: Path = DIRECTORY) -> list[Path]:
    """Where the pictures go; a newer result replaces them."""
    return [directory / f"recall-{name}.png" for name in DRAWINGS]


def draw(result: Result, directory: Path = DIRECTORY) -> list[Path]:
    """Write the pictures that the result has numbers for; returns their paths."""
    return plots.save(result, dict(zip(names(directory), DRAWINGS.values())))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.recall plots``."""
    parser.add_argument("--results", type=Path, default=curves.DIRECTORY, help="folder of the JSON")
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of the pictures")


def run(options: argparse.Namespace) -> int:
    """Draw the newest whole result, if there is one."""
    found = newest(options.results)
    for path in draw(found, options.output) if found else ():
        print(path)
    return 0
