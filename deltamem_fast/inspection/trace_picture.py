"""Writes and reads of a text as a PNG: layers × tokens."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from deltamem_kernels.dispatch import installed

from ..display import printable
from ..errors import MissingPackageError
from ..storage.files import write_atomically
from .pictures import DPI
from .trace import Trace

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
