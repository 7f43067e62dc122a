"""Pictures of the newest results: time against T with the roofline, decode tokens per second, memory against T.

python -m bench.plots [--results DIR] [--output DIR]

The same JSON gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import machine, results
from .results import Result
from .rows import Row

DIRECTORY = results.DIRECTORY / "plots"
COLOURS = {"unpatched": "tab:gray", "patched": "tab:blue", "released": "tab:orange"}


def _series(rows: Sequence[Row], names: Callable[[Row], str | None]) -> dict[str, list[Row]]:
    """Measured rows with ``tokens``, by line, in order of T."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.parameters.get("tokens", 0)):
        name = names(row) if row.status == "measured" and "tokens" in row.parameters else None
        if name is not None:
            found.setdefault(name, []).append(row)
    return found


def kernel_line(row: Row) -> str | None:
    """Which line of the first picture a row belongs to, or None: r = 8, H = 1, one row."""
    sizes = row.parameters
    if (sizes.get("rank"), sizes.get("heads"), sizes.get("batch")) != (8, 1, 1) or row.p50 is None:
        return None
    kind, _, name = row.name.partition("/")
    if kind == "kernel" and name not in ("step", "decode_"):
        return name
    return row.name if kind == "scan" and name in ("reference", "numba", "released") else None


def draw_times(rows: Sequence[Row], axes) -> bool:
    """Time against T, p20 to p80 shaded; dashed: the least time that the bytes take at copy bandwidth."""
    lines = _series(rows, kernel_line)
    for index, (name, found) in enumerate(lines.items()):
        x, colour = [row.parameters["tokens"] for row in found], f"C{index}"
        axes.plot(x, [row.p50 * 1e6 for row in found], marker="o", markersize=3, label=name, color=colour)
        axes.fill_between(
            x, [row.p20 * 1e6 for row in found], [row.p80 * 1e6 for row in found], alpha=0.2, color=colour
        )
        floors = [row.values["roofline"] * row.p50 * 1e6 for row in found if "roofline" in row.values]
        if len(floors) == len(x):
            axes.plot(x, floors, linestyle="--", linewidth=0.8, color=colour)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="T, tokens (B = 1, r = 8, H = 1)", ylabel="µs; dashed: roofline")
    return any(len(found) > 1 for found in lines.values())


def draw_decode(rows: Sequence[Row], axes) -> bool:
    """Tokens per second and row of decode as bars, one group for each model, mode and batch."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        kind, _, variant = row.name.partition("/")
        if kind == "decode" and row.p50 is not None:
            sizes = row.parameters
            found.setdefault(f"{sizes['model']}\n{sizes['mode']}\nB = {sizes['batch']}", {})[variant] = row
    for offset, (variant, colour) in enumerate(COLOURS.items()):
        bars = {i: group[variant] for i, group in enumerate(found.values()) if variant in group}
        if bars:
            x = [i + (offset - 1) * 0.27 for i in bars]
            rates = [row.parameters["tokens"] / row.p50 for row in bars.values()]
            axes.bar(x, rates, 0.25, color=colour, label=variant)
    axes.set_xticks(range(len(found)), list(found), fontsize=5)
    axes.set(ylabel="decode, tokens / s in each row")
    return bool(found)


def draw_memory(rows: Sequence[Row], axes) -> bool:
    """Peak memory of a prefill against T."""

    def line(row: Row) -> str | None:
        kept = row.name.startswith("prefill/") and "peak_memory" in row.values
        return f"{row.parameters['model']} {row.name.split('/')[1]}" if kept else None

    lines = _series(rows, line)
    for name, found in lines.items():
        x = [row.parameters["tokens"] for row in found]
        axes.plot(x, [row.values["peak_memory"] / 2**30 for row in found], marker="o", markersize=3, label=name)
    axes.set(xlabel="T, tokens", ylabel="peak memory, GiB")
    return bool(lines)


DRAWINGS = {"time": draw_times, "decode": draw_decode, "memory": draw_memory}


def names(result: Result, directory: Path = DIRECTORY) -> list[Path]:
    """Where a result's pictures go. One set for each device: a newer result replaces them."""
    kind = "cpu" if result.head["driver"] is None else "gpu"
    return [directory / f"{kind}-{machine.slug(result.head['device'])}-{name}.png" for name in DRAWINGS]


def draw(result: Result, directory: Path = DIRECTORY) -> list[Path]:
    """Write the pictures that the result has numbers for; returns their paths."""
    return save(result, dict(zip(names(result, directory), DRAWINGS.values())))


def save(result: Result, drawings: Mapping[Path, Callable[[Sequence[Row], Any], bool]]) -> list[Path]:
    """Write each drawing of the result's rows that finds numbers to its path; returns these paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for path, drawing in drawings.items():
        figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        if drawing(result.rows, axes):
            axes.legend(fontsize=6)
            axes.grid(alpha=0.3, linewidth=0.5)
            axes.set_title(f"{result.head['device']}, commit {result.head['commit']}", fontsize=8)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without metadata the bytes depend on the numbers alone.
            figure.savefig(path, dpi=110, metadata={"Software": None})
            written.append(path)
        plt.close(figure)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Draw the newest result of each device; the exit status is 2 if a file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description="Pictures of benchmark results.")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the JSON")
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of the pictures")
    options = parser.parse_args(arguments)
    try:
        found = results.newest(options.results)
    except (ValueError, OSError) as error:
        print(f"bench.plots: error: {error}", file=sys.stderr)
        return 2
    for result in found:
        for path in draw(result, options.output):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
