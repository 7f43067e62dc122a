"""A report as one HTML file that loads nothing: its style, its script and its picture are in it."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..display import printable
from . import published
from .published import NOT_YET
from .report_tables import (
    COLUMNS,
    Cell,
    aggregate_cells,
    category_cells,
    facts,
    interval_note,
    ours_of,
    run_notes,
    task_cells,
    title_of,
)

_STYLE = """
:root { color-scheme: light dark; --page: #f6f5f2; --card: #fff; --text: #1d2025; --muted: #5a606a; --line: #dcd9d2;
  --soft: #efede8; --accent: #1f55b5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121418; --card: #1a1d23; --text: #e9e7e4; --muted: #a3a9b3; --line: #363b44; --soft: #23272e;
    --accent: #8fb7ff; }
  figure svg { filter: invert(.92) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1.25rem clamp(.75rem, 2.5vw, 2rem) 3rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
body > * { max-width: 88rem; margin-inline: auto; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 .4rem; font-size: 1.1rem; overflow-wrap: anywhere; }
h3 { margin: 1.1rem 0 .3rem; font-size: .95rem; }
p, ul { margin: .3rem 0; max-width: 75ch; overflow-wrap: anywhere; }
.note, dl { color: var(--muted); font-size: .87rem; }
dl { display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; }
dl div { display: flex; gap: .4rem; min-width: 0; }
dt { white-space: nowrap; } dd { margin: 0; color: var(--text); overflow-wrap: anywhere; }
section { margin-top: 1rem; padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; }
figure { margin: 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 36rem; max-width: 62rem; height: auto; }
.scroll { overflow-x: auto; margin: .5rem 0; border: 1px solid var(--line); border-radius: .45rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
td { white-space: nowrap; }
.words td { white-space: normal; text-align: left; } .words th { text-align: left; }
thead th { border-top: 0; background: var(--soft); vertical-align: bottom; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
thead th:first-child { background: var(--soft); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
a { color: var(--accent); }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table.sorted")) {
  const body = table.tBodies[0], first = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const now = head.getAttribute("aria-sort"), next = !now ? "descending" : now === "descending" ? "ascending" : null;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    if (next) head.setAttribute("aria-sort", next);
    const key = row => row.cells[column].dataset.value;
    const order = (a, b) => {
      if (key(a) === undefined || key(b) === undefined)
        return column ? (key(a) === undefined) - (key(b) === undefined)
          : a.cells[0].textContent.localeCompare(b.cells[0].textContent) * (next === "ascending" ? 1 : -1);
      return (key(a) - key(b)) * (next === "ascending" ? 1 : -1);
    };
    body.append(...(next ? [...first].sort(order) : first));
  }));
}
"""


def page(report: Mapping[str, Any], svg: str = "", without: str = "") -> str:
    """The page; whatever comes from data, models or answers is put in as text.

    Args:
        svg: the picture of score against cost, as ``report_plot`` draws it; "" = none.
        without: why there is none, or "".
    """
    title = _text(title_of(report))
    parts = [f"<h1>{title}</h1>", _facts(facts(report["run"]))]
    if svg or without:
        drawn = f"<figure>{svg}</figure>" if svg else f'<p class="note">{_text(without)}</p>'
        parts.append(f"<section><h2>Score against cost</h2>{drawn}</section>")
    parts += [_task(report, task) for task in report["tasks"]]
    if any(task["rows"] for task in report["tasks"]):
        said = re.sub(r"\*(.+?)\*", r"<em>\1</em>", _text(COLUMNS))
        parts.append(f"<section><h2>What the columns say</h2><p>{said}</p></section>")
    parts.append(_published(ours_of(report)))
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    # The picture has styles at its elements, which only 'unsafe-inline' allows: they can load nothing either.
    rules = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{rules}; script-src \'sha256-{digest}\'">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>"
    )
    body = "\n".join([*parts, f"<script>{_SCRIPT}</script>"])
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _text(text: str) -> str:
    return html.escape(printable(" ".join(text.split())))


def _facts(found: Sequence[tuple[str, str]]) -> str:
    lines = (f"<div><dt>{_text(name)}</dt><dd>{_text(text)}</dd></div>" for name, text in found)
    return f"<dl>{''.join(lines)}</dl>"


def _task(report: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    name = task["name"]
    parts = [f"<h2>{_text(task['title'])}</h2>"]
    said = "".join(f'<p class="note">{_text(note)}</p>' for note in run_notes(report, name))
    if not task["rows"]:
        return f"<section>{parts[0]}<p>{NOT_YET.capitalize()}.</p>{said}</section>"
    parts += [f'<p class="note">{_text(note)}</p>' for note in task["notes"]]
    parts += [_table(*task_cells(report, name)), f'<p class="note">{_text(interval_note(report, name))}</p>']
    parts.append(said)
    for title, (headings, lines) in (
        ("By category, %", category_cells(report, name)),
        ("As the task's own scorer gives them", aggregate_cells(report, name)),
    ):
        if lines:
            parts += [f"<h3>{_text(title)}</h3>", _table(headings, lines)]
    return f"<section>{''.join(parts)}</section>"


def _table(headings: Sequence[str], lines: Sequence[Sequence[Cell]]) -> str:
    """A table that sorts by the column whose heading is clicked: downwards, upwards, as it was."""
    head = "".join(f'<th scope="col"><button type="button">{_text(heading)}</button></th>' for heading in headings)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table class="sorted"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(cell: Cell) -> str:
    text, value = cell
    return f"<td>{_text(text)}</td>" if value is None else f'<td data-value="{value!r}">{_text(text)}</td>'


def _published(ours: Mapping[str, Mapping[str, float]]) -> str:
    paper, systems = published.paper_table(ours), published.systems_table()
    return (
        "<section><h2>What others have reported</h2>"
        f"<p>{_linked(published.PAPER_NOTE)}</p>{_words(paper)}"
        f"<p>{_text(published.SYSTEMS_NOTE)}</p>{_words(systems)}<p>{_text(published.NOT_CLAIMED)}</p></section>"
    )


def _words(lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in lines[0])
    body = "".join(f"<tr>{''.join(f'<td>{_linked(cell)}</td>' for cell in line)}</tr>" for line in lines[1:])
    return f'<div class="scroll"><table class="words"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _linked(text: str) -> str:
    """Our own texts: their addresses as links, which nobody follows but a reader."""
    return re.sub(r"https://[\w./-]*[\w/]", lambda found: f'<a href="{found[0]}">{found[0]}</a>', _text(text))
