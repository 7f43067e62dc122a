"""The state as a picture: a PNG, and characters for a terminal."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deltamem_kernels.dispatch import installed

from ..display import printable
from ..errors import ArgumentError, MissingPackageError
from ..memory.state import MemoryState
from ..storage.files import write_atomically
from .trace import Trace

STYLES = ("colour", "unicode", "ascii")
INCHES, MARGIN, DPI = 1.2, 0.5, 100

# Shares of the largest |entry| at which a cell gets darker.
_STEPS = (0.05, 0.25, 0.5, 0.75)
_SHADES = {"unicode": "·░▒▓█", "ascii": ".:+*#"}
# Of the 256 colours that terminals know: from white to red and to blue.
_REDS, _BLUES = (231, 224, 217, 210, 203, 196, 160), (231, 189, 153, 117, 75, 33, 27)


@dataclass(frozen=True)
class Snapshot:
    """One conversation's memory at one time: a name for it, and layer index → float32 [H, r, r] on the CPU."""

    name: str
    states: dict[int, torch.Tensor]


def snapshot(memory: MemoryState, name: str, row: int = 0) -> Snapshot:
    """A copy of one conversation's memory; later writes do not change it."""
    return Snapshot(name, {layer: state[row].detach().to("cpu", copy=True) for layer, state in memory.items()})


def heat_map_lines(snapshots: Sequence[Snapshot], style: str = "ascii", width: int = 80) -> list[str]:
    """The states side by side as lines of text: a band for each layer and head, titled with its largest |entry|.

    The layers of a single state stand side by side.

    Args:
        snapshots: of the same layers and shapes.
        style: ``colour`` (two rows in a line, red +, blue −), ``unicode`` or ``ascii`` (two characters a cell, the
            darker the larger; a minus before a negative one).
        width: characters in a line; at least one state is put on it.

    Raises:
        ValueError: an unknown style, or no snapshot.
    """
    if style not in STYLES:
        raise ArgumentError(f"style: got {style!r}, allowed {', '.join(STYLES)}")
    if not snapshots:
        raise ArgumentError("snapshots: got none, allowed one or more")
    bands = _bands(snapshots)
    if len(snapshots) == 1:
        states = snapshots[0].states
        titles = [f"{_title(snapshots, layer, head)}: {scale:.2g}" for layer, head, scale in bands]
        return _side_by_side(titles, [_picture(states[i][h], scale, style) for i, h, scale in bands], style, width)
    lines = []
    for layer, head, scale in bands:
        pictures = [_picture(shot.states[layer][head], scale, style) for shot in snapshots]
        lines += ["", f"{_title(snapshots, layer, head)}, up to {scale:.2g}"]
        lines += _side_by_side([shot.name for shot in snapshots], pictures, style, width)
    return lines[1:]


def _side_by_side(titles: list[str], pictures: list[list[str]], style: str, width: int) -> list[str]:
    """Pictures under their titles, as many on a line as fit."""
    drawn = max(_cells(picture, style) for picture in pictures)
    column = max(drawn, *map(len, titles)) + 2
    fitting = max(1, (width + 2) // column)
    lines = []
    for first in range(0, len(titles), fitting):
        part = slice(first, first + fitting)
        lines += ["".join(title.ljust(column) for title in titles[part]).rstrip()]
        lines += [(" " * (column - drawn)).join(row).rstrip() for row in zip(*pictures[part])]
    return lines


def _cells(picture: list[str], style: str) -> int:
    """How wide a picture is in the terminal, where escape sequences take no room."""
    return picture[0].count("▀") if style == "colour" else len(picture[0])


def png_size(snapshots: Sequence[Snapshot]) -> tuple[int, int]:
    """Width and height in pixels of the PNG that ``draw_heat_map`` makes."""
    columns, rows = len(snapshots), len(_bands(snapshots))
    return tuple(round(DPI * inches) for inches in (MARGIN + 0.5 + INCHES * columns, MARGIN + INCHES * rows))


def draw_heat_map(snapshots: Sequence[Snapshot], path: str | os.PathLike) -> Path:
    """Draw the states into a PNG, atomically: a row of pictures a layer and head, a column a snapshot.

    Colours run from blue (negative) over white to red, scaled to each row's largest |entry|.

    Raises:
        ImportError: matplotlib is not installed (extra: demo).
        ValueError: no snapshot.
    """
    if not snapshots:
        raise ArgumentError("snapshots: got none, allowed one or more")
    if not installed("matplotlib"):
        raise MissingPackageError("matplotlib is not installed (extra: demo)")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bands = _bands(snapshots)
    width, height = png_size(snapshots)
    figure = Figure(figsize=(width / DPI, height / DPI), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(bands), len(snapshots), squeeze=False)
    for axes_row, (layer, head, scale) in zip(grid, bands):
        for axes, shot in zip(axes_row, snapshots):
            image = axes.imshow(shot.states[layer][head].numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(_title(snapshots, layer, head))
        figure.colorbar(image, ax=axes_row[-1], shrink=0.8)
    for axes, shot in zip(grid[0], snapshots):
        axes.set_title(shot.name, fontsize="medium")
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))


def _bands(snapshots: Sequence[Snapshot]) -> list[tuple[int, int, float]]:
    """(layer, head, largest |entry| over all snapshots; 1 where all are 0)."""
    return [
        (layer, head, max(float(shot.states[layer][head].abs().max()) for shot in snapshots) or 1.0)
        for layer, state in snapshots[0].states.items()
        for head in range(state.shape[0])
    ]


def _title(snapshots: Sequence[Snapshot], layer: int, head: int) -> str:
    heads = snapshots[0].states[layer].shape[0]
    return f"layer {layer} head {head}" if heads > 1 else f"layer {layer}"


def _picture(state: torch.Tensor, scale: float, style: str) -> list[str]:
    """[r, r] as lines."""
    rows = (state / scale).tolist()
    if style != "colour":
        return ["".join(_cell(value, _SHADES[style]) for value in row) for row in rows]
    lower_rows = [*rows[1:], [None] * len(rows)]
    return [
        "".join(_half_block(*pair) for pair in zip(upper, lower)) + "\x1b[0m"
        for upper, lower in zip(rows[::2], lower_rows[::2])
    ]


def _cell(value: float, shades: str) -> str:
    level = sum(abs(value) >= step for step in _STEPS)
    shade = shades[level]
    if level == 0:
        return " " + shade
    return ("-" if value < 0 else shade) + shade


def _half_block(upper: float, lower: float | None) -> str:
    """Two cells in one character; below the last of an odd number of rows there is none."""
    behind = "49" if lower is None else f"48;5;{_colour(lower)}"
    return f"\x1b[38;5;{_colour(upper)};{behind}m▀"


def _colour(value: float) -> int:
    ramp = _REDS if value > 0 else _BLUES
    return ramp[min(len(ramp) - 1, round(abs(value) * (len(ramp) - 1)))]


NAMED_TOKENS = 120  # more do not fit under the picture
WIDEST = 24.0  # inches
_PANELS = (("writes", "gate × error", "Oranges"), ("reads", "norm of the read", "Blues"))


def trace_png_size(trace: Trace) -> tuple[int, int]:
    """Width and height in pixels of the PNG that ``draw_trace`` makes."""
    tokens, layers, heads = trace.writes.shape
    width = min(WIDEST, 3.0 + 0.24 * max(tokens, 12))
    height = 2 * (0.6 + 0.2 * max(layers * heads, 5)) + (1.2 if tokens <= NAMED_TOKENS else 0.4)
    return round(DPI * width), round(DPI * height)


def draw_trace(trace: Trace, path: str | os.PathLike) -> Path:
    """Draw what each token wrote and read in each layer and head into a PNG, atomically.

    The darker the more; both pictures have a scale of their own, from 0.

    Raises:
        ImportError: matplotlib is not installed (extra: demo).
    """
    if not installed("matplotlib"):
        raise MissingPackageError("matplotlib is not installed (extra: demo)")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens, layers, heads = trace.writes.shape
    width, height = trace_png_size(trace)
    figure = Figure(figsize=(width / DPI, height / DPI), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (measure, unit, colours) in zip(panels, _PANELS):
        sizes = getattr(trace, measure).reshape(tokens, layers * heads).T.numpy()
        image = axes.imshow(sizes, cmap=colours, vmin=0, aspect="auto", interpolation="nearest")
        axes.set_title(measure, fontsize="medium", loc="left")
        named = range(layers * heads) if layers * heads <= 40 else range(0, layers * heads, heads)
        axes.set_yticks(list(named), [_name(trace, i, heads) for i in named], fontsize=7)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, pad=0.01).set_label(unit, fontsize="small")
    if tokens <= NAMED_TOKENS:
        # Dollar signs are text here, no mathematics.
        names = [printable(token) for token in trace.tokens]
        panels[1].set_xticks(range(tokens), names, rotation=90, fontsize=8, parse_math=False)
    else:
        panels[1].set_xlabel("token")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))


def _name(trace: Trace, index: int, heads: int) -> str:
    layer, head = trace.layers[index // heads], index % heads
    return f"{layer}.{head}" if heads > 1 else str(layer)
