"""What the answers to prompts of lm-evaluation-harness cost, as fields of ``Answer``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .costs import FirstToken, Stopwatch, peak_of, reset_peak


class Meter:
    """Counts and times one batch after the other.

    Attributes:
        found: by prompt; a prompt is one string, so that all of it counts as context. Seconds of a batch are shared
            among its rows, those of telling are the told text's, however many ask about it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.found: dict[str, dict[str, Any]] = {}
        self._told: dict[str, dict[str, Any]] = {}
        self._batch: list[tuple[str, int, str]] = []

    def clear(self) -> None:
        """Forget what was told; the costs stay."""
        self._told, self._batch = {}, []

    def told(self, texts: Sequence[str], tokens: Sequence[int], seconds: float) -> None:
        """These texts were told together."""
        share = seconds / max(1, sum(map(bool, tokens)))
        for text, count in zip(texts, tokens):
            self._told[text] = {"told_tokens": count, "tell_seconds": share if count else 0.0}

    def encoded(self, prompts: Sequence[str], tokens: Sequence[int], told: Sequence[str]) -> None:
        """These prompts, of so many tokens, go through the model next, with memories of these told texts."""
        self._batch = list(zip(prompts, tokens, told))

    @contextlib.contextmanager
    def generating(self) -> Iterator[FirstToken]:
        """Inside, the batch's answers are generated; what is yielded is to see their logits."""
        reset_peak(self.device)
        watch = Stopwatch(self.device)
        first = FirstToken(watch)
        yield first
        whole, rows = watch.seconds(), max(1, len(self._batch))
        prefill = whole if first.seconds is None else first.seconds
        seconds = {"prefill_seconds": prefill / rows, "decode_seconds": (whole - prefill) / rows}
        for prompt, tokens, told in self._batch:
            self.found[prompt] = {
                "context_tokens": tokens,
                "peak_bytes": peak_of(self.device),
                **seconds,
                **self._told.get(told, {}),
            }

    def answered(self, rows: Sequence[Sequence[int]], end: int | None) -> None:
        """What was generated for the batch; a row's tokens count to the first ``end``."""
        for (prompt, *_), row in zip(self._batch, rows):
            length = next((place + 1 for place, token in enumerate(row) if token == end), len(row))
            self.found[prompt]["answer_tokens"] = length
