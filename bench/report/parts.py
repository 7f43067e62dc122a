"""What the pages are put together from: headings, tables of cells, pictures, shares with their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..instrument import results
from ..instrument.results import Result
from ..instrument.rows import Row
from ..instrument.tables import markdown, markdown_table

NOT_YET = "not measured yet"


def page(title: str, *parts: str) -> str:
    note = "Written by `python -m bench.report` from the JSON under `bench/results`; not to be edited by hand."
    return "\n\n".join(part for part in (f"# {title}", note, *parts) if part) + "\n"


def section(title: str, text: str, result: Result | None, table: Callable[[Sequence[Row]], str]) -> list[str]:
    """A heading, a text, what it was measured on, and the table; or that it was not measured."""
    measured = [f"{NOT_YET.capitalize()}."] if result is None else [results.heading(result), table(result.rows)]
    return [f"## {title}", text, *measured]


def pictures(paths: Iterable[Path]) -> str:
    return "\n\n".join(f"![{path.stem}]({path.parent.name}/{path.name})" for path in paths if path.exists())


def cross(heading: str, cells: Iterable[tuple[str, str, str]]) -> str:
    """A table of (line, column, text); lines and columns in the order in which they come."""
    lines: dict[str, dict[str, str]] = {}
    for title, column, text in cells:
        lines.setdefault(title, {})[column] = text
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    rest = ([title, *(line.get(column, "") for column in columns)] for title, line in lines.items())
    return markdown([[heading, *columns], *rest])


def sections_of(title: str, text: str, several: Sequence[Result]) -> list[str]:
    """A section of several results, each under what it was measured on."""
    if not several:
        return section(title, text, None, markdown_table)
    parts = [part for result in several for part in (results.heading(result), markdown_table(result.rows))]
    return [f"## {title}", text, *parts]


def with_error(row: Row, value: str, error: str = "", digits: int | None = None) -> str:
    """A value and its standard error, as shares in percent unless ``digits`` are given; "" where there is none."""
    if value not in row.values:
        return ""
    both = row.values[value], row.values[error or f"{value}_error"]
    return " ± ".join(f"{100 * x:.1f}" if digits is None else f"{x:.{digits}f}" for x in both)


def curve(rows: Sequence[Row], name: str) -> list[tuple[str, Row]]:
    """(variant, row) of what was measured of a curve."""
    return [(row.variant, row) for row in rows if row.kind == name and row.status == "measured"]
