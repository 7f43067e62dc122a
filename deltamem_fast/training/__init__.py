"""Training an adapter: episodes from chat messages, their loss, and a run on transformers' Trainer and accelerate.

::

    train(model, tokenizer, ["train.jsonl"], TrainingOptions(output="my-adapter"))
    patch_model(model, "my-adapter")

``deltamem train`` is the same from the command line; ``episode_loss`` is the loss alone, for a loop of one's own.
"""

from .data import Example, ExampleFiles
from .episode import Episode, EpisodeSchedule, build_episode, collate
from .loss import EpisodeBatch, EpisodeLoss, episode_loss
from .options import TrainingOptions

# What needs the Trainer or matplotlib is imported when it is asked for.
_LATER = {
    "DeltaMemTrainer": "trainer",
    "EpisodeModel": "trainer",
    "TrainingResult": "run",
    "draw_curves": "log",
    "prepare_for_training": "setup",
    "read_log": "log",
    "train": "run",
}
__all__ = [
    "Episode",
    "EpisodeBatch",
    "EpisodeLoss",
    "EpisodeSchedule",
    "Example",
    "ExampleFiles",
    "TrainingOptions",
    "build_episode",
    "collate",
    "episode_loss",
    *_LATER,
]


def __getattr__(name: str):
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
