"""Seconds, bytes and tokens: what an answer costs."""

from __future__ import annotations

import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from transformers import LogitsProcessor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stopwatch:
    """Seconds since it was made, or since the last ``restart``; what a GPU was given has been done by then."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Start at 0."""
        self.started = self._now()

    def seconds(self) -> float:
        """Since it started."""
        return self._now() - self.started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class FirstToken(LogitsProcessor):
    """Changes nothing: notes when the first token's logits were there."""

    def __init__(self, watch: Stopwatch):
        self.watch, self.seconds = watch, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.seconds is None:
            self.seconds = self.watch.seconds()
        return scores


def answer_length(
    tokens: Sequence[int],
    ends: Collection[int],
    stops: Sequence[str] = (),
    decode: Callable[[Sequence[int]], str] | None = None,
) -> int:
    """How many of the tokens that were generated are an answer's; what stands behind them is padding, or too much.

    Args:
        ends: tokens that end a text; the first of them is the answer's last token.
        stops: texts that stop an answer; the token that completes the first of them is the answer's last, too.
        decode: tokens → their text, with ``stops``.
    """
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    if decode is None or not stops:
        return length

    def stopped(count: int) -> bool:
        text = decode(tokens[:count])
        return any(stop in text for stop in stops)

    return bisect_left(range(length + 1), True, key=stopped) if stopped(length) else length


def reset_peak(device: torch.device) -> None:
    """From here on ``peak_of`` counts; where the system does not allow that, it counts from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")  # Linux: the high-water mark starts again
    except OSError:
        pass


def peak_of(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took there, on a CPU the most that the process held in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource  # not on Windows, where this line is not reached

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)
