"""Where the states of a batch of sequences are read and written in a paged cache; made once a step for all layers.

A cache of blocks of n tokens has one state a block: block b of a sequence holds the state after its last token that
has been written there. A sequence whose tokens [start, end) come next resumes from block (start − 1) // n, or, at start
0, from zeros or a state of a table, and leaves one state in every block that these tokens touch.

A sequence may also read one state of the table alone, and write nothing, or read nothing either.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

WRITES, READS, NOTHING = range(3)  # what a sequence does with its memory


class Begun(NamedTuple):
    """Sequences that start from a state of the table: their places among those of a step, and that state's row."""

    places: torch.Tensor
    slots: torch.Tensor


class Frozen(NamedTuple):
    """Tokens that read a state of the table: their places among the batch's, and that state's row (−1: zeros)."""

    tokens: torch.Tensor
    slots: torch.Tensor


class Steps(NamedTuple):
    """Sequences of which one token comes.

    Attributes:
        tokens: int64 [N], their places among the batch's tokens; None: they are all, in order.
        sources, targets: int64 [N], the blocks that their states are read from and written to.
        fresh: bool [N, 1, 1, 1], True where a sequence starts here, so that its source counts for nothing; None:
            nowhere.
        begun: those of them that start from a state of the table; None: there are none.
    """

    tokens: torch.Tensor | None
    sources: torch.Tensor
    targets: torch.Tensor
    fresh: torch.Tensor | None
    begun: Begun | None


class Spans(NamedTuple):
    """Sequences of which several tokens come, packed one behind another.

    Each begins at a block's first token: one that resumes inside a block is preceded by masked tokens, which change
    nothing, so that every n-th token of it is the last of a block.

    Attributes:
        tokens: int64 [T], the place of each packed token among the batch's (of a masked one: of any).
        mask: bool [1, T], False at the masked tokens; None: there are none.
        kept: int64, the packed tokens that are none of the masked; None: all.
        cu_seqlens: int32 [N + 1].
        sources, fresh, begun: as of ``Steps``.
        targets: int64 [M], the blocks that states are written to.
        picked: int64 [M], which state each takes: of the checkpoints, then of the last states.
        saved: how many checkpoints there are.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    kept: torch.Tensor | None
    cu_seqlens: torch.Tensor
    sources: torch.Tensor
    fresh: torch.Tensor | None
    begun: Begun | None
    targets: torch.Tensor
    picked: torch.Tensor
    saved: int


@dataclass(frozen=True)
class Plan:
    """What one step of a batch does with its states.

    Attributes:
        block: tokens of a block.
        steps, spans: the sequences of one and of several tokens; None: there are none.
        frozen: tokens of sequences that only read; None: there are none.
    """

    block: int
    steps: Steps | None
    spans: Spans | None
    frozen: Frozen | None = None

    @functools.cached_property
    def all_resume(self) -> tuple[int, int, int] | None:
        """If one token of each sequence comes, in order, and each resumes from a block: how many, and the addresses of
        their sources and targets, contiguous while the plan lives; else None."""
        steps = self.steps
        if steps is None or self.spans is not None or self.frozen is not None:
            return None
        if steps.tokens is not None or steps.fresh is not None or steps.begun is not None:
            return None
        return steps.targets.shape[0], steps.sources.data_ptr(), steps.targets.data_ptr()


def make_plan(
    starts: np.ndarray,
    bounds: np.ndarray,
    table: torch.Tensor,
    block: int,
    *,
    uses: np.ndarray | None = None,
    slots: np.ndarray | None = None,
    firsts: np.ndarray | None = None,
) -> Plan:
    """Plan one step.

    Args:
        starts: int [N], how many tokens of each sequence have been written before.
        bounds: int [N + 1], where each sequence's next tokens begin and end among the batch's. A sequence of which
            none comes is left alone.
        table: int32 or int64 [N, M], the cache's blocks of each sequence, on its device; never waited for.
        block: tokens of a block.
        uses: int [N], ``WRITES``, ``READS`` or ``NOTHING``; None: all write.
        slots: int [N], which of the table's states each starts from, or reads; −1, or None: zeros.
        firsts: int [N], of those that write the first token that is written; those before it are read alone. None: 0.
    """
    firsts = np.zeros(len(starts), np.int64) if firsts is None else firsts
    if uses is not None and ((starts < firsts) & (uses == WRITES)).any():
        starts, bounds, table, uses, slots, firsts = _parted(starts, bounds, table, uses, slots, firsts)
    lengths = np.diff(bounds)
    writes = np.ones(len(lengths), bool) if uses is None else uses == WRITES
    one, several = np.flatnonzero((lengths == 1) & writes), np.flatnonzero((lengths > 1) & writes)
    return Plan(
        block,
        _steps(one, starts, bounds, table, block, slots, firsts) if len(one) else None,
        _spans(several, starts, bounds, table, block, slots, firsts) if len(several) else None,
        None if uses is None else _frozen(np.flatnonzero((lengths > 0) & (uses == READS)), bounds, slots, table.device),
    )


def _parted(starts, bounds, table, uses, slots, firsts):
    """Sequences that begin to write among these tokens, each as two: one that reads alone, and one that writes."""
    ends = starts + np.diff(bounds)
    begins = (uses == WRITES) & (starts < firsts)
    cut = np.where(begins, np.minimum(firsts, ends), ends)  # a part before it, and one behind it, maybe of no token
    rows = np.repeat(np.arange(len(starts)), 2)
    first_parts = np.arange(len(rows)) % 2 == 0
    parted_starts = np.where(first_parts, starts[rows], cut[rows])
    parted_bounds = np.append(
        np.where(first_parts, bounds[:-1][rows], bounds[:-1][rows] + (cut - starts)[rows]), bounds[-1]
    )
    parted_uses = np.where(first_parts & begins[rows], READS, uses[rows])
    slots = None if slots is None else slots[rows]
    return (
        parted_starts,
        parted_bounds,
        table.index_select(0, _tensor(rows, table.device)),
        parted_uses,
        slots,
        firsts[rows],
    )


def _frozen(rows, bounds, slots, device) -> Frozen | None:
    if not len(rows):
        return None
    tokens = np.concatenate([np.arange(bounds[row], bounds[row + 1]) for row in rows])
    found = np.full(len(rows), -1) if slots is None else slots[rows]
    return Frozen(_tensor(tokens, device), _tensor(np.repeat(found, bounds[rows + 1] - bounds[rows]), device))


def _begun(rows, begins, slots, device) -> Begun | None:
    places = [] if slots is None else np.flatnonzero(begins & (slots[rows] >= 0))
    return Begun(_tensor(places, device), _tensor(slots[rows][places], device)) if len(places) else None


def _steps(rows, starts, bounds, table: torch.Tensor, block: int, slots, firsts) -> Steps:
    start, device = starts[rows], table.device
    in_order = len(rows) == bounds[-1]
    sources, targets = _blocks(table, [rows, rows], [_source(start, block), start // block])
    return Steps(
        None if in_order else _tensor(bounds[rows], device),
        sources,
        targets,
        _fresh(start == firsts[rows], device),
        _begun(rows, start == firsts[rows], slots, device),
    )


def _spans(rows, starts, bounds, table: torch.Tensor, block: int, slots, firsts) -> Spans:
    tokens, kept, owners, columns, picked, ends = [], [], [], [], [], [0]
    saved = 0
    last = []  # (place among the sequences, row, block's column) of those that end inside a block
    for place, row in enumerate(rows):
        start, begin, end = int(starts[row]), int(bounds[row]), int(bounds[row + 1])
        lead = start % block
        length = lead + end - begin
        tokens += [np.full(lead, begin), np.arange(begin, end)]
        kept.append(ends[-1] + np.arange(lead, length))
        ends.append(ends[-1] + length)
        first, whole = start // block, length // block
        owners.append(np.full(whole, row))
        columns.append(first + np.arange(whole))
        picked.append(saved + np.arange(whole))
        saved += whole
        if length % block:
            last.append((place, row, first + whole))
    ending = np.array(last, np.int64).reshape(-1, 3)
    owners, columns = np.concatenate([*owners, ending[:, 1]]), np.concatenate([*columns, ending[:, 2]])
    picked.append(saved + ending[:, 0])
    packed, kept = np.concatenate(tokens), np.concatenate(kept)
    mask = None
    if len(kept) < len(packed):
        mask = np.zeros((1, len(packed)), bool)
        mask[0, kept] = True
    start, device = starts[rows], table.device
    sources, targets = _blocks(table, [rows, owners], [_source(start, block), columns])
    return Spans(
        _tensor(packed, device),
        None if mask is None else torch.from_numpy(mask).to(device),
        None if mask is None else _tensor(kept, device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        sources,
        _fresh(start == firsts[rows], device),
        _begun(rows, start == firsts[rows], slots, device),
        targets,
        _tensor(np.concatenate(picked), device),
        saved,
    )


def _source(start: np.ndarray, block: int) -> np.ndarray:
    """The column of the block that a sequence resumes from; some column, where it starts."""
    return np.maximum(start - 1, 0) // block


def _blocks(table: torch.Tensor, rows: list[np.ndarray], columns: list[np.ndarray]) -> tuple[torch.Tensor, ...]:
    """The blocks int64 at several lists of rows and columns of a table, looked up where that is."""
    if table.device.type == "cpu":  # where NumPy's index is the faster one for a few numbers
        found = table.numpy()
        return tuple(torch.from_numpy(found[row, column].astype(np.int64)) for row, column in zip(rows, columns))
    where = _tensor(np.stack([np.concatenate(rows), np.concatenate(columns)]), table.device)
    return table[where[0], where[1]].long().split([len(part) for part in rows])


def _tensor(values: np.ndarray, device) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)


def _fresh(fresh: np.ndarray, device) -> torch.Tensor | None:
    return torch.from_numpy(fresh).to(device).view(-1, 1, 1, 1) if fresh.any() else None
