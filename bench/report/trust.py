"""Tables of ``python -m bench.recall trust``: what was kept and learnt, by trust."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..instrument.rows import Row
from ..instrument.tables import markdown

NOTE = (
    "Four facts about new names are told (*before*: how many of them are answered, in percent), then a text that "
    "somebody else had a hand in. *Kept* are the four facts, *learnt* is what the text says instead (or, of facts "
    "about others, the last four): kept / learnt, in percent. *Text* τ: `ingest(…, trust=τ)`, a message of a session: "
    "the memory goes a share τ of the way to what the whole text makes of it. *Token* τ: `model(…, trust=τ)`, each "
    "token's gates lowered. *Guarded*: `patch_model(…, guard=True)`, whole trust. Standard errors are 3.6 or less."
)
BEFORE = (
    "The same texts and questions, wholly trusted, with the adapters of before "
    "([what changed](../training.md#what-lasts)) and of now: kept / learnt, in percent."
)
GUARD = (
    "`python -m bench.memory guard`: with a guard and without, in turns of one run, times as fast as without. *Trusted "
    "less*: `trust=0.5`, by token, which also lowers the gates' logits before the operator runs."
)
TEXTS, TOKENS = (0.9, 0.75, 0.5, 0.25, 0.1), (0.5, 0.25, 0.1, 0.05)


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """A heading and a table for each adapter."""
    for adapter in dict.fromkeys(row.name.partition("/")[2] for row in rows):
        mine = {
            (p["text"], p["guard"], p.get("way"), p.get("trust")): row.values
            for row in rows
            if row.name.endswith(f"/{adapter}")
            for p in [row.parameters]
        }
        heading = ["told after four facts", "before", "trusted", *(f"text {t:g}" for t in TEXTS)]
        heading += [*(f"token {t:g}" for t in TOKENS), "guarded, before", "guarded, trusted"]
        lines = [heading]
        for text in dict.fromkeys(key[0] for key in mine):
            ways = [("gates", 1.0), *(("share", t) for t in TEXTS), *(("gates", t) for t in TOKENS)]
            cells = [_cell(mine.get((text, False, None, None)))]
            cells += [_cell(mine.get((text, False, way, trust))) for way, trust in ways]
            cells += [_cell(mine.get((text, True, None, None))), _cell(mine.get((text, True, "gates", 1.0)))]
            lines.append([_told(text), *cells])
        yield f"### {adapter}"
        yield markdown(lines)


def before_and_after(old: Sequence[Row], new: Sequence[Row]) -> str:
    """A row a text: each adapter before and after."""
    found = [{(row.name, row.parameters["text"]): row.values for row in rows if _is_whole(row)} for rows in (old, new)]
    names = dict.fromkeys(row.name for row in new if _is_whole(row))
    lines = [
        [
            "told after four facts",
            *(f"{name.partition('/')[2]}, {when}" for name in names for when in ("before", "now")),
        ]
    ]
    for text in dict.fromkeys(text for _, text in found[1]):
        lines.append([_told(text), *(_cell(values.get((name, text))) for name in names for values in found)])
    return markdown(lines)


def _is_whole(row: Row) -> bool:
    """Whether it is of a text that is trusted wholly, without a guard."""
    p = row.parameters
    return row.name.startswith("after/") and not p["guard"] and (p["way"], p["trust"]) == ("gates", 1.0)


def _told(text: str) -> str:
    kind, _, count = text.rpartition(" ")
    return f"{count} tokens of {kind.replace('random tokens', 'noise')}"


def _cell(values: dict[str, float] | None) -> str:
    if values is None:
        return ""
    learnt = f" / {100 * values['learnt']:.0f}" if "learnt" in values else ""
    return f"{100 * values['kept']:.0f}{learnt}"


def fuzz_table(runs: Sequence[dict[str, Any]]) -> str:
    """A row a run."""
    lines = [["commit", "time", "readers", "inputs", "hours", "crashes"]]
    for run in runs:
        seconds = sum(target["seconds"] for target in run["targets"])
        crashes = sum(len(target["crashes"]) for target in run["targets"])
        counts = [str(len(run["targets"])), f"{run['inputs']:,}", f"{seconds / 3600:.2f}", str(crashes)]
        lines.append([run["commit"], run["time"][:10], *counts])
    return markdown(lines)
