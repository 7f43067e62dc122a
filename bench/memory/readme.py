"""Write README's part on operators, sessions and the bank from the newest results, or check it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import readme, results
from ..results import Result
from ..rows import Row
from ..tables import duration, markdown, ratio, size
from . import operators, sessions

BEGIN = "<!-- holding: begin (python -m bench.holding readme writes what lies between) -->"
END = "<!-- holding: end -->"
NOT_YET = readme.NOT_YET
BANK = results.DIRECTORY / "bank"


def newest(directory: Path) -> Result | None:
    """The newest whole result there, or None."""
    found = results.newest(directory) if directory.is_dir() else []
    return max(found, key=lambda result: result.head["time"], default=None)


def operator_table(rows: Sequence[Row]) -> str:
    """A line for each operator, a group of columns for each strategy."""
    names = list(dict.fromkeys(row.name for row in rows))
    by_key = {(row.name, row.parameters["operator"], row.parameters["number"]): row for row in rows}
    heading = ["the first of four facts", *(f"{name.split('/')[1]}: it, the new value, the others" for name in names)]
    lines = [heading]
    for operator, number in operators.operators():
        cells = []
        for name in names:
            row = by_key.get((name, operator, number))
            cells.append(NOT_YET if row is None else " / ".join(f"{100 * row.values[key]:.0f}" for key in SHARES))
        title = operator if number is None else f"{operator} {number:g}"
        lines.append([title, *cells])
    return markdown(lines)


SHARES = ("first", "revised", "others")


def session_table(rows: Sequence[Row]) -> str:
    """A line for each timing."""
    lines = [["what", "median (p20 to p80)", "as fast as by hand", "bytes"]]
    for row in rows:
        what = row.name
        if "cache" in row.parameters:
            cache = "with the cache" if row.parameters["cache"] else "without it"
            what += f", {row.parameters['context_tokens']} tokens, {cache}"
        elif row.parameters["window"] is not None:
            what += f" of {row.parameters['window']} turns, built anew each turn"
        time = "" if row.p50 is None else f"{duration(row.p50)} ({duration(row.p20)} to {duration(row.p80)})"
        compared = ratio(row.ratios["by hand"]) if row.ratios else ""
        lines.append([what, time, compared, size(row.values["bytes"]) if "bytes" in row.values else ""])
    return markdown(lines)


def bank_table(rows: Sequence[Row]) -> str:
    """A line for each figure."""
    lines = [["the bank", "median (p20 to p80)", "figures"]]
    for row in rows:
        time = "" if row.p50 is None else f"{duration(row.p50)} ({duration(row.p20)} to {duration(row.p80)})"
        figures = ", ".join(_figure(name, value) for name, value in row.values.items())
        parameters = ", ".join(_parameter(name, value) for name, value in row.parameters.items())
        lines.append([f"{row.name}: {parameters}", time, figures])
    return markdown(lines)


def _parameter(name: str, value) -> str:
    if name == "durable":
        return "synced to the disk" if value else "not synced"
    return f"{value:,} {name}" if isinstance(value, int) else f"{name} {value}"


def _figure(name: str, value: float) -> str:
    if name.endswith("bytes") or name == "bytes":
        return (
            f"{name.replace('_', ' ')} {value / 1e9:,.2f} GB"
            if value > 1e8
            else f"{name.replace('_', ' ')} {value:,.0f}"
        )
    return f"{name.replace('_', ' ')} {value:,.4g}"


def block(found: dict[str, Result | None]) -> str:
    """Everything between the markers; ``found``: the newest result of ``operators``, ``sessions`` and ``bank``."""
    parts = ["`make holding` measures what follows."]
    texts = {
        "operators": (
            "**Operators.** A memory is told four facts, an operator is applied with the first one's statement, and "
            "all are asked for, each in a context of its own: right answers in percent (the first fact / its new value "
            "/ the other three). A number behind `forget` is its strength, behind `decay` its rate."
        ),
        "sessions": (
            "**Sessions.** A turn of a session beside one by hand (`generate` on a cache and a memory that are kept): "
            "64 tokens said, 64 answered, a 48 M-parameter model on a CPU."
        ),
        "bank": "**Bank.** Memories in the shape of a Qwen3-4B's (9,216 bytes).",
    }
    tables = {"operators": operator_table, "sessions": session_table, "bank": bank_table}
    for name, text in texts.items():
        result = found.get(name)
        parts += [text, NOT_YET if result is None else results.heading(result)]
        if result is not None:
            parts.append(tables[name](result.rows))
    return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.holding readme``."""
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it is not up to date")


def run(options: argparse.Namespace) -> int:
    """Write or check; 1 if ``--check`` found a difference."""
    directories = {"operators": operators.DIRECTORY, "sessions": sessions.DIRECTORY, "bank": BANK}
    new = block({name: newest(directory) for name, directory in directories.items()})
    return readme.publish(new, check=options.check, command="make holding", begin=BEGIN, end=END)
