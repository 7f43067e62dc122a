"""Where keys and queries point, as losses: keys keep facts apart, text neither reads nor erases them.

While a memory holds one fact, answers are best where all keys are one. So training lets them grow alike, and then what
is told next overwrites, and what is forgotten takes the others with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from deltamem_fast.adapter.record import record_of
from deltamem_fast.memory.telling import writes_of
from deltamem_kernels.reference.recurrence import split_projections

from .hidden import attention_inputs
from .start import NULL_KEY, NULL_QUERY, NULLS


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

        def add(attention: nn.Module, hidden: torch.Tensor) -> None:
            memory = attention.delta_memory
            writes = writes_of(memory, memory.project(hidden)[0], segments)
            # The key projection alone is to keep facts apart.
            weights = writes.gates.detach().mean(-1).square()
            if segments is None:
                weights = weights * mask[..., None]
            found = torch.einsum("bth,bthi,bthj->hij", weights, writes.keys, writes.keys), weights.sum((0, 1))
            known = self._moments.get(attention)
            self._moments[attention] = found if known is None else (known[0] + found[0], known[1] + found[1])

        with attention_inputs(self._attentions, add):
            yield

    def mean(self) -> torch.Tensor:
        """The mean squared product of two keys, over their components for facts, and what they have of the others.

        1 / (r − 2) at the least, 1 at most, of all layers and heads; a float32 scalar on the graph.
        """
        each = []
        for sums, weights in self._moments.values():
            moments = sums / weights[:, None, None]  # [H, r, r], of trace 1
            null = moments.diagonal(dim1=1, dim2=2)[:, :NULLS].sum(1)
            each.append(moments[:, NULLS:, NULLS:].square().sum((1, 2)) + null)
        return torch.stack(each).mean()


class InText:
    """What queries, keys and gates do in text, where nothing is stated and nothing asked."""

    def __init__(self, model: nn.Module):
        self._attentions = list(record_of(model).attentions.values())
        self._noise: list[torch.Tensor] = []
        self._erased: list[torch.Tensor] = []

    @contextlib.contextmanager
    def counted(self, mask: torch.Tensor, segments: torch.Tensor | None) -> Iterator[None]:
        """Inside, forwards count.

        Args:
            mask: bool [B, T], True = a real token.
            segments: int64 [B, T], −1 = not written, or None.
        """

        def add(attention: nn.Module, hidden: torch.Tensor) -> None:
            memory = attention.delta_memory
            projections, bias = memory.project(hidden)
            queries = split_projections(projections[mask].float()[None], bias.float(), memory.rule)[0]
            self._noise.append(1 - queries[..., NULL_QUERY].square().mean())
            writes = writes_of(memory, projections, segments)
            erased = writes.gates.mean(-1) * (1 - writes.keys[..., NULL_KEY].square())
            if segments is None:
                erased = erased * mask[..., None]
            self._erased.append(erased.sum() / (mask.sum() * erased.shape[-1]))

        with attention_inputs(self._attentions, add):
            yield

    def noise(self) -> torch.Tensor:
        """What queries have beside their null direction, where no key is: a read of what does not matter to the text.

        The query projection alone gets a gradient.

        Returns:
            The share of a query's square, 0 to 1, of all layers and heads; a float32 scalar on the graph.
        """
        return torch.stack(self._noise).mean()

    def erased(self) -> torch.Tensor:
        """What a token of text erases of facts: its gate times what its key has beside the keys' null direction.

        Key and gate projections alone get a gradient.

        Returns:
            The share, 0 to 1, of what stands under such a key, of all tokens, layers and heads; a float32 scalar on
            the graph.
        """
        return torch.stack(self._erased).mean()
