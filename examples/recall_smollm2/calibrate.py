"""Three numbers of a trained adapter, set after the last step: how wide gates open, how long keys and queries are.

Gates' biases are −4.5 to −7.4, and Adam moves a parameter by its rate: training hardly moves them. It shuts gates in
text by their weights alone, less well in text that it lacks, and what they let through there is written over facts.
Queries read facts in text that does not need them, too; a little shorter beside their null direction they do so less.
Answers at once hardly suffer from that, answers behind text do; README.md has the figures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from deltamem_fast.adapter.record import record_of

from .pool import COUNTS, Pool
from .recall import recall
from .start import NULLS
from .trainee import Trainee

SHIFTS = (0.0, -1.0, -2.0, -3.0, -4.0)  # of the gates' logits
KEYS = (1.0, 0.5, 0.25, 0.125)  # of the rows of the key projection, but for the null direction's
QUERIES = 0.8  # of the rows of the query projection, likewise
EPISODES = 40  # of each count of facts
BEHIND = (0, 2)  # texts


@dataclass(frozen=True)
class Setting:
    """What an adapter's parameters are changed by.

    Attributes:
        shift: added to the gates' logits.
        keys, queries: that what these are made of beside their null directions is multiplied by.
    """

    shift: float = SHIFTS[0]
    keys: float = KEYS[0]
    queries: float = 1.0


@dataclass(frozen=True)
class Tried:
    """A setting, and what an adapter remembers with it.

    Attributes:
        near: the share of right values, asked at once.
        far: the share of right values, asked behind text.
    """

    setting: Setting
    near: float
    far: float

    @property
    def right(self) -> float:
        """What is maximized."""
        return (self.near + self.far) / 2


def calibrate(trainee: Trainee, pool: Pool) -> list[Tried]:
    """Set an adapter to the most right of all shifts, with that to the most right of all keys, and shorten queries.

    Args:
        pool: training's own; nothing held out is looked at.

    Returns:
        All settings that were tried, in order; the adapter has the last one.
    """
    trained = {name: p.detach().clone() for name, p in trainee.model.named_parameters() if p.requires_grad}
    tried: list[Tried] = []

    def look(setting: Setting) -> None:
        _restore(trainee.model, trained)
        adjust(trainee.model, setting)
        found = Tried(setting, *recall(trainee, pool, COUNTS, episodes=EPISODES, behind=BEHIND))
        print(
            f"gates {setting.shift:+.0f}, keys × {setting.keys}, queries × {setting.queries}: right {found.near:.3f}, "
            f"{found.far:.3f} behind text", file=sys.stderr, flush=True,
        )  # fmt: skip
        tried.append(found)

    for shift in SHIFTS:
        look(Setting(shift))
    shift = most_right(tried).shift
    for keys in KEYS[1:]:
        look(Setting(shift, keys))
    look(replace(most_right(tried), queries=QUERIES))
    return tried


def most_right(tried: Sequence[Tried]) -> Setting:
    """Of equals the first."""
    return max(tried, key=lambda found: found.right).setting


@torch.no_grad()
def adjust(model: nn.Module, setting: Setting) -> None:
    """Change a patched model's parameters."""
    for attention in record_of(model).attentions.values():
        memory = attention.delta_memory
        memory.beta_bias += setting.shift
        for projection, scale in ((memory.memory_k_proj, setting.keys), (memory.memory_q_proj, setting.queries)):
            projection.unflatten(0, (-1, memory.config.rank))[:, NULLS:] *= scale


def estimated_seconds(trainee: Trainee, pool: Pool) -> float:
    """What ``calibrate`` will take, from a tenth of what it does for one setting."""
    episodes = max(1, EPISODES // 10)
    for _ in range(2):  # the first runs the lower layers, too
        began = time.monotonic()
        recall(trainee, pool, COUNTS, episodes=episodes, behind=BEHIND)
    return (time.monotonic() - began) * EPISODES / episodes * (len(SHIFTS) + len(KEYS))


@torch.no_grad()
def _restore(model: nn.Module, trained: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in trained.items():
        parameters[name].copy_(value)
