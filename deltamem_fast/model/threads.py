"""How many threads a small model on a CPU gets: one. More would wait for each other longer than they compute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

from ..arguments import check_integer

# A matmul of such a model takes microseconds; on a busy machine the threads that share it wait milliseconds.
SMALL = 20_000_000  # parameters
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
HELP = "of PyTorch on a CPU (default: one for a small model, else as PyTorch has it; OMP_NUM_THREADS also says it)"


def check_threads(threads: int | None, name: str = "--threads") -> int | None:
    """``threads``, if PyTorch can have as many. Raises: ValueError."""
    most = 4 * (os.cpu_count() or 1)
    return threads if threads is None else check_integer(threads, name, 1, most)


@contextlib.contextmanager
def fitting_threads(model: nn.Module, threads: int | None = None) -> Iterator[int]:
    """Inside, PyTorch uses as many threads as fit ``model``: one if it is small and on a CPU, else as many as before.

    Args:
        threads: as many, instead. What the environment says (``OMP_NUM_THREADS``, ``MKL_NUM_THREADS``) also stands.

    Yields:
        How many they are. Of this process; afterwards they are as many as before.
    """
    before = torch.get_num_threads()
    wanted = threads
    if wanted is None and not any(os.environ.get(name) for name in VARIABLES):
        parameters = list(model.parameters())
        small = sum(p.numel() for p in parameters) <= SMALL and all(p.device.type == "cpu" for p in parameters)
        wanted = 1 if small else None
    if wanted is not None and wanted != before:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
