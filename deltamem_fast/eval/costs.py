"""Seconds and bytes: what an answer costs."""

from __future__ import annotations

import sys
import time
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
