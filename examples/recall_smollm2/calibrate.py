"""Three numbers of a trained adapter, chosen on training's own: how wide gates open, how long keys and queries are.

Gates' biases are −4.5 to −7.4, and Adam moves a parameter by its rate: training hardly moves them. It shuts gates in
text by their weights alone, less well in text that it lacks, and what they let through there is written over facts.
Queries that are longer beside their null direction read more of facts, in text that does not need them, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import nn

from deltamem_fast import MemoryState
from deltamem_fast.adapter.record import record_of

from .pool import COUNTS, Pool
from .recall import recall
from .start import NULLS
from .trainee import Trainee

SHIFTS = (0.0, -1.0, -2.0, -3.0, -4.0)  # of the gates' logits
KEYS = (1.0, 0.5, 0.25, 0.125)  # of the rows of the key projection, but for the null direction's
QUERIES = (1.0, 0.9, 0.8, 0.7, 0.6)  # the same of the query projection
# KL(frozen ‖ with memory) per token of training's text, nats, that is let pass: as much as 1 % of perplexity.
DIVERGENCE = 0.01
EPISODES = 40  # of each count of facts
BEHIND = (0, 2)  # texts
FACTS = 8  # behind which the divergence is looked at


@dataclass(frozen=True)
class Setting:
    """What an adapter's parameters are changed by.

    Attributes:
        shift: added to the gates' logits.
        keys, queries: that what these are made of beside their null directions is multiplied by.
    """

    shift: float = SHIFTS[0]
    keys: float = KEYS[0]
    queries: float = QUERIES[0]


@dataclass(frozen=True)
class Tried:
    """A setting, and what an adapter does with it.

    Attributes:
        near: the share of right values, asked at once.
        far: the share of right values, asked behind text.
        divergence: KL(frozen ‖ with memory) per token of text, read behind facts, nats.
    """

    setting: Setting
    near: float
    far: float
    divergence: float

    @property
    def right(self) -> float:
        """What is maximized."""
        return (self.near + self.far) / 2


def calibrate(trainee: Trainee, pool: Pool) -> list[Tried]:
    """Set an adapter to the best of settings: all shifts, with the best all keys, with that queries until it is quiet.

    Args:
        pool: training's own; nothing held out is looked at.

    Returns:
        All settings that were tried, in order; the adapter has the ``chosen`` one.
    """
    trained = {name: p.detach().clone() for name, p in trainee.model.named_parameters() if p.requires_grad}
    tried: list[Tried] = []

    def look(setting: Setting) -> Tried:
        _restore(trainee.model, trained)
        adjust(trainee.model, setting)
        found = Tried(setting, *recall_and_divergence(trainee, pool, EPISODES))
        print(
            f"gates {setting.shift:+.0f}, keys × {setting.keys}, queries × {setting.queries}: right {found.near:.3f}, "
            f"{found.far:.3f} behind text; KL {found.divergence:.4f}", file=sys.stderr, flush=True,
        )  # fmt: skip
        tried.append(found)
        return found

    for shift in SHIFTS:
        look(Setting(shift))
    best = _most_right(tried)
    for keys in KEYS[1:]:
        look(replace(best.setting, keys=keys))
    best = _most_right(tried)
    for queries in QUERIES[1:]:
        if best.divergence <= DIVERGENCE:
            break
        best = look(replace(best.setting, queries=queries))
    _restore(trainee.model, trained)
    adjust(trainee.model, chosen(tried).setting)
    return tried


def _most_right(tried: Sequence[Tried]) -> Tried:
    return max(tried, key=lambda found: found.right)


def chosen(tried: Sequence[Tried]) -> Tried:
    """Of gates and keys the most right, of equals the first; of queries with these the first quiet, or the last."""
    best = _most_right([found for found in tried if found.setting.queries == QUERIES[0]]).setting
    of_queries = [found for found in tried if replace(found.setting, queries=best.queries) == best]
    return next((found for found in of_queries if found.divergence <= DIVERGENCE), of_queries[-1])


@torch.no_grad()
def adjust(model: nn.Module, setting: Setting) -> None:
    """Change a patched model's parameters."""
    for attention in record_of(model).attentions.values():
        memory = attention.delta_memory
        memory.beta_bias += setting.shift
        for projection, scale in ((memory.memory_k_proj, setting.keys), (memory.memory_q_proj, setting.queries)):
            projection.unflatten(0, (-1, memory.config.rank))[:, NULLS:] *= scale


@torch.no_grad()
def recall_and_divergence(trainee: Trainee, pool: Pool, episodes: int) -> tuple[float, float, float]:
    """What ``Tried`` has of an adapter as it is; ``episodes``: of each count of facts."""
    near, far = recall(trainee, pool, COUNTS, episodes=episodes, behind=BEHIND)
    told = [pool.episode(FACTS, place, True)[0] for place in range(min(episodes, pool.size))]
    memory = MemoryState.zeros(trainee.model, len(told))
    trainee.tell(told, memory)
    texts = pool.texts(max(BEHIND), len(told))
    return near, far, trainee.text(texts, memory.read_only(), Random(0)).divergence.item()


def estimated_seconds(trainee: Trainee, pool: Pool) -> float:
    """What ``calibrate`` may take, from a tenth of what it does for one setting."""
    episodes = max(1, EPISODES // 10)
    for _ in range(2):  # the first runs the lower layers, too
        began = time.monotonic()
        recall_and_divergence(trainee, pool, episodes)
    return (time.monotonic() - began) * EPISODES / episodes * (len(SHIFTS) + len(KEYS) + len(QUERIES) - 2)


@torch.no_grad()
def _restore(model: nn.Module, trained: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in trained.items():
        parameters[name].copy_(value)
