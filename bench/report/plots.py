"""Pictures of the newest results. What a picture says stands in its title, with numbers of the rows that it shows.

The same JSON gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..instrument import machine
from ..instrument.results import Result
from ..instrument.rows import Row
from ..instrument.tables import duration
from ..recall.targets import HALF
from .found import PICTURES, Found

# Ours is blue everywhere, lighter and darker where there are several; whatever it is compared with is not.
OURS, LIGHT, DARK = SHADES = "#1f6fd0", "#7db3f2", "#123f7a"
BARE, RELEASED, RETRIEVER, SIGHT = "#8a8a8a", "#d9822b", "#8a6d1f", "#444444"
STALE, FAINT = "#f0bd8a", "#e4e4e4"
STRATEGIES = {"tsw-r8": ("TSW", OURS), "ssw-r8": ("SSW", LIGHT), "msw-r8": ("MSW", DARK)}
FROZEN = {"frozen": ("no memory", BARE)}
SEEN = {"full context": ("full context", SIGHT), "bm25 top 1": ("BM25, 1 sentence", RETRIEVER)}
SCANS = {
    "scan/numba": ("compiled scan", OURS),
    "scan/triton": ("scan in Triton", OURS),
    "scan/reference": ("loop in PyTorch", BARE),
    "scan/released": ("released scan", RELEASED),
}
Drawing = Callable[[Sequence[Row], object], str]  # (rows, figure) → its title, "" if there is nothing to draw


@dataclass(frozen=True)
class Line:
    """A line of a chart: ``points`` are (x, low, middle, high), low to high shaded. Ours are solid, others dashed."""

    name: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]
    style: str = "-"


# --- what all of them use


def percent(share: float) -> str:
    """As text."""
    return f"{100 * share:.0f} %"


def span(shares: Iterable[float]) -> str:
    """The least and the most of them, in percent."""
    texts = [percent(share) for share in sorted(shares)] or ["nothing"]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0].removesuffix(' %')} to {texts[-1]}"


def save(result: Result, drawing: Drawing, path: Path) -> bool:
    """Draw the result's rows; False if it has none for this picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with matplotlib.rc_context(style):
        figure = plt.figure(figsize=(6.8, 3.8), layout="constrained")
        title = drawing(result.rows, figure)
        if title:
            figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
            said = f"{result.head['device']}; commit {result.head['commit']}, {result.head['time'][:10]}"
            figure.supxlabel(said, fontsize=6, color=BARE, x=0.01, ha="left")
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without metadata the bytes depend on the numbers alone.
            figure.savefig(path, dpi=120, metadata={"Software": None})
        plt.close(figure)
    return bool(title)


def _chart(figure, lines: Sequence[Line], x: str, y: str, scale: str = "linear", unit=percent, beside=None, **options):
    """Draw ``lines`` over ticks where they have points, each named at its end; returns the axes.

    Args:
        scale, options: of the x axis, as matplotlib's ``set_xscale`` takes them.
        unit: the text of a tick of the y axis; ``percent`` has 0 to 1, ``duration`` is logarithmic.
        beside: where our lines are named instead, a point's number, if their ends are close together.
    """
    axes = figure.add_subplot()
    for line in lines:
        at, low, middle, high = zip(*line.points)
        axes.plot(at, middle, line.style, color=line.colour, marker="o" if line.style == "-" else "", markersize=3)
        axes.fill_between(at, low, high, alpha=0.2, color=line.colour, linewidth=0)
    axes.set_xscale(scale, **options)
    if unit is duration:
        axes.set_yscale("log")
    else:
        axes.set_ylim((-0.02, 1.02) if unit is percent else (min(0, axes.get_ylim()[0]), None))
    axes.yaxis.set_major_formatter(lambda value, _: unit(value))
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)
    axes.set(xlabel=x, ylabel=y)
    ticks = sorted({point[0] for line in lines for point in line.points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    inside = [line for line in lines if beside is not None and line.style == "-"]
    for line in inside:
        axes.annotate(line.name, line.points[beside][::2], (6, 4), textcoords="offset points", color=line.colour)
    _name_ends(axes, [line for line in lines if line not in inside])
    return axes


def _name_ends(axes, lines: Sequence[Line], least: float = 0.06) -> None:
    """Name lines right of the axes at the height of their ends, at least a share ``least`` of the height apart."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(((*to_axes.transform(line.points[-1][::2]), line) for line in lines), key=lambda end: end[1])
    placed = -1.0
    for n, (x, y, line) in enumerate(ends):
        placed = max(placed + least, min(y, 1 - least * (len(ends) - n - 0.5)))
        pointer = {"arrowstyle": "-", "color": line.colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            line.name, (x, y), (1.03, placed), "axes fraction", "axes fraction", color=line.colour, va="center",
            arrowprops=pointer, annotation_clip=False,
        )  # fmt: skip


# --- a machine's speed


def _grouped(rows: Sequence[Row], name: Callable[[Row], object]) -> dict:
    """Rows by what ``name`` says of them (None: not drawn), in order of T where they have one."""
    found: dict = {}
    for row in sorted(rows, key=lambda row: row.parameters.get("tokens", 0)):
        key = name(row)
        if key is not None:
            found.setdefault(key, []).append(row)
    return found


def _single(row: Row) -> bool:
    """Whether a row is at r = 8, H = 1 and one row."""
    return [row.parameters.get(size) for size in ("rank", "heads", "batch")] == [8, 1, 1]


def draw_scan(rows: Sequence[Row], figure) -> str:
    """Time of a scan against T, p20 to p80 shaded."""
    kept = [row for row in rows if row.name in SCANS and row.p50 is not None and _single(row)]
    lines = [
        Line(*SCANS[name], [(row.parameters["tokens"], row.p20, row.p50, row.p80) for row in found])
        for name, found in _grouped(kept, lambda row: row.name).items()
    ]
    ours = [row for row in kept if SCANS[row.name][1] == OURS and row.ratios]
    if not ours or all(len(line.points) < 2 for line in lines):
        return ""
    _chart(figure, lines, "tokens (one row, r = 8, one head)", "time", "log", duration, base=2)
    longest = max(ours, key=lambda row: row.parameters["tokens"])
    baseline, (_, times, _) = next(iter(longest.ratios.items()))
    other, tokens = SCANS[f"scan/{baseline}"][0], longest.parameters["tokens"]
    return f"The {SCANS[longest.name][0]} of {tokens:,} tokens is {times:.0f} times as fast as the {other}"


def draw_kernels(rows: Sequence[Row], figure) -> str:
    """What share of the copy bandwidth each kernel reaches against T, a panel for each."""
    kept = [row for row in rows if row.kind == "kernel" and "roofline" in row.values and _single(row)]
    found = _grouped(kept, lambda row: row.variant)
    found = {name: line for name, line in found.items() if len(line) > 1}
    if not found:
        return ""
    best = {name: max(row.values["roofline"] for row in line) for name, line in found.items()}
    across = min(4, len(found))
    panels = list(figure.subplots(-(-len(found) // across), across, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (name, line) in zip(panels, found.items()):
        x, y = zip(*((row.parameters["tokens"], row.values["roofline"]) for row in line))
        axes.plot(x, y, "o-", color=OURS, markersize=3)
        axes.set_title(f"{name}: {percent(best[name])}", fontsize=8, color=OURS)
        axes.set(xscale="log", ylim=(-0.02, 1.02))
        axes.yaxis.set_major_formatter(lambda value, _: percent(value))
        axes.grid(alpha=0.3, linewidth=0.5)
    for axes in panels[len(found) :]:
        axes.remove()
    panels[-across].set_xlabel("tokens")
    return f"At its best size a kernel moves its bytes at {span(best.values())} of a copy's speed"


def _place(row: Row) -> str:
    """What the rows of a prompt or of decoding have in common, whatever the variant."""
    sizes = row.parameters
    what = "decode" if row.name.startswith("decode") else f"prompt of {sizes['tokens']:,}"
    mode = "" if sizes.get("mode", "eager") == "eager" else f", {sizes['mode']}"
    return f"{sizes['model']}, {what}{mode}" + f", {sizes['batch']} rows" * (sizes["batch"] > 1)


def draw_model(rows: Sequence[Row], figure) -> str:
    """Prompts and decoding as shares of the bare model's speed, p20 to p80 as bars."""
    kept = [row for row in rows if row.kind in ("prefill", "decode") and "unpatched" in row.ratios]
    kept = sorted(kept, key=lambda row: row.name)[::-1]  # prompts below, decoding on top
    places = list(dict.fromkeys(_place(row) for row in kept if row.variant == "patched"))
    if not places:
        return ""
    axes, behind = figure.add_subplot(), {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.axvline(1, color=BARE, linewidth=1)
    figure.set_figheight(max(3.8, 1.2 + 0.28 * len(places)))
    for variant, name, colour in (("patched", "with the memory", OURS), ("released", "released code", RELEASED)):
        ratios = {places.index(_place(row)): row.ratios["unpatched"] for row in kept if row.variant == variant}
        for y, (low, middle, high) in ratios.items():
            text = {"xy": (middle, y), "ha": "center", "color": colour, "textcoords": "offset points", "bbox": behind}
            axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.5, solid_capstyle="butt")
            axes.plot(middle, y, "o", markersize=5, color=colour)
            axes.annotate(percent(middle), xytext=(0, 5), fontsize=6, **text)
            if y == max(ratios):
                axes.annotate(name, xytext=(0, 14), **text)
    axes.annotate("bare model", (1, -0.6), (-3, 0), textcoords="offset points", ha="right", va="center", color=BARE)
    axes.set_yticks(range(len(places)), places, fontsize=7)
    axes.set(xlabel="speed, the bare model's = 100 %", ylim=(-0.9, len(places) + 0.1), xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    ours = span(row.ratios["unpatched"][1] for row in kept if row.variant == "patched")
    return f"With the memory a model runs at {ours} of its bare speed"


def draw_memory(rows: Sequence[Row], figure) -> str:
    """Peak memory of a prefill beyond the bare model's, as a share of that, against T."""
    lines, most = [], 0.0
    measured = [row for row in rows if "extra_memory" in row.values]
    for name, found in _grouped(measured, lambda row: f"{row.parameters['model']}, {row.variant}").items():
        points = [(row.parameters["tokens"], *[row.values["extra_memory"]] * 3) for row in found]
        ours = name.endswith("patched")
        lines.append(Line(name, SHADES[len(lines) % 3] if ours else RELEASED, points))
        most = max([most, *(point[2] for point in points)]) if ours else most
    if not lines:
        return ""
    y = "peak memory beyond the bare model's"
    _chart(figure, lines, "tokens of the prompt", y, unit=lambda extra: f"{100 * extra:g} %")
    return f"The patch adds at most {100 * most:.1f} % to a prompt's peak memory"


# --- recall


def _shares(rows: Sequence[Row], curve: str, along: str, named: Mapping[str, tuple[str, str]]) -> list[Line]:
    """Recall along a size, one standard error to both sides, a line for each variant that was measured."""
    lines = []
    for variant, (name, colour) in named.items():
        points = [
            (row.parameters[along], *(row.values["share"] + sign * row.values["error"] for sign in (-1, 0, 1)))
            for row in rows if row.name == f"{curve}/{variant}" and "share" in row.values
        ]  # fmt: skip
        if points:
            lines.append(Line(name, colour, sorted(points), "-" if variant in STRATEGIES else "--"))
    return lines


def _at(lines: Iterable[Line], size: int) -> str:
    """From the least to the most of our lines at a size."""
    return span(point[2] for line in lines if line.style == "-" for point in line.points if point[0] == size)


def draw_facts(rows: Sequence[Row], figure) -> str:
    """Recall against the number of facts; where the text itself is in sight, a band from the least to the most."""
    ours = _shares(rows, "facts", "facts", STRATEGIES)
    if not ours:
        return ""
    seen: dict[float, list[float]] = {}
    for line in _shares(rows, "facts", "facts", SEEN | {"bm25 top 4": ("", SIGHT)}):
        for x, _, share, _ in line.points:
            seen.setdefault(x, []).append(share)
    band = [(x, min(shares), min(shares), max(shares)) for x, shares in seen.items()]
    others = [Line("the text in sight\n(context, or BM25)", SIGHT, band, "--")] * bool(band)
    others += _shares(rows, "facts", "facts", FROZEN)
    x = "facts told, their context gone"
    _chart(figure, [*ours, *others], x, "answered right", "log", beside=len(ours[0].points) * 2 // 3, base=2)
    return f"A memory still answers {_at(ours, 4)} of 4 facts, and {_at(ours, 16)} of 16"


def draw_ranks(rows: Sequence[Row], figure) -> str:
    """Recall against rank, a line for each number of facts; adapters trained a fifth as long."""
    found: dict[int, list[tuple]] = {}
    for rank in (4, 8, 16, 32):
        for line in _shares(rows, "facts", "facts", {f"tsw-r{rank}-short": ("", OURS)}):
            for facts, *shares in (point for point in line.points if point[0] in (2, 8, 16)):
                found.setdefault(facts, []).append((rank, *shares))
    lines = [Line(f"{facts} facts", SHADES[n % 3], points) for n, (facts, points) in enumerate(found.items())]
    if all(len(line.points) < 2 for line in lines):
        return ""
    _chart(figure, lines, "rank r; TSW, adapters trained a fifth as long", "answered right", "log", base=2)
    return f"Ranks 4 to 32: a memory answers {span(share for _, _, share, _ in found.get(8, ()))} of 8 facts"


def draw_distance(rows: Sequence[Row], figure) -> str:
    """Recall of two facts against the tokens told after them."""
    ours, others = (_shares(rows, "distance", "distance", named) for named in (STRATEGIES, SEEN))
    if not ours:
        return ""
    x = "tokens of small talk after two facts"
    _chart(figure, ours + others, x, "answered right", "symlog", base=2, linthresh=32)
    shares = {line.name: {at: share for at, _, share, _ in line.points} for line in ours}
    best = max(shares, key=lambda name: shares[name].get(256, 0))
    (near, far), last = (percent(shares[best].get(at, 0)) for at in (256, max(shares[best]))), max(shares[best])
    return f"Two facts: {best} answers {near} after 256 tokens of other talk, {far} after {last:,}"


def draw_half(rows: Sequence[Row], figure) -> str:
    """With the newer half in sight: recall of all facts; dotted: the target."""
    ours, frozen = (_shares(rows, "half", "facts", named) for named in (STRATEGIES, FROZEN))
    if not ours:
        return ""
    target = [
        Line(f"target: {HALF:g} × {line.name}", SIGHT, [(x, *[HALF * y] * 3) for x, _, y, _ in line.points], ":")
        for line in frozen
    ]
    x = "facts told, the older half out of sight"
    _chart(figure, [*ours, *frozen, *target], x, "of all facts answered right")
    return f"Half of 4 facts out of sight, a memory answers {_at(ours, 4)}; half of 16, {_at(ours, 16)}"


def draw_overwriting(rows: Sequence[Row], figure) -> str:
    """What is answered to the fact that was overwritten, a panel for each way to remember; dots: the other facts."""
    kept = [row for row in rows if row.kind == "overwriting" and "newest" in row.values]
    found = _grouped(kept, lambda row: row.variant if row.parameters["facts"] == 8 else None)
    panels = {name: panel for name, panel in (STRATEGIES | SEEN).items() if name in found}
    if not panels:
        return ""
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, (title, colour)) in zip(every, panels.items()):
        x = [row.parameters["revisions"] for row in found[name]]
        newest, stale, kept = ([row.values.get(key, 0) for row in found[name]] for key in ("newest", "stale", "kept"))
        edges = [[0] * len(x), newest, [a + b for a, b in zip(newest, stale)], [1] * len(x)]
        parts = ("the newest value", colour, "white"), ("an earlier value", STALE, "black"), ("neither", FAINT, "black")
        for (text, fill, ink), low, high in zip(parts, edges, edges[1:]):
            axes.bar(x, [b - a for a, b in zip(low, high)], 0.8, bottom=low, color=fill)
            if axes is every[0]:
                _name_part(axes, text, ink, list(zip(x, low, high, kept)))
        axes.plot(x, kept, "o", markersize=4, color="white", markeredgecolor="black")
        axes.set_title(title, fontsize=8, color=colour)
        axes.set_xticks(x)
        axes.tick_params(length=0)
        axes.set_ylim(0, 1.03)
    every[0].yaxis.set_major_formatter(lambda value, _: percent(value))
    every[0].set_ylabel("of the answers")
    x = "times that one of eight facts was overwritten     ○ the other seven, answered right"
    every[len(every) // 2].set_xlabel(x)
    ours = [row for name in STRATEGIES for row in found.get(name, ())]
    once, most = (span(row.values["newest"] for row in ours if row.parameters["revisions"] == n) for n in (1, 3))
    return f"Overwritten once, {once} answer the newest value; three times, {most}"


def _name_part(axes, text: str, colour: str, bars: Iterable[tuple[float, float, float, float]]) -> None:
    """Name a part of the bars, (x, low, high, dot), upright, where there is the most room beside the dots."""
    rooms = []
    for x, low, high, dot in bars:
        edges = [low, *([dot - 0.03, dot + 0.03] if low < dot < high else []), high]
        rooms += [(b - a, x, (a + b) / 2) for a, b in zip(edges[::2], edges[1::2])]
    _, x, middle = max(rooms)
    axes.text(x, middle, text, rotation=90, ha="center", va="center", fontsize=7, color=colour)


# --- which there are


MACHINE: dict[str, Drawing] = {"scan": draw_scan, "kernels": draw_kernels, "model": draw_model, "memory": draw_memory}
RECALL: dict[str, Drawing] = {
    "recall-facts": draw_facts, "recall-ranks": draw_ranks, "recall-distance": draw_distance,
    "recall-overwriting": draw_overwriting, "recall-half": draw_half,
}  # fmt: skip


def picture(name: str, result: Result | None = None, directory: Path = PICTURES) -> Path:
    """Where a picture goes. One set for each device (``result``'s): a newer result replaces them."""
    if result is not None:
        kind = "cpu" if result.head["driver"] is None else "gpu"
        name = f"{kind}-{machine.slug(result.head['device'])}-{name}"
    return directory / f"{name}.png"


def draw(found: Found) -> list[Path]:
    """Write the pictures that there are numbers for to ``found.pictures``; returns their paths."""
    directory = found.pictures
    wanted = [(one, MACHINE[name], picture(name, one, directory)) for one in found.machines for name in MACHINE]
    if found.recall is not None:
        wanted += [(found.recall, RECALL[name], picture(name, None, directory)) for name in RECALL]
    return [path for result, drawing, path in wanted if save(result, drawing, path)]
