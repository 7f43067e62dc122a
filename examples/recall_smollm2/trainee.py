"""A patched model in training: what is told and asked, as losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_fast import DeltaMemConfig, MemoryState, memory_disabled
from deltamem_fast.adapter.record import identity_of

from .halves import LowerOutputs, detached_layers, upper_layers
from .hidden import Seen
from .pointing import InText, Overlap
from .pool import Asked, Told

TEXT_SHARE = 4  # every so manieth token of a text is compared: the output layer costs as much as eight others


@dataclass
class Kept:
    """What was computed of a frozen model, for adapters on the same layers.

    Attributes:
        lower, frozen: by token ids, what it makes of them: below the memory, and, of texts, at its end.
        seen: what training starts from; see ``structured_start``.
    """

    lower: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    frozen: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    seen: dict[tuple[bool, bool], list[Seen]] = field(default_factory=dict)


class TextLosses(NamedTuple):
    """What telling a text comes to; float32 scalars on the graph.

    Attributes:
        divergence: KL(frozen model ‖ with memory) per token, nats.
        noise, erased: see pointing.py.
    """

    divergence: torch.Tensor
    noise: torch.Tensor
    erased: torch.Tensor


class Trainee:
    """A patched model in training; what the frozen model makes of token sequences is kept.

    Args:
        model: patched with an adapter whose lowest layer is not 0, or 0: then nothing is kept but embeddings.
        kept: what another Trainee of the same backbone and lowest layer had kept; it grows. None = nothing yet.
    """

    def __init__(self, model: nn.Module, config: DeltaMemConfig, kept: Kept | None = None):
        self.model, self.config = model, config
        kept = Kept() if kept is None else kept
        layers = identity_of(model).memories
        self.first, self.last = min(layers), max(layers)
        dtype = torch.float16 if model.dtype == torch.float32 else None
        self.lower = LowerOutputs(model, self.first, dtype, kept.lower)
        self._frozen = kept.frozen

    def tell(self, rows: Sequence[Sequence[Told]], memory: MemoryState) -> torch.Tensor:
        """Tell each memory its row's contexts, one after another; the writes are on the graph.

        Returns:
            The overlap of the keys, a float32 scalar on the graph; see pointing.py.
        """
        overlap = Overlap(self.model)
        for contexts in zip(*rows, strict=True):
            self._write(contexts, memory, overlap)
        return overlap.mean()

    def _write(self, rows: Sequence[Told], memory: MemoryState, overlap: Overlap) -> None:
        hidden, mask = self.lower([row.ids for row in rows])
        segments = self._segments(rows, mask)
        with (
            overlap.counted(mask, segments.get("segment_ids")),
            upper_layers(self.model, self.first, self.last + 1),  # what is above writes nothing
            detached_layers(self.model),
        ):
            self.model.model(inputs_embeds=hidden, attention_mask=mask, memory=memory, use_cache=False, **segments)

    def answer(self, rows: Sequence[Asked], memory: MemoryState) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of the answers' tokens by their weights, and which values are likeliest throughout.

        Args:
            memory: is read, and not written.

        Returns:
            A float32 scalar on the graph, and bool [values].
        """
        hidden, mask = self.lower([row.ids for row in rows])
        device = hidden.device
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True).to(device)
        weights = nn.utils.rnn.pad_sequence([torch.tensor(row.weights) for row in rows], batch_first=True).to(device)
        with upper_layers(self.model, self.first):
            found = self.model.model(
                inputs_embeds=hidden, attention_mask=mask, memory=memory.read_only(), use_cache=False
            ).last_hidden_state
        row, place = (weights[:, 1:] > 0).nonzero(as_tuple=True)
        logits = self.model.lm_head(found[row, place]).float()
        targets, weights = ids[row, place + 1], weights[row, place + 1]
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        valued = weights == 1
        # A value's tokens stand side by side; the first of each begins a new one.
        begins = valued & ~F.pad(valued[:-1], (1, 0))
        of = begins.cumsum(0)[valued] - 1
        wrong = torch.zeros(int(begins.sum()), device=device)
        wrong.index_add_(0, of, (logits.detach().argmax(-1) != targets)[valued].float())
        return loss, wrong == 0

    def text(self, rows: Sequence[Told], memory: MemoryState, random: Random) -> TextLosses:
        """Tell texts behind what a memory holds."""
        hidden, mask = self.lower([row.ids for row in rows])
        row, place = mask.nonzero(as_tuple=True)
        kept = random.sample(range(len(row)), len(row) // TEXT_SHARE)
        row, place = row[kept], place[kept]

        def log_probabilities(states: torch.Tensor) -> torch.Tensor:
            return self.model.lm_head(states[row, place]).float().log_softmax(-1)

        with torch.no_grad():
            wanted = log_probabilities(self._frozen_outputs(rows, hidden, mask))
        segments = self._segments(rows, mask)
        in_text = InText(self.model)
        with in_text.counted(mask, segments.get("segment_ids")), upper_layers(self.model, self.first):
            found = self.model.model(
                inputs_embeds=hidden, attention_mask=mask, memory=memory, use_cache=False, **segments
            )
        found = log_probabilities(found.last_hidden_state)
        divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()
        return TextLosses(divergence, in_text.noise(), in_text.erased())

    def _frozen_outputs(self, rows: Sequence[Told], hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the frozen model makes of texts, [B, T, hidden], computed once each and kept in the model's dtype."""
        keys = [tuple(row.ids) for row in rows]
        missing = [i for i, key in enumerate(keys) if key not in self._frozen]
        if missing:
            with upper_layers(self.model, self.first), memory_disabled(self.model):
                found = self.model.model(
                    inputs_embeds=hidden[missing], attention_mask=mask[missing], use_cache=False
                ).last_hidden_state
            for i, states in zip(missing, found):
                self._frozen[keys[i]] = states[: len(keys[i])].clone()
        return nn.utils.rnn.pad_sequence([self._frozen[key] for key in keys], batch_first=True)

    def _segments(self, rows: Sequence[Told], mask: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.config.segmented:
            return {}
        segments = [torch.tensor(row.segments) for row in rows]
        return {"segment_ids": nn.utils.rnn.pad_sequence(segments, True, -1).to(mask.device)}
