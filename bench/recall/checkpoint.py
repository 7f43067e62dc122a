"""A training run on disk: weights, optimizer, random numbers and place, so that it goes on as if never stopped."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch

from deltamem_fast.storage.files import write_atomically

NAME = "checkpoint.pt"


def save(output: Path, options: dict, model: dict, optimizer: torch.optim.Optimizer, random: Random, **place) -> None:
    """Write a checkpoint into ``output``, atomically; ``place`` is the run's own, plain values."""
    version, internal, gauss = random.getstate()
    state = {
        "options": options, "model": model, "optimizer": optimizer.state_dict(),
        "random": [version, list(internal), gauss], "place": place,
    }  # fmt: skip
    write_atomically(output / NAME, lambda temporary: torch.save(state, temporary), private=False)


def load(output: Path, options: dict, device) -> dict | None:
    """The checkpoint in ``output``, or None if there is none.

    Raises:
        ValueError: it was made with other options.
    """
    path = output / NAME
    if not path.is_file():
        return None
    state = torch.load(path, map_location=device, weights_only=True)
    if state["options"] != options:
        raise ValueError(f"output: {path} was made with {state['options']}; remove it, or give the same options")
    return state


def restore(state: dict, optimizer: torch.optim.Optimizer, random: Random) -> None:
    """Set optimizer and random numbers to a checkpoint's."""
    optimizer.load_state_dict(state["optimizer"])
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))


def remove(output: Path) -> None:
    """Remove the checkpoint of a run that has come to its end."""
    (output / NAME).unlink(missing_ok=True)
