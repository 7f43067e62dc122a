"""What the answers to prompts of lm-evaluation-harness cost, as fields of ``Answer``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .costs import FirstToken, Stopwatch, peak_of, reset_peak
from .telling import Remembered


class Meter:
    """Counts and times one batch after the other.

    Attributes:
        found: by prompt. Where it has a document, it is one string with it, and all of it counts as context. Seconds
            of a batch are shared among its rows, those of telling are the told text's, however many ask about it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Forget all costs."""
        self.found: dict[str, dict[str, Any]] = {}
        self._batch: list[tuple[str, dict[str, Any]]] = []

    def encoded(
        self, prompts: Sequence[str], tokens: Sequence[int], told: Sequence[Remembered | None], *, asked: bool = False
    ) -> None:
        """These prompts, of so many tokens, go through the model next, each with what was told before it.

        Args:
            asked: a prompt is a question without a document.
        """
        name, self._batch = "question_tokens" if asked else "context_tokens", []
        for prompt, count, one in zip(prompts, tokens, told):
            telling = {} if one is None else {"told_tokens": one.tokens, "tell_seconds": one.seconds}
            self._batch.append((prompt, {name: count} | telling))

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
        peak = {"peak_bytes": peak_of(self.device)}
        self.found |= {prompt: {**known, **peak, **seconds} for prompt, known in self._batch}

    def answered(self, lengths: Sequence[int]) -> None:
        """How many tokens each answer of the batch has."""
        for (prompt, _), length in zip(self._batch, lengths):
            self.found[prompt]["answer_tokens"] = length
