"""Rows as text: aligned for a terminal, Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence

from deltamem_fast.display import columns_of, table

from . import devices, targets
from .rows import Row

HEADINGS = ("benchmark", "parameters", "p20", "p50", "p80", "tokens/s", "times as fast as (p20 to p80)", "", "target")


def duration(seconds: float | None) -> str:
    """Seconds with a unit that fits, or ""."""
    if seconds is None:
        return ""
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"


def timing(row: Row) -> str:
    """The row's median and its spread, or ""."""
    return "" if row.p50 is None else f"{duration(row.p50)} ({duration(row.p20)} to {duration(row.p80)})"


def number(value: float) -> str:
    """Three or more significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def size(count: float) -> str:
    """Bytes with a unit that fits."""
    power = 3 if count >= 2**30 else 2 if count >= 2**20 else 1
    return f"{count / 2 ** (10 * power):,.3g} {('KiB', 'MiB', 'GiB')[power - 1]}"


def ratio(values: Sequence[float]) -> str:
    """A median and its spread, from [p20, p50, p80]."""
    low, middle, high = values
    return f"{number(middle)} ({number(low)} to {number(high)})"


def named_value(name: str, value: float) -> str:
    """One of a row's ``values`` with its unit."""
    if name == "bandwidth":
        return f"{value / 1e9:,.3g} GB/s"
    if name == "extra_memory":
        return f"extra memory {value:+.2%}"
    if name in ("bytes", "peak_memory"):
        return f"{name.replace('_', ' ')} {size(value)}"
    if name.startswith("estimate_"):
        return f"{name.removeprefix('estimate_')} {duration(value)}, estimated, not measured"
    if name.endswith("_to_emulated"):
        return f"{name.removesuffix('_to_emulated').replace('_', ' ')} ÷ emulated {value:.3f}"
    if name == "back_to_back":
        return f"back to back {duration(value)}"
    text = f"{value:,.0f}" if float(value).is_integer() else number(value)
    return f"{name.replace('_', ' ')} {text}"


def parameters(row: Row) -> str:
    """The row's sizes on one line."""
    return " ".join(f"{key}={value}" for key, value in row.parameters.items())


def tokens_per_second(row: Row) -> str:
    """From ``tokens`` × ``batch`` and the median, or ""."""
    if row.p50 is None or "tokens" not in row.parameters:
        return ""
    return number(row.parameters["tokens"] * row.parameters.get("batch", 1) / row.p50)


def cells(row: Row) -> list[str]:
    """One line of a table, under HEADINGS."""
    ratios = "; ".join(f"{name} {ratio(values)}" for name, values in row.ratios.items())
    values = ", ".join(named_value(name, value) for name, value in row.values.items())
    if row.kind == "kernel" and "bytes" in row.values:
        least = row.values["bytes"]
        values += "; floor " + ", ".join(f"{known.name} {duration(least / known.copy)}" for known in devices.KNOWN)
    verdict = targets.verdict(row)
    if row.status != "measured":
        verdict = row.status
    if row.note:
        verdict = f"{verdict}: {row.note}" if verdict else row.note
    times = [duration(seconds) for seconds in (row.p20, row.p50, row.p80)]
    return [row.name, parameters(row), *times, tokens_per_second(row), ratios, values, verdict]


def _without_empty_columns(lines: list[list[str]]) -> list[list[str]]:
    kept = [i for i in range(len(lines[0])) if i == 0 or any(line[i] for line in lines[1:])]
    return [[line[i] for i in kept] for line in lines]


def plain_table(rows: Sequence[Row]) -> str:
    """Aligned text; columns in which no row has anything are left out."""
    return aligned(_without_empty_columns([list(HEADINGS), *(cells(row) for row in rows)]))


def aligned(lines: Sequence[list[str]]) -> str:
    """A heading line and the lines under it, columns aligned."""
    heading, *rest = lines
    rule = ["-" * max(map(columns_of, column)) for column in zip(*lines)][:-1] + [""]
    return table(heading, [rule, *rest], left=range(len(heading)))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a heading line and the lines under it."""
    heading, *rest = lines
    lines = [heading, ["---"] * len(heading), *rest]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows; columns in which no row has anything are left out."""
    return markdown(_without_empty_columns([list(HEADINGS), *(cells(row) for row in rows)]))
