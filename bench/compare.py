"""What moved between two results.

bench/compare OLD NEW [--ratio 1.10]        (or python -m bench.compare)

Exit status: 0, 1 if a row became worse by more than the ratio, and not within its spread, or is refused now; 2 for
input that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from .instrument import commands, results
from .instrument.rows import Row
from .instrument.tables import duration, number, parameters

# Counts and sizes of which less is better; the other values follow from the times or describe the row.
COSTS = (
    "peak_memory", "extra_memory", "operations", "launches", "registers", "shared", "spills", "stack", "depth",
    "instructions", "sectors", "sectors_past_l1", "distinct_sectors", "bytes_to_floor",
)  # fmt: skip
MADE_WITH = ("device", "driver", "processor", "threads", "torch", "triton", "transformers", "numba")


@dataclass(frozen=True)
class Change:
    """One number of one row in both results.

    Attributes:
        what: row, parameters and which number.
        old, new: as text.
        ratio: new ÷ old; more than 1 is worse.
        disjoint: whether the spreads, p20 to p80, do not touch. A count has none.
    """

    what: str
    old: str
    new: str
    ratio: float
    disjoint: bool


def changes(old: Row, new: Row) -> list[Change]:
    """Every number that both rows have."""
    found, what = [], f"{new.name} {parameters(new)}".strip()
    if old.p50 is not None and new.p50 is not None:
        disjoint = new.p20 > old.p80 or new.p80 < old.p20
        found.append(Change(what, duration(old.p50), duration(new.p50), new.p50 / old.p50, disjoint))
    for name in COSTS:
        if name in old.values and name in new.values:
            before, after = old.values[name], new.values[name]
            if name == "extra_memory":  # a share that may be 0 or below
                before, after = 1 + before, 1 + after
            ratio = 1.0 if before == after else after / before if before > 0 else float("inf")
            found.append(Change(f"{what}: {name.replace('_', ' ')}", number(before), number(after), ratio, True))
    return found


def _rows(result: results.Result, path: Path) -> dict[str, Row]:
    if not result.rows:
        raise ValueError(f"{path}: holds no rows")
    found: dict[str, Row] = {}
    for row in result.rows:
        if row.key in found:
            raise ValueError(f"{path}: two rows {row.name} {parameters(row)}")
        found[row.key] = row
    return found


def report(old_path: Path, new_path: Path, ratio: float) -> tuple[str, bool]:
    """The text to print, and whether there is a regression.

    Raises:
        ValueError, OSError: a file cannot be used; the message names it.
    """
    results_ = results.load(old_path), results.load(new_path)
    old, new = (_rows(result, path) for result, path in zip(results_, (old_path, new_path)))
    heads = ((name, *(result.head.get(name) for result in results_)) for name in MADE_WITH)
    lines = [f"not the same: {name}: {a} in the old, {b} in the new" for name, a, b in heads if a != b]
    bad, moved, same = False, 0, 0
    for name in [name for name in new if name in old]:
        before, after = old[name], new[name]
        if before.status != after.status:
            bad |= after.status == "refused"
            lines.append(f"{after.name} {parameters(after)}: {before.status} → {after.status} {after.note}".rstrip())
            continue
        for change in changes(before, after):
            same += 1
            if 1 / ratio <= change.ratio <= ratio:
                continue
            moved += 1
            bad |= change.disjoint and change.ratio > ratio
            side = "worse" if change.ratio > 1 else "better"
            spread = "disjoint spreads" if change.disjoint else "spreads overlap"
            lines.append(f"{change.what}: {change.old} → {change.new}, {change.ratio:.2f}× ({side}, {spread})")
    for side, rows, others in (("old", old, new), ("new", new, old)):
        for name in [name for name in rows if name not in others]:
            lines.append(f"only in the {side}: {rows[name].name} {parameters(rows[name])}".rstrip())
    lines.append(f"{moved} of {same} numbers moved by more than {ratio:g}×" + ("; regression" if bad else ""))
    return "\n".join(lines), bad


def main(arguments: list[str] | None = None) -> int:
    """Print what moved; see the module."""
    parser = argparse.ArgumentParser(prog="bench/compare", description="What moved between two benchmark results.")
    parser.add_argument("old", type=Path, metavar="OLD", help="JSON of python -m bench")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--ratio", type=float, default=1.10, help="what counts as moved (default 1.10)")
    options = parser.parse_args(arguments)
    if not options.ratio >= 1:
        parser.error("--ratio: allowed 1 or more")

    def said() -> int:
        text, bad = report(options.old, options.new, options.ratio)
        print(text)
        return int(bad)

    return commands.status_of("bench/compare", said)


if __name__ == "__main__":
    sys.exit(main())
