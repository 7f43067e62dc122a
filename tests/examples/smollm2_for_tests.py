"""What tests of examples/recall_smollm2 share: its modules, and a stand-in of SmolLM2's kind with random weights."""

import importlib
from dataclasses import replace

import torch
from support import tiny_model

from deltamem_fast import DeltaMemConfig, patch_model
from deltamem_fast.training.setup import prepare_for_training

# The reference backend is plain PyTorch: no loops are compiled for these ranks.
CONFIGS = {
    "msw": DeltaMemConfig.msw(2, rank=4, base_slice_ref_width=4, target_layers=(1, 2), alpha=8.0, output_init="zero"),
    "ssw": DeltaMemConfig.ssw(
        "sentence_mean", rank=4, base_slice_ref_width=4, target_layers=(1, 2), alpha=8.0, output_init="zero"
    ),
}


def example(name):
    return importlib.import_module(f"examples.recall_smollm2.{name}")


def stand_in(tokenizer, dtype=torch.float32):
    return tiny_model("llama", dtype=dtype, vocab_size=len(tokenizer)).requires_grad_(False)


def fresh_trainee(tokenizer, strategy="msw"):
    """A trainee as before its first step, and a pool of eight episodes of each count."""
    model = patch_model(stand_in(tokenizer), CONFIGS[strategy], backend="reference")
    prepare_for_training(model)
    drawn = example("pool").Pool(example("pool").Encoder(tokenizer, CONFIGS[strategy]), 8, 0)
    return example("train").Trainee(model, CONFIGS[strategy]), drawn


def short(train, **changes):
    """Options of a run of four steps."""
    return replace(train.TrainOptions(steps=4, pool=8, decay=0.5, save_every=2, quiet_from=1), **changes)


def fewer(monkeypatch):
    """Fewer rows, statements and settings: the stand-in learns nothing anyway."""
    for name, changes in {
        "pool": {"ROWS": {1: 4, 2: 3, 4: 2, 8: 2}},
        "train": {"ROWS": {1: 4, 2: 3, 4: 2, 8: 2}, "LOGGED": 2, "CHECKED": 2, "LEVELS": ((1,), (1, 2))},
        "hidden": {"FACTS": 48, "TALKS": 4},
        "calibrate": {"EPISODES": 2, "SHIFTS": (0.0, -2.0), "KEYS": (1.0, 0.5)},
    }.items():
        for key, value in changes.items():
            monkeypatch.setattr(example(name), key, value)
