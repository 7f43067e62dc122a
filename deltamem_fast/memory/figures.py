"""Figures of states, layer by layer and head by head, and how far two memories are apart; all from plain tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..arguments import check_integer
from ..display import number, plain, table
from ..errors import ArgumentError
from .file import whole_counts

# Layer index → [B, H, r, r], of any floating dtype; a MemoryState is one, too.
States = Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class LayerReport:
    """Figures of one state S, r × r: one head of one layer of one conversation.

    Attributes:
        layer, head, row: where it is; ``row`` is the conversation, 0 to B − 1.
        norm: ‖S‖, Frobenius.
        effective_rank: exp of the entropy of the singular values divided by their sum; 0 for an empty state, k for k
            equal ones, r at most.
        saturation: effective rank ÷ r, 0 (empty) to 1: the share of the r directions that a key can have which is in
            use. At 1 all of them hold as much as each other, so whatever is written next overwrites a part of it.
        largest_row, largest_row_norm: index and norm of the row of S with the largest norm (the first of equals): the
            value that the memory holds the most of.
        skipped: tokens of this layer and conversation that were left out because they were not finite.

    A state with a NaN or Inf has NaN as its figures.
    """

    layer: int
    head: int
    row: int
    norm: float
    effective_rank: float
    saturation: float
    largest_row: int
    largest_row_norm: float
    skipped: int


@dataclass(frozen=True)
class LayerDistance:
    """How far two states A and B are apart.

    Attributes:
        layer, head, row: where they are.
        distance: ‖A − B‖, Frobenius.
        relative: ‖A − B‖ ÷ max(‖A‖, ‖B‖): 0 equal, 1 if one is empty, 2 opposite; 0 if both are empty.
        cosine: ⟨A, B⟩ ÷ (‖A‖ ‖B‖), or None where one is empty.
    """

    layer: int
    head: int
    row: int
    distance: float
    relative: float
    cosine: float | None


@dataclass(frozen=True)
class _Rows:
    """Figures as rows of a table and as JSON."""

    rows: tuple

    def __iter__(self) -> Iterator:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict:
        """One JSON object; a figure that is NaN or infinite is null."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"rows": [{k: plain(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows]}

    def _lines(self, headings: list[str], cells) -> str:
        # Conversations and heads are named where there is more than one.
        several = {name for name in ("row", "head") if len({getattr(row, name) for row in self.rows}) > 1}
        names = [name for name in ("row", "layer", "head") if name == "layer" or name in several]
        return table(names + headings, [[str(getattr(row, name)) for name in names] + cells(row) for row in self.rows])


class MemoryReport(_Rows):
    """``rows``: a LayerReport for each conversation, layer and head, in that order. ``print`` it to read it."""

    def __str__(self) -> str:
        headings = ["norm", "effective rank", "saturation", "largest row", "its norm", "skipped"]
        return self._lines(headings, _figures)


class DistanceReport(_Rows):
    """``rows``: a LayerDistance for each conversation, layer and head, in that order. ``print`` it to read it."""

    def __str__(self) -> str:
        headings = ["distance", "relative", "cosine"]
        return self._lines(headings, lambda row: [number(row.distance), number(row.relative), number(row.cosine)])


def _figures(row: LayerReport) -> list[str]:
    largest = str(row.largest_row) if row.norm else "-"
    rank, share = f"{row.effective_rank:.2f}", f"{row.saturation:.2f}"
    return [number(row.norm), rank, share, largest, number(row.largest_row_norm), str(row.skipped)]


def report(states: States, skipped: States, row: int | None = None) -> MemoryReport:
    """Figures of every layer and head of a memory, computed in float64 on the CPU; ``MemoryState.report`` calls it.

    Args:
        states: are not changed.
        skipped: layer index → int32 [B], the tokens that were left out.
        row: of one conversation only; None = of all.

    Raises:
        ValueError: no such row.
    """
    rows = rows_of(states, row)
    found = {layer: _report_figures(states[layer][rows], skipped[layer][rows]) for layer in states}
    return MemoryReport(_by_place(LayerReport, rows, found))


def _by_place(kind: type, rows: list[int], found: Mapping[int, Sequence[Sequence]]) -> tuple:
    """A ``kind`` for each conversation, layer and head, in that order, of each layer's figures, each [rows][heads]."""
    return tuple(
        kind(layer, head, row, *values)
        for n, row in enumerate(rows)
        for layer, figures in found.items()
        for head, values in enumerate(zip(*(figure[n] for figure in figures)))
    )


def rows_of(states: States, row: int | None, name: str = "row") -> list[int]:
    """The conversations to look at: ``row``, or all of them for None. Raises ValueError if there is no such row."""
    count = _rows(states)
    if row is None:
        return list(range(count))
    if not count:
        raise ArgumentError(f"{name}: got {row!r}, allowed none (the memory holds no conversation)")
    return [check_integer(row, name, 0, count - 1)]


def norm_of(states: States) -> float:
    """The Frobenius norm of all layers together."""
    return math.sqrt(sum(float(state.detach().double().square().sum()) for _, state in states.items()))


def _rows(states: States) -> int:
    return next((states[layer].shape[0] for layer in states), 0)


def _report_figures(state: torch.Tensor, skipped: torch.Tensor) -> list[list]:
    """Those of a ``LayerReport``, in its order."""
    state = state.detach().cpu().double()
    effective = effective_rank(state)
    largest_norm, largest = state.norm(dim=-1).max(-1)
    figures = (state.norm(dim=(-2, -1)), effective, effective / state.shape[-1], largest, largest_norm)
    counts = whole_counts(skipped.detach().cpu()).unsqueeze(1).expand(state.shape[:2])
    return [figure.tolist() for figure in (*figures, counts)]


def effective_rank(states: torch.Tensor) -> torch.Tensor:
    """exp(−Σ p log p) of p = singular values ÷ their sum (Roy and Vetterli, 2007).

    Args:
        states: [..., r, r], of any floating dtype.

    Returns:
        float64 [...]: 0 for an empty state, NaN for one that is not finite, else 1 to r.
    """
    states = states.double()
    finite = torch.isfinite(states).all(-1).all(-1)
    values = torch.linalg.svdvals(torch.where(finite[..., None, None], states, 0.0))
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1.0)
    ranks = torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
    return torch.where(finite, ranks, torch.nan)


def distance(a: States, b: States, row: int | None = None) -> DistanceReport:
    """How far two memories are apart, layer by layer and head by head, computed in float64 on the CPU.

    Args:
        a, b: of the same layers, heads and rank; they may be of different adapters. Neither is changed.
        row: that conversation of each; None = all, of which both have as many.

    Raises:
        ValueError: their layers or shapes differ, or there is no such row.
    """
    check_alike(a, b)
    if row is None and _rows(a) != _rows(b):
        raise ArgumentError(f"b: got {_rows(b)} rows, allowed {_rows(a)} as in the other one; or name one row")
    rows = rows_of(a, row)
    rows_of(b, row)
    found = {layer: _distance_figures(a[layer][rows], b[layer][rows]) for layer in a}
    return DistanceReport(_by_place(LayerDistance, rows, found))


def check_alike(a: States, b: States, name: str = "b") -> None:
    """Raise ValueError unless both have the same layers, heads and rank."""
    ours, theirs = ({layer: list(states[layer].shape[1:]) for layer in states} for states in (a, b))
    if ours != theirs:
        raise ArgumentError(f"{name}: got layers {theirs}, allowed {ours}, [heads, rank, rank] by layer")


def _distance_figures(a: torch.Tensor, b: torch.Tensor) -> list[list]:
    """Those of a ``LayerDistance``, in its order."""
    a, b = (state.detach().cpu().double().flatten(2) for state in (a, b))
    norms = [state.norm(dim=-1) for state in (a, b)]
    apart = (a - b).norm(dim=-1)
    larger, product = torch.maximum(*norms), norms[0] * norms[1]
    relative = torch.where(larger == 0, 0.0, apart / larger)
    cosine = ((a * b).sum(-1) / product).clamp(-1, 1).tolist()
    empty = (product == 0).tolist()
    cosine = [[None if none else c for c, none in zip(*heads)] for heads in zip(cosine, empty)]
    return [apart.tolist(), relative.tolist(), cosine]
