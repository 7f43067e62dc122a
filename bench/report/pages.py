"""The measured part of README.md, written from the newest results.

python -m bench.readme [--check]        --check: change nothing, exit 1 with the difference if it is not up to date
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import machine, plots, results
from .results import Result
from .rows import Row
from .tables import markdown, markdown_table, number, parameters, ratio, size
from .targets import TARGETS, Target

README = machine.ROOT / "README.md"
BEGIN = "<!-- measured: begin (python -m bench.readme writes what lies between) -->"
END = "<!-- measured: end -->"
NOT_YET = "not measured yet"


def _number(target: Target, row: Row) -> str:
    if target.baseline:
        return ratio(row.ratios[target.baseline])
    return number(row.values[target.value]) if row.values[target.value] % 1 else f"{row.values[target.value]:,.0f}"


def target_line(target: Target, found: Iterable[Result]) -> list[str]:
    """One line of the table of targets: what, goal, stretch, measured, met, on what."""
    measured, met, places = [], [], []
    for result in found:
        row = target.worst(result.rows)
        if row is not None:
            measured.append(_number(target, row))
            met.append("yes" if target.met(target.number(row)) else "no")
            met[-1] += " (the spread includes it)" if target.open(row) else ""
            places.append(f"{result.head['device']}, {result.head['commit']}")
    goals = [target.bound(target.goal), target.bound(target.stretch)]
    return [target.what, *goals, "; ".join(measured) or NOT_YET, "; ".join(met), "; ".join(places)]


def target_table(found: Sequence[Result]) -> str:
    """Every target, measured or not."""
    heading = ["what", "target", "stretch", "measured (p20 to p80)", "met", "on, commit"]
    return markdown([heading, *(target_line(target, found) for target in TARGETS)])


def memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of a prefill by model, length and variant, or "" if it was not measured."""
    kept = [row for row in rows if "peak_memory" in row.values and row.name.startswith("prefill/")]
    lines = [
        [
            f"{row.parameters['model']}, {row.parameters['tokens']:,} tokens", row.name.split("/")[1],
            size(row.values["peak_memory"]),
            f"{row.values['extra_memory']:+.2%}" if "extra_memory" in row.values else "",
        ]
        for row in kept
    ]  # fmt: skip
    return markdown([["prefill", "variant", "peak memory", "÷ unpatched"], *lines]) if lines else ""


def shown(row: Row) -> bool:
    """Whether a row is in README's tables: of a sweep over ranks, heads and rows only r = 8, H = 1, one row."""
    if not row.name.startswith("kernel/"):
        return True
    sizes = row.parameters
    return (sizes.get("rank"), sizes.get("heads")) == (8, 1) and (sizes.get("batch") == 1 or sizes.get("tokens") == 1)


def left_out(rows: Sequence[Row]) -> str:
    """What a result says it left out, in a line, or ""."""
    said = [f"{row.name} {parameters(row)}".strip() + f" ({row.note})" for row in rows if row.status == "absent"]
    return f"Left out: {'; '.join(said)}." if said else ""


def block(found: Sequence[Result], pictures: Path = plots.DIRECTORY) -> str:
    """Everything between the markers."""
    parts = [
        "`make bench` measures, `make gpu` measures on a GPU in nine minutes, `bench/compare OLD NEW` says what moved. "
        "A ratio says how many times as fast as the variant it names; median, p20 to p80 over the turns.",
        target_table(found),
    ]
    for result in found:
        parts += [f"<details><summary>All rows: {results.heading(result).replace('**', '')}</summary>"]
        rows = [row for row in result.rows if row.status != "absent" and shown(row)]
        parts += [markdown_table(rows), memory_table(result.rows), left_out(result.rows), "</details>"]
    base = README.parent
    names = [path for result in found for path in plots.names(result, pictures)]
    parts += [f"![{path.stem}]({path.relative_to(base).as_posix()})" for path in names if path.exists()]
    return "\n\n".join(part for part in parts if part)


def updated(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with what lies between the markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{README.name}: allowed once each and in order: {begin} and {end}")
    head, rest = text.split(begin)
    return head + begin + "\n\n" + new + "\n\n" + end + rest.split(end)[1]


def publish(new: str, *, check: bool, command: str, begin: str = BEGIN, end: str = END) -> int:
    """Put ``new`` between README's markers, or with ``check`` print the difference; 1 if there is one, else 0.

    Args:
        command: what brings README up to date.

    Raises:
        ValueError, OSError: the markers are not there, or README cannot be read or written.
    """
    old = README.read_text(encoding="utf-8")
    text = updated(old, new, begin, end)
    if check:
        lines = difflib.unified_diff(old.splitlines(), text.splitlines(), "README.md", "from results", lineterm="")
        difference = "\n".join(lines)
        if difference:
            print(f"{difference}\n\nREADME.md is not what the results say: {command}")
        return int(bool(difference))
    if text != old:
        README.write_text(text, encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Write or check; the exit status is 1 if ``--check`` found a difference, 2 if a file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description="README's measured part.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it is not up to date")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the JSON")
    options = parser.parse_args(arguments)
    try:
        return publish(block(results.newest(options.results)), check=options.check, command="make readme")
    except (ValueError, OSError) as error:
        print(f"bench.readme: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
