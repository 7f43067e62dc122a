"""Adapters of the recall proof: trained on the frozen backbone to answer from memory what no context shows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import nn

from deltamem_fast import DeltaMemConfig, patch_model, save_adapter
from deltamem_fast.adapter.files import SAFETENSORS_NAME
from deltamem_fast.recall import measure
from deltamem_fast.recall.weights import load_backbone
from deltamem_fast.storage.files import read_json, write_json
from deltamem_fast.training import TrainingOptions, train
from deltamem_fast.training.checkpoints import RUN_NAME

from .lasting import LastingOptions, make_lasting
from .settle import SettlingOptions, settle

CHECKED = (1, 2, 4, 8)  # facts


@dataclass(frozen=True)
class Stage:
    """One run of ``train``: its name, which is its folder's, its steps, and its file of episodes."""

    name: str
    steps: int
    data: Path


def adapter_config(strategy: str, rank: int) -> DeltaMemConfig:
    """The released recipe, of this strategy and rank: ``ssw`` writes once a sentence, ``msw`` has four states."""
    changes = {"rank": rank, "base_slice_ref_width": rank, "alpha": 2.0 * rank}
    if strategy == "ssw":
        return DeltaMemConfig.ssw("sentence_mean", **changes)
    return DeltaMemConfig.preset(strategy, **changes)


def train_adapter(
    config: DeltaMemConfig,
    options: TrainingOptions,
    stages: list[Stage],
    settling: SettlingOptions | None,
    backbone: str | os.PathLike,
    lasting: Sequence[LastingOptions] = (),
) -> dict:
    """Train, or go on with, an adapter of the backbone in ``backbone``, by stages; then settle it, then make it last.

    Args:
        options: of all stages; each runs in a folder of its own below ``output``, which then holds the adapter and
            ``training.json``.
        settling: of the steps behind the stages, or None = without them.
        lasting: of the last steps, one stage behind another.

    Returns:
        The figures, as ``training.json`` holds them.

    Raises:
        KeyboardInterrupt: a stage was told to stop, and has left a checkpoint.
    """
    output, adapter = Path(options.output), config
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    runs = {}
    for stage in stages:
        run = replace(options, output=str(output / stage.name), steps=stage.steps, resume="auto")
        if not is_trained(run.output):
            model, tokenizer = load_backbone(backbone, device)
            if train(model, tokenizer, [stage.data], run, adapter).interrupted:
                raise KeyboardInterrupt
        adapter = run.output
        runs[stage.name] = read_json(Path(run.output) / RUN_NAME)
    model, tokenizer = load_backbone(backbone, device)
    patch_model(model, adapter)
    figures = {"stages": runs}
    if settling is not None:
        found = settle(model, tokenizer, config, [stages[-1].data], settling)
        figures["settling"] = {"options": asdict(settling), **found}
    if lasting:
        figures["lasting"] = [{"options": asdict(each), **make_lasting(model, tokenizer, each)} for each in lasting]
    figures["recall"] = check(model, tokenizer)
    write_json(output / RUN_NAME, figures, private=False)
    save_adapter(model, output)
    return figures


def is_trained(directory: str | os.PathLike) -> bool:
    """Whether a run has come to its end: the adapter is written last."""
    return (Path(directory) / SAFETENSORS_NAME).is_file()


def check(model: nn.Module, tokenizer) -> dict[str, dict[str, float]]:
    """Recall of a trained adapter on a few episodes: facts → condition → share."""
    found = {}
    for count in CHECKED:
        episodes = [measure.draw_episode(Random(seed), count) for seed in range(64)]
        conditions = ("memory", "empty", "context", "half_frozen", "half_memory")
        found[str(count)] = {c: round(measure.recall(model, tokenizer, episodes, c), 4) for c in conditions}
    return found
