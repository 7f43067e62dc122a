"""Two numbers of a trained adapter, chosen by recall: how wide gates open, and how much of keys is for facts.

Gates' biases are −4.5 to −7.4, and Adam moves a parameter by its rate: training hardly moves them. It shuts gates in
text by their weights alone, less well in text that it lacks, and what they let through there is written over facts.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from deltamem_fast.adapter.record import record_of

from .pool import COUNTS, Pool
from .recall import recall
from .start import NULLS
from .trainee import Trainee

SHIFTS = (0.0, -1.0, -2.0, -3.0, -4.0)  # of the gates' logits
SCALES = (1.0, 0.5, 0.25, 0.125)  # of the rows of the key projection, but for the null direction's
EPISODES = 40  # of each count of facts
BEHIND = (0, 2)  # texts


@dataclass(frozen=True)
class Calibration:
    """A setting, and the share of right values that it has.

    Attributes:
        shift: added to the gates' logits.
        scale: that the rows of the key projection for facts are multiplied by.
        near: right, asked at once.
        far: right, asked behind text.
    """

    shift: float
    scale: float
    near: float
    far: float

    @property
    def score(self) -> float:
        """What is maximized."""
        return (self.near + self.far) / 2


def calibrate(trainee: Trainee, pool: Pool) -> list[Calibration]:
    """Set an adapter's gates and keys to the best setting: first of all shifts, then, with it, of all scales.

    Args:
        pool: training's own; nothing held out is looked at.

    Returns:
        All settings that were tried, in order; the adapter has the best one's, of equals the first.
    """
    trained = {name: p.detach().clone() for name, p in trainee.model.named_parameters() if p.requires_grad}
    tried: list[Calibration] = []

    def look(shift: float, scale: float) -> None:
        _restore(trainee.model, trained)
        adjust(trainee.model, shift, scale)
        found = Calibration(shift, scale, *recall(trainee, pool, COUNTS, episodes=EPISODES, behind=BEHIND))
        print(
            f"gates {shift:+.0f}, keys × {scale}: right {found.near:.3f}, {found.far:.3f} behind text", file=sys.stderr
        )
        tried.append(found)

    for shift in SHIFTS:
        look(shift, SCALES[0])
    shift = best(tried).shift
    for scale in SCALES[1:]:
        look(shift, scale)
    _restore(trainee.model, trained)
    adjust(trainee.model, best(tried).shift, best(tried).scale)
    return tried


def best(tried: list[Calibration]) -> Calibration:
    """The setting of the highest score, of equals the first."""
    return max(tried, key=lambda found: found.score)


@torch.no_grad()
def adjust(model: nn.Module, shift: float, scale: float) -> None:
    """Add to the gates' logits, and scale what keys are made of beside their null direction."""
    for attention in record_of(model).attentions.values():
        memory = attention.delta_memory
        memory.beta_bias += shift
        memory.memory_k_proj.unflatten(0, (-1, memory.config.rank))[:, NULLS:] *= scale


def estimated_seconds(trainee: Trainee, pool: Pool) -> float:
    """What ``calibrate`` will take, from a tenth of what it does for one setting."""
    episodes = max(1, EPISODES // 10)
    for _ in range(2):  # the first runs the lower layers, too
        began = time.monotonic()
        recall(trainee, pool, COUNTS, episodes=episodes, behind=BEHIND)
    return (time.monotonic() - began) * EPISODES / episodes * (len(SHIFTS) + len(SCALES) - 1)


@torch.no_grad()
def _restore(model: nn.Module, trained: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in trained.items():
        parameters[name].copy_(value)
