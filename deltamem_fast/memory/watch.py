"""Watching what forwards write: gate statistics for a training, raw projections for operators and inspection."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import torch

from deltamem_kernels.rule import DeltaRule

from ..errors import ArgumentError

OPEN, SHUT = 0.99, 0.01


class GateSums(NamedTuple):
    """Sums over the β gates of one layer's written tokens.

    Attributes:
        beta: float32 scalar, Σ β; under autograd on the graph.
        rest: float32 [6], off the graph: how many gates, Σ β², how many over ``OPEN``, how many under ``SHUT``, the
            smallest and the largest β (1 and 0 without a written token).
    """

    beta: torch.Tensor
    rest: torch.Tensor

    def plus(self, other: GateSums) -> GateSums:
        """The sums over both's gates."""
        mine, theirs = self.rest, other.rest
        rest = [mine[:4] + theirs[:4], torch.minimum(mine[4:5], theirs[4:5]), torch.maximum(mine[5:], theirs[5:])]
        return GateSums(self.beta + other.beta, torch.cat(rest))


class GateRecord:
    """What ``record_gates`` has seen, over all forwards."""

    def __init__(self):
        self._layers: dict[int, GateSums] = {}

    def add(self, sums: dict[int, GateSums]) -> None:
        """Count one forward's gates, by layer index."""
        for layer, more in sums.items():
            known = self._layers.get(layer)
            self._layers[layer] = more if known is None else known.plus(more)

    def mean_beta(self) -> dict[int, torch.Tensor]:
        """By layer index the mean β over written tokens and gates, float32 scalars; 0 where no token was written.

        Under autograd they are on the graph.
        """
        return {layer: sums.beta / sums.rest[0].clamp(min=1) for layer, sums in sorted(self._layers.items())}

    def penalty(self, target: float = 0.05) -> torch.Tensor:
        """Mean over layers of (mean β − target)²; a float32 scalar, under autograd on the graph.

        A layer in which no token was written counts as 0.

        Raises:
            ValueError: target is not between 0 and 1, or no forward has written a memory.
        """
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 <= target <= 1:
            raise ArgumentError(f"target: got {target!r}, allowed 0 to 1")
        means = self.mean_beta()
        if not means:
            raise ArgumentError("record_gates: no forward of a patched model has written a memory inside it")
        device = next(iter(means.values())).device
        terms = [(mean - target) ** 2 * (self._layers[layer].rest[0] > 0) for layer, mean in means.items()]
        return torch.stack([term.to(device) for term in terms]).mean()

    def saturated(self) -> dict[int, torch.Tensor]:
        """By layer index the share of gates over 0.99 or under 0.01, float32 scalars off the graph."""
        layers = sorted(self._layers.items())
        return {layer: (sums.rest[2] + sums.rest[3]) / sums.rest[0].clamp(min=1) for layer, sums in layers}

    def statistics(self) -> dict[int, dict[str, float]]:
        """By layer index, as plain numbers; on a GPU it waits for them.

        Returns:
            ``written`` (tokens × gates), ``mean``, ``std``, ``min``, ``max`` of β, and ``open`` and ``shut``, the
            shares over 0.99 and under 0.01. A layer in which no token was written has ``written`` 0 alone.
        """
        if not self._layers:
            return {}
        layers = sorted(self._layers)
        rows = [torch.cat([s.beta.detach().reshape(1), s.rest]).cpu() for s in (self._layers[i] for i in layers)]
        return {layer: _numbers(row) for layer, row in zip(layers, torch.stack(rows).double().tolist())}


def _numbers(sums: list[float]) -> dict[str, float]:
    beta, count, square, over, under, smallest, largest = sums
    if not count:
        return {"written": 0}
    mean = beta / count
    return {
        "written": int(count),
        "mean": mean,
        "std": max(square / count - mean * mean, 0.0) ** 0.5,
        "min": smallest,
        "max": largest,
        "open": over / count,
        "shut": under / count,
    }


_recording: contextvars.ContextVar[GateRecord | None] = contextvars.ContextVar("deltamem_gates", default=None)
_entered: list[GateRecord] = []


@contextlib.contextmanager
def record_gates() -> Iterator[GateRecord]:
    """Inside, forwards of patched models that write a memory have their β gates counted.

    ::

        with record_gates() as gates:
            model(write_ids, memory=memory)
        loss = loss + 0.01 * gates.penalty(target=0.05)

    β is float32, over written tokens: not the masked or non-finite ones, with segments one per segment. Read-only
    forwards count nothing. Holds for this context (thread or task) only; inside a torch.compile'd region, for the
    whole process. Of nested ones the innermost counts.
    """
    record = GateRecord()
    token = _recording.set(record)
    _entered.append(record)
    try:
        yield record
    finally:
        _entered.remove(record)
        _recording.reset(token)


def current_record() -> GateRecord | None:
    """The record of the innermost ``record_gates``, or None outside."""
    # Context variables cannot be traced; inside a compiled region the list, which is guarded, decides.
    if torch.compiler.is_compiling():
        return _entered[-1] if _entered else None
    return _recording.get()


def gate_sums(
    projections: torch.Tensor, gate_bias: torch.Tensor, rule: DeltaRule, mask: torch.Tensor | None
) -> GateSums:
    """Sums over the gates of the tokens that a scan would write.

    Args:
        projections: [B, T, W], raw.
        gate_bias: as the scan takes it.
        rule: the recurrence.
        mask: bool [B, T], True = a real token, or None.
    """
    if not projections[..., 0].numel():
        rest = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float32, device=projections.device)
        return GateSums(rest.new_zeros(()), rest)
    width, gates = rule.read_width, rule.gate_width
    written = torch.isfinite(projections).all(-1)
    written = (written if mask is None else written & mask).unsqueeze(-1)
    raw = torch.where(written, projections[..., 3 * width : 3 * width + gates], 0).float()
    beta = torch.sigmoid(raw + gate_bias[:gates].float())
    off = beta.detach()
    counts = [written.sum() * gates, (off * off * written).sum(), ((off > OPEN) & written).sum()]
    counts += [((off < SHUT) & written).sum(), torch.where(written, off, 1).amin(), torch.where(written, off, 0).amax()]
    return GateSums((beta * written).sum(), torch.stack([number.float() for number in counts]))


# One forward's raw projections: layer index → [B, T, W] in the model's dtype, off the graph.
Projections = dict[int, torch.Tensor]


_capturing: contextvars.ContextVar[list[Projections] | None] = contextvars.ContextVar("deltamem_capture", default=None)


@contextlib.contextmanager
def capture_projections() -> Iterator[list[Projections]]:
    """Inside, each forward of a patched model appends its tokens' raw projections to the list that is yielded.

    W is the rule's width: q, k, v, β (and λ), before tanh, normalisation, bias and sigmoid, as
    ``reference.recurrence.split_projections`` takes them. Holds for this context (thread or task) only; a
    torch.compile'd region is not seen. Of nested ones the innermost gets them.
    """
    found: list[Projections] = []
    token = _capturing.set(found)
    try:
        yield found
    finally:
        _capturing.reset(token)


def current_capture() -> list[Projections] | None:
    """The list of the innermost ``capture_projections``, or None outside and in compiled regions."""
    return None if torch.compiler.is_compiling() else _capturing.get()
