"""A memory, and what a text does to it, as one HTML file that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..adapter.files import same_bits
from ..display import plain
from ..errors import ArgumentError
from ..memory.figures import check_alike, distance, rows_of
from ..memory.state import MemoryState
from ..storage.files import write_text
from .trace import Trace

FIGURES = ("writes", "reads", "beta", "norms")
KEPT_FIGURES = 5_000_000  # of all tokens, layers and heads: 27 MB in the file
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: str | os.PathLike,
    memory: MemoryState | None = None,
    *,
    trace: Trace | None = None,
    other: MemoryState | None = None,
    other_name: str = "the other memory",
    title: str = "Inside a memory",
    facts: Mapping[str, str] | None = None,
    row: int = 0,
) -> Path:
    """Write one HTML file, atomically: figures of every layer and head, the states as heat maps, and a text's tokens.

    The file holds its data, style and script, and its content security policy lets it load nothing and run nothing
    else. Text is put in as text, whatever it says.

    Args:
        memory: of which conversation ``row`` is shown. None = what ``trace``'s text left.
        trace: of a text that was run from this conversation's state.
        other: a memory of the same layers, heads and rank, whose conversation ``row`` is put beside it.
        other_name: what the page calls it.
        title: of the page.
        facts: names and values to put under the title.
        row: 0 to B − 1.

    Raises:
        ValueError: neither a memory nor a trace; no such row; the memories do not fit each other, or the trace did
            not start from this one.
    """
    if memory is None and trace is None:
        raise ArgumentError("memory: got neither a memory nor a trace, allowed one of them or both")
    begin = memory is not None
    if memory is None:
        memory, row = trace.memory, 0
    rows_of(memory, row)
    shapes = {tuple(state.shape[1:]) for _, state in memory.items()}
    if len(shapes) != 1:
        raise ArgumentError(f"memory: got layers of shapes {sorted(shapes)}, allowed one shape")
    data = {
        "title": title,
        "facts": [[str(name), str(value)] for name, value in (facts or {}).items()],
        "layers": list(memory),
        "shape": list(*shapes),
        "figures": memory.report(row).to_dict()["rows"],
        "state": _packed(_stacked(memory, row)),
        "other": None,
        "trace": None,
    }
    if other is not None:
        check_alike(memory, other, "other")
        rows_of(other, row, "other: row")
        apart = distance(memory, other, row).to_dict()["rows"]
        data["other"] = {"name": other_name, "figures": apart, "state": _packed(_stacked(other, row))}
    if trace is not None:
        if begin and not _starts_from(trace, memory, row):
            raise ArgumentError(
                "trace: did not start from this memory; leave the memory out to show what the text left"
            )
        data["trace"] = _trace_data(trace, begin)
    text = fill(TEMPLATE.read_text(encoding="utf-8"), title, data)
    return write_text(path, text)


def fill(template: str, title: str, data: dict) -> str:
    """The page: ``{{title}}``, ``{{data}}`` and ``{{policy}}`` in the template are filled in, once each."""
    values = {"title": html.escape(title), "data": safe_json(data), "policy": policy(template)}
    # In one pass, so that no value is searched for the next one's place.
    return re.sub(r"\{\{(title|data|policy)\}\}", lambda match: values[match.group(1)], template)


def policy(template: str) -> str:
    """A content security policy that allows this template's own styles and scripts, by their hashes, and no more."""
    rules = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.S)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        rules.append(" ".join([kind, *(f"'sha256-{digest}'" for digest in digests)]))
    return "; ".join(rules)


def safe_json(data: dict) -> str:
    """JSON that ends no script element and begins no comment: <, > and & as escapes."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # The line separators are JSON, but old JavaScript reads them as line ends; lone surrogates are no UTF-8.
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match.group()):04x}", text)


def _trace_data(trace: Trace, begin: bool) -> dict:
    """Figures of each state are None for a text of which they would be more than ``KEPT_FIGURES``.

    ``held``: after how many tokens a state is held, of 0 to T; ``states``: those of ``held`` but the first.
    """
    length, by_state = len(trace), len(FIGURES) * trace.writes.numel() <= KEPT_FIGURES
    states = trace.final[None] if trace.states is None else trace.states
    return {
        "tokens": list(trace.tokens),
        "segments": None if trace.segment_ids is None else list(trace.segment_ids),
        "frozen": trace.frozen,
        "begin": begin,
        **{name: _packed(getattr(trace, name)) if by_state else None for name in FIGURES},
        "initial": _packed(trace.initial),
        "totals": {name: [plain(float(f"{value:.6g}")) for value in trace.total(name).tolist()] for name in FIGURES},
        "held": [0, length] if trace.states is None else list(range(length + 1)),
        "states": _packed(states),
    }


def _starts_from(trace: Trace, memory: MemoryState, row: int) -> bool:
    return list(trace.layers) == list(memory) and same_bits(_stacked(memory, row), trace.initial)  # NaN included


def _stacked(memory: MemoryState, row: int) -> torch.Tensor:
    """float32 [L, H, r, r] of one conversation."""
    return torch.stack([state[row].detach().cpu() for _, state in memory.items()])


def _packed(values: torch.Tensor) -> str:
    """float32 numbers, little-endian, as base64."""
    return base64.b64encode(values.detach().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()
