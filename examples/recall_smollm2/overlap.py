"""Keys that keep facts apart, as a loss.

While a memory holds one fact, answers are best where all keys are one. So training lets them grow alike, and then what
is told next overwrites, and what is forgotten takes the others with it. This loss is the mean squared product of two
keys that are written under, over their components for facts (least where they point everywhere alike), and what they
have of the two null directions that start.py leaves to text without facts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from deltamem_fast.adapter.record import record_of
from deltamem_fast.memory.telling import writes_of

from .start import NULLS


class Overlap:
    """The keys that a patched model writes under: their second moments, layer by layer and head by head."""

    def __init__(self, model: nn.Module):
        self._attentions = list(record_of(model).attentions.values())
        self._moments: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def counted(self, mask: torch.Tensor, segments: torch.Tensor | None) -> Iterator[None]:
        """Inside, forwards' keys count, by the square of their gates: what hardly writes hardly counts.

        Args:
            mask: bool [B, T], True = a real token.
            segments: int64 [B, T], −1 = not written, or None.
        """

        def add(attention: nn.Module, arguments: tuple, named: dict) -> None:
            memory, hidden = attention.delta_memory, arguments[0] if arguments else named["hidden_states"]
            # The key projection alone is to keep facts apart.
            projections = nn.functional.linear(hidden.detach(), memory.stacked()[0])
            writes = writes_of(memory, projections, segments)
            weights = writes.gates.detach().mean(-1).square()
            if segments is None:
                weights = weights * mask[..., None]
            found = torch.einsum("bth,bthi,bthj->hij", weights, writes.keys, writes.keys), weights.sum((0, 1))
            known = self._moments.get(attention)
            self._moments[attention] = found if known is None else (known[0] + found[0], known[1] + found[1])

        hooks = [attention.register_forward_pre_hook(add, with_kwargs=True) for attention in self._attentions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mean(self) -> torch.Tensor:
        """1 / (r − 2) at the least, 1 at most, of all layers and heads; a float32 scalar on the graph."""
        each = []
        for sums, weights in self._moments.values():
            moments = sums / weights[:, None, None]  # [H, r, r], of trace 1
            null = moments.diagonal(dim1=1, dim2=2)[:, :NULLS].sum(1)
            each.append(moments[:, NULLS:, NULLS:].square().sum((1, 2)) + null)
        return torch.stack(each).mean()
