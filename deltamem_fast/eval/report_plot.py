"""The picture of score against cost: a panel a task, a point a row, each named beside its point."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..display import printable, shortened
from .report_tables import NO_MEMORY, duration, in_capitals, label

# After Okabe and Ito's colours, which people of every eye tell apart, darker where names are written in them.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#00805D", "#B35C8D", "#B57A00", "#3187B8", "#7F5539", "#6A4C93")
_MARKERS = {NO_MEMORY: "o", "": "o", "tsw": "^", "ssw": "s", "ssw-sentence": "p", "msw": "D"}
_OTHER = "P"  # of a memory of another name
_FAINT = "#8a8a8a"
_WIDTH, _HEIGHT = 8.6, 4.0  # inches, a panel
_STEP = 2.0  # points between the places that are tried for a name


@dataclass(frozen=True)
class Point:
    """A row in a panel: its cost in seconds and its score in percent with an interval."""

    name: str
    policy: str
    memory: str
    seconds: float
    score: float
    low: float
    high: float


def points_of(task: Mapping[str, Any]) -> list[Point]:
    """The rows of a task that have a score and took time."""
    return [
        Point(
            label(row),
            row["policy"],
            row["memory"],
            row["cost"]["seconds_per_question"],
            *(100 * row["score"][name] for name in ("mean", "low", "high")),
        )
        for row in task["rows"]
        if row["score"] and row["cost"] and row["cost"]["seconds_per_question"] > 0
    ]


def draw_cost(report: Mapping[str, Any]) -> dict[str, bytes]:
    """``cost.svg`` and ``cost.png``; {} if no row of any task has both. The same report gives the same bytes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels = [(task, points) for task in report["tasks"] if (points := points_of(task))]
    if not panels:
        return {}
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(point.policy for _, points in panels for point in points))
    colours = {policy: _COLOURS[place % len(_COLOURS)] for place, policy in enumerate(policies)}
    style = {
        "font.size": 8.5,
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "cost",
        "svg.fonttype": "path",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own style is
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(_WIDTH, _HEIGHT * len(panels) + 0.35))
        FigureCanvasAgg(figure)
        every = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        height = figure.get_figheight()
        figure.subplots_adjust(0.075, 0.75 / height, 0.985, 1 - 0.4 / height, hspace=0.3)
        for axes, (task, points) in zip(every, panels):
            _panel(axes, task, points, colours)
        memories = list(dict.fromkeys(point.memory for _, points in panels for point in points))
        _key(figure, memories)
        for axes, (_, points) in zip(every, panels):
            _name_points(axes, points, colours)
        return {
            "cost.svg": _svg(figure),
            "cost.png": _saved(figure, format="png", dpi=150, metadata={"Software": None}),
        }


def _panel(axes, task: Mapping[str, Any], points: Sequence[Point], colours: Mapping[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for point in points:
        colour, with_memory = colours[point.policy], point.memory not in (NO_MEMORY, "")
        bars = [[point.score - point.low], [point.high - point.score]]
        axes.errorbar(
            [point.seconds], [point.score], yerr=bars, color=colour, marker=_MARKERS.get(point.memory, _OTHER),
            markersize=6.5, markerfacecolor=colour if with_memory else "white", markeredgewidth=1.4, elinewidth=0.9,
            capsize=2.5, capthick=0.9, zorder=3,
        )  # fmt: skip
    for bare, point in _added(points):
        ends = (bare.seconds, point.seconds), (bare.score, point.score)
        axes.plot(*ends, color=colours[point.policy], linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    axes.set_xscale("log")
    low, high = min(point.seconds for point in points), max(point.seconds for point in points)
    room = max((high / low) ** 0.12, 1.35)
    axes.set_xlim(low / room, high * room)
    few = high / low * room**2 < 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1, 3), numticks=40))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    bottom, top = min(point.low for point in points), max(point.high for point in points)
    room = max(0.08 * (top - bottom), 0.5)
    axes.set_ylim(max(bottom - room, 0 - room if bottom >= 0 else bottom - room), top + room)
    axes.grid(axis="both", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("seconds per question, with its share of what a document's questions share", parse_math=False)
    axes.set_ylabel(f"{_short(task['metric'] or 'score', 30)}, %", parse_math=False)
    axes.set_title(_short(task["title"], 90), loc="left", fontsize=9.5, fontweight="bold", parse_math=False)


def _added(points: Sequence[Point]) -> Iterator[tuple[Point, Point]]:
    """Each policy without memory, and the same policy with one."""
    bare = {point.policy: point for point in points if point.memory == NO_MEMORY}
    yield from ((bare[point.policy], point) for point in points if bare.get(point.policy, point) is not point)


def _key(figure, memories: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for memory in memories:
        bare = memory in (NO_MEMORY, "")
        name = "no memory" if bare else f"memory {_short(in_capitals(memory), 20)}"
        handles.append(
            Line2D(
                [], [], linestyle="", marker=_MARKERS.get(memory, _OTHER), color="#444444", markeredgewidth=1.4,
                markerfacecolor="white" if bare else "#444444", label=name,
            )
        )  # fmt: skip
    key = figure.legend(
        handles=handles, loc="lower left", ncols=len(handles), frameon=False, fontsize=8, bbox_to_anchor=(0.06, 0.0),
        handletextpad=0.1, columnspacing=1.2,
    )  # fmt: skip
    for text in key.get_texts():
        text.set_parse_math(False)
    figure.text(
        0.985, 0.07 / figure.get_figheight(), "bars: 95 % intervals; dotted: what the memory adds to a policy",
        ha="right", va="bottom", fontsize=7.5, color=_FAINT,
    )  # fmt: skip


def _name_points(axes, points: Sequence[Point], colours: Mapping[str, str]) -> None:
    """Write each point's name where it covers the least of the others, with a thin line to it where that is far."""
    figure = axes.figure
    figure.canvas.draw()
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    frame = np.asarray(axes.get_window_extent(renderer).extents)
    at = [axes.transData.transform((point.seconds, point.score)) for point in points]
    taken = []
    for point, (x, y) in zip(points, at):
        (_, low), (_, high) = axes.transData.transform([(point.seconds, point.low), (point.seconds, point.high)])
        taken += [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale), (x - 3, low, x + 3, high)]
    places = dict(zip(points, at))
    for ends in _added(points):
        (x, y), (right, top) = (places[point] for point in ends)
        for step in range(101):  # a dotted line, as little boxes
            along = x + (right - x) * step / 100, y + (top - y) * step / 100
            taken.append((along[0] - 2, along[1] - 2, along[0] + 2, along[1] + 2))
    for point, (x, y) in sorted(zip(points, at), key=lambda found: (found[1][0], found[1][1])):
        text = axes.text(0, 0, _short(point.name, 40), color=colours[point.policy], parse_math=False, fontsize=8.5)
        size = text.get_window_extent(renderer)
        left, bottom, right, top = _best(*_boxes(x, y, size.width, size.height, scale), np.array(taken), frame)
        text.set_position(axes.transData.inverted().transform((left, bottom)))
        text.set_va("bottom")
        taken.append((left, bottom, right, top))
        nearest = min(max(x, left), right), min(max(y, bottom), top)
        if ((nearest[0] - x) ** 2 + (nearest[1] - y) ** 2) ** 0.5 > 14 * scale:
            start = axes.transData.inverted().transform(nearest)
            axes.plot(
                [point.seconds, start[0]], [point.score, start[1]], color=colours[point.policy], linewidth=0.5, zorder=2
            )


def _boxes(x: float, y: float, width: float, height: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a name could stand, and how many steps away that is: right, left, above and below its point.

    Boxes are left, bottom, right and top, in pixels; [boxes, 4] and [boxes].
    """
    corners, steps = [], []
    away = 8 * scale
    lefts = (x + 4 * scale, x - width / 2, x - width - 4 * scale)
    for step in range(40):
        up = step * _STEP * scale
        beside = [(left, y - height / 2 + sign * up) for left in (x + away, x - away - width) for sign in (1, -1)]
        over = [(left, bottom) for left in lefts for bottom in (y + away + up, y - away - height - up)]
        corners += [*beside, *over]
        steps += [step] * (len(beside) + len(over))
    lower = np.array(corners)
    return np.concatenate([lower, lower + (width, height)], axis=1), np.array(steps)


def _best(boxes: np.ndarray, steps: np.ndarray, taken: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The box that covers the least, in pixels squared; much counts what is outside of the axes, a little each step."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    outside = areas - _common(boxes, frame[None])[:, 0]
    return boxes[np.argmin(10 * outside + _common(boxes, taken).sum(axis=1) + 4 * steps)]


def _common(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The areas of what boxes share with others; [boxes, others]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.maximum(high - low, 0).prod(axis=2)


def _short(text: str, most: int) -> str:
    """One line that the picture's font can draw."""
    return shortened(printable(text), most)


def _svg(figure) -> bytes:
    """An element that can stand in a page: no declaration, no addresses but those of its namespaces."""
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    text = _saved(figure, format="svg", transparent=True, metadata=metadata).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return text.replace("<svg ", '<svg role="img" aria-label="Score against seconds per question" ', 1).encode()


def _saved(figure, **options) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, **options)
    return file.getvalue()
