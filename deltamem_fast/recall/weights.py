"""The weights of the recall proof: a backbone, and adapters that were trained on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import CONFIG_NAME
from ..errors import FileMissingError
from ..model.loading import load_model
from ..storage.files import as_path

SHIPPED = Path(__file__).parent.parent / "data" / "recall"
# Write strategy → the directory of its adapter.
STRATEGIES = {"tsw": "tsw-r8", "ssw": "ssw-r8", "msw": "msw-r8"}
MADE_BY = "python -m examples.recall"


@dataclass(frozen=True)
class Weights:
    """Where the weights lie: ``backbone``, a directory, and ``adapters``, strategy → directory."""

    backbone: Path
    adapters: dict[str, Path]


def find_weights(directory: str | os.PathLike | None = None) -> Weights:
    """The backbone and the adapters of ``STRATEGIES`` under ``directory``, by default the shipped ones.

    Raises:
        FileNotFoundError: a part is missing; the message names it and the command that makes it.
    """
    directory = SHIPPED if directory is None else as_path(directory, "weights")
    weights = Weights(directory / "backbone", {name: directory / folder for name, folder in STRATEGIES.items()})
    for path in (weights.backbone / "config.json", *(folder / CONFIG_NAME for folder in weights.adapters.values())):
        if not path.is_file():
            raise FileMissingError(f"weights: {path}: no such file; `{MADE_BY} --output {directory}` makes them")
    return weights


def load_backbone(directory: str | os.PathLike, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """The frozen backbone, float32 on ``device``, and its tokenizer. Nothing is downloaded.

    Raises:
        ValueError, OSError: the directory holds no model, or a broken one.
    """
    return load_model(str(directory), "weights", device=device, dtype="float32", local=True, quiet=True)
