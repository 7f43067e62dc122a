"""Write README's part on recall from the newest result, or check it.

The rows are those of curves.py; each share is a percentage and its standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import readme, results
from ..results import Result
from ..rows import Row
from ..tables import markdown
from . import curves, figures, perplexity, plots, variants
from .targets import GOALS

BEGIN = "<!-- recall: begin (python -m bench.recall readme writes what lies between) -->"
END = "<!-- recall: end -->"
NOT_YET = readme.NOT_YET
FACTS = (1, 2, 4, 8, 16, 32)  # of which README's table has columns; the JSON has all


def share(row: Row | None, value: str = "share", error: str | None = None) -> str:
    """A share and its standard error in percent."""
    if row is None or value not in row.values:
        return NOT_YET
    return f"{row.values[value]:.1%} ± {row.values[error or f'{value}_error']:.1%}".replace("%", "")


def ratio(row: Row | None, error: str = "error", digits: int = 2) -> str:
    """A ratio and its standard error."""
    if row is None or "ratio" not in row.values:
        return NOT_YET
    return f"{row.values['ratio']:.{digits}f} ± {row.values[error]:.{digits}f}"


def _find(rows: Sequence[Row], name: str, **parameters) -> Row | None:
    found = [row for row in rows if row.name == name and row.parameters == parameters and row.status == "measured"]
    return found[0] if found else None


def goal_table(rows: Sequence[Row]) -> str:
    """Every target, measured or not."""
    lines = [["what", "target", "measured", "met"]]
    for goal in GOALS:
        worst = goal.worst(rows)
        met = "" if worst is None else "yes" if goal.met(worst) else "no"
        lines.append([goal.what, goal.bounds(), ratio(worst, goal.error, 2 if goal.least > 1 else 4), met])
    return markdown(lines)


def facts_table(rows: Sequence[Row]) -> str:
    """Recall against the number of facts, a line for each variant."""
    lines = [["facts told", *map(str, FACTS)]]
    for variant in curves.CURVES["facts"].variants:
        found = (_find(rows, f"facts/{variant.name}", facts=count) for count in FACTS)
        lines.append([variant.name, *(share(row, error="error") for row in found)])
    return markdown(lines)


def distance_table(rows: Sequence[Row]) -> str:
    """Recall against distance, a line for each variant."""
    curve = curves.CURVES["distance"]
    lines = [["two facts, tokens told after them", *(str(point["distance"]) for point in curve.points)]]
    for variant in curve.variants:
        found = (_find(rows, f"distance/{variant.name}", **point) for point in curve.points)
        lines.append([variant.name, *(share(row, error="error") for row in found)])
    return markdown(lines)


def overwriting_table(rows: Sequence[Row]) -> str:
    """Newest and earlier values and untouched facts, a line for each variant and number of revisions of eight facts."""
    curve = curves.CURVES["overwriting"]
    lines = [["eight facts, one overwritten", "times", "newest value", "an earlier value", "the other facts"]]
    for variant in curve.variants:
        for point in (point for point in curve.points if point["facts"] == 8):
            row = _find(rows, f"overwriting/{variant.name}", **point)
            stale = share(row, "stale") if point["revisions"] else ""
            lines.append([variant.name, str(point["revisions"]), share(row, "newest"), stale, share(row, "kept")])
    return markdown(lines)


def half_table(rows: Sequence[Row]) -> str:
    """Recall with the newer half in sight, and its ratio to the frozen backbone."""
    curve = curves.CURVES["half"]
    lines = [["newer half in the context, facts", *(str(point["facts"]) for point in curve.points)]]
    for variant in curve.variants:
        found = [_find(rows, f"half/{variant.name}", **point) for point in curve.points]
        lines.append([variant.name, *(share(row, error="error") for row in found)])
        if variant.adapter is not None:
            lines.append([f"{variant.name} ÷ frozen", *(ratio(row, "ratio_error") for row in found)])
    return markdown(lines)


def perplexity_table(rows: Sequence[Row]) -> str:
    """Perplexity of the frozen backbone, and its ratio under each memory, by kind of text."""
    kinds = (*perplexity.TEXTS, perplexity.EVERYTHING)
    lines = [["perplexity of held-out text", *kinds]]
    frozen = [_find(rows, f"{perplexity.NAME}/frozen", text=kind) for kind in kinds]
    lines.append(["frozen", *(NOT_YET if row is None else f"{row.values['perplexity']:.3f}" for row in frozen)])
    for name in variants.STRATEGIES:
        for memory in perplexity.MEMORIES:
            found = (_find(rows, f"{perplexity.NAME}/{name}", text=kind, memory=memory) for kind in kinds)
            lines.append([f"{name}, {memory} ÷ frozen", *(ratio(row, digits=4) for row in found)])
    return markdown(lines)


TABLES = {
    "Distance": distance_table,
    "Overwriting": overwriting_table,
    "Half of the facts in the context": half_table,
    "Perplexity": perplexity_table,
}


def block(result: Result | None, pictures: Path = plots.DIRECTORY) -> str:
    """Everything between the markers."""
    chances = ", ".join(f"{kind} {chance:.1%}" for kind, chance in figures.CHANCE.items())
    if result is None:
        return f"`make recall` measures what the shipped weights remember: {NOT_YET}."
    size = f"{result.head['parameters'] / 1e6:.1f} M parameters"
    parts = [
        f"`make recall` measures. A Qwen3 of {size}, patched with adapters trained on it, is told facts about names "
        "that occur in no training text; their context is thrown away, and each fact is asked for alone. Share of "
        f"right answers in percent ± standard error; a guess: {chances}. *frozen* sees nothing, *full context* "
        "everything, *bm25 top k* the k sentences that BM25 finds.",
        results.heading(result),
        goal_table(result.rows),
        facts_table(result.rows),
    ]
    for title, table in TABLES.items():
        parts += [f"<details><summary>{title}</summary>", table(result.rows), "</details>"]
    base = readme.README.parent
    paths = [path for path in plots.names(pictures) if path.exists() and path.is_relative_to(base)]
    parts += [f"![{path.stem}]({path.relative_to(base).as_posix()})" for path in paths]
    return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.recall readme``."""
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it is not up to date")
    parser.add_argument("--results", type=Path, default=curves.DIRECTORY, help="folder of the JSON")


def run(options: argparse.Namespace) -> int:
    """Write or check; 1 if ``--check`` found a difference."""
    new = block(plots.newest(options.results))
    return readme.publish(new, check=options.check, command="make recall", begin=BEGIN, end=END)
