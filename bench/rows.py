"""Rows of a benchmark's result, and the tables made of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

HEADINGS = ("benchmark", "parameters", "p20", "p50", "p80", "tokens/s", "ratio (p20 to p80)", "target", "met")


@dataclass
class Row:
    """One measured variant, or why it was not measured.

    Attributes:
        name: what was measured and of which implementation, as in ``scan/numba``.
        parameters: its sizes; ``tokens`` and ``batch`` give tokens per second.
        status: ``measured``, ``refused`` (wrong results, so not timed) or ``absent`` (cannot run here).
        note: why it was refused or is absent, or how far its ratio decides.
        error: relative error that the check found, of the worst output, or None.
        samples: how many timings p20, p50 and p80 are taken from.
        p20, p50, p80: seconds.
        ratio, ratio_p20, ratio_p80: how many times as fast as the baseline it was timed in turns with: median and
            spread over the turns.
        target: what ``ratio`` should be at least, or None.
        met: whether it is, or None where there is no target or no ratio.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    status: str = "measured"
    note: str = ""
    error: float | None = None
    samples: int = 0
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    target: float | None = None
    met: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile of two samples or more, interpolated linearly."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low, statistics.median(samples), high


def measured(name: str, parameters: dict[str, Any], seconds: Sequence[float], error: float | None = None) -> Row:
    """A row of timings in seconds."""
    row = Row(name, parameters, error=error, samples=len(seconds))
    row.p20, row.p50, row.p80 = spread(seconds)
    return row


def compare(row: Row, ratios: Sequence[float], target: float | None = None) -> Row:
    """Add to ``row`` how many times as fast as its baseline it was, turn by turn; returns it."""
    row.ratio_p20, row.ratio, row.ratio_p80 = spread(ratios)
    row.target = target
    row.met = None if target is None else row.ratio >= target
    if target is not None and row.ratio_p20 < target <= row.ratio_p80:
        row.note = "the spread includes the target"
    return row


def refused(name: str, parameters: dict[str, Any], note: str, error: float | None = None, target=None) -> Row:
    """A row of a variant that was not timed because its results are wrong."""
    # JSON has no NaN: an output that is not a number at all has no error to report.
    finite = error if error is not None and error < float("inf") else None
    return Row(name, parameters, status="refused", note=note, error=finite, target=target)


def absent(name: str, note: str, parameters: dict[str, Any] | None = None) -> Row:
    """A row of a variant that cannot run here."""
    return Row(name, parameters or {}, status="absent", note=note)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.3f}"


def _rate(row: dict[str, Any]) -> str:
    sizes = row["parameters"]
    if row["p50"] is None or "tokens" not in sizes:
        return ""
    return _number(sizes["tokens"] * sizes.get("batch", 1) / row["p50"])


def cells(row: dict[str, Any]) -> list[str]:
    """One line of a table, under HEADINGS, of a row read from JSON."""
    sizes = " ".join(f"{key}={value}" for key, value in row["parameters"].items())
    ratio = ""
    if row["ratio"] is not None:
        ratio = f"{_number(row['ratio'])} ({_number(row['ratio_p20'])} to {_number(row['ratio_p80'])})"
    target = "" if row["target"] is None else f"≥ {row['target']:g}"
    met = "" if row["met"] is None else "yes" if row["met"] else "no"
    if row["status"] != "measured":
        met = row["status"]
    if row["note"]:
        met += f": {row['note']}"
    times = [_duration(row[key]) for key in ("p20", "p50", "p80")]
    return [row["name"], sizes, *times, _rate(row), ratio, target, met]


def plain_table(rows: list[dict[str, Any]]) -> str:
    """Aligned text."""
    lines = [list(HEADINGS), *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS) - 1)] + [0]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [list(HEADINGS), ["---"] * len(HEADINGS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
