"""Rows of a benchmark's result: what was measured, or why it was not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

STATUSES = ("measured", "refused", "absent")


@dataclass
class Row:
    """One measured variant, or why it was not measured.

    Attributes:
        name: what was measured and of which implementation, as in ``scan/numba``.
        parameters: its sizes; ``tokens`` and ``batch`` give tokens per second.
        status: ``measured``, ``refused`` (wrong results, so not timed) or ``absent`` (cannot run here, left out).
        note: why it was refused or is absent, or what the number leaves open.
        error: relative error that the check found, of the worst output, or None.
        samples: how many timings p20, p50 and p80 are taken from.
        p20, p50, p80: seconds.
        ratios: by baseline, how many times as fast as that variant it was: [p20, p50, p80] over the turns in which
            both ran.
        values: other numbers by name: ``bytes`` (the least that has to be moved), ``bandwidth`` (bytes per second),
            ``roofline`` (least possible time ÷ p50), ``peak_memory`` (bytes), ``operations``, ``registers``, ….
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    status: str = "measured"
    note: str = ""
    error: float | None = None
    samples: int = 0
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratios: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes two rows the same measurement."""
        return f"{self.name} {json.dumps(self.parameters, sort_keys=True)}"

    @property
    def kind(self) -> str:
        """What was measured: ``scan`` of ``scan/numba``."""
        return self.name.partition("/")[0]

    @property
    def variant(self) -> str:
        """Of what: ``numba`` of ``scan/numba``."""
        return self.name.partition("/")[2]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def from_dict(data: Mapping[str, Any]) -> Row:
    """The row of a JSON object.

    Raises:
        ValueError: a name is missing or a key is unknown, or the status is.
    """
    known = {f.name for f in fields(Row)}
    if "name" not in data or set(data) - known:
        raise ValueError(f"row: got the keys {sorted(data)}, allowed {sorted(known)}")
    row = Row(**data)
    if row.status not in STATUSES:
        raise ValueError(f"row {row.name}: status {row.status!r}, allowed {', '.join(STATUSES)}")
    return row


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile of two samples or more, interpolated linearly."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low, statistics.median(samples), high


def measured(
    name: str, parameters: dict[str, Any], seconds: Sequence[float], error: float | None = None, **values: float
) -> Row:
    """A row of timings in seconds."""
    return Row(name, parameters, "measured", "", error, len(seconds), *spread(seconds), values=values)


def counted(name: str, parameters: dict[str, Any], note: str = "", **values: float) -> Row:
    """A row of numbers that are no timings."""
    return Row(name, parameters, note=note, values=values)


def compare(row: Row, baseline: str, theirs: Sequence[float], ours: Sequence[float]) -> Row:
    """Add to ``row`` how many times as fast as ``baseline`` it was, turn by turn; returns it.

    Args:
        theirs, ours: seconds of the baseline and of this row, one each a turn.
    """
    row.ratios[baseline] = list(spread([a / b for a, b in zip(theirs, ours, strict=True)]))
    return row


def refused(name: str, parameters: dict[str, Any], note: str, error: float | None = None) -> Row:
    """A row of a variant that was not timed because its results are wrong."""
    # JSON has no NaN: an output that is not a number at all has no error to report.
    finite = error if error is not None and error < float("inf") else None
    return Row(name, parameters, status="refused", note=note, error=finite)


def absent(name: str, note: str, parameters: dict[str, Any] | None = None) -> Row:
    """A row of a variant that cannot run here, or was left out."""
    return Row(name, parameters or {}, status="absent", note=note)
