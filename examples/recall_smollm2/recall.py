"""Recall of episodes whose answers are given up to the values: what a training is watched and calibrated by."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltamem_fast import MemoryState

from .pool import Pool
from .trainee import Trainee


@torch.no_grad()
def recall(
    trainee: Trainee, pool: Pool, counts: Sequence[int], *, episodes: int | None = None, behind: Sequence[int] = (0,)
) -> list[float]:
    """The share of values whose every token is the likeliest, for each number of texts that are told behind the facts.

    Args:
        counts: how many facts episodes have; the share is the mean of theirs.
        episodes: of each count; None = all of the pool.
        behind: numbers of texts, growing; each text is told in a context of its own, of up to 128 tokens.
    """
    right: list[list[float]] = [[] for _ in behind]
    for count in counts:
        places = range(pool.size if episodes is None else min(episodes, pool.size))
        told, asked = zip(*[pool.episode(count, place, True) for place in places])
        memory = MemoryState.zeros(trainee.model, len(told))
        trainee.tell(told, memory)
        for shares, first, last in zip(right, (0, *behind), behind):
            for text in range(first, last):
                trainee.tell([[row] for row in pool.texts(text, len(told))], memory)
            shares.append(trainee.answer(asked, memory)[1].float().mean().item())
    return [sum(shares) / len(shares) for shares in right]
