"""How sure a mean is: bootstrap intervals of scores, and of paired differences, that resample whole documents."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..arguments import check_integer
from ..errors import ArgumentError

RESAMPLES = 10_000
LEVEL = 0.95
_DRAWS = 2**21  # at once, 16 MB
_ROUNDING = 1e-12  # of the largest score: a mean that is no further above 0 is a tie


@dataclass(frozen=True)
class Estimate:
    """A mean and how far it would move if other documents had been drawn.

    Attributes:
        mean: over all questions, each counted once.
        low, high: of the percentile interval, which ``LEVEL`` of the resampled means lie in.
        above_zero: the share of resampled means above 0, by more than rounding could make of a tie.
        questions: how many there are.
        documents: of which they are.
        resampled: ``documents``, or ``questions`` where there is one document only: then the interval says nothing of
            other documents.
    """

    mean: float
    low: float
    high: float
    above_zero: float
    questions: int
    documents: int
    resampled: str

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def estimate(
    scores: Sequence[float], documents: Sequence[Hashable], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """The mean of ``scores`` with a bootstrap interval (Efron's percentile interval) of whole documents.

    Questions of one document are not independent: they share what was told and what was kept of it. So documents are
    drawn with replacement, as many as there are, each with all of its questions, and the mean over the questions drawn
    is taken (a cluster bootstrap). The order of the questions changes nothing.

    Args:
        scores: of the questions, finite.
        documents: of each question the document that it asks about (any name or number).
        seed: of the draws; one seed gives one interval.
        resamples: how many means are drawn.

    Raises:
        ArgumentError: no scores, one that is not finite, or not as many documents as scores.
    """
    check_integer(seed, "seed", 0)
    check_integer(resamples, "resamples", 1)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ArgumentError(f"scores: got {'none' if not values.size else f'shape {values.shape}'}, allowed a list")
    if not np.isfinite(values).all():
        raise ArgumentError("scores: got one that is not finite, allowed finite ones")
    if len(documents) != len(values):
        raise ArgumentError(f"documents: got {len(documents)}, allowed one for each of {len(values)} scores")
    # Counted from one of the scores on, equal scores leave exactly nothing to add.
    origin = float(values.min())
    by_document: dict[Hashable, list[float]] = {}
    for document, value in zip(documents, values):
        by_document.setdefault(document, []).append(float(value) - origin)
    units = list(by_document.values()) if len(by_document) > 1 else [[value] for value in by_document.popitem()[1]]
    resampled = "documents" if len(set(documents)) > 1 else "questions"
    # ``fsum`` rounds once, whatever the order. Units are sorted by what they hold, not by their names, and by how much
    # first: then rounding can only swap two that are as good as equal.
    counts, sums = np.array(sorted((len(unit), math.fsum(unit)) for unit in units)).T
    means = origin + _resampled_means(sums, counts, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    mean = origin + math.fsum(sums) / len(values)
    share = float((means > _ROUNDING * np.abs(values).max()).mean())
    return Estimate(mean, float(low), float(high), share, len(values), len(set(documents)), resampled)


def paired_difference(
    scores: Sequence[float],
    reference: Sequence[float],
    documents: Sequence[Hashable],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The mean of ``scores`` − ``reference``, question by question, with its interval; see ``estimate``.

    Both rows answered the same questions, so what makes a question hard for both leaves the difference.

    Args:
        scores, reference: of the same questions, in the same order.
        documents, seed, resamples: as ``estimate`` takes them.

    Raises:
        ArgumentError: as ``estimate``, or the rows are not equally long.
    """
    if len(scores) != len(reference):
        raise ArgumentError(f"reference: got {len(reference)} scores, allowed {len(scores)}, one for each of the row's")
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    return estimate(differences, documents, seed=seed, resamples=resamples)


def _resampled_means(sums: np.ndarray, counts: np.ndarray, random: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of as many units as there are, drawn with replacement; [resamples]."""
    units, means = len(sums), []
    rows = max(1, _DRAWS // units)
    for first in range(0, resamples, rows):
        drawn = random.integers(0, units, (min(rows, resamples - first), units))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)
