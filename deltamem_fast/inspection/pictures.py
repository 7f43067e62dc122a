"""States and traces as pictures: PNG files, and characters for a terminal."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from deltamem_kernels.dispatch import installed

from ..arguments import check_choice
from ..display import printable, shortened
from ..errors import ArgumentError, MissingPackageError
from ..memory.state import MemoryState
from ..storage.files import write_atomically
from .trace import Trace

STYLES = ("colour", "unicode", "ascii")
INCHES, MARGIN, DPI = 1.2, 0.5, 100
# Of more states than these the picture is a grid of layers × heads.
BANDS = 8
# Of a grid, in pixels: a state's side, the most of a picture's side, the room for labels (left, right, top, bottom,
# above each snapshot, below each line of layers).
TILE, MOST = 64.0, 2300
LEFT, RIGHT, TOP, BOTTOM, ABOVE, BELOW = 60, 110, 50, 30, 26, 22
ASPECT = 1.6  # width ÷ height that a grid's layers are laid into lines for
COLOUR = "#1f6fd0"  # of the memory, as in all of the project's pictures

NAMED_TOKENS = 120  # more do not fit under the picture
NAMED_ROWS = 40  # of more layers × heads a layer's heads are one row
WIDEST, HIGHEST = 24.0, 9.0  # inches, of the picture and of one of its two panels
_PANELS = (("writes", "write", "gate × error"), ("reads", "read", "norm of the read"))
_PAST = {"write": "written", "read": "read"}

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
    check_choice(style, "style", STYLES)
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
    # Escape sequences take no room in the terminal.
    drawn = max(picture[0].count("▀") if style == "colour" else len(picture[0]) for picture in pictures)
    column = max(drawn, *map(len, titles)) + 2
    fitting = max(1, (width + 2) // column)
    lines = []
    for first in range(0, len(titles), fitting):
        part = slice(first, first + fitting)
        lines += ["".join(title.ljust(column) for title in titles[part]).rstrip()]
        lines += [(" " * (column - drawn)).join(row).rstrip() for row in zip(*pictures[part])]
    return lines


def png_size(snapshots: Sequence[Snapshot]) -> tuple[int, int]:
    """Width and height in pixels of the PNG that ``draw_heat_map`` makes; neither is over 2,400 in a grid."""
    columns, rows = len(snapshots), len(_bands(snapshots))
    if rows > BANDS:
        return _grid(snapshots).size
    return tuple(round(DPI * inches) for inches in (MARGIN + 0.5 + INCHES * columns, MARGIN + INCHES * rows))


def draw_heat_map(snapshots: Sequence[Snapshot], path: str | os.PathLike) -> Path:
    """Draw the states into a PNG, atomically.

    Up to ``BANDS`` of them: a row of pictures a layer and head, a column a snapshot, each row scaled to its largest
    |entry|. More: for each snapshot a grid of layers × heads, in as many lines as fit, all on one scale; the state
    with the largest norm is outlined. Colours run from blue (negative) over white to red.

    Raises:
        ImportError: matplotlib is not installed (extra: demo).
        ValueError: no snapshot.
    """
    figure = _figure(*png_size(snapshots))
    bands = _bands(snapshots)
    if len(bands) > BANDS:
        _draw_grid(figure, snapshots)
    else:
        _draw_bands(figure, snapshots, bands)
    return _saved(figure, path)


def _figure(width: int, height: int):
    """An empty figure of that many pixels."""
    if not installed("matplotlib"):
        raise MissingPackageError("matplotlib is not installed (extra: demo)")
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), layout="constrained")


def _saved(figure, path: str | os.PathLike) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))


def _draw_bands(figure, snapshots: Sequence[Snapshot], bands: list[tuple[int, int, float]]) -> None:
    grid = figure.subplots(len(bands), len(snapshots), squeeze=False)
    for axes_row, (layer, head, scale) in zip(grid, bands):
        for axes, shot in zip(axes_row, snapshots):
            image = axes.imshow(shot.states[layer][head].numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(_title(snapshots, layer, head))
        figure.colorbar(image, ax=axes_row[-1], shrink=0.8)
    for axes, shot in zip(grid[0], snapshots):
        axes.set_title(shot.name, fontsize="medium", parse_math=False)


# --- many states: layers × heads


class _Grid(NamedTuple):
    """How the states of a snapshot are laid out: the layers of each line, heads down; sizes in pixels."""

    lines: list[list[int]]
    heads: int
    tile: float
    size: tuple[int, int]


def _grid(snapshots: Sequence[Snapshot]) -> _Grid:
    """The layout whose picture comes nearest to ``ASPECT`` with the states as large as ``TILE`` and ``MOST`` allow."""
    layers, count = list(snapshots[0].states), len(snapshots)
    heads = max(state.shape[0] for state in snapshots[0].states.values())
    found = []
    for columns in sorted({math.ceil(len(layers) / lines) for lines in range(1, len(layers) + 1)}, reverse=True):
        lines = [layers[first : first + columns] for first in range(0, len(layers), columns)]
        beside = (LEFT + RIGHT, TOP + BOTTOM + count * (ABOVE + len(lines) * BELOW))
        shape = (columns, count * len(lines) * heads)
        tile = min(TILE, *((MOST - room) / states for room, states in zip(beside, shape)))
        if tile > 0:
            width, height = (room + tile * states for room, states in zip(beside, shape))
            far = abs(math.log(width / height / ASPECT))
            grid = _Grid(lines, heads, tile, (round(max(width, 780)), round(height)))
            found.append((-min(tile, TILE / 2), far, grid))
    if not found:
        raise ArgumentError(f"snapshots: got {count} of {len(layers)} layers, more than fit into one picture")
    return min(found, key=lambda layout: layout[:2])[2]


def _draw_grid(figure, snapshots: Sequence[Snapshot]) -> None:
    from matplotlib.patches import Rectangle

    grid = _grid(snapshots)
    width, height = grid.size
    figure.set_layout_engine("none")
    rank = max(state.shape[-1] for state in snapshots[0].states.values())
    entries = torch.cat([state.abs().flatten() for shot in snapshots for state in shot.states.values()])
    entries = entries[entries.isfinite()]
    largest = float(entries.max()) if entries.numel() else 0.0
    scale = largest or 1.0
    across, down, top = len(grid.lines[0]) * grid.tile, grid.heads * grid.tile, height - TOP

    def add_axes(left: float, bottom: float, across: float, down: float):
        """Axes at a place in pixels."""
        return figure.add_axes((left / width, bottom / height, across / width, down / height))

    figure.suptitle(
        _message(snapshots), x=LEFT / width, y=1 - 12 / height, ha="left", va="top", fontsize=13, parse_math=False
    )
    for shot in snapshots:
        layer, head, norm, share = _strongest(shot)
        held = f"most in layer {layer}, head {head}: norm {norm:.3g}, {share:.0%} of all squared" if norm else "empty"
        figure.text(LEFT / width, (top - ABOVE + 8) / height, f"{shot.name}: {held}", fontsize=10, parse_math=False)
        top -= ABOVE
        for line in grid.lines:
            axes = add_axes(LEFT, top - down, len(line) * grid.tile, down)
            mosaic = _mosaic(shot, line, grid.heads, rank).numpy()
            image = axes.imshow(mosaic, cmap="RdBu_r", vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
            axes.set_facecolor("#d0d0d0")
            middles = [(rank - 1) / 2 + (rank + 1) * n for n in range(max(len(line), grid.heads))]
            every = max(1, math.ceil(20 / grid.tile))  # labels need 20 pixels
            axes.set_xticks(middles[: len(line) : every], line[::every], fontsize=8)
            axes.set_yticks(middles[: grid.heads : every], range(0, grid.heads, every), fontsize=8)
            axes.tick_params(length=0, pad=2)
            axes.spines[:].set_visible(False)
            if grid.heads > 1:
                axes.set_ylabel("head", fontsize=9)
            if layer in line and norm:
                corner = (line.index(layer) * (rank + 1) - 0.9, head * (rank + 1) - 0.9)
                axes.add_patch(Rectangle(corner, rank + 0.8, rank + 0.8, fill=False, lw=1.6, ec="black", clip_on=False))
            top -= down + BELOW
    figure.text(LEFT / width, 10 / height, "layer", fontsize=9)
    bar = add_axes(LEFT + across + 20, BOTTOM + BELOW, 14, min(down, 240))
    figure.colorbar(image, cax=bar).set_label("entry, one scale for all", fontsize=8)
    bar.tick_params(labelsize=8)


def _mosaic(shot: Snapshot, layers: list[int], heads: int, rank: int) -> torch.Tensor:
    """[heads · (rank + 1) − 1, layers · (rank + 1) − 1]: the states side by side, NaN between them."""
    whole = torch.full((heads * (rank + 1), len(layers) * (rank + 1)), torch.nan)
    for column, layer in enumerate(layers):
        for head, state in enumerate(shot.states[layer]):
            side = state.shape[-1]
            rows, columns = head * (rank + 1), column * (rank + 1)
            whole[rows : rows + side, columns : columns + side] = state
    return whole[:-1, :-1]


def _strongest(shot: Snapshot) -> tuple[int, int, float, float]:
    """Layer and head of the state with the largest norm, that norm, and its square's share of all states' squares."""
    norms = {(i, h): float(one.norm()) for i, state in shot.states.items() for h, one in enumerate(state)}
    norms = {place: norm if math.isfinite(norm) else 0.0 for place, norm in norms.items()}
    place = max(norms, key=norms.get)
    total = sum(norm * norm for norm in norms.values())
    return *place, norms[place], norms[place] ** 2 / total if total else 0.0


def _message(snapshots: Sequence[Snapshot]) -> str:
    """What the grid shows, in a line: how evenly the first snapshot that is not empty fills its states."""
    for shot in snapshots:
        squares = [float(one.double().square().sum()) for state in shot.states.values() for one in state]
        squares = sorted((value if math.isfinite(value) else 0.0 for value in squares), reverse=True)
        if sum(squares):
            enough = next(n for n in range(1, len(squares) + 1) if sum(squares[:n]) >= sum(squares) / 2)
            told = f"{enough} of {len(squares)} states {'holds' if enough == 1 else 'hold'} half of the squared norm"
            return f"{told} of {shortened(shot.name, 30)}" if len(snapshots) > 1 else f"{told}; outlined: most"
    return f"All {len(_bands(snapshots))} states are empty"


def _bands(snapshots: Sequence[Snapshot]) -> list[tuple[int, int, float]]:
    """(layer, head, largest |entry| over all snapshots; 1 where all are 0)."""
    if not snapshots:
        raise ArgumentError("snapshots: got none, allowed one or more")
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


# --- a text's writes and reads: layers × tokens


def trace_png_size(trace: Trace) -> tuple[int, int]:
    """Width and height in pixels of the PNG that ``draw_trace`` makes; neither is over 2,400."""
    tokens, rows = len(trace), len(_row_names(trace))
    width = min(WIDEST, 3.0 + 0.24 * max(tokens, 20))
    height = 2 * min(HIGHEST, 0.6 + 0.2 * max(rows, 5)) + (1.4 if tokens <= NAMED_TOKENS else 0.6)
    return round(DPI * width), round(DPI * height)


def draw_trace(trace: Trace, path: str | os.PathLike) -> Path:
    """Draw what each token wrote and read in each layer and head into a PNG, atomically.

    The darker the more; both panels have a scale of their own, from 0. Of more than ``NAMED_ROWS`` layers × heads a
    layer is one row: the root of the sum of squares over its heads.

    Raises:
        ImportError: matplotlib is not installed (extra: demo).
    """
    figure = _figure(*trace_png_size(trace))
    from matplotlib.colors import LinearSegmentedColormap

    tokens, layers, heads = trace.writes.shape
    names = _row_names(trace)
    colours = LinearSegmentedColormap.from_list("memory", ["#ffffff", COLOUR, "#0b2a55"])
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (measure, verb, unit) in zip(panels, _PANELS):
        sizes = getattr(trace, measure)
        sizes = (sizes.flatten(1) if len(names) == layers * heads else sizes.norm(dim=2)).T.numpy()
        image = axes.imshow(sizes, cmap=colours, vmin=0, aspect="auto", interpolation="nearest")
        axes.set_title(_told(trace, measure, verb), fontsize="medium", loc="left", parse_math=False)
        every = max(1, math.ceil(len(names) / NAMED_ROWS))
        axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
        axes.set_ylabel("layer" if len(names) == layers else "layer.head", fontsize="small")
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, pad=0.01).set_label(unit, fontsize="small")
    if tokens <= NAMED_TOKENS:
        # Dollar signs are text here, no mathematics.
        words = [shortened(printable(token), 16) or "␣" for token in trace.tokens]
        panels[1].set_xticks(range(tokens), words, rotation=90, fontsize=8, parse_math=False)
    else:
        panels[1].set_xlabel("token")
    return _saved(figure, path)


def _row_names(trace: Trace) -> list[str]:
    """A row for each layer and head, ``3.1``, or where these are too many for each layer."""
    _, layers, heads = trace.writes.shape
    if heads == 1 or layers * heads > NAMED_ROWS:
        return [str(layer) for layer in trace.layers]
    return [f"{layer}.{head}" for layer in trace.layers for head in range(heads)]


def _told(trace: Trace, measure: str, verb: str) -> str:
    """The panel's message: who writes or reads most, and how much of the whole."""
    entries = trace.top(measure, len(trace))
    if not entries:
        return f"Nothing is {_PAST[verb]}"
    first = entries[0]
    share = first.size / sum(entry.size for entry in entries)
    start, end = first.positions[0], first.positions[-1]
    place = f"token {start}" if start == end else f"tokens {start}-{end}"
    return f"“{shortened(printable(first.text))}” ({place}) {verb}s most: {share:.0%} of all that is {_PAST[verb]}"
