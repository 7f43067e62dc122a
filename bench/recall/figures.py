"""Shares, ratios and their standard errors; which weights they are of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from deltamem_fast.recall import world

from .conversations import Conversation

DIGITS = 5  # behind the point, in the results
# A guess of the right kind hits one value in so many.
CHANCE = {kind: 1 / len(values) for kind, values in world.VALUES.items()}


def weights_digest(folder: Path) -> str:
    """The first twelve digits of the SHA-256 of a folder's weights; that of nothing where it has none."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def standard_error(share: float, count: int) -> float:
    """Of a share of ``count`` answers: √(p (1 − p) / n), as if all were independent."""
    return math.sqrt(share * (1 - share) / count)


def ratio(share: float, base: float, count: int, base_count: int) -> tuple[float, float] | None:
    """``share`` ÷ ``base`` and its standard error, to first order; None where a base of 0 gives neither.

    The two are taken as independent; asked the same questions they are not, and the error is smaller than said.
    """
    if not base:
        return None
    errors = standard_error(share, count), standard_error(base, base_count)
    return share / base, math.hypot(errors[0], share / base * errors[1]) / base


def point(conversations: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """The figures of one point of a curve.

    Args:
        answers: by conversation, in the order of its questions.

    Returns:
        ``share`` of right answers, its standard ``error``, how many were ``asked`` and the ``chance`` to guess; the
        share of each part of the questions by name with ``_error``; ``stale``, the share of earlier values among the
        answers to questions that have any.
    """
    given = [pair for talk, texts in zip(conversations, answers) for pair in zip(talk.questions, texts, strict=True)]
    hits = [text == question.fact.value for question, text in given]
    chance = sum(CHANCE[question.fact.kind] for question, _ in given) / len(given)
    found = _share("share", hits) | {"asked": len(given), "chance": round(chance, DIGITS)}
    found["error"] = found.pop("share_error")
    for part in sorted({question.part for question, _ in given} - {""}):
        found |= _share(part, [hit for (question, _), hit in zip(given, hits) if question.part == part])
    stale = [text in question.before for question, text in given if question.before]
    return found | (_share("stale", stale) if stale else {})


def _share(name: str, hits: Sequence[bool]) -> dict[str, float]:
    share = sum(hits) / len(hits)
    return {name: round(share, DIGITS), f"{name}_error": round(standard_error(share, len(hits)), DIGITS)}
