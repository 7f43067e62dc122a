"""Meter: sums over a step's forwards and devices, fetched once a step."""

from __future__ import annotations

import time

import torch

from .episode import KINDS


class Meter:
    """Sums on the device what a step's forwards found; ``take`` adds up the devices and starts anew.

    Args:
        layers: how many layers have a memory.
        device: where the sums are kept.
    """

    def __init__(self, layers: int, device: torch.device):
        self.layers = layers
        # forwards, penalty, tokens written, tokens read; losses and answer tokens by kind; β and saturation by layer.
        self.sums = torch.zeros(4 + 2 * len(KINDS) + 2 * layers, device=device, dtype=torch.float64)
        self.since: float | None = None

    def begin(self) -> None:
        """A forward begins: time runs from a step's first one, so that saving and evaluating do not count."""
        if self.since is None:
            self.since = time.perf_counter()

    @torch.no_grad()
    def add(self, found: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], kinds: torch.Tensor) -> None:
        """Count one forward: what ``EpisodeModel`` returned, its batch, and each row's place in ``KINDS``."""
        written = batch["write_mask"].sum()
        by_kind = torch.zeros(2, len(KINDS), device=self.sums.device, dtype=torch.float64)
        by_kind[0].index_add_(0, kinds, found["row_losses"].double())
        by_kind[1].index_add_(0, kinds, found["row_tokens"].double())
        head = torch.stack(
            [torch.ones_like(found["penalty"]), found["penalty"], written, batch["read_mask"].sum()]
        ).double()
        gates = torch.cat([found["mean_beta"], found["saturated"]]).double() * written
        self.sums += torch.cat([head, by_kind.flatten(), gates])

    def take(self, accelerator, gate_weight: float) -> dict:
        """The step's entry for the log; every process has to call it."""
        sums = accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        seconds, self.since = time.perf_counter() - self.since, None
        forwards, penalty, written, read = sums[:4]
        kinds, gates = sums[4 : 4 + 2 * len(KINDS)], sums[4 + 2 * len(KINDS) :]
        losses, counts = kinds[: len(KINDS)], kinds[len(KINDS) :]
        answer_loss, penalty = sum(losses) / sum(counts), penalty / forwards
        entry = {"loss": answer_loss + gate_weight * penalty, "answer_loss": answer_loss, "penalty": penalty}
        for kind, loss, count in list(zip(KINDS, losses, counts))[1:]:
            if count:
                entry[f"{kind}_loss"] = loss / count
        entry["mean_beta"] = [value / max(written, 1) for value in gates[: self.layers]]
        entry["saturated"] = [value / max(written, 1) for value in gates[self.layers :]]
        entry["tokens"] = int(written + read)
        entry["tokens_per_second"] = round((written + read) / seconds, 1)
        return entry
