"""The sections of a long life."""

from __future__ import annotations

from collections.abc import Sequence

from ..instrument import results
from ..instrument.rows import Row
from ..instrument.tables import markdown, ratio
from .found import Found

TEXTS = {
    "tokens": (
        "Ten million tokens",
        "Each stream goes through the compiled operators a token at a time and in chunks, and through the same rule in "
        "float64 from the first token to the last: relative distances, the largest of all looks (reads of one token by "
        "the size of their state). A gate near 1 costs "
        "digits whatever computes it: S is in proportion to 1 / (1 − β), of which float32 keeps eps / (1 − β).",
    ),
    "session": (
        "Ten thousand turns",
        "One session with four turns in its context; its turns beside those of one that has just begun, by turns. Kept "
        "messages grow, and with them `session.json` and the time of `save`.",
    ),
    "bank": (
        "A million users under kills",
        "Reads compared bit for bit, commits, new users, deletes and counts by several processes, of which all but one "
        "are killed (SIGKILL) by turns; at the end every user is compared with what was acknowledged.",
    ),
}


def life_sections(found: Found) -> list[str]:
    """A heading, a text and the rows of each command that was measured; [] where none was."""
    parts = []
    for name, (title, text) in TEXTS.items():
        result = found.life.get(name)
        if result is not None:
            parts += [f"## {title}", text, results.heading(result), table(result.rows)]
    return parts


def table(rows: Sequence[Row]) -> str:
    """A line for each row: its sizes, its seconds if it has some, and its numbers."""
    lines = [["", "sizes", "measured"]]
    for row in rows:
        sizes = " ".join(f"{key}={value:,}" if isinstance(value, int) else f"{key}={value}"
                         for key, value in row.parameters.items())  # fmt: skip
        said = [f"times as fast as {name} {ratio(values)}" for name, values in row.ratios.items()]
        said += [f"{key.replace('_', ' ')} {short(value)}" for key, value in row.values.items() if not timed(key)]
        said += [f"refused: {row.note}"] if row.status == "refused" else []
        lines.append([row.name, sizes, ", ".join(said)])
    return markdown(lines)


def timed(key: str) -> bool:
    """Whether a number is a time: for hours the machine had other work, too, and speed has a page of its own."""
    return key.endswith(("_us", "seconds"))


def short(value: float) -> str:
    """A number in few letters."""
    whole = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else whole
